"""How a program starts and ends: its arguments, its errors, its exit status. Light on purpose (no torch)."""

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import acmix.process.compiled  # it reads the environment before PyTorch writes there
import acmix.process.launcher  # noqa: F401 - it reads this process's parent while it has one
from acmix.errors import UserError
from acmix.paths import path_argument
from acmix.process.output import flush_output, unfailing_output

if TYPE_CHECKING:
    from acmix.process.signals import StopSignals

DONE = 0
FAILED = 1
BAD_USAGE = 2
REQUEUE = 75
"""A signal stopped the run, its checkpoint is saved: start me again (EX_TEMPFAIL)."""

STATUS_FOLDER = "ACMIX_STATUS_FOLDER"
"""Environment variable, set by acmix.launch: the folder where each worker leaves its exit status."""

_GRACE_SECONDS = 10.0


class Arguments(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError instead of printing its usage and ending the process.

    In arguments of type Path, `~` and variables are replaced.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.register("type", Path, path_argument)

    def error(self, message: str) -> NoReturn:
        """Raise UserError with the mistake and how to get help."""
        raise UserError(f"{message}; see {self.prog} --help")


class RunFailure(UserError):
    """A run that cannot go on though its input was good: a loss that is not finite, a lost process, a dead worker."""

    status = FAILED
    reported_here = False


class ReportedElsewhere(Exception):
    """Ends this process without a message, because another rank reports the error."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def whole_number(text: str) -> int:
    """An argument that must be a whole number above 0: the `type` of an option."""
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")


def run_program(work: Callable[[], int], signals: "StopSignals | None" = None) -> int:
    """Call `work` and return the exit status of the process; an error becomes one message on stderr.

    `UserError` prints `error: MESSAGE` (status 2, or the error's own `status`), any other exception its traceback
    (status 1). Under torchrun the process ends here, without the teardown of its libraries. No state of stdout or
    stderr changes any of this. `signals` are watched while `work` runs; a program that has them is a run, which does
    not wait for a reader that has stopped reading.
    """
    with unfailing_output(wait=signals is None), signals or nullcontext():
        return _run(work, signals)


def _run(work: Callable[[], int], signals: "StopSignals | None") -> int:
    try:
        status = work()
    except ReportedElsewhere as error:
        return _leave(error.status)
    except UserError as error:
        status = getattr(error, "status", BAD_USAGE)
        if rank_from_environment() > 0 and not getattr(error, "reported_here", False):
            _let_first_rank_report(status, signals)
        print(f"error: {error}", file=sys.stderr, flush=True)
        return _leave(status)
    except Exception:  # noqa: BLE001 - the outermost frame: print it once, end with a status that says so
        traceback.print_exc()
        return _leave(FAILED)
    return _leave(status)


def rank_from_environment() -> int:
    """Global rank that torchrun gave this process; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def leave_status(status: int) -> None:
    """Write this process's exit status where acmix.launch reads it, if that started the process."""
    folder = os.environ.get(STATUS_FOLDER)
    if folder:
        attempt, rank = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), os.environ.get("LOCAL_RANK", "0")
        with suppress(OSError):  # a file without content can be made on a full disk too
            for earlier in Path(folder).glob(f"{attempt}-{rank}-*"):
                earlier.unlink(missing_ok=True)
            Path(folder, f"{attempt}-{rank}-{status}").touch()


def end_now(status: int) -> NoReturn:
    """End the process without the teardown of its libraries, which may wait for processes that are gone."""
    leave_status(status)
    flush_output()
    os._exit(status)


def _let_first_rank_report(status: int, signals: "StopSignals | None") -> None:
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
