"""One download for several processes."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from acmix.errors import UserError


@contextmanager
def download_lock(root: Path) -> Iterator[None]:
    """Hold a lock beside the data: one process downloads, the others wait and then find the files.

    Raises UserError for a folder that cannot be written.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        with open(root / ".download.lock", "w") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise UserError(f"{root}: cannot be written: {error.strerror or error}") from None
