"""Stop requests: a handler that only sets a flag, and the exit statuses they lead to.

Nothing is saved and no other process is spoken to inside a handler: the trainer reads the flag at its step boundaries,
where all processes agree on it.
"""

import os
import signal
import time
from types import FrameType

from acmix.engine.exits import REQUEUE, end_now

HANDLED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
ECHO_SECONDS = 0.5
"""A launcher passes on a signal that a terminal has sent to its processes too: that is an echo, no second request."""


class StopSignals:
    """Watches for SIGTERM, SIGUSR1, SIGINT and, under torchrun, for the launcher's death.

    Until `begin`, when all processes have met, a signal ends this one at once, with the status that asks for a requeue:
    there is nothing to save, and nobody waits for it. From then on the first signal asks for a stop at the next step boundary; a second one, later than `ECHO_SECONDS`
    after the first, ends the process with the signal's own default action.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._since = 0.0
        self._begun = False
        self._sealed = False
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    def install(self) -> None:
        """Take over the three signals; only possible in the main thread."""
        for number in HANDLED:
            signal.signal(number, self._handle)

    def begin(self) -> None:
        """From now on a signal is answered at a step boundary."""
        self._begun = True

    @property
    def requested(self) -> bool:
        """Whether this process was asked to stop, or lost the launcher that would restart or end it."""
        return self.received is not None or (self._launcher is not None and os.getppid() != self._launcher)

    @property
    def reason(self) -> str:
        """What asked for the stop, for messages."""
        return self.received.name if self.received else "the end of the launcher"

    def seal(self) -> None:
        """Ignore further signals: the work is on disk, and a launcher signals the ranks it sees outlive the first."""
        self._sealed = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._sealed:
            return
        if not self._begun:
            end_now(128 + number if number == signal.SIGINT else REQUEUE)
        if self.received is None:
            self.received, self._since = signal.Signals(number), now
        elif now - self._since > ECHO_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
