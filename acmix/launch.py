"""torchrun with the run's own exit status: `python -m acmix.launch [torchrun's options] train.py [its arguments]`.

torchrun itself ends with status 1 whatever its workers end with, and is killed by SIGUSR1, which batch systems send.
This passes SIGUSR1 on to the workers like SIGTERM, and ends as they do: with 0, 75 (stopped by a signal, saved, start
me again), 2 or 1. Signals that it is started with ignored (nohup) stay so. Everything else is torchrun's: options,
restarts, several machines.
"""

import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from acmix.process.program import DONE, FAILED, REQUEUE, STATUS_FOLDER, run_program

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run torchrun in this process; returns the exit status of the run."""
    return run_program(lambda: launch(arguments))


def launch(arguments: Sequence[str] | None) -> int:
    """Let torchrun start the workers and wait for them; returns the exit status they agree on."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    given = sys.argv[1:] if arguments is None else list(arguments)
    heard = [number.name for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    options = run.parse_args(["--signals-to-handle", ",".join(heard), *given])
    with tempfile.TemporaryDirectory(prefix="acmix-launch-") as folder:
        os.environ[STATUS_FOLDER] = folder
        try:
            run.run(options)
        except (ChildFailedError, SignalException, RendezvousError) as stop:
            status = _status_of_workers(Path(folder))
            if status == FAILED:
                print(f"acmix.launch: {stop}", file=sys.stderr, flush=True)
            return status
        finally:
            del os.environ[STATUS_FOLDER]
    return DONE


def _status_of_workers(folder: Path) -> int:
    """The exit status that all workers of the last attempt left; 1 if they differ or left none.

    A worker that was still starting when another ended is stopped by torchrun: its 75 does not count beside an error.
    """
    found = [(int(file.name.partition("-")[0]), int(file.read_text())) for file in folder.iterdir()]
    last = max((attempt for attempt, _ in found), default=0)
    statuses = {status for attempt, status in found if attempt == last}
    decisive = statuses - {REQUEUE} or statuses
    return decisive.pop() if len(decisive) == 1 and decisive != {DONE} else FAILED


if __name__ == "__main__":
    sys.exit(main())
