"""Reading checkpoints back: every file is checked against the manifest before anything is returned."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from acmix.checkpoint.layout import CHECKPOINTS, list_checkpoints, replaced_checkpoint
from acmix.checkpoint.manifest import (
    EMA_FILE,
    MANIFEST_NAME,
    MODEL_FILE,
    PROGRESS_FILE,
    TRAINING_FILE,
    DamagedCheckpoint,
    read_checked,
    read_manifest,
    read_verified,
)
from acmix.checkpoint.snapshot import Snapshot
from acmix.checkpoint.untrusted import load_pickle_bytes, load_weights_file
from acmix.errors import UserError


class Weights(NamedTuple):
    """Weights of a run, a checkpoint or a file: raw, EMA (None: there are none), the run's progress (None: a file)."""

    model: dict[str, Tensor]
    ema: dict[str, Tensor] | None
    progress: dict[str, Any] | None


@dataclass(frozen=True)
class SoundCheckpoint:
    """A checkpoint whose files all agree with its manifest: its folder, and file name → the bytes that were checked."""

    folder: Path
    contents: dict[str, bytes]

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read every file of a checkpoint folder once; raises DamagedCheckpoint naming the file and the damage."""
        return cls(folder, read_verified(folder))

    def snapshot(self) -> Snapshot:
        """The state of the run, on the CPU. Executes nothing; raises UserError for contents that are no such state."""
        path = self.folder / TRAINING_FILE
        training = load_pickle_bytes(self.contents[TRAINING_FILE], path)
        if not isinstance(training, dict):
            raise DamagedCheckpoint(path, "unreadable content", "holds no dict")
        return Snapshot(self._tensors(MODEL_FILE), self._ema(), training, self._progress())

    def weights(self) -> Weights:
        """The weights alone, on the CPU; raises DamagedCheckpoint for contents that are no weights."""
        return Weights(self._tensors(MODEL_FILE), self._ema(), self._progress())

    def _ema(self) -> dict[str, Tensor] | None:
        return self._tensors(EMA_FILE) if EMA_FILE in self.contents else None

    def _tensors(self, name: str) -> dict[str, Tensor]:
        return _parse_weights(self.contents[name], self.folder / name)

    def _progress(self) -> dict[str, Any]:
        path = self.folder / PROGRESS_FILE
        try:
            progress = json.loads(self.contents[PROGRESS_FILE])
        except (ValueError, RecursionError) as error:
            raise DamagedCheckpoint(path, "unreadable content", "not JSON") from error
        if not isinstance(progress, dict) or not isinstance(progress.get("step"), int):
            raise DamagedCheckpoint(path, "unreadable content", "does not say the step")
        return progress


def load_checkpoint(path: Path) -> Snapshot:
    """The snapshot in a checkpoint folder (or behind `last`, `best`, or a run folder: its newest sound checkpoint).

    Raises UserError: no such folder, a weights file instead of a checkpoint, or DamagedCheckpoint naming the file and
    the kind of damage. Nothing is returned before every file is checked, and nothing in the files is executed.
    """
    return read_checkpoint(path).snapshot()


def resolve_weights(path: Path) -> Weights:
    """The weights behind a path: a run folder (its best checkpoint, else the newest sound one), a checkpoint, a file.

    Raises UserError as load_checkpoint and acmix.checkpoint.untrusted.load_state_dict_file do.
    """
    path = Path(path)
    if not path.is_file():
        return read_checkpoint(path, prefer="best").weights()
    if path.name in (MODEL_FILE, EMA_FILE) and (path.parent / MANIFEST_NAME).is_file():
        data = read_checked(path, read_manifest(path.parent)[path.name])
        return Weights(_parse_weights(data, path), None, None)
    return Weights(*load_weights_file(path), None)


def read_checkpoint(path: Path, prefer: Literal["last", "best"] = "last") -> SoundCheckpoint:
    """The checkpoint a path names; a run folder stands for its `best` where preferred, else for its newest sound one.

    Raises UserError as load_checkpoint does.
    """
    path = Path(path)
    if path.is_file():
        # Reading it tells a hostile pickle apart from harmless weights given at the wrong place.
        load_weights_file(path)
        raise UserError(
            f"{path}: a weights file, not a checkpoint to resume; give a folder checkpoints/step_XXXXXXXX, or start a "
            f"new run from these weights with model.checkpoint={path}"
        )
    if not path.is_dir():
        if (replaced := replaced_checkpoint(path)) is not None:
            return SoundCheckpoint.read(replaced)
        raise UserError(
            f"{path}: no such checkpoint; give a run folder, a folder checkpoints/step_XXXXXXXX or its `last`"
        )
    if any((path / name).exists() for name in (MANIFEST_NAME, MODEL_FILE, TRAINING_FILE)):
        return SoundCheckpoint.read(path.resolve())
    folder = path if path.name == CHECKPOINTS else path / CHECKPOINTS
    if prefer == "best" and (folder / "best").is_dir():
        return SoundCheckpoint.read((folder / "best").resolve())
    newest = newest_sound(folder)
    if newest is None:
        raise UserError(f"{path}: holds no complete checkpoint")
    return newest


def newest_sound(folder: Path) -> SoundCheckpoint | None:
    """The newest checkpoint in a `checkpoints/` folder that is whole; warns on stderr of each damaged, newer one."""
    for _, path in sorted(list_checkpoints(folder), reverse=True):
        try:
            return SoundCheckpoint.read(path)
        except DamagedCheckpoint as damage:
            print(f"warning: checkpoint left out: {damage}", file=sys.stderr, flush=True)
    return None


def _parse_weights(data: bytes, path: Path) -> dict[str, Tensor]:
    try:
        weights: dict[str, Tensor] = safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise DamagedCheckpoint(path, "unreadable content", f"not a safetensors file ({error})") from error
    return weights
