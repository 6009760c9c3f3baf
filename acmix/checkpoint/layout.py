"""The names in a run's `checkpoints/` folder: checkpoints, their steps, and what killed saves left behind."""

import os
import re
import shutil
from pathlib import Path

from acmix.checkpoint.atomic import is_leftover_of_dead_process, link_target

CHECKPOINTS = "checkpoints"
ABANDONED = "abandoned"
"""Folder in it for checkpoints later than the one a run went on from."""

_STEP = re.compile(r"step_(\d{8,})")
_OLD = re.compile(r"\.old-(step_\d{8,})-\d+")


def step_name(step: int) -> str:
    """Folder name of the checkpoint at an optimizer step: `step_` and at least eight digits."""
    return f"step_{step:08d}"


def step_of(name: str) -> int | None:
    """The step in a checkpoint folder's name; None for any other name."""
    match = _STEP.fullmatch(name)
    return int(match.group(1)) if match else None


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of every checkpoint in a `checkpoints/` folder, sound or not, in no particular order.

    A save killed while it replaced a checkpoint of the same step leaves the old one under a temporary name; that one
    counts as long as the step has no other.
    """
    if not folder.is_dir():
        return []
    names = os.listdir(folder)
    found = {step: folder / name for name in names if (step := step_of(name)) is not None}
    for name in names:
        match = _OLD.fullmatch(name)
        if match and (step := step_of(match.group(1))) is not None:
            found.setdefault(step, folder / name)
    return list(found.items())


def replaced_checkpoint(path: Path) -> Path | None:
    """Where the checkpoint of a path (`step_XXXXXXXX`, `last`, `best`) is that a killed save was about to replace.

    None where there is no such checkpoint.
    """
    step = step_of(link_target(path) or path.name)
    return None if step is None else dict(list_checkpoints(path.parent)).get(step)


def names_something(path: Path) -> bool:
    """Whether a path given by a person leads to a file, a folder or a checkpoint that was being replaced."""
    return path.exists() or replaced_checkpoint(path) is not None


def clean_leftovers(folder: Path) -> None:
    """Remove what dead processes left in a `checkpoints/` folder, and put back a checkpoint they were replacing.

    Files of live processes stay.
    """
    if not folder.is_dir():
        return
    for name in sorted(os.listdir(folder)):
        if not name.startswith((".tmp-", ".trash-", ".link-", ".old-")) or not is_leftover_of_dead_process(name):
            continue
        path = folder / name
        match = _OLD.fullmatch(name)
        if match and not (folder / match.group(1)).exists():
            os.rename(path, folder / match.group(1))
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
