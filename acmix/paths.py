"""Paths as people write them: `~` and `$VARIABLES`, and what to say of one that leads nowhere. A leaf without torch."""

import os
import re
from difflib import get_close_matches
from pathlib import Path

from acmix.errors import UserError

_VARIABLE = re.compile(r"\$(?:\$|(\w+)|\{([^{}]*)\})", re.ASCII)
_URL = re.compile(r"(hf[-_]hub|timm|[a-z][a-z0-9+.-]+(?=:/)):", re.IGNORECASE)  # a Path has made one / of two


def expand_path(text: str, name: str) -> str:
    """The path with `~` and `~USER` at its start, `$NAME` and `${NAME}` replaced; `$$` stands for one `$`.

    A part of the path that exists as it is written keeps its `$`. Raises UserError, beginning with `name`, the key or
    option that holds the path, for a variable that is not set.
    """
    done: list[str] = []
    for part in os.path.expanduser(text).split("/"):
        if "$" in part and not os.path.lexists("/".join([*done, part])):
            part = _VARIABLE.sub(lambda match: _value_of(match, text, name), part)
        done.append(part)
    return "/".join(done)


def escape_path(text: str) -> str:
    """A path that `expand_path` turns back into `text`."""
    return text.replace("$", "$$")


def path_argument(text: str) -> Path:
    """A path given on the command line; raises UserError as expand_path."""
    return Path(expand_path(text, text))


def cache_folder() -> Path:
    """Where what can be made again is kept: $ACMIX_CACHE, or ~/.cache/acmix, made for its user alone where missing.

    Raises OSError.
    """
    folder = Path(os.environ.get("ACMIX_CACHE") or Path.home() / ".cache" / "acmix")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def missing_path_hint(path: str | Path) -> str:
    """What to do about a path that does not exist: download what it names, or take the most similar name there is.

    Empty, or a clause that begins with "; ".
    """
    if _URL.match(str(path)):
        return "; it names something to download: do that first and give the path of the file"
    given = Path(path)
    path, folder = given, given.parent
    while not folder.is_dir() and folder != folder.parent:
        path, folder = folder, folder.parent
    try:
        names = [entry.name for entry in os.scandir(folder) if not entry.name.startswith(".")]
    except OSError:
        return ""
    nearest = get_close_matches(path.name, names, n=1)
    if nearest:
        return f"; nearest: {folder / nearest[0]}"
    return "" if path == given else f"; there is no {path} either"


def _value_of(match: re.Match[str], text: str, name: str) -> str:
    if match[0] == "$$":
        return "$"
    variable = match[1] or match[2]
    if match[1] and match[1][0].isdigit():  # $5 names no variable
        return match[0]
    value = os.environ.get(variable or "")
    if not value:
        raise UserError(
            f"{name}: the environment variable {variable} in {text!r} is not set; set it, or write $$ for a plain $"
        )
    return value
