"""Weights from files that may be hostile: safetensors, or pickles under torch's weights-only rules. No code runs."""

import pickle
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from acmix.checkpoint.pickle_scan import scan_globals
from acmix.checkpoint.state_dict import state_dict_refusal
from acmix.errors import UserError

PICKLE_SUFFIXES = (".pth", ".pt", ".bin", ".pkl", ".tar", ".ckpt")

# Training code often stores its options beside the weights, in one of these two containers. Both are read as
# OrderedDict, which the weights-only unpickler builds anyway, so the file gains no new callable.
_ALIASES = [(OrderedDict, "yacs.config.CfgNode"), (OrderedDict, "argparse.Namespace")]
_ALIAS_NAMES = frozenset(name for _, name in _ALIASES)

# All that the weights-only unpickler and the archive readers are known to raise on damaged or hostile bytes.
_LOAD_ERRORS = (
    pickle.UnpicklingError, RuntimeError, EOFError, KeyError, IndexError, AttributeError, TypeError, ValueError,
    AssertionError, ImportError, MemoryError, OverflowError, RecursionError, OSError, struct.error,
    zipfile.BadZipFile,
)  # fmt: skip


def load_state_dict_file(path: Path) -> dict[str, Tensor]:
    """The weights in one file: parameter name → CPU tensor.

    Reads `.safetensors` and the pickle formats of torch (`.pth`, `.pt`, `.bin`, `.pkl`, `.tar`, `.ckpt`). The weights
    may be at the top level or under `model`, `state_dict` or `module`; prefixes left by DistributedDataParallel and
    torch.compile are dropped. Raises UserError if the file is missing, damaged, of unknown kind or without weights, or
    if its pickle asks for a global outside the weights-only list (the message names it; nothing is executed).
    """
    return load_weights_file(path)[0]


def load_weights_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """As load_state_dict_file, with the EMA weights (`model_ema` or `state_dict_ema`) where the file has them."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such weights file")
    if path.suffix == ".safetensors":
        return _read_safetensors(path), None
    if path.suffix not in PICKLE_SUFFIXES:
        known = ", ".join((".safetensors", *PICKLE_SUFFIXES))
        raise UserError(f"{path}: unknown kind of weights file {path.suffix!r}; known are {known}")
    content = load_pickle_file(path)
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a dict of weights")
    ema = next((content[key] for key in ("model_ema", "state_dict_ema") if isinstance(content.get(key), Mapping)), None)
    nested = (content[key] for key in ("model", "state_dict", "module") if isinstance(content.get(key), Mapping))
    model = next(nested, content if ema is None else ema)
    return _state_dict(model, path), None if ema is None else _state_dict(ema, path)


def load_pickle_file(path: Path) -> Any:
    """The content of a torch file under weights-only rules; UserError as in load_state_dict_file."""
    try:
        is_zip = zipfile.is_zipfile(path)
        if is_zip:
            _check_archive(path)
        # Mapping the file saves a copy; the archive check has made sure that no record is compressed.
        content = _weights_only(path, mmap=is_zip)
    except _LOAD_ERRORS as error:
        raise _refusal(path, error) from error
    return content


def load_pickle_bytes(data: bytes, path: Path) -> Any:
    """As load_pickle_file, for bytes already read (and checked) from `path`, which errors name."""
    try:
        return _weights_only(BytesIO(data), mmap=None)
    except _LOAD_ERRORS as error:
        raise _refusal(path, error) from error


def _weights_only(source: Path | BytesIO, mmap: bool | None) -> Any:
    with torch.serialization.safe_globals(_ALIASES), warnings.catch_warnings():  # type: ignore[arg-type]
        # A refusal is one clear error; torch's own warnings about the kind of file would only hide it.
        warnings.simplefilter("ignore")
        return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: damaged or not a safetensors file ({error})") from error


def _check_archive(path: Path) -> None:
    """Refuse what torch.save never writes and torch.load does not notice: compressed records, failed check sums."""
    with zipfile.ZipFile(path) as archive:
        compressed = [item.filename for item in archive.infolist() if item.compress_type != zipfile.ZIP_STORED]
        if compressed:
            raise ValueError(f"compressed records, as {compressed[0]}; save it again with torch.save")
        for item in archive.infolist():
            # torch can be told to write no check sums: then they are 0. Reading a record to its end checks it.
            if item.CRC != 0:
                with archive.open(item) as record:
                    while record.read(1 << 20):
                        pass


def _refusal(path: Path, error: BaseException) -> UserError:
    """The UserError for a failed load: it names the globals that were refused, or says that the file is damaged."""
    try:
        found = scan_globals(path)
    except OSError as cause:
        return UserError(f"{path}: cannot be read ({cause.strerror})")
    except MemoryError:
        found = []  # why it was refused is known all the same
    refused = [name for name in found if not _is_allowed(name)]
    if refused:
        return UserError(
            f"{path}: refused, its pickle asks for {', '.join(refused[:8])}, which may run code; nothing of it was "
            "executed. If you trust its origin, open it where it was made and save the weights alone, as "
            "torch.save(model.state_dict(), FILE) or safetensors"
        )
    reason = str(error).strip().splitlines()
    detail = reason[-1 if len(reason) == 1 else 0][:200] if reason else type(error).__name__
    return UserError(f"{path}: damaged, or not a weights file that torch can read safely ({detail})")


def _is_allowed(name: str) -> bool:
    allowed = torch._weights_only_unpickler._get_allowed_globals()
    return name in allowed or name in _ALIAS_NAMES


def _state_dict(content: Mapping[Any, Any], path: Path) -> dict[str, Tensor]:
    refusal = state_dict_refusal(content)
    if refusal is not None or not content:
        raise UserError(f"{path}: not a dict of weights; {refusal or 'it is empty'}")
    state = {_clean(key): value for key, value in content.items()}
    if len(state) != len(content):
        raise UserError(f"{path}: two of its names differ only in the prefix that a wrapper of the network left")
    return state


def _clean(key: Any) -> str:
    name = str(key)
    for prefix in ("_orig_mod.", "module.", "_orig_mod."):
        name = name.removeprefix(prefix)
    return name
