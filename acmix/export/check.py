"""Whether an exported file computes what the network computes, and how fast."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LIMIT = 1e-4
"""Largest difference of a logit in float32 that an exported file may have from the network."""

BATCHES = (1, 3)
"""Numbers of images that a file is checked with."""

_SECONDS, _MOST_RUNS = 2.0, 50

Run = Callable[[Tensor], Tensor]


def largest_difference(run: Run, model: nn.Module, images: Tensor, *, any_size: bool) -> float:
    """The largest absolute difference of any logit; infinite where one of them is not a number.

    Args:
        run: What the file computes: images to logits.
        model: The network.
        images: At least as many as the largest of `BATCHES`.
        any_size: Whether to compare on images of another size and shape, too.
    """
    inputs = [images[:count] for count in BATCHES]
    if any_size:
        height, width = images.shape[2:]
        other = (height + height // 4 + 1, width + width // 2 + 1)
        inputs.append(F.interpolate(images[: BATCHES[-1]], other, mode="bilinear"))
    largest = 0.0
    for given in inputs:
        with torch.inference_mode():
            difference = (run(given) - model(given)).abs().max().item()
        largest = max(largest, difference) if difference == difference else float("inf")
    return largest


def median_milliseconds(runs: Sequence[Run], image: Tensor) -> list[float]:
    """Median time of each on one image, taken in turns so that what else the machine does meets all of them."""
    times: list[list[float]] = [[] for _ in runs]
    with torch.inference_mode():
        for run in runs:
            run(image)  # the first call makes ready
        end = time.perf_counter() + _SECONDS
        while len(times[0]) < 3 or (time.perf_counter() < end and len(times[0]) < _MOST_RUNS):
            for run, taken in zip(runs, times, strict=True):
                start = time.perf_counter()
                run(image)
                taken.append(1000 * (time.perf_counter() - start))
    return [statistics.median(taken) for taken in times]
