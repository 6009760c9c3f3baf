"""TensorBoard's view of a run's record."""

import os
import shutil
import sys
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import FileWriter

from acmix.telemetry.board_values import BoardValues
from acmix.telemetry.record import Record, Row, read_rows

_PICTURES = 10
"""Pictures that are drawn again at a resume, the newest: TensorBoard keeps no more of them."""


class Board:
    """Shows rows as they come; `acmix.telemetry.board_values` says what of them.

    Event files found in `folder` are replaced by one made from the record: a kill leaves event files without the last
    seconds, and a resumed run logs some of their steps again. A full disk stops TensorBoard, never the run.
    """

    def __init__(self, folder: Path, record: Record) -> None:
        self._folder = folder
        self._writer: FileWriter | None = None
        self._values = BoardValues()
        try:
            rebuilt = self._rebuild(record)
            self._writer = FileWriter(str(folder), flush_secs=10)
            if rebuilt:  # an open TensorBoard has read the old files: let it drop later steps
                self._writer.add_event(Event(session_log=SessionLog(status=SessionLog.START)), record.keep_step + 1)
        except OSError as error:
            self._give_up(error)

    def show(self, row: Row) -> None:
        """Add what there is to see of a row."""
        if self._writer is not None:
            try:
                self._add(self._writer, row)
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
        rows = list(read_rows(record.path))
        shown = {id(row) for row in [row for row in rows if row["event"] == "eval"][-_PICTURES:]}
        writer = FileWriter(str(temporary))
        for row in rows:
            self._add(writer, row, picture=id(row) in shown)
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

    def _add(self, writer: FileWriter, row: Row, *, picture: bool = True) -> None:
        """Write a row as one event; one for each value, as `SummaryWriter` does it, takes five times as long."""
        values = self._values.of(row, picture=picture)
        if values:
            writer.add_summary(Summary(value=values), row["step"], walltime=row.get("time"))
