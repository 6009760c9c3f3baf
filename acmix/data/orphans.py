"""Helper processes that outlive the one that started them would hold its memory and its files for ever."""

import ctypes
import os
import signal
import sys
import threading

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Have this process killed when its parent ends, however that ends. On Linux; elsewhere nothing is done.

    Only for a process started where `outlives_helpers` was true.
    """
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the request was made
            os._exit(1)


def outlives_helpers() -> bool:
    """Whether the calling thread, like the main thread, ends no earlier than the program.

    Of a process that another thread started, Linux takes the end of that thread for the parent's.
    """
    return threading.current_thread() is threading.main_thread()
