"""One live run per folder: a lock that the kernel releases when its process dies, however it dies."""

import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from acmix.errors import UserError

LOCK_NAME = ".lock"

_held_here: set[Path] = set()


class RunLock:
    """Context manager that holds `run_dir/.lock` for this process.

    The lock is a POSIX record lock: the kernel releases it when the process ends, so no crash or SIGKILL leaves it
    held, and forked loader workers do not inherit it. The file itself stays, as removing it would race with the next
    run; what it says about the holder is read only while the lock is held.

    Raises UserError when another live run holds the folder (naming its process and host), or when the folder cannot
    be written.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = Path(run_dir).resolve() / LOCK_NAME
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take the lock or raise UserError; does not wait."""
        if self.path in _held_here:
            # Record locks never conflict within one process, so this case is checked here.
            raise UserError(self._refusal(f"this process ({os.getpid()})"))
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise UserError(
                f"cannot write to the run folder {self.path.parent}: {error.strerror}; choose another run.dir"
            ) from error
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            holder = os.pread(descriptor, 4096, 0)
            os.close(descriptor)
            raise UserError(self._refusal(_describe(holder))) from error
        except OSError as error:
            os.close(descriptor)
            raise UserError(
                f"cannot lock {self.path}: {error.strerror}; put run.dir on a file system with POSIX locks"
            ) from error
        self._descriptor = descriptor
        _held_here.add(self.path)
        note = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        with suppress(OSError):  # a full disk has no room for the note, which the lock does without
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(note).encode(), 0)

    def release(self) -> None:
        """Release the lock; does nothing when it is not held."""
        if self._descriptor is None:
            return
        with suppress(OSError):
            os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)
        self._descriptor = None
        _held_here.discard(self.path)

    def __enter__(self) -> "RunLock":
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _refusal(self, holder: str) -> str:
        return (
            f"{self.path.parent}: another run is live in this folder, held by {holder}; "
            "wait for it, stop it, or choose another run.dir"
        )


def _describe(note: bytes) -> str:
    try:
        holder = json.loads(note)
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (ValueError, KeyError, TypeError):
        return "a process that has not yet written its name"
