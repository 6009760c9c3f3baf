"""Rows that describe a model layer by layer, as probes measure them: the `layers` of a row in the record."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from acmix.telemetry.record import as_number

LayerRows = Sequence[Mapping[str, Any]]
Column = list[float | None]

_PLACE = ("layer", "stage", "depth")


def measured(rows: LayerRows) -> dict[str, Column]:
    """What was measured: key → its value in each row, None in a row without it; keys in order of appearance."""
    keys = dict.fromkeys(key for row in rows for key in row if key not in _PLACE)
    columns = {key: [as_number(row.get(key)) for row in rows] for key in keys}
    return {key: column for key, column in columns.items() if any(value is not None for value in column)}


def stage_means(rows: LayerRows, column: Column) -> dict[int, float]:
    """The mean of one key over the rows of each stage that have it."""
    stages: dict[int, list[float]] = defaultdict(list)
    for row, value in zip(rows, column, strict=True):
        if value is not None:
            stages[row["stage"]].append(value)
    return {stage: sum(values) / len(values) for stage, values in stages.items()}
