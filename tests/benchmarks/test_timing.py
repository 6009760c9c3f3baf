import time

import pytest
import torch

from benchmarks.timing import Samples, time_in_turn

CPU = torch.device("cpu")


def test_median_and_spread_are_robust_to_an_outlier() -> None:
    samples = Samples((1.0, 2.0, 3.0, 4.0, 100.0))
    assert (samples.median, samples.spread, samples.n) == (3.0, 2.0, 5)
    assert Samples((2.0,)).spread == 0.0


def test_ratios_are_paired_round_by_round() -> None:
    assert Samples((2.0, 40.0)).over(Samples((1.0, 10.0))).values == (2.0, 4.0)


def test_steps_are_sampled_in_turn() -> None:
    order: list[str] = []

    def step(name: str) -> None:
        order.append(name)
        time.sleep(0.05)  # longer than a sample needs: one call each

    times = time_in_turn([lambda: step("a"), lambda: step("b")], CPU, rounds=3)
    assert order == ["a", "b"] * 4  # the first pair finds out how often to repeat
    assert [t.n for t in times] == [3, 3]


def test_short_steps_are_repeated_within_a_sample() -> None:
    calls: list[int] = []
    (samples,) = time_in_turn([lambda: calls.append(1)], CPU, rounds=2)
    assert len(calls) > 100
    assert samples.median < 1e-3


def test_at_least_five_rounds_are_made_whatever_the_budget() -> None:
    (samples,) = time_in_turn([lambda: time.sleep(0.04)], CPU, seconds=0.0)
    assert samples.n == 5


@pytest.mark.gpu
def test_a_gpu_is_waited_for() -> None:
    x = torch.randn(4096, 4096, device="cuda")
    (samples,) = time_in_turn([lambda: torch.mm(x, x)], torch.device("cuda"), rounds=3)
    assert samples.median > 1e-5  # launching alone takes less
