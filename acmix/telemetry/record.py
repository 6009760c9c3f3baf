"""`metrics.jsonl`, the record of a run: one JSON object a line, appended whole; a resume drops later rows."""

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from acmix.checkpoint.atomic import write_atomically
from acmix.errors import UserError
from acmix.json_text import json_text, plain

Row = dict[str, Any]


class Record:
    """Appends rows to a JSON-lines file that survives kills, full disks and resumes.

    Args:
        path: the file.
        keep_step: rows of later steps, `end` rows and unreadable lines are removed when the file is opened; 0 keeps no
            row.

    Raises UserError when the file cannot be opened or rewritten.
    """

    def __init__(self, path: Path, *, keep_step: int) -> None:
        self.path = path
        self.keep_step = keep_step
        self._pending = b""
        self._failing = False
        self._written: set[tuple[str, int]] = set()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._cut()
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - stays open for the life of the run
        except OSError as error:
            reason = f"{error.strerror}; make it writable or choose another run.dir"
            raise UserError(f"cannot write {path}: {reason}") from None

    def write(self, row: Mapping[str, Any]) -> Row | None:
        """Append a row, stamped with the time; returns it as written, or None if there is one of its event and step.

        Probes measure a step with its training row, at the end of its epoch and after a resume: one row is enough.
        """
        occasion = (row["event"], row["step"])
        if occasion in self._written:
            return None
        if row["event"] not in ("start", "end"):
            self._written.add(occasion)
        stamped: Row = {"event": row["event"], "time": round(time.time(), 3), **plain(row)}
        self._pending += json.dumps(stamped, allow_nan=False).encode() + b"\n"
        self._flush()
        return stamped

    def sync(self) -> None:
        """Force all rows to the disk; UserError when some cannot be written."""
        self._flush()
        if self._pending:
            raise UserError(f"cannot write {self.path}: {len(self._pending)} bytes of log rows wait; free disk space")
        try:
            os.fsync(self._file.fileno())
        except OSError as error:  # network file systems say only here that the disk is full
            raise UserError(f"cannot write {self.path}: {error.strerror}; free disk space or check the disk") from None

    def close(self) -> None:
        """Write what is pending and close the file."""
        if not self._file.closed:
            self._flush()
            self._file.close()

    def _flush(self) -> None:
        """Append the pending rows whole or leave the file as it was: half a line would spoil the next one."""
        if not self._pending:
            return
        before = os.fstat(self._file.fileno()).st_size
        try:
            written = self._file.write(self._pending)
            if written != len(self._pending):  # a short write: the disk is full, or nearly
                self._file.truncate(before)
                raise OSError(0, "no space left on the device")
        except OSError as error:
            if not self._failing:
                message = f"cannot write {self.path}: {error.strerror}; rows wait in memory"
                print(f"warning: {message}", file=sys.stderr, flush=True)
            self._failing = True
            return
        self._pending, self._failing = b"", False

    def _cut(self) -> None:
        """Drop rows after keep_step and the `end` row; the resumed run logs them again."""
        if not self.path.exists():
            return
        rows = read_rows(self.path) if self.keep_step > 0 else ()
        keep = [row for row in rows if row["event"] != "end" and row["step"] <= self.keep_step]
        self._written = {(row["event"], row["step"]) for row in keep if row["event"] != "start"}
        write_atomically(self.path, "".join(json_text(row) + "\n" for row in keep))


def read_rows(path: Path) -> Iterator[Row]:
    """Every readable row of a record, oldest first; a line torn by a kill or a bad disk is skipped."""
    if path.exists():
        with open(path, "rb") as file:
            for line in file:
                row = _parse(line)
                if row is not None:
                    yield row


def _parse(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    sound = isinstance(row, dict) and isinstance(row.get("event"), str) and isinstance(row.get("step"), int)
    return row if sound and line.endswith(b"\n") else None


def key_paths(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested mappings by their key paths (`model.kwargs.mix`); an empty mapping is a value."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from key_paths(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def as_number(value: Any) -> float | None:
    """Read a number back, also one that `plain` made a string; None for any other value."""
    if isinstance(value, str):
        return float(value) if value in ("nan", "inf", "-inf") else None
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
