"""How a process ends: what it prints, once for all ranks, and with which exit status. Light on purpose (no torch)."""

import os
import sys
import time
import traceback
from collections.abc import Callable

from acmix.errors import UserError
from acmix.process.exits import BAD_USAGE, FAILED, end_now, leave_status
from acmix.process.signals import StopSignals

_GRACE_SECONDS = 10.0


class RunFailure(UserError):
    """A run that cannot go on though its input was good: a loss that is not finite, a lost process, a dead worker."""

    status = FAILED
    reported_here = False


class ReportedElsewhere(Exception):
    """Ends this process without a word, because another rank reports the error."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def rank_from_environment() -> int:
    """Global rank that torchrun gave this process; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def run_program(work: Callable[[], int], signals: StopSignals | None = None) -> int:
    """Call `work` and return the exit status of the process; an error becomes one message on stderr.

    `UserError` prints `error: MESSAGE` (status 2, or the error's own `status`), any other exception its traceback
    (status 1). Under torchrun the process does not linger in the teardown of its libraries.
    """
    try:
        status = work()
    except ReportedElsewhere as error:
        return _leave(error.status)
    except UserError as error:
        status = getattr(error, "status", BAD_USAGE)
        if rank_from_environment() > 0 and not getattr(error, "reported_here", False):
            _let_first_rank_speak(status, signals)
        print(f"error: {error}", file=sys.stderr, flush=True)
        return _leave(status)
    except Exception:  # noqa: BLE001 - the outermost frame: print it once, end with a status that says so
        traceback.print_exc()
        return _leave(FAILED)
    return _leave(status)


def _let_first_rank_speak(status: int, signals: StopSignals | None) -> None:
    """Errors in a config hit every rank alike: rank 0 prints, then the launcher ends the others with SIGTERM."""
    if signals is not None:
        signals.early_status = status
    leave_status(status)
    time.sleep(_GRACE_SECONDS)


def _leave(status: int) -> int:
    if "RANK" in os.environ:
        end_now(status)
    leave_status(status)
    return status
