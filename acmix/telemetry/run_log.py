"""A run's log behind one call: lines on stdout, `metrics.jsonl`, and the loggers that are asked for.

`metrics.jsonl` is the record; TensorBoard and CSV are views of it, rebuilt from the record when a run is resumed. So
they always agree, each tag has one value per step, and what a kill cut from a file is restored.
"""

import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from acmix.json_text import plain
from acmix.telemetry.layer_rows import LayerRows
from acmix.telemetry.lines import end_line, eval_line, probe_line, start_lines, train_line
from acmix.telemetry.loggers import Logger, open_loggers, places
from acmix.telemetry.record import Record

Row = Mapping[str, Any]


class ProgressBar:
    """Told of each step that is done; None shows nothing."""

    def __init__(self, bar: "tqdm[Any] | None") -> None:
        self._bar = bar

    def advance(self) -> None:
        """One more step is done."""
        if self._bar is not None:
            self._bar.update()


class RunLog:
    """Logs a run. With `enabled=False`, on all ranks but 0, every method does nothing.

    Args:
        run_dir: the run folder; created if it is missing.
        enabled: whether this process writes.
        resume_step: the step to resume from. Rows of later steps, the `end` row and a line torn by a kill are removed
            from the record first, atomically. None, like 0, begins again: no row of an earlier attempt stays.
        loggers: where rows are shown besides: tensorboard, csv, wandb, mlflow.

    Each row is a single write, so no kill loses a row whose method has returned. When the disk is full, rows wait in
    memory, a warning says so once, and each later row tries to write them all.

    Raises UserError when the run folder cannot be written, or a logger cannot begin.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        enabled: bool = True,
        resume_step: int | None = None,
        loggers: Sequence[str] = ("tensorboard",),
    ) -> None:
        self.run_dir = Path(run_dir)
        self.enabled = enabled
        self._step = resume_step or 0
        self._started = time.monotonic()
        self._bar: tqdm[Any] | None = None
        self._places = places(loggers)
        self._loggers: list[Logger] = []
        if enabled:
            self._record = Record(self.run_dir / "metrics.jsonl", keep_step=self._step)
            self._loggers = open_loggers(loggers, self.run_dir, self._record)

    def start(self, info: Row) -> None:
        """The first row of a process: config, versions, git revision, parameters, device; says where results go."""
        if self.enabled:
            self._write("start", {"step": self._step, "resumed_from": self._step or None, **info})
            self.line(*start_lines(self.run_dir, self._step, self._places))

    def train(self, row: Row) -> None:
        """Progress of training: `step`, `epoch`, `loss`, `lr`, `images_per_second` and, where measured, `grad_norm`,
        `data_wait` (share of the time, 0 to 1), `memory_gib`, `eta_seconds`, and the totals `epochs` and `steps`."""
        if self.enabled:
            self._write("train", row)
            self.line(train_line(row))

    def eval(self, row: Row) -> None:
        """An evaluation: `step`, `epoch`, `loss`, `top1` and `top5` in percent, `count` of images."""
        if self.enabled:
            self._write("eval", row)
            self.line(eval_line(row))

    def probe(
        self, name: str, step: int, rows: LayerRows, *, echo: bool = False, shown: Collection[str] | None = None
    ) -> None:
        """What the probe `name` measured after update `step`; with `echo` also the stage means of `shown` on stdout."""
        if self.enabled and rows:
            layers = plain(rows)
            self._write(name, {"step": step, "layers": layers})
            if echo and shown != () and (text := probe_line(step, layers, shown)):
                self.line(text)

    def event(self, name: str, row: Row) -> None:
        """Any other event worth a row, such as skipped updates or unreadable images; needs `step`."""
        if self.enabled:
            self._write(name, row)

    def end(self, row: Row) -> None:
        """The last row of a process: `step`, why it ended and the best result; says where results are."""
        if self.enabled:
            row = {"seconds": round(time.monotonic() - self._started, 1), **row}
            self._write("end", row)
            self.line(end_line(self.run_dir, row))

    def line(self, *texts: str) -> None:
        """Plain lines on stdout, above the progress bar if there is one."""
        if self.enabled:
            for text in texts:
                if self._bar is None:
                    print(text, flush=True)
                else:
                    self._bar.write(text, file=sys.stdout)

    @contextmanager
    def progress_bar(self, *, total: int, initial: int = 0, description: str = "") -> Iterator[ProgressBar]:
        """A bar for `total` steps of which `initial` are done; silent unless stdout is a terminal: lines are shown."""
        if not (self.enabled and sys.stdout.isatty()):
            yield ProgressBar(None)
            return
        with tqdm(desc=description, total=total, initial=initial, file=sys.stdout, leave=False) as bar:
            self._bar = bar
            try:
                yield ProgressBar(bar)
            finally:
                self._bar = None

    def sync(self) -> None:
        """Force the record to the disk, so that no checkpoint is ever newer than its log: call it before each save.

        Raises UserError naming the file when rows cannot be written.
        """
        if self.enabled:
            self._record.sync()

    def close(self) -> None:
        """Write what is pending and close the files; may be called more than once."""
        if self.enabled:
            for logger in self._loggers:
                logger.close()
            self._record.close()

    def _write(self, event: str, row: Row) -> None:
        written = self._record.write({"event": event, **row})
        if written is not None:
            for logger in self._loggers:
                logger.show(written)
