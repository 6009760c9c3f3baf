"""Reading checkpoints back: every file is checked against the manifest before anything is returned."""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from acmix.checkpoint.atomic import link_target
from acmix.checkpoint.layout import CHECKPOINTS, list_checkpoints, step_of
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


def load_checkpoint(path: Path, *, map_location: str | torch.device = "cpu") -> Snapshot:
    """The snapshot in a checkpoint folder (or behind `last`, `best`, or a run folder: its newest sound checkpoint).

    Tensors come on `map_location`. Raises UserError: no such folder, a weights file instead of a checkpoint, or
    DamagedCheckpoint naming the file and the kind of damage. Nothing is returned before every file is checked, and
    nothing in the files is executed.
    """
    folder = _checkpoint_folder(Path(path), prefer="last")
    contents = read_verified(folder)
    device = torch.device(map_location)
    training = load_pickle_bytes(contents[TRAINING_FILE], folder / TRAINING_FILE)
    if not isinstance(training, dict):
        raise DamagedCheckpoint(folder / TRAINING_FILE, "unreadable content", "holds no dict")
    return Snapshot(
        model=_parse_weights(contents[MODEL_FILE], folder / MODEL_FILE, device),
        ema=_parse_weights(contents[EMA_FILE], folder / EMA_FILE, device) if EMA_FILE in contents else None,
        training=_to_device(training, device),
        progress=_parse_progress(contents[PROGRESS_FILE], folder / PROGRESS_FILE),
    )


def resolve_weights(path: Path) -> Weights:
    """The weights behind a path: a run folder (its best checkpoint, else the newest sound one), a checkpoint, a file.

    Raises UserError as load_checkpoint and acmix.checkpoint.untrusted.load_state_dict_file do.
    """
    path = Path(path)
    if path.is_file():
        if path.name in (MODEL_FILE, EMA_FILE) and (path.parent / MANIFEST_NAME).is_file():
            data = read_checked(path, read_manifest(path.parent)[path.name])
            return Weights(_parse_weights(data, path, torch.device("cpu")), None, None)
        return Weights(*load_weights_file(path), None)
    folder = _checkpoint_folder(path, prefer="best")
    contents = read_verified(folder)
    cpu = torch.device("cpu")
    return Weights(
        _parse_weights(contents[MODEL_FILE], folder / MODEL_FILE, cpu),
        _parse_weights(contents[EMA_FILE], folder / EMA_FILE, cpu) if EMA_FILE in contents else None,
        _parse_progress(contents[PROGRESS_FILE], folder / PROGRESS_FILE),
    )


def newest_sound(folder: Path) -> Path | None:
    """The newest checkpoint in a `checkpoints/` folder that is whole; warns on stderr of each damaged, newer one."""
    for _, path in sorted(list_checkpoints(folder), reverse=True):
        try:
            read_verified(path)
        except DamagedCheckpoint as damage:
            print(f"warning: checkpoint left out: {damage}", file=sys.stderr, flush=True)
        else:
            return path
    return None


def _checkpoint_folder(path: Path, prefer: str) -> Path:
    """The checkpoint folder a path names; a run folder stands for its `best` where preferred, else its newest one."""
    if path.is_file():
        # Reading it tells a hostile pickle apart from harmless weights given at the wrong place.
        load_weights_file(path)
        raise UserError(
            f"{path}: a weights file, not a checkpoint to resume; give a folder checkpoints/step_XXXXXXXX, or start a "
            f"new run from these weights with model.checkpoint={path}"
        )
    if not path.is_dir():
        # A save killed while it replaced this step has left the old checkpoint under another name.
        step = step_of(link_target(path) or path.name)
        replaced = dict(list_checkpoints(path.parent)).get(-1 if step is None else step)
        if replaced is not None:
            return replaced
        raise UserError(
            f"{path}: no such checkpoint; give a run folder, a folder checkpoints/step_XXXXXXXX or its `last`"
        )
    if (path / MANIFEST_NAME).exists() or (path / MODEL_FILE).exists() or (path / TRAINING_FILE).exists():
        return path.resolve()
    folder = path if path.name == CHECKPOINTS else path / CHECKPOINTS
    if prefer == "best" and (folder / "best").is_dir():
        return (folder / "best").resolve()
    newest = newest_sound(folder)
    if newest is None:
        raise UserError(f"{path}: holds no complete checkpoint")
    return newest


def _parse_weights(data: bytes, path: Path, device: torch.device) -> dict[str, Tensor]:
    try:
        weights = safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise DamagedCheckpoint(path, "unreadable content", f"not a safetensors file ({error})") from error
    return {name: tensor.to(device) for name, tensor in weights.items()}


def _parse_progress(data: bytes, path: Path) -> dict[str, Any]:
    try:
        progress = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(path, "unreadable content", "not JSON") from error
    if not isinstance(progress, dict) or not isinstance(progress.get("step"), int):
        raise DamagedCheckpoint(path, "unreadable content", "does not say the step")
    return progress


def _to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _to_device(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_to_device(item, device) for item in value)
    return value
