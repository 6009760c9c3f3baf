"""A run's training rows and evaluations as `train.csv` and `eval.csv`, for spreadsheets."""

import csv
import io
import sys
from pathlib import Path

from acmix.checkpoint.atomic import write_atomically
from acmix.errors import UserError
from acmix.telemetry.record import Record, Row, read_rows


class CsvFiles:
    """Appends rows; the columns are the keys of metrics.jsonl. What cannot be written stops the files, never the run.

    When they are opened both files are made anew from the record, so they hold each row that it holds, once.
    """

    def __init__(self, folder: Path, record: Record) -> None:
        self._folder = folder
        self._record = record.path
        self._columns: dict[str, list[str]] = {}
        self._stopped = False
        for event in ("train", "eval"):
            self._attempt(event, None)

    def show(self, row: Row) -> None:
        """Add a row, if it is one of training or an evaluation."""
        if row["event"] in self._columns and not self._stopped:
            self._attempt(row["event"], row)

    def close(self) -> None:
        """Nothing is held open."""

    def _attempt(self, event: str, row: Row | None) -> None:
        try:
            columns = self._columns.get(event)
            if row is None or columns is None or not (row.keys() - {"event"}) <= set(columns):
                self._rebuild(event)  # the record has the row already
            else:
                with open(self._folder / f"{event}.csv", "a", encoding="utf-8", newline="") as file:
                    file.write(_text([row], columns))
        except (OSError, UserError) as error:
            self._stopped = True
            message = f"CSV stops here: {error}; metrics.jsonl goes on, and a resume shows it all"
            print(f"warning: {message}", file=sys.stderr, flush=True)

    def _rebuild(self, event: str) -> None:
        rows = [row for row in read_rows(self._record) if row["event"] == event]
        columns = list(dict.fromkeys(key for row in rows for key in row if key != "event"))
        header = ",".join(columns) + "\n" if columns else ""
        write_atomically(self._folder / f"{event}.csv", header + _text(rows, columns))
        self._columns[event] = columns


def _text(rows: list[Row], columns: list[str]) -> str:
    text = io.StringIO()
    csv.DictWriter(text, columns, restval="", extrasaction="ignore", lineterminator="\n").writerows(rows)
    return text.getvalue()
