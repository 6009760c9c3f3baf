"""Checks of arguments that the networks have in common."""

import math
from collections.abc import Sequence


def check_rates(**rates: float) -> None:
    """Raise ValueError unless every rate is a probability below 1."""
    for name, rate in rates.items():
        if not 0 <= rate < 1:
            raise ValueError(f"{name} must be at least 0 and below 1, got {rate}")


def check_positive(**sizes: int | Sequence[int]) -> None:
    """Raise ValueError unless every size, or every one of a pair, is at least 1."""
    for name, size in sizes.items():
        if min((size,) if isinstance(size, int) else size) < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def perceptron_width(channels: int, ratio: float) -> int:
    """Hidden width of a perceptron over so many channels; raises ValueError unless it is at least 1."""
    if not 1 <= channels * ratio < math.inf:
        raise ValueError(f"an mlp_ratio of {ratio} leaves a perceptron over {channels} channels no hidden layer")
    return int(channels * ratio)
