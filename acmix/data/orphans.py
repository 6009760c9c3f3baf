"""Helper processes that outlive the one that started them would hold its memory and its files for ever."""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1


def helpers_first_call() -> Callable[[], None]:
    """What a helper process that the calling thread starts is to call first, so that it ends with this process.

    Of a process that another thread than the main one started, Linux takes the end of that thread for the parent's:
    then the call does nothing.
    """
    return _die_with_parent if threading.current_thread() is threading.main_thread() else _nothing


def _die_with_parent() -> None:
    """Have this process killed when its parent ends, however that ends. On Linux; elsewhere nothing is done."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the request was made
            os._exit(1)


def _nothing() -> None:
    pass
