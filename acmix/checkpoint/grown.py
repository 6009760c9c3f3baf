"""Which parameters of a grown network are new: the file of scripts/grow.py says it, and the progress of its runs."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from acmix.checkpoint.layout import CHECKPOINTS
from acmix.checkpoint.manifest import PROGRESS_FILE

METADATA = "acmix.new"
"""Key of the list in the metadata of a safetensors file."""
PROGRESS = "new_parameters"
"""Key of the list in the progress of a run."""


def new_parameters(path: str | Path) -> list[str]:
    """The names that a weights file, a run or a checkpoint gives as new; empty where it says nothing or cannot be read.

    What a damaged file means, the reading of its weights tells.
    """
    real = Path(path).resolve()
    if real.is_file() and real.suffix == ".safetensors":
        if names := _names(_metadata(real).get(METADATA)):
            return names
        real = real.parent
    places = (real, *(real / CHECKPOINTS / link for link in ("best", "last")))
    return next((names for place in places if (names := _of_run(place / PROGRESS_FILE))), [])


def _metadata(file: Path) -> dict[str, str]:
    try:
        with safe_open(file, framework="pt") as opened:
            return opened.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def _of_run(file: Path) -> list[str]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return _checked(values.get(PROGRESS)) if isinstance(values, dict) else []


def _names(text: str | None) -> list[str]:
    try:
        return [] if text is None else _checked(json.loads(text))
    except ValueError:
        return []


def _checked(names: Any) -> list[str]:
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []
