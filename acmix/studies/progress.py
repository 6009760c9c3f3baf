"""How far a study is, in one line: which arm and seed runs, and when all will be done."""

import json
import os
import time
from collections.abc import Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from acmix.engine.run_folder import METRICS
from acmix.studies.plan import Run

_TAIL = 1 << 16  # bytes at the end of a record in which its last row of training lies


class Forecast:
    """Expects each run to take what finished runs of its arm took, or else those of any arm, running ones included.

    Args:
        jobs: runs at a time.
    """

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self._seconds: dict[str, list[float]] = {}

    def add(self, arm: str, seconds: float) -> None:
        """Note how long a run of an arm took."""
        self._seconds.setdefault(arm, []).append(seconds)

    def eta(self, waiting: Iterable[Run], running: Mapping[Run, float]) -> float | None:
        """Seconds until all are done, None where nothing is known; running: run → the monotonic time when it began."""
        now = time.monotonic()
        left: list[float] = []
        totals: list[float] = []
        for run, began in running.items():
            rest = last_row(run.folder, "train").get("eta_seconds")
            if rest is None and (expected := self._expected(run.arm, [])) is not None:
                rest = max(0.0, expected - (now - began))
            if rest is None:
                return None
            left.append(rest)
            totals.append(now - began + rest)
        for run in waiting:
            if (expected := self._expected(run.arm, totals)) is None:
                return None
            left.append(expected)
        return max([sum(left) / self.jobs, *left[: len(running)]])

    def _expected(self, arm: str, others: list[float]) -> float | None:
        known = self._seconds.get(arm) or [value for values in self._seconds.values() for value in values] or others
        return sum(known) / len(known) if known else None


def last_row(folder: Path, event: str) -> dict[str, Any]:
    """The newest row of an event in a run's record, empty without any; only the end of the file is read."""
    try:
        with open(folder / METRICS, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
            lines = file.read().splitlines()
    except OSError:
        return {}
    for text in reversed(lines):
        try:
            row = json.loads(text)
        except ValueError:  # cut off by the seek, or still being written
            continue
        if isinstance(row, dict) and row.get("event") == event:
            return row
    return {}


def clock(seconds: float | None) -> str:
    """Seconds as hours, minutes and seconds."""
    return "unknown" if seconds is None else str(timedelta(seconds=round(seconds)))
