"""The tables of a report: rows of text, a row of heads first."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np

from acmix.engine.confusion import row_name
from acmix.engine.progress import is_finite
from acmix.report.collect import Arm, Run, common, differences
from acmix.report.evaluation import Evaluation
from acmix.studies.outcome import rate
from acmix.studies.statistics import mean_and_std
from acmix.studies.table import spread
from acmix.telemetry.record import Row, as_number

WORST = 5


@dataclass(frozen=True)
class Table:
    """heads: of the columns; rows: the first cell of each names it; caption: what the table shows."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


def labelled(arms: Sequence[Arm]) -> dict[str, Run]:
    """Every run under the name that people tell it by; with its folder where others of its arm have its seed."""
    found = {}
    for arm in arms:
        seeds = Counter(run.seed for run in arm.runs)
        for run in arm.runs:
            where = f" ({run.folder})" if seeds[run.seed] > 1 else ""
            found[f"{arm.name} seed {run.seed}{where}"] = run
    return found


def repeated(arms: Sequence[Arm]) -> list[str]:
    """Which arms hold runs of one seed: their spread is then not one over seeds."""
    found = []
    for arm in arms:
        seeds = [run.seed for run in arm.runs]
        known = list(dict.fromkeys(seeds))
        if len(known) < len(seeds) and "?" not in known:
            named = f"seed{'s' * (len(known) > 1)} {', '.join(known)}"
            found.append(f"{arm.name}: {len(seeds)} runs of the {named} alone, so their spread is not one over n seeds")
    return found


def results_table(arms: Sequence[Arm], evaluations: Mapping[str, Sequence[Evaluation]]) -> Table:
    """A row an arm: mean ± standard deviation over its runs. `evaluations`: arm → those of its runs."""
    scored = any(evaluations.values())
    macro = ["macro precision, %", "macro recall, %", "macro F1, %"] if scored else []
    heads = [
        "arm", "n", "top-1, %", "best epoch, %", "top-5, %", "validation loss", *macro, "parameters", "images/s",
        "training time",
    ]  # fmt: skip
    rows = [_result(arm, evaluations.get(arm.name, ()), scored) for arm in arms]
    caption = "Last epoch, mean ± standard deviation over n seeds; the best epoch is chosen on these same images."
    return Table(heads, rows, caption)


def _result(arm: Arm, evaluations: Sequence[Evaluation], scored: bool) -> list[str]:
    runs = arm.judged
    last = [run.evaluations[-1] for run in runs]

    def over_runs(key: str, digits: int) -> str:
        return _spread([as_number(row.get(key)) for row in last], digits)

    best = [_best(run) for run in runs]
    macro = (
        [_spread([100 * e.per_class["macro avg"][key] for e in evaluations], 2) for key in _SCORES] if scored else []
    )
    count = str(len(runs)) if all(run.finished for run in runs) else f"{len(runs)} unfinished"
    return [
        arm.name, count, over_runs("top1", 2), _spread(best, 2), over_runs("top5", 2), over_runs("loss", 4), *macro,
        _parameters(arm), _spread([rate(list(run.rows)) for run in runs], 0),
        _time([as_number(run.end.get("seconds")) for run in runs if run.start.get("resumed_from") is None]),
    ]  # fmt: skip


def _best(run: Run) -> float | None:
    """The highest top-1 of the evaluations with a finite loss, as `best` is chosen; of all where there is none."""
    rows = [row for row in run.evaluations if is_finite(row)] or run.evaluations
    return max((score for row in rows if (score := as_number(row.get("top1"))) is not None), default=None)


_SCORES = ("precision", "recall", "f1-score")


def _spread(values: Sequence[float | None], digits: int) -> str:
    known = [value for value in values if value is not None and np.isfinite(value)]
    return spread(*mean_and_std(known), digits)


def _time(seconds: Sequence[float | None]) -> str:
    known = [value for value in seconds if value is not None]
    return str(timedelta(seconds=round(float(np.mean(known))))) if known else ""


def _parameters(arm: Arm) -> str:
    counts = {run.start.get("parameters") for run in arm.runs} - {None}
    return ", ".join(f"{count:,}" for count in sorted(c for c in counts if isinstance(c, int)))


def runs_table(arms: Sequence[Arm]) -> Table:
    """A row a run: where it lies and how far it is."""
    rows = []
    for arm in arms:
        for run in arm.runs:
            last: Row = run.evaluations[-1] if run.evaluations else {}
            top1 = as_number(last.get("top1"))
            epoch = "" if not last else str(last.get("epoch", ""))
            score = "" if top1 is None else f"{top1:.2f}"
            rows.append([arm.name, run.seed, run.told(), epoch, score, str(run.folder)])
    return Table(["arm", "seed", "state", "epochs", "top-1, %", "folder"], rows, "Every run.")


