"""File operations that survive a kill or a power cut at any instant, and the crash points that prove it."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from acmix.errors import UserError

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


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, with its suffix; the file written there then replaces `path` as a whole.

    A reader sees the file before or the new one, never half of it, even after a power cut. If the block raises, `path`
    stays as it was. A device or a pipe, such as /dev/stdout, cannot be replaced and is written to directly.
    Raises UserError, naming `path` and the way out, for any OSError.
    """
    temporary = path.parent / f".{path.stem}.{os.getpid()}{path.suffix}"
    try:
        if path.exists() and not path.is_file():
            yield path
            return
        yield temporary
        sync_file(temporary)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write {path}: {reason}; make it writable or choose another place") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file (UTF-8) as a whole; UserError as in `replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


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
    """Remove a folder so that it is never seen half deleted under its name: rename it away, then delete it."""
    trash = folder.with_name(f".trash-{folder.name.lstrip('.')}-{os.getpid()}")
    shutil.rmtree(trash, ignore_errors=True)
    os.rename(folder, trash)
    if before_removal is not None:
        before_removal()
    shutil.rmtree(trash)


def is_leftover_of_dead_process(name: str) -> bool:
    """Whether a name ending in `-PID` is of a process that no longer runs (or of an earlier one with our own PID)."""
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
