"""Standard output and error that never stop a program: what cannot be written is dropped. Light (no torch)."""

import atexit
import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

_STREAMS = ("stdout", "stderr")
_FAULTS = (OSError, ValueError, AttributeError)
"""Raised by a stream that is broken, closed (ValueError), too narrow (UnicodeError is one) or has not every method."""
_ESCAPES = ("backslashreplace", "ignore", "namereplace", "replace", "xmlcharrefreplace")
_PATIENCE_SECONDS = 2.0
_PIECE = 4096  # bytes that a pipe with room takes whole, without blocking (PIPE_BUF on Linux)


@contextmanager
def unfailing_output(*, wait: bool = True) -> Iterator[None]:
    """Let `sys.stdout` and `sys.stderr` drop what cannot be written, within the block and when the interpreter exits.

    A closed pipe, a full disk, a hung-up terminal, characters outside the encoding (written as escapes), a stream that
    is None or lacks methods: none of them raises or changes the exit status. Descriptors 0 to 2 that are closed are
    opened first, so enter the block before anything else opens a file. What it replaced is restored at its end.

    Args:
        wait: wait for a reader as long as it takes, as pipes do; else, and on a descriptor set to non-blocking, drop
            what it has not taken within two seconds.
    """
    open_standard_descriptors()
    atexit.unregister(_replace_streams)
    atexit.register(_replace_streams, wait=wait)
    before = {name: getattr(sys, name) for name in _STREAMS}
    ours = _replace_streams(wait=wait)
    try:
        yield
    finally:
        flush_output()
        for name in _STREAMS:
            if getattr(sys, name) is ours[name]:
                setattr(sys, name, before[name])


def open_standard_descriptors() -> None:
    """Open those of descriptors 0 to 2 that are closed on /dev/null; else the next file opened would get the number,
    and everything printed."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
            os.set_inheritable(descriptor, True)


def flush_output() -> None:
    """Write what stdout and stderr hold back; what fails is dropped."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(*_FAULTS):
            stream.flush()


class _Descriptor(io.RawIOBase):
    """A descriptor to write to; see `unfailing_output`."""

    def __init__(self, descriptor: int, *, wait: bool) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._wait = wait
        self._stuck = False

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: Any) -> int:
        rest = memoryview(data)
        with suppress(OSError):
            while rest and self._has_room():
                rest = rest[os.write(self._descriptor, rest[:_PIECE]) :]
        return len(data)

    def _has_room(self) -> bool:
        """Whether a write will not block for long. A reader that was waited for in vain once is not waited for again
        until it reads: a run must not lose two seconds a line."""
        if self._wait and os.get_blocking(self._descriptor):
            return True
        room = select.poll()
        room.register(self._descriptor, select.POLLOUT)
        self._stuck = not room.poll(0 if self._stuck else 1000 * _PATIENCE_SECONDS)
        return not self._stuck


class _Stream:
    """Any object that stands for stdout or stderr, such as a notebook's or one that copies to a file."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(*_FAULTS):
            try:
                self._stream.write(text)
            except UnicodeError:
                self._stream.write(text.encode("ascii", "backslashreplace").decode("ascii"))
        return len(text)

    def flush(self) -> None:
        with suppress(*_FAULTS):
            self._stream.flush()

    def isatty(self) -> bool:
        with suppress(*_FAULTS):
            return bool(self._stream.isatty())
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _replace_streams(*, wait: bool) -> dict[str, Any]:
    """Replace `sys.stdout` and `sys.stderr` by streams that do not fail; returns these."""
    ours = {name: _unfailing(getattr(sys, name), getattr(sys, f"__{name}__"), wait) for name in _STREAMS}
    for name, stream in ours.items():
        setattr(sys, name, stream)
    return ours


def _unfailing(stream: Any, original: Any, wait: bool) -> Any:
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8", errors="backslashreplace")
    if stream is not original or not isinstance(stream, io.TextIOWrapper) or stream.closed:
        return _Stream(stream)
    with suppress(*_FAULTS):
        stream.flush()
    raw: Any = _Descriptor(stream.fileno(), wait=wait)
    return io.TextIOWrapper(
        raw if stream.write_through else io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors=stream.errors if stream.errors in _ESCAPES else "backslashreplace",
        newline="\n",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
