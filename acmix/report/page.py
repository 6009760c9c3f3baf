"""The page: every section from what there is, and in words what is missing."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from acmix.checkpoint.atomic import write_atomically
from acmix.config import as_override
from acmix.config.resume import shown
from acmix.engine.confusion import draw_confusion
from acmix.engine.run_folder import CONFIG
from acmix.paths import escape_path
from acmix.report.collect import OF_A_SEED, Arm, Run
from acmix.report.evaluation import Evaluation
from acmix.report.figures import Picture, curves, lesion_panel, path_panels, photo, picture
from acmix.report.paths import lesion_changes, logged_in, place, shares_after_training
from acmix.report.tables import (
    Table,
    class_scores,
    differences_table,
    environment_table,
    labelled,
    lesions_table,
    measures_table,
    repeated,
    results_table,
    runs_table,
    worst_classes,
)
from acmix.studies.plot import draw
from acmix.studies.table import COMPARED, comparison
from acmix.telemetry.plot import BALANCE, SHARE, WEIGHTS

Evaluations = Mapping[Run, Evaluation | str]
"""Run → its evaluation, or why there is none."""


@dataclass(frozen=True)
class Section:
    """A part of the page: pictures in a grid, more under headings, tables, others to unfold, what is missing."""

    id: str
    title: str
    text: str = ""
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    groups: Mapping[str, Sequence[Picture]] = field(default_factory=dict)
    code: str = ""
    details: Mapping[str, Table | str] = field(default_factory=dict)
    missing: Sequence[str] = ()


def write_page(
    out: Path,
    arms: Sequence[Arm],
    evaluations: Evaluations,
    command: str,
    study: Mapping[str, Any] | None = None,
) -> None:
    """Write the report of some arms as one HTML file. Raises UserError where it cannot be written.

    Args:
        out: the file.
        arms: what to report, with all runs read.
        evaluations: for each run what its data told, or why they told nothing.
        command: that made the page.
        study: `results.json` of the study that the arms are of; the page then leads with it.
    """
    pages = Environment(
        loader=PackageLoader("acmix.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    report = _Report(arms, evaluations, command, study)
    html = pages.get_template("page.html").render(
        title=report.title, subtitle=report.subtitle, sections=report.sections()
    )
    write_atomically(out, html, make_parents=True)


@dataclass(frozen=True)
class _Report:
    arms: Sequence[Arm]
    evaluations: Evaluations
    command: str
    study: Mapping[str, Any] | None

    @property
    def title(self) -> str:
        """The study, or the models and the data."""
        if self.study is not None:
            return f"Study {self.study['study']}"
        return " and ".join(self._all("model.name")) + " on " + " and ".join(self._all("data.dataset"))

    @property
    def subtitle(self) -> str:
        """How many runs of what."""
        runs = sum(len(arm.runs) for arm in self.arms)
        finished = sum(run.finished for arm in self.arms for run in arm.runs)
        told = f"{_count(len(self.arms), 'arm')}, {_count(runs, 'run')}"
        return told + ("" if finished == runs else f", {finished} of them finished")

    def _all(self, key: str) -> list[str]:
        return list(dict.fromkeys(str(arm.config.get(key, "?")) for arm in self.arms))

    def sections(self) -> list[Section]:
        """All of them, in order; one without content says why."""
        lead = [] if self.study is None else [self._comparison(self.study)]
        return [
            *lead,
            self._what(),
            self._results(),
            self._curves(),
            self._paths(),
            self._lesions(),
            self._classes(),
            self._mistakes(),
            Section("environment", "Environment", tables=[environment_table(self.arms)], missing=self._unstarted()),
            self._commands(),
        ]

    @cached_property
    def evaluated(self) -> dict[str, list[Evaluation]]:
        """Arm → the evaluations of its runs, for the arms that have any."""
        found = {
            arm.name: [e for run in arm.runs if isinstance(e := self.evaluations.get(run), Evaluation)]
            for arm in self.arms
        }
        return {name: evaluations for name, evaluations in found.items() if evaluations}

    @cached_property
    def unevaluated(self) -> list[str]:
        """Which runs have no evaluation, and why; one line for a reason."""
        reasons: dict[str, list[str]] = {}
        for who, run in labelled(self.arms).items():
            if not isinstance(reason := self.evaluations.get(run, "left out"), Evaluation):
                reasons.setdefault(reason, []).append(who)
        everyone = len(labelled(self.arms))
        return [
            f"Not evaluated: {reason}" if len(who) == everyone else f"Not evaluated: {', '.join(who)}: {reason}"
            for reason, who in reasons.items()
        ]

    def _comparison(self, study: Mapping[str, Any]) -> Section:
        heads, *rows = comparison(study)
        text = f"{study['model']} on {study['dataset']}, equal {study['equal']}. {COMPARED}"
        left = [
            f"{arm['name']} seed {seed}" for arm in study["arms"] for seed in study["seeds"] if seed not in arm["seeds"]
        ]
        missing = [f"Not finished: {', '.join(left)}"] if left else []
        dots = picture(draw(study), "Top-1 of every seed by arm, and the difference of each arm to the reference")
        return Section("study", "The arms compared", text, [dots], [Table(heads, rows)], missing=missing)

    def _what(self) -> Section:
        lines = [f"{key}: {shown(value)}" for key, value in self.arms[0].config.items()]
        difference = differences_table(self.arms)
        return Section(
            "what",
            "What was run",
            "Arms are alike in every key that is not listed." if difference.rows else "",
            tables=[difference, runs_table(self.arms)] if difference.rows else [runs_table(self.arms)],
            details={f"Config of {self.arms[0].name}, without {' and '.join(OF_A_SEED)}": "\n".join(lines)},
            missing=[f"{who}: {run.told()}" for who, run in labelled(self.arms).items() if not run.finished]
            + [f"{who}: no readable config" for who, run in labelled(self.arms).items() if not run.config],
        )

    def _results(self) -> Section:
        empty = [arm.name for arm in self.arms if not arm.judged]
        missing = [f"No evaluation in the record of {', '.join(empty)}"] if empty else []
        missing += repeated(self.arms)
        text = ""
        if self.evaluated:
            text = f"Precision, recall and F1 on {self._images()}, means over the classes."
        else:
            missing += [f"No precision, recall and F1. {line}" for line in self.unevaluated]
        return Section("results", "Results", text, tables=[results_table(self.arms, self.evaluated)], missing=missing)

    def _images(self) -> str:
        counts = {(e.images, e.total) for found in self.evaluated.values() for e in found}
        told = [f"{n:,} of {total:,}" if n < total else f"all {total:,}" for n, total in sorted(counts)]
        return f"{' or '.join(told)} validation images"

    def _curves(self) -> Section:
        panels = curves(self.arms)
        missing = [] if panels else ["No run logged a step of training or an evaluation"]
        text = "Mean over the seeds with ± one standard deviation as a band; where seeds end apart, each goes on alone."
        return Section("curves", "Curves", text if panels else "", panels, missing=missing)

    def _paths(self) -> Section:
        weights, missing = logged_in(self.arms, "paths")
        shares, _ = logged_in(self.arms, "path_shares")
        shares = {name: runs for name, runs in shares.items() if "attention_share" in runs[0].values}
        timed = set(shares)
        for name, found in self.evaluated.items():
            if name not in shares and (history := shares_after_training(self._arm(name), found)):
                shares[name] = history
        notes = {name: f", measured after training on {self._images()}" for name in shares if name not in timed}
        mixing = [name for name, runs in weights.items() if {"alpha", "beta"} <= runs[0].values.keys()]
        both = [name for name in mixing if all(weights[name][0].values[key].any() for key in ("alpha", "beta"))]
        if without := [name for name in both if name not in timed]:
            told = "No effective share over training of" if self.evaluated else "No effective share of"
            missing = [*missing, f"{told} {', '.join(without)}: run.probes leaves out path_shares"]
        mixed = {name: weights[name] for name in mixing}
        panels = path_panels(WEIGHTS, mixed, {}) | path_panels(BALANCE, mixed, {}) | path_panels(SHARE, shares, notes)
        tables = {
            f"Measures of each block: {name}": measures_table(found)
            for name, found in self.evaluated.items()
            if found[0].paths
        }
        return Section("paths", "What the paths weigh and add", _PATHS, groups=panels, details=tables, missing=missing)

    def _arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)

    def _lesions(self) -> Section:
        hurt = {name: found for name, found in self.evaluated.items() if found[0].lesions}
        panels, tables = [], {}
        for name, found in hurt.items():
            places, changes = lesion_changes(found)
            alt = f"Change of top-1 with each path of each block silenced, {name}"
            panels.append(picture(lesion_panel(places, changes), alt, name))
            tables[f"Numbers: {name}"] = lesions_table(found, partial(place, paths=found[0].paths))
        missing = [f"{name}: no ACmix blocks" for name in self.evaluated if name not in hurt]
        text = (
            f"One path at a time is zeroed, or replaced by its mean, at inference; on {self._images()}." if hurt else ""
        )
        return Section("lesions", "Lesions", text, panels, details=tables, missing=[*self.unevaluated, *missing])

    def _classes(self) -> Section:
        panels, tables, every = [], [], {}
        for name, found in self.evaluated.items():
            matrix = np.sum([e.matrix for e in found], axis=0)
            caption = f"{name}, {_count(len(found), 'seed')} together" if len(found) > 1 else name
            panels.append(
                picture(draw_confusion(matrix, found[0].classes), f"Confusion matrix, {name}", caption, cut=True)
            )
            worst = worst_classes(found)
            tables.append(Table(worst.heads, worst.rows, f"Worst classes: {name}"))
            every[f"All classes: {name}"] = class_scores(found)
        text = f"On {self._images()}." if panels else ""
        return Section("classes", "Classes", text, panels, tables, details=every, missing=self.unevaluated)

    def _mistakes(self) -> Section:
        photos, missing = {}, list(self.unevaluated)
        for name, found in self.evaluated.items():
            grid = [
                photo(
                    m.pixels,
                    f"{m.true} taken for {m.predicted}",
                    f"{m.true} → {m.predicted}, {100 * m.probability:.1f} %",
                )
                for m in found[0].mistakes
            ]
            if grid:
                photos[name] = grid
            else:
                missing.append(f"{name}: no mistake on {self._images()}")
        text = "True class → predicted class and its probability, of the first seed." if photos else ""
        return Section("mistakes", "Confident mistakes", text, groups=photos, missing=missing)

    def _unstarted(self) -> list[str]:
        return [f"{who}: its record says nothing of it" for who, run in labelled(self.arms).items() if not run.start]

    def _commands(self) -> Section:
        lines = [f"# {who}\n{_training(run)}" for who, run in labelled(self.arms).items()]
        revisions = list(
            dict.fromkeys(str(run.start["git"]) for run in labelled(self.arms).values() if run.start.get("git"))
        )
        checkout = [f"git checkout {shlex.quote(revision.partition('+')[0])}" for revision in revisions[:1]]
        told = []
        if len(revisions) > 1:
            told.append(f"The runs were made by {len(revisions)} revisions, see Environment")
        if any("+" in revision for revision in revisions):
            told.append("Files differed from the revision when a run was made")
        code = "\n\n".join([*checkout, *lines, f"# this page\n{self.command}"])
        return Section("commands", "Commands to reproduce", code=code, missing=told)


_PATHS = (
    "α multiplies attention and β convolution. The effective share compares what the paths add to the block's output, "
    "RMS(α·attention) / (RMS(α·attention) + RMS(β·convolution)): a small weight on a large output is no small part."
)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _training(run: Run) -> str:
    """The command that trains the run again, in a folder of its own."""
    processes = run.start.get("processes", 1)
    several = isinstance(processes, int) and processes > 1
    start = ["torchrun", "--nproc-per-node", str(processes)] if several else ["python"]
    again = as_override("run.dir", escape_path(f"{run.folder}-again"))
    return shlex.join([*start, "train.py", "--config", str(run.folder / CONFIG), again])
