"""The exit statuses of the programs, and how a worker tells them to the launcher that wants to pass them on."""

import os
import sys
from pathlib import Path
from typing import NoReturn

DONE = 0
FAILED = 1
BAD_USAGE = 2
REQUEUE = 75
"""A signal stopped the run, its checkpoint is saved: start me again (EX_TEMPFAIL)."""

STATUS_FOLDER = "ACMIX_STATUS_FOLDER"
"""Environment variable, set by acmix.launch: the folder where each worker leaves its exit status."""


def leave_status(status: int) -> None:
    """Leave this process's exit status for acmix.launch, if that started it."""
    folder = os.environ.get(STATUS_FOLDER)
    if folder:
        attempt, rank = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), os.environ.get("LOCAL_RANK", "0")
        Path(folder, f"{attempt}-{rank}").write_text(str(status))


def end_now(status: int) -> NoReturn:
    """End the process without the teardown of its libraries, which may wait for processes that are gone."""
    leave_status(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
