"""The measures of a single map or weight, against sums taken by hand in float64."""

import cmath
import math

import pytest
import torch

from acmix.analysis.frequencies import high_frequency_energy
from acmix.analysis.kernels import shift_distance
from acmix.analysis.shares import attention_share, cosine, path_energies, rms
from acmix.analysis.weights import log_ratio
from acmix.layers import ShiftConv


def test_shares_follow_from_two_small_maps() -> None:
    a = torch.tensor([3.0, 0.0, 0.0, 4.0]).view(1, 1, 2, 2)
    c = torch.tensor([0.0, 5.0, 0.0, 12.0]).view(1, 1, 2, 2)
    energies = path_energies(a, c).tolist()
    assert energies == [25.0, 169.0, 48.0]
    assert rms(energies[0], 4) == 2.5
    assert rms(energies[1], 4) == 6.5
    assert attention_share(2.5, 6.5) == pytest.approx(2.5 / 9)
    assert cosine(energies) == pytest.approx(48 / 65)


def test_a_path_that_is_absent_or_silent_has_no_angle() -> None:
    a = torch.ones(1, 2, 3, 3)
    assert path_energies(a, None).tolist() == [18.0, 0.0, 0.0]
    assert path_energies(None, a).tolist() == [0.0, 18.0, 0.0]
    assert cosine([18.0, 0.0, 0.0]) is None
    assert attention_share(0.0, 0.0) is None


def test_a_small_weight_on_a_large_output_is_no_small_share() -> None:
    attention, convolution = torch.full((1, 1, 2, 2), 10.0), torch.full((1, 1, 2, 2), 1.0)
    first, second, _ = path_energies(0.1 * attention, 0.9 * convolution).tolist()
    assert attention_share(rms(first, 4), rms(second, 4)) == pytest.approx(1 / 1.9)


@pytest.mark.parametrize(("height", "width"), [(4, 6), (5, 3), (1, 1), (2, 7)])
def test_high_frequencies_are_those_of_a_fourier_sum_by_hand(height: int, width: int) -> None:
    torch.manual_seed(0)
    maps = torch.randn(2, 3, height, width, dtype=torch.float64)
    expected = 0.0
    for values in maps.flatten(0, 1).tolist():
        for v in range(height):
            for u in range(width):
                fy, fx = min(v, height - v) / height, min(u, width - u) / width
                wave = sum(
                    values[y][x] * cmath.exp(-2j * cmath.pi * (v * y / height + u * x / width))
                    for y in range(height)
                    for x in range(width)
                )
                expected += abs(wave) ** 2 / (height * width) * (fy * fy + fx * fx >= 1 / 16)
    assert high_frequency_energy(maps).item() == pytest.approx(expected)


def test_a_constant_map_has_no_high_frequencies_and_a_checkerboard_no_others() -> None:
    board = (torch.arange(8)[:, None] + torch.arange(8)).remainder(2).mul(2).sub(1).float().view(1, 1, 8, 8)
    assert high_frequency_energy(torch.ones(1, 1, 8, 8)).item() == pytest.approx(0.0, abs=1e-10)
    assert high_frequency_energy(board).item() == pytest.approx(64.0)


def test_shift_kernels_start_at_distance_0_and_a_change_of_one_entry_counts_as_what_it_is() -> None:
    path = ShiftConv(2, 3)
    assert shift_distance(path).item() == 0.0  # type: ignore[union-attr]
    with torch.no_grad():
        path.shift_weight[4, 2, 1, 1] += 3.0
    assert shift_distance(path).item() == pytest.approx(3 / math.sqrt(6 * 9))  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["shift", "fixed", "random", "full"])
def test_kernels_that_do_not_learn_from_shifts_have_no_distance(kind: str) -> None:
    assert shift_distance(ShiftConv(2, 3, kind=kind)) is None
    assert shift_distance(None) is None


def test_the_log_ratio_of_the_weights() -> None:
    assert log_ratio(-0.5, 0.25) == pytest.approx(math.log(2))
    assert log_ratio(0.5, 0.0) == math.inf
    assert log_ratio(0.0, 0.5) == -math.inf
    assert math.isnan(log_ratio(0.0, 0.0))
