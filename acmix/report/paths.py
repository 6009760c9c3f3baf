"""What the paths did, from the records of runs and from their evaluations."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from acmix.errors import UserError
from acmix.report.collect import Arm
from acmix.report.evaluation import Evaluation
from acmix.telemetry.history import ProbeHistory, read_probe, read_runs
from acmix.telemetry.layer_rows import measured


def logged_in(arms: Sequence[Arm], probe: str) -> tuple[dict[str, list[ProbeHistory]], list[str]]:
    """Arm → what a probe logged in its runs; and of which arms it logged nothing, with the reason."""
    found: dict[str, list[ProbeHistory]] = {}
    missing = []
    for arm in arms:
        logged = [run.folder for run in arm.runs if any(r["event"] == probe and r.get("layers") for r in run.rows)]
        try:
            if logged:
                found[arm.name] = read_runs(logged, probe)
            else:
                read_probe(arm.runs[0].folder, probe)
        except UserError as error:
            missing.append(f"{arm.name}: {error}")
    return found, missing


def shares_after_training(arm: Arm, evaluations: Sequence[Evaluation]) -> list[ProbeHistory]:
    """The effective share after training, from evaluations; empty for a network without blocks that have both paths."""
    runs = [run for run in arm.runs if run.step]
    histories = []
    for evaluation in evaluations:
        values = {key: np.array([column], dtype=np.float64) for key, column in measured(evaluation.paths).items()}
        if "attention_share" in values:
            histories.append(
                ProbeHistory(
                    run=runs[0].folder if runs else Path(),
                    model="",
                    probe="path_shares",
                    layers=tuple(row["layer"] for row in evaluation.paths),
                    stages=tuple(int(row["stage"]) for row in evaluation.paths),
                    steps=np.array([max(run.step for run in runs)] if runs else [0], dtype=np.float64),
                    values=values,
                )
            )
    return histories


def place(row: Mapping[str, Any], paths: Sequence[Mapping[str, Any]]) -> str:
    """Where a lesion is, short."""
    if "layer" in row:
        depth = next((block["depth"] for block in paths if block["layer"] == row["layer"]), row["layer"])
        return f"block {depth}"
    return "all blocks" if row["stage"] == "all" else f"stage {row['stage']}"


def lesion_changes(evaluations: Sequence[Evaluation]) -> tuple[list[str], dict[tuple[str, str], np.ndarray]]:
    """The places, and (path, mode) → change of top-1 as (runs, places), NaN where a place lacks the path."""
    first = evaluations[0]
    places = list(dict.fromkeys(place(row, first.paths) for row in first.lesions))
    changes: dict[tuple[str, str], np.ndarray] = {}
    for i, evaluation in enumerate(evaluations):
        for row in evaluation.lesions:
            empty = np.full((len(evaluations), len(places)), np.nan)
            column = changes.setdefault((row["path"], row["mode"]), empty)
            column[i, places.index(place(row, first.paths))] = row["delta_top1"]
    return places, changes
