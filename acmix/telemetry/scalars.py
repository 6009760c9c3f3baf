"""The numbers of a row of a run's record as scalars, under the names that every logger shows them by."""

from collections.abc import Iterator

from acmix.telemetry.layer_rows import LayerRows, measured, stage_means
from acmix.telemetry.record import Row, as_number

_NOT_CURVES = {"event", "time", "step", "epoch", "epochs", "steps", "count"}


def scalars(row: Row) -> Iterator[tuple[str, float]]:
    """`train/*`, `eval/*`; of a probe `NAME/KEY/STAGE/LAYER` and `NAME/KEY/STAGE/mean`. Nothing for other rows."""
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
