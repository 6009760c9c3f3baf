"""The rows of the target table that one machine has measured, in one JSON file, each with its revision and date."""

import json
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from acmix.checkpoint.atomic import write_atomically
from acmix.errors import UserError
from benchmarks.machine import Place, occasion_row
from benchmarks.measure import Result
from benchmarks.parity import ParityError
from benchmarks.suite import BrokenError, Figure, NotMeasuredError, Suite, Target, need_cores

Row = dict[str, Any]


class Results:
    """What is known of one machine; opened with the rows of earlier calls.

    Args:
        folder: where the file lies, or will lie.
        place: the machine.
        targets: rows that the table has; others are dropped.

    Raises UserError for a file that cannot be read.
    """

    def __init__(self, folder: Path, place: Place, targets: Sequence[Target]) -> None:
        self.path = folder / place.file
        self.place = place
        self.rows: dict[tuple[str, int], Row] = {}
        self.roofs: dict[str, Row] = {}
        self._order = [(target.key, threads) for target in targets for threads in target.threads]
        if self.path.exists():
            stored = read_results(self.path)
            self.rows = {(row["key"], row["threads"]): row for row in stored["rows"]}
            self.roofs = stored["roofs"]

    def put(self, row: Row, suite: Suite) -> None:
        """Keep a row, and the roofs of the machine that were measured for it, and write the file.

        What could not be measured this time does not replace what was.
        """
        key = row["key"], row["threads"]
        if "not_measured" not in row or key not in self.rows:
            self.rows[key] = row
        for (_, dtype, threads), roof in suite.bench.rooflines.items():
            self.roofs[f"{dtype}, {threads} thread(s)"] = {
                "gflops_per_second": 1e-9 * roof.operations,
                "gigabytes_per_second": 1e-9 * roof.copy,
            }
        self.write()

    def write(self) -> None:
        """Replace the file: a line for each row, in the table's order. Raises UserError when it cannot be written."""
        rows = ",\n".join(_json(self.rows[key]) for key in self._order if key in self.rows)
        text = f'{{"machine": {_json(asdict(self.place))},\n"roofs": {_json(self.roofs)},\n"rows": [\n{rows}\n]}}\n'
        write_atomically(self.path, text, make_parents=True)


def read_results(path: Path) -> dict[str, Any]:
    """A file that `Results` wrote: `machine`, a Place, `roofs` and `rows`. Raises UserError."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return {"machine": Place(**stored["machine"]), "roofs": stored["roofs"], "rows": stored["rows"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a file of the benchmark suite ({error!r}); move it away or remove it") from None


def measure_rows(
    suite: Suite,
    report: Callable[[Row], None],
    targets: Sequence[Target],
    threads: Collection[int] | None = None,
) -> list[Row]:
    """Measure the rows of the suite's device, each reported as it comes; they are in JSON's types, with `value`,
    `not_measured` or `refused`.

    threads: only rows of these numbers of threads; None for all.
    """
    rows = []
    for target in targets:
        for count in target.threads:
            if target.device == suite.device.type and (threads is None or count in threads):
                rows.append(_measure(target, suite, count))
                report(rows[-1])
    return rows


def _measure(target: Target, suite: Suite, threads: int) -> Row:
    row: Row = {"key": target.key, "threads": threads, "what": target.what, "target": str(target)}
    row |= occasion_row(suite.device)
    began = time.perf_counter()
    try:
        if suite.device.type == "cpu":
            need_cores(threads)
        figure = target.measure(suite, threads)
    except NotMeasuredError as reason:
        return row | {"not_measured": str(reason)}
    except (ParityError, BrokenError) as error:
        return row | {"refused": str(error)}
    took = {"took_seconds": time.perf_counter() - began}
    return row | took | _measured(figure) | {"met": target.met(figure.value.median)}


def _measured(figure: Figure) -> Row:
    value = figure.value
    numbers = {"value": value.median, "spread": value.spread, "n": value.n, "note": figure.note}
    return numbers | {"results": [_short(result) for result in figure.results]}


def _short(result: Result) -> Row:
    """A result without the time of every round."""
    return {key: value for key, value in result.as_dict().items() if key != "seconds"}


def _json(value: Any) -> str:
    return json.dumps(_rounded(value), ensure_ascii=False)


def _rounded(value: Any) -> Any:
    """Numbers to five significant digits: the others are noise, and change with every run."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
