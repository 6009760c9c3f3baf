"""The learning-rate range test: train while the rate grows from step to step, and see where the loss falls fastest.

Source: Smith, Cyclical learning rates for training neural networks (2017), section 3.3, with rates that grow
exponentially.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d

from acmix.engine.learner import Learner

if TYPE_CHECKING:
    from acmix.data.loader import Batch, TrainLoader

_DIVERGED = 4.0
"""Multiple of the lowest smoothed loss at which the test stops: what follows says nothing more."""
_MEMORY = 0.9
_WIDTH = 0.03  # of the smoothing of the curve, as a share of the steps
_FEWEST = 8


@dataclass(frozen=True)
class RangeTest:
    """What a range test saw: rates and losses of its steps, (T,), and whether it stopped because the loss diverged."""

    rates: NDArray[np.float64]
    losses: NDArray[np.float64]
    diverged: bool

    @property
    def smoothed(self) -> NDArray[np.float64]:
        """The losses, (T,), as a Gaussian mean over neighbouring steps, which does not lag behind."""
        values: NDArray[np.float64] = gaussian_filter1d(
            self.losses, max(1.0, _WIDTH * len(self.losses)), mode="nearest"
        )
        return values

    @property
    def minimum(self) -> int:
        """The step of the lowest smoothed loss."""
        return int(self.smoothed.argmin())

    @property
    def steepest(self) -> int | None:
        """The step before the minimum at which the smoothed loss falls fastest over the logarithm of the rate.

        None where it never falls, or there are too few steps to tell.
        """
        if len(self.losses) < _FEWEST or self.minimum == 0:
            return None
        slope = np.gradient(self.smoothed, np.log(self.rates))[: self.minimum + 1]
        return int(slope.argmin()) if slope.min() < 0 else None


class _Ramp:
    """Stands in for the schedule: the rate of each step as given, with the factors of layers and path weights."""

    def __init__(self, optimizer: torch.optim.Optimizer, rates: Sequence[float]) -> None:
        self._optimizer = optimizer
        self._rates = rates

    def step_update(self, step: int) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = self._rates[step] * group.get("lr_scale", 1.0)


def growing_rates(first: float, last: float, steps: int) -> list[float]:
    """`steps` rates from `first` to `last`, each the same multiple of the one before."""
    return [float(rate) for rate in np.geomspace(first, last, steps)]


def range_test(
    learner: Learner, loader: "TrainLoader", rates: Sequence[float], on_step: Callable[[], object] = lambda: None
) -> RangeTest:
    """Take a step at each of the rates; `on_step` is called after each.

    It ends early at a loss that is not finite, or whose running mean is four times its lowest. The learner is spoilt
    for anything else. Training goes on through as many epochs as it takes.
    """
    learner.scheduler = _Ramp(learner.optimizer, rates)  # type: ignore[assignment]
    learner.model.train()
    losses: list[float] = []
    mean, lowest, diverged = 0.0, math.inf, False
    for step, batches in enumerate(_updates(loader, len(rates)), start=1):
        loss = torch.stack([part.read() for part in learner.gradients(batches, step)]).mean().item()
        if not math.isfinite(loss):
            diverged = True
            break
        losses.append(loss)
        mean = _MEMORY * mean + (1 - _MEMORY) * loss
        running = mean / (1 - _MEMORY**step)
        lowest = min(lowest, running)
        if running > _DIVERGED * lowest:
            diverged = True
            break
        learner.update(step)
        on_step()
    return RangeTest(np.array(rates[: len(losses)]), np.array(losses), diverged)


def _updates(loader: "TrainLoader", count: int) -> Iterator[list["Batch"]]:
    epoch = 0
    while count > 0:
        for batches in loader.epoch(epoch):
            yield batches
            count -= 1
            if count == 0:
                return
        epoch += 1
