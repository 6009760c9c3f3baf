"""Text files that people write beside their data."""

from pathlib import Path

from acmix.data.folders import from_where
from acmix.data.images import BadImage, read_image_file
from acmix.errors import UserError


def read_text(path: Path, key: str) -> str:
    """The text of a file in UTF-8, without byte-order mark, every line ended by a newline character.

    `key` is the config key that names the file, for messages. Raises UserError.
    """
    try:
        text = read_image_file(path).decode("utf-8-sig")
    except BadImage as error:
        raise UserError(f"{key}: {path}: {error.reason}{from_where(path)}") from None
    except UnicodeDecodeError:
        raise UserError(f"{key}: {path}: not a text file in UTF-8; save it as UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")
