"""What the rows of the target table share: the conditions, the authors' code, the roof of the machine."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch

from acmix import models
from acmix.errors import UserError
from benchmarks.cases import DTYPES, Case, Setting, build_case
from benchmarks.measure import Result, measure
from benchmarks.parity import ParityError
from benchmarks.roofline import Roofline, measure_roofline
from benchmarks.timing import Samples


class NotMeasuredError(Exception):
    """This machine or this call lacks what a target needs; the message says what."""


@dataclass(frozen=True)
class Figure:
    """A measured ratio with the results it comes from; note: what else was seen on the way."""

    value: Samples
    results: Sequence[Result] = ()
    note: str = ""


@dataclass(frozen=True)
class Target:
    """One row of the table: limit is the least ratio that meets it where at_least, else the greatest."""

    key: str
    what: str
    device: str
    limit: float
    at_least: bool
    measure: Callable[["Suite"], Figure]

    def __str__(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.limit:g}"

    def met(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit


@dataclass
class Suite:
    """Measures rows of the target table on one device.

    Args:
        authors: a clone of the authors' code, or None: rows that compare with it are then not measured.
        photos: a folder of photographs in class folders, or None: loaders are then not measured.
        seconds: time spent on each side of each comparison, about.
        rooflines: filled while running, by dtype.
    """

    device: torch.device
    authors: Path | None
    seconds: float = 5.0
    photos: Path | None = None
    rooflines: dict[str, Roofline] = field(default_factory=dict)

    @cached_property
    def setting(self) -> Setting:
        """The targets' conditions: float32 on a CPU, bf16 and channels_last at batch 128 on a GPU."""
        if self.device.type == "cuda":
            return Setting(self.device, "bf16", channels_last=True, batch_size=128, authors=self.authors)
        return Setting(self.device, authors=self.authors)

    def compare(self, setting: Setting, *subjects: str | Case) -> list[Result]:
        """Measure subjects in turn; raises ParityError if one may not be timed."""
        if setting.dtype not in self.rooflines:
            self.rooflines[setting.dtype] = measure_roofline(self.device, DTYPES[setting.dtype])
        cases = [build_case(subject, setting) if isinstance(subject, str) else subject for subject in subjects]
        results = measure(cases, self.rooflines[setting.dtype], seconds=self.seconds)
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
