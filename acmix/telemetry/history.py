"""The course of alpha and beta over a training run, read back from its record."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from acmix.errors import UserError
from acmix.telemetry.record import Row, read_rows

Array = NDArray[np.float64]


@dataclass(frozen=True)
class PathHistory:
    """Alpha and beta of every block of one run, at every step they were logged.

    model: the model's name, or "" where the record does not say; layers, stages: (D,) in depth order;
    steps: (T,) updates, increasing; alpha, beta: (T, D).
    """

    run: Path
    model: str
    layers: tuple[str, ...]
    stages: tuple[int, ...]
    steps: Array
    alpha: Array
    beta: Array

    @property
    def log_ratio(self) -> Array:
        """log|alpha / beta|, (T, D): above 0 attention weighs more, below 0 convolution; not finite where one is 0."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.log(np.abs(self.alpha)) - np.log(np.abs(self.beta))


def read_paths(run: Path) -> PathHistory:
    """Read the `paths` rows of a run folder (or of a `metrics.jsonl` file).

    Raises UserError when there is no record at that place, or none of path weights.
    """
    record = run / "metrics.jsonl" if run.is_dir() else run
    if not record.is_file():
        raise UserError(_missing(run))
    rows = list(read_rows(record))
    paths = {row["step"]: row["layers"] for row in rows if row["event"] == "paths" and row["layers"]}
    if not paths:
        raise UserError(f"{record} logs no path weights: the run's model has no ACmix blocks, or it never started")
    steps = sorted(paths)
    first = paths[steps[0]]
    return PathHistory(
        run=run,
        model=_model_name(rows),
        layers=tuple(layer["layer"] for layer in first),
        stages=tuple(int(layer["stage"]) for layer in first),
        steps=np.array(steps, dtype=np.float64),
        alpha=_matrix(paths, steps, "alpha", record),
        beta=_matrix(paths, steps, "beta", record),
    )


def _matrix(paths: dict[int, list[dict[str, Any]]], steps: list[int], weight: str, record: Path) -> Array:
    depth = len(paths[steps[0]])
    odd = next((step for step in steps if len(paths[step]) != depth), None)
    if odd is not None:
        raise UserError(f"{record}: step {odd} logs {len(paths[odd])} blocks, step {steps[0]} logs {depth}")
    return np.array([[float(layer[weight]) for layer in paths[step]] for step in steps])


def _model_name(rows: list[Row]) -> str:
    configs = [row.get("config") for row in rows if row["event"] == "start"]
    models = [config.get("model") for config in configs if isinstance(config, dict)]
    return next((str(model["name"]) for model in models if isinstance(model, dict) and "name" in model), "")


def _missing(run: Path) -> str:
    if not run.exists():
        return f"{run} does not exist: give a run folder, the one that holds metrics.jsonl"
    inside = sorted(path.parent for path in run.glob("*/metrics.jsonl")) if run.is_dir() else []
    hint = f"; it holds runs, such as {inside[-1]}: give those" if inside else ": give a run folder"
    return f"{run} holds no metrics.jsonl{hint}"
