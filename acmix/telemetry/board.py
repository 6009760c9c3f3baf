"""TensorBoard's view of a run's record."""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import FileWriter

from acmix.telemetry.layer_rows import LayerRows, measured, stage_means
from acmix.telemetry.record import Record, Row, as_number, read_rows

_NOT_CURVES = {"event", "time", "step", "epoch", "epochs", "steps", "count"}


class Board:
    """Shows rows as scalars: `train/*`, `eval/*`; of each probe `NAME/KEY/STAGE/LAYER` and `NAME/KEY/STAGE/mean`.

    Event files found in `folder` are replaced by one made from the record: a kill leaves event files without the last
    seconds, and a resumed run logs some of their steps again. A full disk stops TensorBoard, never the run.
    """

    def __init__(self, folder: Path, record: Record) -> None:
        self._folder = folder
        self._writer: FileWriter | None = None
        try:
            rebuilt = self._rebuild(record)
            self._writer = FileWriter(str(folder), flush_secs=10)
            if rebuilt:  # an open TensorBoard has read the old files: let it drop later steps
                self._writer.add_event(Event(session_log=SessionLog(status=SessionLog.START)), record.keep_step + 1)
        except OSError as error:
            self._give_up(error)

    def show(self, row: Row) -> None:
        """Add a row's scalars."""
        if self._writer is not None:
            try:
                _add(self._writer, row)
            except OSError as error:
                self._give_up(error)

    def close(self) -> None:
        """Flush and close the event file."""
        if self._writer is not None:
            try:
                self._writer.close()
            except OSError as error:
                self._give_up(error)
            self._writer = None

    def _rebuild(self, record: Record) -> bool:
        """Replace all event files by one made from the record; returns False when there are none."""
        old = sorted(self._folder.glob("events.out.tfevents.*"))
        temporary = self._folder.with_name(f".{self._folder.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        if not old:
            return False
        writer = FileWriter(str(temporary))
        for row in read_rows(record.path):
            _add(writer, row)
        writer.close()
        (new,) = temporary.iterdir()
        os.replace(new, old[0])
        for stale in old[1:]:
            stale.unlink()
        temporary.rmdir()
        return True

    def _give_up(self, error: OSError) -> None:
        self._writer = None
        message = f"TensorBoard stops here: {self._folder}: {error}; metrics.jsonl goes on, and a resume shows it all"
        print(f"warning: {message}", file=sys.stderr, flush=True)


def _add(writer: FileWriter, row: Row) -> None:
    """Write a row as one event; one for each value, as `SummaryWriter` does it, takes five times as long to rebuild."""
    values = [Summary.Value(tag=tag, simple_value=value) for tag, value in _scalars(row)]
    if values:
        writer.add_summary(Summary(value=values), row["step"], walltime=row.get("time"))


def _scalars(row: Row) -> Iterator[tuple[str, float]]:
    event = row["event"]
    if "layers" in row:
        yield from _layer_scalars(event, row["layers"])
    elif event in ("train", "eval"):
        for key, value in row.items():
            number = as_number(value)
            if key not in _NOT_CURVES and number is not None:
                yield f"{event}/{key}", number


def _layer_scalars(event: str, layers: LayerRows) -> Iterator[tuple[str, float]]:
    for key, column in measured(layers).items():
        for layer, value in zip(layers, column, strict=True):
            if value is not None:
                yield f"{event}/{key}/{layer['stage']}/{layer['layer']}", value
        for stage, mean in stage_means(layers, column).items():
            yield f"{event}/{key}/{stage}/mean", mean
