"""TensorBoard's view of a run's record."""

import os
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import FileWriter

from acmix.telemetry.record import Record, Row, read_rows

_NOT_CURVES = {"event", "time", "step", "epoch", "epochs", "steps", "count"}


class Board:
    """Shows rows as scalars: `train/*`, `eval/*`, `paths/alpha/STAGE/LAYER`, `paths/beta/STAGE/LAYER`, stage means.

    Event files found in `folder` are replaced by one made from the record: a kill leaves event files that lack the
    last seconds, and a resume makes some of their values untrue. A full disk costs the view, never the run.
    """

    def __init__(self, folder: Path, record: Record) -> None:
        self._folder = folder
        self._writer: FileWriter | None = None
        try:
            rebuilt = self._rebuild(record)
            self._writer = FileWriter(str(folder), flush_secs=10)
            if rebuilt:  # a TensorBoard that is open has read the old files: the mark tells it what to forget
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
        """Put one event file made from the record in the place of all there are; False when there are none."""
        old = sorted(self._folder.glob("events.out.tfevents.*"))
        workshop = self._folder.with_name(f".{self._folder.name}.tmp")
        shutil.rmtree(workshop, ignore_errors=True)
        if not old:
            return False
        writer = FileWriter(str(workshop))
        for row in read_rows(record.path):
            _add(writer, row)
        writer.close()
        (new,) = workshop.iterdir()
        os.replace(new, old[0])
        for stale in old[1:]:
            stale.unlink()
        workshop.rmdir()
        return True

    def _give_up(self, error: OSError) -> None:
        self._writer = None
        message = f"TensorBoard stops here: {self._folder}: {error}; metrics.jsonl goes on, and a resume shows it all"
        print(f"warning: {message}", file=sys.stderr, flush=True)


def _add(writer: FileWriter, row: Row) -> None:
    """One event a row: one for each value, as `SummaryWriter` does it, takes five times as long to rebuild."""
    values = [Summary.Value(tag=tag, simple_value=value) for tag, value in _scalars(row)]
    if values:
        writer.add_summary(Summary(value=values), row["step"], walltime=row.get("time"))


def _scalars(row: Row) -> Iterator[tuple[str, float]]:
    if row["event"] in ("train", "eval"):
        for key, value in row.items():
            number = _number(value)
            if key not in _NOT_CURVES and number is not None:
                yield f"{row['event']}/{key}", number
    elif row["event"] == "paths":
        yield from _path_scalars(row["layers"])


def _path_scalars(layers: Sequence[dict[str, Any]]) -> Iterator[tuple[str, float]]:
    for path in ("alpha", "beta"):
        stages: dict[int, list[float]] = defaultdict(list)
        for layer in layers:
            value = float(layer[path])
            stages[layer["stage"]].append(value)
            yield f"paths/{path}/{layer['stage']}/{layer['layer']}", value
        for stage, values in stages.items():
            yield f"paths/{path}/{stage}/mean", sum(values) / len(values)


def _number(value: Any) -> float | None:
    """The float a JSON value stands for; "nan" and "inf" are how the record spells floats that are not finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except ValueError:
        return None
