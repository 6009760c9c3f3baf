"""Measure cases side by side: time, memory, arithmetic, and how near they come to what the machine can do."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from acmix.telemetry.flops import count_multiply_adds
from benchmarks.cases import DTYPES, Case, Setting, build_case, is_authors, twin
from benchmarks.parity import ParityError, check_parity
from benchmarks.peak import peak_bytes
from benchmarks.roofline import Roofline, measure_roofline
from benchmarks.timing import Samples, time_in_turn

MODES = ("train", "infer")


@dataclass(frozen=True)
class Result:
    """What one case took.

    seconds: per step of `batch_size` images; peak: bytes above weights and inputs, 0 where not measured; multiply_adds:
    of one image, forward; roofline: share of the speed that arithmetic and memory traffic allow, 0 to 1; refused: why
    it was not timed.
    """

    case: Case
    mode: str
    seconds: Samples | None = None
    peak: int = 0
    multiply_adds: int = 0
    roofline: float = 0.0
    refused: str = ""

    @property
    def images_per_second(self) -> float:
        return self.case.batch_size / self.seconds.median if self.seconds else 0.0

    @property
    def operations_per_second(self) -> float:
        """Floating-point operations that the mathematics asks for, a multiply-add being two of them."""
        return 2 * _passes(self.mode) * self.multiply_adds * self.images_per_second

    def as_dict(self) -> dict[str, Any]:
        """The result in JSON's types."""
        setting = self.case.setting
        row: dict[str, Any] = {
            "subject": self.case.label,
            "impl": self.case.impl,
            "mode": self.mode,
            "device": str(setting.device),
            "dtype": setting.dtype,
            "compile": setting.compile,
            "channels_last": setting.channels_last,
            "threads": setting.threads,
            "batch_size": self.case.batch_size,
            "shape": list(self.case.inputs[0].shape[1:]),
        }
        if self.seconds is None:
            return row | {"refused": self.refused}
        return row | {
            "seconds_median": self.seconds.median,
            "seconds_spread": self.seconds.spread,
            "seconds": list(self.seconds.values),
            "n": self.seconds.n,
            "images_per_second": self.images_per_second,
            "peak_bytes": self.peak,
            "multiply_adds": self.multiply_adds,
            "gflops_per_second": 1e-9 * self.operations_per_second,
            "roofline_share": self.roofline,
        }


class Bench:
    """Measures cases side by side. What is proved about a case, and the machine's roofs, are found out once."""

    def __init__(self) -> None:
        self.rooflines: dict[tuple[torch.device, str, int], Roofline] = {}
        self._refusals: dict[tuple[str, str, Setting], str] = {}

    def roofline(self, setting: Setting) -> Roofline:
        """What the machine can do at best on the setting's device and threads, in its dtype."""
        key = setting.device, setting.dtype, setting.threads
        if key not in self.rooflines:
            self.rooflines[key] = measure_roofline(setting.device, DTYPES[setting.dtype], setting.threads)
        return self.rooflines[key]

    def measure(
        self,
        cases: Sequence[Case],
        *,
        mode: str = "train",
        seconds: float = 5.0,
        rounds: int | None = None,
        memory: bool = True,
    ) -> list[Result]:
        """Check each case against its reference, then time those that pass, in turn.

        A training step is forward, loss and backward, without the optimizer; inference is the forward pass alone. The
        samples of one call are paired round by round, so their ratios hold on a busy machine.
        """
        refusals = [self.refusal(case) for case in cases]
        sound = [case for case, refusal in zip(cases, refusals, strict=True) if not refusal]
        for case in sound:
            case.module.train(mode == "train")
        steps = [case.train_step if mode == "train" else case.infer for case in sound]
        for step in steps:
            for _ in range(2):
                step()
        peaks = []
        for case, step in zip(sound, steps, strict=True):
            case.clear()
            peaks.append(peak_bytes(step, case.setting.device) if memory else 0)
        times = time_in_turn(steps, cases[0].setting.device, seconds=seconds, rounds=rounds) if steps else []
        measured = iter(zip(times, peaks, strict=True))
        return [
            Result(case, mode, refused=refusal) if refusal else self._result(case, mode, *next(measured))
            for case, refusal in zip(cases, refusals, strict=True)
        ]

    def refusal(self, case: Case) -> str:
        """Why a case may not be timed: what differs from its reference; empty if nothing does."""
        if is_authors(case.label):
            return ""
        # a compiled graph is another one for each batch; else the proof takes a part of it that is always the same
        setting = case.setting if case.setting.compile else replace(case.setting, batch_size=0)
        key = case.label, case.impl, setting
        if key not in self._refusals:
            try:
                check_parity(case)
                self._refusals[key] = ""
            except ParityError as error:
                self._refusals[key] = str(error)
        return self._refusals[key]

    def _result(self, case: Case, mode: str, seconds: Samples, peak: int) -> Result:
        passes, count = _passes(mode), _multiply_adds(case)
        roofline = self.roofline(case.setting)
        best = roofline.seconds(passes * count * case.batch_size, passes * case.traffic)
        case.clear()
        return Result(case, mode, seconds, peak, count, best / seconds.median)


def _passes(mode: str) -> int:
    """How often a step does the work of a forward pass: backward computes, and moves, twice what forward does."""
    return 3 if mode == "train" else 1


def _multiply_adds(case: Case) -> int:
    """Per image. The authors' attention is written elementwise, which is not counted: their twin of ours is."""
    counted = build_case(twin(case.label), case.setting) if is_authors(case.label) else case
    return count_multiply_adds(counted.module, *(t.detach()[:1].float() for t in counted.inputs))
