"""Results as a table on a terminal and as JSON."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from acmix.checkpoint.atomic import write_atomically
from benchmarks.measure import Result


def table(results: Sequence[Result], against: int | None = None) -> str:
    """Results in columns; with `against`, the index of the one that times are divided by."""
    head = ["subject", "impl", "mode", "median ms", "spread", "n", "images/s", "peak MiB", "GFLOP/s", "of roof"]
    rows = [[*head, *(["time ratio"] if against is not None else [])]]
    for result in results:
        row = [result.case.label, result.case.impl, result.mode]
        if result.seconds is None:
            rows.append([*row, result.refused])
            continue
        times = [f"{1e3 * result.seconds.median:.3f}", f"{1e3 * result.seconds.spread:.3f}", str(result.seconds.n)]
        row += [*times, f"{result.images_per_second:,.1f}", f"{result.peak / 2**20:,.1f}"]
        row += [f"{1e-9 * result.operations_per_second:,.1f}", f"{result.roofline:.1%}"]
        rows.append(row + ([_ratio(result, results[against])] if against is not None else []))
    return columns(rows)


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Text in aligned columns, the first three to the left."""
    full = [row for row in rows if len(row) == len(rows[0])]
    widths = [max(len(row[i]) for row in full) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=False))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _ratio(result: Result, base: Result) -> str:
    if result.seconds is None or base.seconds is None:
        return "-"
    return f"{result.seconds.over(base.seconds).median:.3f}"


def write_json(data: dict[str, Any], path: Path) -> None:
    """Replace a file as a whole; raises UserError when it cannot be written."""
    write_atomically(path, json.dumps(data, indent=1, ensure_ascii=False) + "\n", make_parents=True)
