"""Stop requests: a handler that only sets a flag, and a thread that ends a process which cannot read it.

A signal neither saves nor talks to other processes: the trainer reads the flag at its step boundaries, where all
processes agree on it.
"""

import ctypes
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

from acmix.process.launcher import launcher_is_gone
from acmix.process.program import REQUEUE, end_now

HANDLED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
MAY_BE_IGNORED = (signal.SIGINT, signal.SIGHUP)
"""Who starts a program with one of these ignored means it: nohup, or a shell without job control for `program &`."""
ECHO_SECONDS = 0.5
"""A terminal signals the workers as well as the launcher, which passes it on: that echo is not a second request."""
_DEFAULT_ACTION = 0  # SIG_DFL
_POLL_SECONDS = 1.0


class StopSignals:
    """Watches for SIGTERM, SIGUSR1, SIGINT, SIGHUP and, under torchrun, for the launcher's death; a context manager.

    SIGINT and SIGHUP stay ignored where they were ignored at the start.

    Until `begin`, called when all processes have met, a signal ends this one at once, with the status that asks for a
    requeue: there is nothing to save and no process waits for it. After `begin` the first signal asks for a stop at the
    next step boundary; a second one, more than `ECHO_SECONDS` later, ends the process with the signal's default action,
    unless it is SIGHUP, which a closing terminal and its shell both send.
    Both work while the main thread waits inside a library, for another process or the GPU.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.early_status = REQUEUE
        self._since = 0.0
        self._begun = False
        self._sealed = False

    def __enter__(self) -> Self:
        """Take over the signals; only possible in the main thread."""
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        found: dict[signal.Signals, Any] = {number: signal.getsignal(number) for number in HANDLED}
        stay = {number for number in MAY_BE_IGNORED if found[number] == signal.SIG_IGN}
        self._before = {number: handler for number, handler in found.items() if number not in stay}
        self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="acmix-signals", daemon=True).start()
        for number in self._before:
            signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Sealed: the exit status is decided, and a late signal must not change it.
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if self._sealed else handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._writer)  # ends the thread, which closes its own end

    def begin(self) -> None:
        """From now on a signal asks for a stop at the next step boundary."""
        self._begun = True

    @property
    def requested(self) -> bool:
        """Whether this process was asked to stop, or lost its launcher, which would restart or end it."""
        return self.received is not None or launcher_is_gone()

    @property
    def reason(self) -> str:
        """What asked for the stop, for messages."""
        if self.received is not None:
            return self.received.name
        return "the end of the launcher" if launcher_is_gone() else "a signal to another rank"

    def seal(self) -> None:
        """Ignore further signals: the work is on disk, and a launcher signals ranks that end later than the first."""
        self._sealed = True

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self._sealed and self.received is None:
            self.received = signal.Signals(number)

    def _watch(self) -> None:
        """Receive each signal's number as a byte from the handler's C part, even while the main thread is busy."""
        while number := os.read(self._reader, 1):
            if number[0] in HANDLED and not self._sealed:
                self._act(number[0])
        os.close(self._reader)

    def _act(self, number: int) -> None:
        now = time.monotonic()
        if not self._begun:
            end_now(128 + number if number == signal.SIGINT else self.early_status)
        if not self._since:
            self._since = now
        elif now - self._since > ECHO_SECONDS and number != signal.SIGHUP:
            # signal.signal works only in the main thread, which may be stuck; the C function works in any.
            ctypes.CDLL(None).signal(number, _DEFAULT_ACTION)
            os.kill(os.getpid(), number)


@contextmanager
def ending_with_launcher() -> Iterator[None]:
    """Inside, this process ends, with the status that asks for a requeue, soon after its torchrun is gone.

    For waits in which the main thread is inside a library: the processes that it waits for may be gone as well.
    """
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            if launcher_is_gone():
                end_now(REQUEUE)
            over.wait(_POLL_SECONDS)

    threading.Thread(target=watch, name="acmix-launcher", daemon=True).start()
    try:
        yield
    finally:
        over.set()
