"""What an epoch spends waiting for its data."""

import time
from collections.abc import Iterator

import pytest
import torch

from acmix.engine.meter import Meter


def test_the_wait_of_an_epoch_leaves_out_how_long_its_loader_takes_to_start() -> None:
    def slow() -> Iterator[int]:
        time.sleep(0.3)
        for item in range(4):
            yield item
            time.sleep(0.03)

    meter = Meter(1, torch.device("cpu"))
    for _ in meter.timed(slow()):
        time.sleep(0.03)
    assert meter.epoch_wait == pytest.approx(0.5, abs=0.15)
    for _ in meter.timed(iter([1, 2, 3])):
        time.sleep(0.01)
    assert meter.epoch_wait < 0.1
