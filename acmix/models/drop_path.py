"""Stochastic depth that grows with depth."""

from collections.abc import Sequence

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily


def drop_path_rates(last: float, depths: Sequence[int]) -> list[list[float]]:
    """The probability for every block of every stage: linear over all blocks from 0 to `last`."""
    with unset_fake_temporarily():  # a network may be built of fake tensors, which have no numbers
        rates = torch.linspace(0, last, sum(depths), device="cpu")
        return [stage.tolist() for stage in rates.split(list(depths))]
