"""What a probe measured over a training run, read back from the run's record."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from acmix.errors import UserError
from acmix.telemetry.layer_rows import measured
from acmix.telemetry.record import Row, read_rows

Array = NDArray[np.float64]


@dataclass(frozen=True)
class ProbeHistory:
    """What one probe measured in one run, at every step it was logged.

    model: the model's name, or "" where the record does not say; layers, stages: (D,) in depth order;
    steps: (T,), increasing; values: key → (T, D), NaN where a row lacks the key.
    """

    run: Path
    model: str
    probe: str
    layers: tuple[str, ...]
    stages: tuple[int, ...]
    steps: Array
    values: dict[str, Array]


def log_ratio(paths: ProbeHistory) -> Array:
    """log|alpha / beta|, (T, D): above 0 attention weighs more, below 0 convolution; not finite where one is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log(np.abs(paths.values["alpha"])) - np.log(np.abs(paths.values["beta"]))


def read_probe(run: Path, name: str) -> ProbeHistory:
    """Read the rows of a probe from a run folder (or from a `metrics.jsonl` file).

    Raises UserError when there is no record at that place, or no row of this probe in it.
    """
    record = run / "metrics.jsonl" if run.is_dir() else run
    if not record.is_file():
        raise UserError(_missing(run))
    rows = list(read_rows(record))
    logged = {row["step"]: row["layers"] for row in rows if row["event"] == name and row.get("layers")}
    if not logged:
        raise UserError(_not_logged(record, rows, name))
    steps = sorted(logged)
    first = logged[steps[0]]
    layers = _names(first)
    odd = next((step for step in steps if _names(logged[step]) != layers), None)
    if odd is not None:
        raise UserError(f"{record}: the layers logged at step {odd} are not those of step {steps[0]}")
    if not (values := _values([logged[step] for step in steps])):
        raise UserError(f"{record}: the rows of the probe {name} hold no number")
    return ProbeHistory(
        run=run,
        model=_model_name(rows),
        probe=name,
        layers=layers,
        stages=tuple(int(layer["stage"]) for layer in first),
        steps=np.array(steps, dtype=np.float64),
        values=values,
    )


def read_runs(folders: Sequence[Path], name: str) -> list[ProbeHistory]:
    """Read a probe's rows from several runs of one model, to compare them.

    Raises UserError for a run given twice, of another model than the first, or without a step that the others reached.
    """
    twice = [folder for i, folder in enumerate(folders) if folder.resolve() in [f.resolve() for f in folders[:i]]]
    if twice:
        raise UserError(f"{twice[0]} is given twice: a standard deviation needs different runs")
    runs = [read_probe(folder, name) for folder in folders]
    first = runs[0]
    for run in runs[1:]:
        if (run.layers, run.stages) != (first.layers, first.stages):
            raise UserError(
                f"{first.run} has {len(first.layers)} layers ({first.layers[0]}, ...) and {run.run} has "
                f"{len(run.layers)} ({run.layers[0]}, ...): draw each model in a picture of its own"
            )
        if run.values.keys() != first.values.keys():
            keys = [", ".join(history.values) for history in (first, run)]
            raise UserError(
                f"{first.run} measured {keys[0]} and {run.run} {keys[1]}: draw each in a picture of its own"
            )
    late = max(runs, key=lambda run: float(run.steps[0]))
    if late.steps[0] > common_end(runs):
        raise UserError(f"{late.run} starts at step {late.steps[0]:.0f}, after another run's last: they share no step")
    return runs


def common_end(runs: Sequence[ProbeHistory]) -> float:
    """The last step that every run has reached."""
    return min(float(run.steps[-1]) for run in runs)


def _names(layers: list[dict[str, Any]]) -> tuple[str, ...]:
    return tuple(layer["layer"] for layer in layers)


def _values(logged: list[list[dict[str, Any]]]) -> dict[str, Array]:
    """Key → (T, D) from T steps with D rows each; a number that is absent becomes NaN."""
    steps = [measured(layers) for layers in logged]
    keys = dict.fromkeys(key for columns in steps for key in columns)
    absent = [None] * len(logged[0])
    return {key: np.array([columns.get(key, absent) for columns in steps], dtype=np.float64) for key in keys}


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


def _not_logged(record: Path, rows: list[Row], name: str) -> str:
    found = ", ".join(dict.fromkeys(row["event"] for row in rows if row.get("layers"))) or "none"
    why = "the run's model has no ACmix blocks" if name == "paths" else "it found nothing to measure"
    return (
        f"{record} holds no rows of the probe {name}: run.probes leaves it out, {why}, or the run never started; "
        f"probes it holds: {found}"
    )
