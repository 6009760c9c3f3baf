"""A figure that a person asked for as a file: its name, the names in it, and writing it whole or not at all."""

from pathlib import Path
from typing import TYPE_CHECKING

from acmix.checkpoint.atomic import prove_writable, replacing
from acmix.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SUFFIXES = (".png", ".svg", ".pdf")


def check_figure_file(option: str, file: Path, json: Path | None = None) -> None:
    """Refuse, before any work, a picture that could not be written, or that the file of `--json` would replace.

    Raises UserError that names the option.
    """
    if file.suffix.lower() not in _SUFFIXES:
        raise UserError(f"{option} {file}: the name must end in .png, .svg or .pdf")
    if json is not None and json.resolve() == file.resolve():
        raise UserError(f"{option}, --json: both are {file}; give each a file of its own")
    prove_writable(option, file)


def drawn_text(text: str) -> str:
    """A name of others (a class, a file, an arm) as matplotlib draws it letter by letter.

    No formula between $ signs, and escapes for the bytes of a file name that are not UTF-8.
    """
    return text.encode("utf-8", "backslashreplace").decode("utf-8").replace("$", r"\$")


def save_figure(figure: "Figure", file: Path) -> None:
    """Write a figure in the project's style, by the suffix of the file; raises UserError when it cannot be written."""
    import matplotlib

    from acmix.telemetry.plot import STYLE

    metadata = {"Date": None} if file.suffix.lower() == ".svg" else None  # the same picture is the same file
    with replacing(file, make_parents=True) as temporary, matplotlib.rc_context(STYLE):
        figure.savefig(temporary, dpi=160, metadata=metadata)
