"""The manifest of a checkpoint: size and SHA-256 of each file, noted while it is written, checked when it is read."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from acmix.errors import UserError

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
MODEL_FILE = "model.safetensors"
EMA_FILE = "ema.safetensors"
TRAINING_FILE = "training.pt"
PROGRESS_FILE = "progress.json"

_REQUIRED = frozenset({MODEL_FILE, TRAINING_FILE, PROGRESS_FILE})
_KNOWN = _REQUIRED | {EMA_FILE}


class DamagedCheckpoint(UserError):
    """A checkpoint that must not be used; the message names the file and the kind of damage.

    kind: `missing`, `truncated`, `wrong size`, `checksum mismatch`, `unreadable manifest`, `unreadable content` or
    `newer version`.
    """

    def __init__(self, path: Path, kind: str, detail: str) -> None:
        super().__init__(f"{path}: {kind}: {detail}")
        self.path = path
        self.kind = kind


@dataclass(frozen=True)
class FileRecord:
    """What the manifest says of one file: SHA-256 in hex and size in bytes."""

    sha256: str
    size: int


class HashingFile:
    """A binary file, open for writing, that hashes what passes through it.

    The digest is taken from memory, so a byte that changes on the way to the disk is noticed too. Large writes and hash
    updates release the interpreter lock, so that a background save does not hold up the training loop.
    """

    def __init__(self, file: BinaryIO, after_write: Callable[[], None] | None = None) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self._size = 0
        self._after_write = after_write
        self.failure: OSError | None = None
        """The first write that failed; torch.save hides it behind a RuntimeError of its own."""

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data).cast("B")
        self._hash.update(view)
        try:
            self._file.write(view)
        except OSError as error:
            self.failure = self.failure or error
            raise
        self._size += view.nbytes
        if self._after_write is not None:
            self._file.flush()
            self._after_write()
        return view.nbytes

    def flush(self) -> None:
        self._file.flush()

    def record(self) -> FileRecord:
        """Digest and size of everything written so far."""
        return FileRecord(self._hash.hexdigest(), self._size)


def render_manifest(step: int, files: dict[str, FileRecord]) -> bytes:
    """The manifest as bytes. It ends with a digest over itself, so that a flipped bit in it is noticed too."""
    body = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "files": {name: {"bytes": record.size, "sha256": record.sha256} for name, record in sorted(files.items())},
    }
    return _render(body)


def read_verified(folder: Path) -> dict[str, bytes]:
    """File name → contents of a checkpoint folder; raises DamagedCheckpoint unless every file agrees with the manifest.

    Each file is read once: the bytes returned are the bytes that were checked.
    """
    records = read_manifest(folder)
    # All sizes first: the cheap check finds a truncated file before gigabytes of the others are read.
    for name, record in records.items():
        _check_size(folder / name, record.size)
    return {name: read_checked(folder / name, record) for name, record in records.items()}


def read_manifest(folder: Path) -> dict[str, FileRecord]:
    """The checked manifest of a checkpoint folder: file name → record. Raises DamagedCheckpoint."""
    path = folder / MANIFEST_NAME
    body = _parse(path)
    version = body.get("format_version")
    if not isinstance(version, int) or version < 1:
        raise DamagedCheckpoint(path, "unreadable manifest", f"format_version is {version!r}")
    if version > FORMAT_VERSION:
        raise DamagedCheckpoint(
            path,
            "newer version",
            f"written in checkpoint format {version}, this acmix reads up to {FORMAT_VERSION}; upgrade acmix to use it",
        )
    try:
        records = {name: FileRecord(entry["sha256"], entry["bytes"]) for name, entry in body["files"].items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(path, "unreadable manifest", "its list of files is malformed") from error
    # The manifest may be hostile: only known names are taken, so that no path leads out of the folder.
    if not _REQUIRED <= records.keys() <= _KNOWN:
        names = ", ".join(sorted(records.keys() ^ _REQUIRED)) or "none"
        raise DamagedCheckpoint(path, "unreadable manifest", f"it lacks or adds files: {names}")
    return records


def read_checked(path: Path, record: FileRecord) -> bytes:
    """A file's bytes if they agree with its record, else DamagedCheckpoint."""
    _check_size(path, record.size)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DamagedCheckpoint(path, "missing", f"cannot be read ({error.strerror})") from error
    if hashlib.sha256(data).hexdigest() != record.sha256:
        raise DamagedCheckpoint(
            path, "checksum mismatch", "its contents are not what was saved; use another checkpoint"
        )
    return data


def _check_size(path: Path, expected: int) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DamagedCheckpoint(path, "missing", "the manifest lists it; use another checkpoint") from error
    if size != expected:
        kind = "truncated" if size < expected else "wrong size"
        raise DamagedCheckpoint(path, kind, f"{size} bytes instead of {expected}; use another checkpoint")


def _render(body: dict[str, Any]) -> bytes:
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**body, "manifest_sha256": digest}, indent=2, sort_keys=True) + "\n").encode()


def _parse(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DamagedCheckpoint(path, "missing", "the folder is not a complete checkpoint; use another one") from error
    try:
        body = json.loads(data)
        body.pop("manifest_sha256")
        intact = _render(body) == data
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise DamagedCheckpoint(path, "unreadable manifest", "not the JSON that was saved") from error
    if not intact:
        raise DamagedCheckpoint(path, "unreadable manifest", "its own checksum does not match")
    return body
