"""The results of a study: what every arm reached over its seeds, and how it differs from the reference."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from acmix.config import Config
from acmix.studies.outcome import Outcome
from acmix.studies.schema import Study
from acmix.studies.size import Size
from acmix.studies.statistics import mean_and_std, paired_difference

Outcomes = Mapping[str, Mapping[int, Outcome]]
"""Arm → seed → what came of the run; runs that are not finished are missing."""


def summarise(
    study: Study, outcomes: Outcomes, sizes: Mapping[str, Size], reference_config: Config, overrides: Sequence[str]
) -> dict[str, Any]:
    """The content of `results.json`.

    `arms` holds for each arm, in the study's order: name; seeds, those finished, and in their order top1 of the last
    epoch and best of all, in percent; mean and std of top1 over the seeds and n; epochs; parameters; multiply_adds
    for an image; images_per_second in training, the mean over seeds of each run's median; difference to the reference
    in points over the seeds that both have, its interval at 95 %, p and pairs (null where `acmix.studies.statistics`
    says so, and for the reference); paths, a list of {stage, alpha, alpha_std, beta, beta_std} after training.
    """
    reference = outcomes[study.reference]
    return {
        "study": study.name,
        "base": str(study.base),
        "overrides": list(overrides),
        "model": reference_config.model.name,
        "dataset": reference_config.data.dataset,
        "equal": study.equal,
        "reference": study.reference,
        "seeds": list(study.seeds),
        "arms": [_arm(study, arm, outcomes[arm], reference, sizes[arm]) for arm in study.arms],
    }


def missing(study: Study, results: Mapping[str, Any]) -> dict[str, list[int]]:
    """Arm → seeds without a result; arms that are complete are left out."""
    left = {arm["name"]: [seed for seed in study.seeds if seed not in arm["seeds"]] for arm in results["arms"]}
    return {arm: seeds for arm, seeds in left.items() if seeds}


def _arm(
    study: Study, name: str, runs: Mapping[int, Outcome], reference: Mapping[int, Outcome], size: Size
) -> dict[str, Any]:
    seeds = [seed for seed in study.seeds if seed in runs]
    found = [runs[seed] for seed in seeds]
    mean, std = mean_and_std([run.top1 for run in found])
    pairs = [] if name == study.reference else [seed for seed in seeds if seed in reference]
    difference = paired_difference([runs[seed].top1 for seed in pairs], [reference[seed].top1 for seed in pairs])
    rates = [run.images_per_second for run in found if math.isfinite(run.images_per_second)]
    return {
        "name": name,
        "overrides": list(study.arms[name]),
        "seeds": seeds,
        "top1": [run.top1 for run in found],
        "best": [run.best for run in found],
        "mean": mean,
        "std": std,
        "n": len(found),
        "epochs": max((run.epochs for run in found), default=None),
        "parameters": size.parameters,
        "multiply_adds": size.multiply_adds,
        "images_per_second": mean_and_std(rates)[0],
        "difference": difference.mean,
        "interval": difference.interval,
        "p": difference.p,
        "pairs": difference.n,
        "paths": _paths(found),
    }


def _paths(runs: Sequence[Outcome]) -> list[dict[str, Any]]:
    rows = []
    for stage in sorted({stage for run in runs for stage in run.paths}):
        pairs = [run.paths[stage] for run in runs if stage in run.paths]
        row: dict[str, Any] = {"stage": stage}
        for key, values in zip(("alpha", "beta"), zip(*pairs, strict=True), strict=True):
            row[key], row[f"{key}_std"] = mean_and_std(values)
        rows.append(row)
    return rows
