"""File operations that survive a kill or a power cut at any instant, and the crash points that prove it."""

import hashlib
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

CRASH_POINTS = ("before_write", "mid_write", "before_sync", "before_rename", "mid_replace", "after_rename", "pruning")


def crash_point(name: str, save_number: int) -> None:
    """Kill this process with SIGKILL when ACMIX_CRASH_AT asks for it: `NAME` (first save) or `NAME:N` (N-th save).

    Only the fault drills set the variable; NAME is one of CRASH_POINTS.
    """
    wanted = os.environ.get("ACMIX_CRASH_AT")
    if not wanted:
        return
    point, _, number = wanted.partition(":")
    if point == name and save_number == int(number or 1):
        os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class FileRecord:
    """What the manifest says of one file: SHA-256 in hex and size in bytes."""

    sha256: str
    size: int


class HashingFile:
    """A binary file, open for writing, that hashes what passes through it.

    The digest is taken from memory, so it also covers the way to the disk. Large writes and hash updates release the
    interpreter lock, which keeps a background save out of the training loop's way.
    """

    def __init__(self, file: BinaryIO, after_write: Callable[[], None] | None = None) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self._size = 0
        self._after_write = after_write
        self.failure: OSError | None = None
        """The first write's failure; torch.save reports a RuntimeError of its own in its place."""

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


def sync_file(path: Path) -> None:
    """Force a file's data to the disk (fsync)."""
    _sync(path, os.O_RDONLY)


def sync_folder(path: Path) -> None:
    """Force a folder's entries to the disk: after a rename, this makes the rename itself durable."""
    _sync(path, os.O_RDONLY | os.O_DIRECTORY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_link(link: Path, target: str) -> None:
    """Point the symbolic link at `target` (relative to the link's folder) in one atomic step."""
    temporary = link.with_name(f".link-{link.name}-{os.getpid()}")
    temporary.unlink(missing_ok=True)
    os.symlink(target, temporary)
    os.replace(temporary, link)


def link_target(link: Path) -> str | None:
    """Name the link points at, or None where there is no such link."""
    return os.readlink(link) if link.is_symlink() else None


def remove_folder(folder: Path, before_removal: Callable[[], None] | None = None) -> None:
    """Remove a folder so that no half of it is ever seen under its name: rename it away, then delete it."""
    trash = folder.with_name(f".trash-{folder.name.lstrip('.')}-{os.getpid()}")
    shutil.rmtree(trash, ignore_errors=True)
    os.rename(folder, trash)
    if before_removal is not None:
        before_removal()
    shutil.rmtree(trash)


def is_leftover_of_dead_process(name: str) -> bool:
    """Whether a name ending in `-PID` belongs to a process that no longer runs (or had this process's number)."""
    _, _, number = name.rpartition("-")
    if not number.isdecimal():
        return False
    pid = int(number)
    if pid == os.getpid():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False
