"""Runs the runs of a study as processes of train.py, one after another or several at a time."""

import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tqdm import tqdm

from acmix.process.program import DONE, REQUEUE
from acmix.process.signals import StopSignals
from acmix.studies.outcome import read_outcome
from acmix.studies.plan import Run
from acmix.studies.progress import Forecast, clock, last_row

_POLL_SECONDS = 0.1
_LINE_SECONDS = 2.0
_LAST_LINES = 5


@dataclass(frozen=True)
class Failure:
    """A run that ended with an error: its exit status, negative where a signal killed it, and the end of its log."""

    run: Run
    status: int
    last_lines: tuple[str, ...]

    def __str__(self) -> str:
        tail = "".join(f"\n    {text}" for text in self.last_lines)
        return f"{self.run.label} ended with status {self.status}; the last lines of {self.run.log}:{tail}"


class Runner:
    """Starts runs and waits for them; a stop signal is passed on, and the runs save and end.

    Args:
        command: the command of a run.
        signals: stop requests to this process.
        jobs: runs at a time.
        forecast: for the ETA; knows the runs that are finished already.
        total: runs of the study, `done` of them finished already.
    """

    def __init__(
        self,
        command: Callable[[Run], list[str]],
        signals: StopSignals,
        jobs: int,
        forecast: Forecast,
        *,
        total: int,
        done: int = 0,
    ) -> None:
        self.command, self.signals, self.jobs, self.forecast = command, signals, jobs, forecast
        self.total, self.done = total, done
        self.failures: list[Failure] = []
        self.stopped = False
        self._waiting: deque[Run] = deque()
        self._live: dict[Run, subprocess.Popen[bytes]] = {}
        self._began: dict[Run, float] = {}

    def run(self, runs: Sequence[Run]) -> None:
        """Run all; a run that fails is told and the others go on. `failures` and `stopped` say what came of it."""
        self._waiting.extend(runs)
        with tqdm(bar_format="{desc}", file=sys.stdout, disable=not sys.stdout.isatty(), leave=False) as self._bar:
            try:
                self._loop()
            finally:
                self._stop()  # where this process fails, no child is left behind
                for child in self._live.values():
                    child.wait()

    def _loop(self) -> None:
        shown, asked = 0.0, False
        while self._waiting or self._live:
            if self.signals.requested and not asked:
                asked = self.stopped = True
                self._waiting.clear()
                self._say(f"Stopping on {self.signals.reason}: the runs save and end")
                self._stop()
            while self._waiting and len(self._live) < self.jobs:
                self._start(self._waiting.popleft())
            for run, child in list(self._live.items()):
                if (status := child.poll()) is not None:
                    del self._live[run]
                    self._end(run, status)
            if time.monotonic() - shown > _LINE_SECONDS:
                shown = time.monotonic()
                self._bar.set_description_str(self._line())
            time.sleep(_POLL_SECONDS if self._live else 0)

    def _start(self, run: Run) -> None:
        run.log.parent.mkdir(parents=True, exist_ok=True)
        with open(run.log, "ab") as log:
            # a group of its own: Ctrl-C in a terminal reaches this process alone, which passes it on once
            self._live[run] = subprocess.Popen(
                self.command(run), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self._began[run] = time.monotonic()
        if self._bar.disable:
            self._say(f"[{self.done + 1}/{self.total}] {run.label} begins, ETA {clock(self._eta())}")

    def _end(self, run: Run, status: int) -> None:
        seconds = time.monotonic() - self._began[run]
        if status == REQUEUE:
            self.stopped = True  # by our signal, or by one that the run got from elsewhere
            self._say(f"{run.label} stopped and saved")
            return
        outcome = read_outcome(run.folder) if status == DONE else None
        if outcome is None:
            failure = Failure(run, status, _last_lines(run))
            self.failures.append(failure)
            self._say(str(failure))
            return
        self.done += 1
        self.forecast.add(run.arm, outcome.seconds)
        self._say(
            f"[{self.done}/{self.total}] {run.label}: top-1 {outcome.top1:.2f} % in {clock(seconds)}, "
            f"ETA {clock(self._eta())}"
        )

    def _stop(self) -> None:
        for child in self._live.values():
            child.terminate()

    def _eta(self) -> float | None:
        return self.forecast.eta(self._waiting, {run: self._began[run] for run in self._live})

    def _line(self) -> str:
        parts = []
        for run in self._live:
            row = last_row(run.folder, "train")
            parts.append(f"{run.label} epoch {row['epoch']}/{row['epochs']}" if row else f"{run.label} starts")
        return f"{self.done}/{self.total} done  {', '.join(parts)}  ETA {clock(self._eta())}"

    def _say(self, text: str) -> None:
        if self._bar.disable:
            print(text, flush=True)
        else:
            self._bar.write(text, file=sys.stdout)


def _last_lines(run: Run) -> tuple[str, ...]:
    try:
        with open(run.log, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 8192))
            return tuple(file.read().decode(errors="replace").splitlines()[-_LAST_LINES:])
    except OSError:
        return ()