def differences_table(arms: Sequence[Arm]) -> Table:
    """The keys in which the arms differ; no rows for one arm."""
    rows = [[key, *cells] for key, cells in differences(arms).items()]
    return Table(["key", *(arm.name for arm in arms)], rows, "Keys of the config in which the arms differ.")


def environment_table(arms: Sequence[Arm]) -> Table:
    """Versions, revision and machine, from the `start` rows; a value in which runs differ says whose it is."""
    told: dict[str, dict[str, str]] = {}
    for who, run in labelled(arms).items():
        versions = run.start.get("versions")
        facts = {key: run.start.get(key) for key in ("git", "device", "processes", "threads", "host")}
        for key, value in (versions if isinstance(versions, dict) else {}).items() | facts.items():
            if value is not None:
                told.setdefault(str(key), {})[who] = str(value)
    order = ["git", "device", "processes", "threads", "host", "python", "acmix", "torch"]
    keys = sorted(told, key=lambda key: (order.index(key) if key in order else len(order), key))
    return Table(["what", "value"], [[key, common(told[key])] for key in keys])


def class_scores(evaluations: Sequence[Evaluation]) -> Table:
    """Precision, recall and F1 of each class, in percent, mean ± standard deviation over the runs of an arm."""
    names = _reported(evaluations[0])
    rows = []
    for name in names:
        scores = (_spread([100 * e.per_class[row_name(name)][key] for e in evaluations], 1) for key in _SCORES)
        rows.append([name, *scores, str(int(evaluations[0].per_class[row_name(name)]["support"]))])
    return Table(["class", "precision, %", "recall, %", "F1, %", "images"], rows)


def worst_classes(evaluations: Sequence[Evaluation]) -> Table:
    """The classes with the lowest mean F1, and what each is most often taken for."""
    first = evaluations[0]
    matrix = np.sum([e.matrix for e in evaluations], axis=0)
    places = {name: i for i, name in enumerate(first.classes)}

    def mean_f1(name: str) -> float:
        return float(np.mean([e.per_class[row_name(name)]["f1-score"] for e in evaluations]))

    rows = []
    for name in sorted(_reported(first), key=mean_f1)[:WORST]:
        taken = matrix[places[name]].copy()
        taken[places[name]] = 0
        other = first.classes[int(taken.argmax())]
        share = 100 * taken.max() / max(matrix[places[name]].sum(), 1)
        scores = (
            _spread([100 * e.per_class[row_name(name)][key] for e in evaluations], 1) for key in reversed(_SCORES)
        )
        rows.append([name, *scores, f"{other}, {share:.1f} %" if taken.max() else "none"])
    return Table(["class", "F1, %", "recall, %", "precision, %", "most often taken for"], rows)


def _reported(evaluation: Evaluation) -> list[str]:
    """The classes that have a row of scores, in order."""
    return [name for name in evaluation.classes if row_name(name) in evaluation.per_class]


_MEASURES: Sequence[tuple[str, str, int]] = (
    ("alpha", "α", 3),
    ("beta", "β", 3),
    ("attention_rms", "RMS of α·attention", 3),
    ("convolution_rms", "RMS of β·convolution", 3),
    ("attention_share", "effective share of attention", 3),
    ("cosine", "cosine of the paths", 3),
    ("entropy_bits", "attention entropy, bits", 2),
    ("distance_px", "attention distance, pixels", 2),
)


def measures_table(evaluations: Sequence[Evaluation]) -> Table:
    """What the paths of each block do, mean ± standard deviation over the runs of an arm."""
    blocks = list(zip(*(e.paths for e in evaluations), strict=True))
    rows = [
        [str(block[0]["depth"]), block[0]["layer"], str(block[0]["stage"])]
        + [_spread([row[key] for row in block], digits) for key, _, digits in _MEASURES]
        for block in blocks
    ]
    return Table(["depth", "block", "stage", *(name for _, name, _ in _MEASURES)], rows)


def lesions_table(evaluations: Sequence[Evaluation], place: Callable[[Mapping[str, Any]], str]) -> Table:
    """What each lesion changes, mean ± standard deviation over the runs of an arm."""
    rows = [
        [
            place(lesion[0]), lesion[0]["path"], lesion[0]["mode"],
            _spread([row["top1"] for row in lesion], 2), _spread([row["delta_top1"] for row in lesion], 2),
            _spread([row["delta_loss"] for row in lesion], 3),
        ]
        for lesion in zip(*(e.lesions for e in evaluations), strict=True)
    ]  # fmt: skip
    return Table(["place", "path", "mode", "top-1, %", "change, points", "change of loss"], rows)
