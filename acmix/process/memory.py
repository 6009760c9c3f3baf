"""Keeps the memory of freed tensors in the process, where the next step finds it."""

import ctypes
import os
import platform

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of malloc.h
_CHOICES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_")


def keep_freed_memory() -> None:
    """Tell the C library's allocator to give nothing back to the system.

    By default glibc returns large blocks when they are freed. Every training step on a CPU then asks for hundreds of
    megabytes again, and the system clears them page by page, which takes up to 16 % of the step. The process stays at
    the most memory that it has ever used, as it does on a GPU. Left alone where the environment configures the
    allocator (MALLOC_..., GLIBC_TUNABLES), and where the C library is another.
    """
    configured = any(name in os.environ for name in _CHOICES) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if not configured and platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_TRIM_THRESHOLD, -1)
        mallopt(_MMAP_MAX, 0)
