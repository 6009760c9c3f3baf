"""What the rows of the target table share: the conditions, the authors' code, what is already known of the machine."""

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from acmix import models
from acmix.errors import UserError
from benchmarks.cases import Case, Setting, build_case
from benchmarks.measure import Bench, Result
from benchmarks.parity import ParityError
from benchmarks.timing import Samples


class NotMeasuredError(Exception):
    """This machine or this call lacks what a target needs; the message says what."""


class BrokenError(Exception):
    """What was to be measured did not run; the message says how it ended."""


@dataclass(frozen=True)
class Figure:
    """What was measured, with the results it comes from; note: what else was seen on the way."""

    value: Samples
    results: Sequence[Result] = ()
    note: str = ""


@dataclass(frozen=True)
class Target:
    """One row of the table: limit is the least figure that meets it where at_least, else the greatest.

    measure is called for each of `threads`, numbers of CPU threads that have a column of their own; tried: where it was
    missed, why, and the designs that were tried for it.
    """

    key: str
    what: str
    device: str
    limit: float
    at_least: bool
    measure: Callable[["Suite", int], Figure]
    threads: tuple[int, ...] = (1, 2)
    tried: str = ""

    def __str__(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.limit:g}"

    def met(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit


@dataclass
class Suite:
    """Measures rows of the target table on one device.

    Args:
        authors: a clone of the authors' code, or None: rows that compare with it are then not measured.
        photos: a folder of photographs in class folders, or None: their loading is then not measured.
        cifar: CIFAR-10 as JPEG files, train/CLASS/FILE and test/CLASS/FILE, or None: as above.
        seconds: time spent on each side of each comparison, about.
        bench: what the rows have proved and found out so far.
    """

    device: torch.device
    authors: Path | None
    seconds: float = 5.0
    photos: Path | None = None
    cifar: Path | None = None
    bench: Bench = field(default_factory=Bench)

    def setting(self, threads: int = 1, mode: str = "train", **changes: Any) -> Setting:
        """The targets' conditions: on a CPU float32, batch 4 to train and 8 to infer; on a GPU bf16, channels_last and
        batch 128."""
        if self.device.type == "cuda":
            common = Setting(self.device, "bf16", channels_last=True, batch_size=128, authors=self.authors)
        else:
            batch = 4 if mode == "train" else 8
            common = Setting(self.device, batch_size=batch, threads=threads, authors=self.authors)
        return replace(common, **changes)

    def compare(self, *cases: Case, mode: str = "train", memory: bool = True) -> list[Result]:
        """Measure cases in turn; raises ParityError if one may not be timed."""
        results = self.bench.measure(cases, mode=mode, seconds=self.seconds, memory=memory)
        for result in results:
            if result.refused:
                raise ParityError(result.refused)
        return results

    def with_authors(self, setting: Setting, theirs: str, ours: str) -> tuple[Case, Case]:
        """Build both and show that they compute the same with the same weights."""
        if self.authors is None:
            raise NotMeasuredError("needs --authors PATH")
        pair = build_case(theirs, setting), build_case(ours, replace(setting, compile=False))
        _agree(*pair)
        return pair[0], build_case(ours, setting)


def _agree(theirs: Case, ours: Case) -> None:
    """With the authors' weights ours must give the authors' output. Both are float32, so they may differ by rounding,
    which a network amplifies; a mistake would be of order 1. Raises ParityError."""
    module, reference = copy.deepcopy(ours.module).eval(), copy.deepcopy(theirs.module).eval()
    models.load_official(module, reference.state_dict())
    inputs = tuple(t.detach()[:2] for t in theirs.inputs)
    with torch.no_grad():
        expected, found = reference(*inputs), module(*inputs)
    difference = float((found - expected).norm() / expected.norm())
    if not difference < 1e-4:
        raise ParityError(f"{ours.label} differs from {theirs.label} by {difference:.1e} relative; neither is timed")


def suite_device(name: str) -> torch.device:
    """The device of a run. Raises UserError for CUDA where there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no CUDA device here; use --device cpu")
    return torch.device(name)


def need_cores(count: int) -> None:
    """Raises NotMeasuredError where this process may use fewer processor cores."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if usable < count:
        raise NotMeasuredError(f"needs {count} cores, this process may use {usable}")
