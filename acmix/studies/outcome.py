"""What a finished run has to tell a study, read from its record."""

from dataclasses import dataclass
from pathlib import Path
from statistics import median

from acmix.engine.progress import is_finite
from acmix.engine.run_folder import METRICS
from acmix.telemetry.layer_rows import measured, stage_means
from acmix.telemetry.record import Row, as_number, read_rows

_WARM_UP_ROWS = 1
"""Rows of training left out of the rate: the first updates compile and fill caches."""


@dataclass(frozen=True)
class Outcome:
    """Of one finished run.

    top1: of its last epoch, in percent; best: the highest of all epochs, of those with a finite loss where there are
    any; epochs: it trained; parameters: of its network; images_per_second: median over its rows of training, NaN
    without any; seconds: that its last attempt took; paths: stage → the stage's mean alpha and beta after training,
    empty without ACmix blocks.
    """

    top1: float
    best: float
    epochs: int
    parameters: int
    images_per_second: float
    seconds: float
    paths: dict[int, tuple[float, float]]


def read_outcome(folder: Path) -> Outcome | None:
    """What came of the run in `folder`; None where its record does not hold the end of a run with an evaluation."""
    rows = list(read_rows(folder / METRICS))
    end = next((row for row in reversed(rows) if row["event"] == "end"), None)
    evaluations = [row for row in rows if row["event"] == "eval"]
    if end is None or not evaluations:
        return None
    scores = [float(row["top1"]) for row in evaluations]
    return Outcome(
        top1=scores[-1],
        best=max(_of_finite_loss(evaluations) or scores),
        epochs=int(evaluations[-1]["epoch"]),
        parameters=int(end["parameters"]),
        images_per_second=rate(rows),
        seconds=float(end["seconds"]),
        paths=_final_paths(rows),
    )


def _of_finite_loss(evaluations: list[Row]) -> list[float]:
    return [float(row["top1"]) for row in evaluations if is_finite(row)]


def rate(rows: list[Row]) -> float:
    """Median images per second of the rows of training, without those of the first updates; NaN without any."""
    rates = [as_number(row.get("images_per_second")) for row in rows if row["event"] == "train"]
    known = [value for value in rates[_WARM_UP_ROWS:] or rates if value is not None]
    return median(known) if known else float("nan")


def measured_rate(folder: Path) -> float:
    """`rate` of the run in `folder`."""
    return rate(list(read_rows(folder / METRICS)))


def _final_paths(rows: list[Row]) -> dict[int, tuple[float, float]]:
    layers: list[Row] = next((row["layers"] for row in reversed(rows) if row["event"] == "paths"), [])
    columns = measured(layers)
    if not {"alpha", "beta"} <= columns.keys():
        return {}
    alpha, beta = (stage_means(layers, columns[key]) for key in ("alpha", "beta"))
    return {stage: (alpha[stage], beta[stage]) for stage in alpha if stage in beta}
