"""Times of several steps measured in turn, in one process, so that a busy machine slows all of them alike."""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Step = Callable[[], None]
_MIN_SAMPLE = 0.03  # seconds: shorter steps are repeated within a sample, above the clock's and the caches' noise


def use_threads(count: int) -> None:
    """Let PyTorch, and the operations written in C++, compute on so many CPU threads from now on."""
    if torch.get_num_threads() != count:  # to set it again is not free
        torch.set_num_threads(count)


@dataclass(frozen=True)
class Samples:
    """Figures that were measured n times, with median and spread (the distance between the quartiles)."""

    values: tuple[float, ...]

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def spread(self) -> float:
        if self.n < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.values, n=4, method="inclusive")
        return high - low

    def over(self, other: "Samples") -> "Samples":
        """Ratio to another step's samples, round by round: what disturbs a round disturbs both of its samples."""
        return Samples(tuple(mine / theirs for mine, theirs in zip(self.values, other.values, strict=True)))


def time_in_turn(
    steps: Sequence[Step], device: torch.device, *, seconds: float = 5.0, rounds: int | None = None
) -> list[Samples]:
    """Seconds per call of each step, sampled in rounds A B C, A B C, ...

    Args:
        steps: they must have been called before, so that nothing compiles or allocates for the first time.
        seconds: time to spend on each step, about; at least 5 rounds are made.
        rounds: exact number of rounds, instead of `seconds`.
    """
    repeats = [max(1, round(_MIN_SAMPLE / _sample(step, 1, device))) for step in steps]
    samples: list[list[float]] = [[] for _ in steps]
    gc.collect()
    gc.disable()
    try:
        started = time.perf_counter()
        while not _finished(len(samples[0]), rounds, time.perf_counter() - started, seconds * len(steps)):
            for step, repeat, taken in zip(steps, repeats, samples, strict=True):
                taken.append(_sample(step, repeat, device))
    finally:
        gc.enable()
    return [Samples(tuple(taken)) for taken in samples]


def _finished(done: int, rounds: int | None, elapsed: float, budget: float) -> bool:
    return done >= rounds if rounds is not None else done >= 5 and elapsed > budget


def _sample(step: Step, repeat: int, device: torch.device) -> float:
    _wait(device)
    started = time.perf_counter()
    for _ in range(repeat):
        step()
    _wait(device)
    return max(time.perf_counter() - started, 1e-9) / repeat


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
