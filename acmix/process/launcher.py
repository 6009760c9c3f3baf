"""Whether the torchrun that started this process is still there. Light on purpose: it must be asked early."""

import os
from pathlib import Path

_INIT = 1
_parent = os.getppid()  # of the program at its start: the launcher may be gone before the slow imports are done


def launcher_is_gone() -> bool:
    """Whether the torchrun that started this process has ended; False for a process that none started."""
    return "TORCHELASTIC_RUN_ID" in os.environ and (os.getppid() != _parent or _was_adopted())


def _was_adopted() -> bool:
    """Whether the launcher ended before this process could ask for it, and left it to process 1.

    In a container, process 1 may be the launcher itself: a program in Python, which no init and no shell is, and one of
    the same user.
    """
    if _parent != _INIT:
        return False
    try:
        return not Path(os.readlink(f"/proc/{_INIT}/exe")).name.startswith("python")
    except PermissionError:
        return True
    except OSError:  # no /proc
        return False
