"""File operations that survive a kill or a power cut at any instant, and the crash points that prove it."""

import errno
import os
import re
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
def replacing(path: Path, *, make_parents: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`, with its suffix; the file written there then replaces `path` as a whole.

    A reader sees the file before or the new one, never half of it, even after a power cut. If the block raises, `path`
    stays as it was. What writers that were killed left beside it is removed. A device or a pipe, such as /dev/stdout,
    cannot be replaced and is written to directly. With `make_parents`, folders that are missing are made.
    Raises UserError, naming `path` and the way out, for any OSError.
    """
    temporary = _temporary(path)
    try:
        if _is_device(path):
            yield path
            return
        if make_parents:
            _make_parents(path)
        _clean_leftovers(path)
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


def write_atomically(path: Path, content: str | bytes, *, make_parents: bool = False) -> None:
    """Replace a file as a whole, by bytes or by text (UTF-8); UserError as in `replacing`.

    The bytes of a file name that are not UTF-8 are written as escapes, which JSON reads back.
    """
    data = content if isinstance(content, bytes) else content.encode("utf-8", "backslashreplace")
    with replacing(path, make_parents=make_parents) as temporary:
        temporary.write_bytes(data)


def prove_writable(option: str, path: Path, *, folder: bool = False) -> None:
    """Find out, before the work, whether its result can be written to `path`: a file, or a `folder` that gets files.

    Makes the folders that are missing and writes a file there; leaves neither. Raises UserError, naming `option` (as on
    the command line) and `path`, when that fails.
    """
    made: list[Path] = []
    try:
        if not folder and path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        if _is_device(path) and not folder:
            os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
            return
        trial = _temporary(path / "trial" if folder else path)
        made = [parent for parent in trial.parents if not parent.exists()]
        _make_parents(trial)
        try:
            trial.write_bytes(b" ")
        finally:
            trial.unlink(missing_ok=True)
    except OSError as error:
        reason = f"{error.strerror or error}; make it writable or choose another place"
        raise UserError(f"{option} {path}: cannot write there: {reason}") from None
    finally:
        for parent in made:
            with suppress(OSError):
                parent.rmdir()


def _make_parents(path: Path) -> None:
    with suppress(FileExistsError):  # a file in its place is reported by the write that follows: not a directory
        path.parent.mkdir(parents=True, exist_ok=True)


def _temporary(path: Path) -> Path:
    return path.parent / f".{path.stem}.{os.getpid()}{path.suffix}"


def _is_device(path: Path) -> bool:
    """Whether `path` is there but no file or folder of its own: a device, a pipe, or a descriptor such as /dev/stdout,
    which leads to a file when output goes to one."""
    if not path.exists():
        return False
    place = path.parent.resolve()
    return not path.is_file() or place == Path("/dev") or place.is_relative_to("/proc")


def _clean_leftovers(path: Path) -> None:
    ours = re.compile(rf"\.{re.escape(path.stem)}\.(\d+){re.escape(path.suffix)}")
    with suppress(OSError):  # a folder that cannot be listed can be written to
        for name in os.listdir(path.parent):
            match = ours.fullmatch(name)
            if match and _is_dead(int(match.group(1))):
                (path.parent / name).unlink(missing_ok=True)


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
    return pid == os.getpid() or _is_dead(pid)


def _is_dead(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False
