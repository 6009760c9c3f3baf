"""torchrun with the run's own exit status: `python -m acmix.launch [torchrun's options] train.py [its arguments]`.

torchrun itself ends with status 1 whatever its workers end with, and is killed by SIGUSR1, which batch systems send.
This passes SIGUSR1 on to the workers like SIGTERM, and ends as they do: with 0, 75 (stopped by a signal, saved, start
me again), 2 or 1. A signal before there are workers ends it with 75 at once. SIGINT, SIGHUP and SIGQUIT stay ignored
where it is started so (nohup). Everything else is torchrun's: options, restarts, several machines.
"""

import os
import shutil
import signal
import sys
import tempfile
import threading
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from acmix.errors import UserError, one_line
from acmix.paths import missing_path_hint
from acmix.process.program import DONE, FAILED, REQUEUE, STATUS_FOLDER, end_now, run_program
from acmix.process.signals import MAY_BE_IGNORED

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)
_MAY_BE_IGNORED = (*MAY_BE_IGNORED, signal.SIGQUIT)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run torchrun in this process; returns the exit status of the run."""
    return run_program(lambda: launch(arguments))


def launch(arguments: Sequence[str] | None) -> int:
    """Let torchrun start the workers and wait for them; returns the exit status they agree on."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    stay = {number for number in _MAY_BE_IGNORED if signal.getsignal(number) == signal.SIG_IGN}
    heard = [number for number in _SIGNALS if number not in stay]
    with tempfile.TemporaryDirectory(prefix="acmix-launch-") as folder, _ending_before_workers(heard, folder):
        os.environ[STATUS_FOLDER] = folder
        try:
            return _run(["--signals-to-handle", ",".join(number.name for number in heard), *given], Path(folder))
        finally:
            del os.environ[STATUS_FOLDER]


def _run(arguments: Sequence[str], folder: Path) -> int:
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    options = run.parse_args(arguments)
    _refuse_bad_options(options)
    try:
        run.run(options)
    except (ChildFailedError, SignalException, RendezvousError) as stop:
        status = _status_of_workers(folder)
        if status == FAILED:
            print(f"acmix.launch: {stop}", file=sys.stderr, flush=True)
        return status
    return DONE


@contextmanager
def _ending_before_workers(heard: Sequence[signal.Signals], folder: str) -> Iterator[None]:
    """Let a signal end this process, with the status that asks for a requeue, as long as there are no workers.

    torchrun takes the signals over when it starts them. Until then it may wait for other machines inside a library, so
    a thread acts. SIGQUIT stays as it is.
    """
    early = set(heard) - {signal.SIGQUIT}
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = {number: signal.signal(number, _note) for number in early}
    wakeup_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def watch() -> None:
        while number := os.read(reader, 1):
            if number[0] in early and signal.getsignal(number[0]) is _note:
                shutil.rmtree(folder, ignore_errors=True)
                end_now(128 + number[0] if number[0] == signal.SIGINT else REQUEUE)
        os.close(reader)

    threading.Thread(target=watch, name="acmix-launch-signals", daemon=True).start()
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is _note:
                signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup_before)
        os.close(writer)  # ends the thread, which closes its own end


def _note(number: int, frame: FrameType | None) -> None:
    """The handler of a signal that the thread acts on."""


def _refuse_bad_options(options: Namespace) -> None:
    """UserError where torchrun, or Python in each worker, would only fail: a program that is not there, bad numbers."""
    from torch.distributed import run

    program = options.training_script
    if not (options.module or options.no_python or Path(program).exists()):
        raise UserError(f"{program}: no such program{missing_path_hint(program)}")
    try:
        if run.config_from_args(options)[0].nproc_per_node < 1:
            raise ValueError("--nproc-per-node must be at least 1")
    except (ValueError, AssertionError) as error:
        raise UserError(f"torchrun's options: {one_line(error)}; see python -m acmix.launch --help") from None


def _status_of_workers(folder: Path) -> int:
    """The exit status that all workers of the last attempt left; 1 if they differ or left none.

    An error counts alone: a worker that was still starting when another ended is stopped by torchrun, with 75, and one
    that was done before another could not write its last file has left 0.
    """
    found = [tuple(map(int, file.name.split("-"))) for file in folder.iterdir()]  # attempt, rank, status
    last = max((attempt for attempt, _, _ in found), default=0)
    statuses = {status for attempt, _, status in found if attempt == last}
    decisive = statuses - {REQUEUE, DONE} or statuses
    return decisive.pop() if len(decisive) == 1 and decisive != {DONE} else FAILED


if __name__ == "__main__":
    sys.exit(main())
