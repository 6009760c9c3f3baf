"""Means, spreads and paired differences against computations by hand."""

import numpy as np
import pytest

from acmix.studies.statistics import mean_and_std, paired_difference

T_2 = 4.302652729911275  # 97.5 % quantile of Student's t with 2 degrees of freedom


def test_the_difference_is_over_pairs_with_students_interval() -> None:
    values, reference = [60.0, 62.0, 61.5], [59.0, 60.0, 61.0]
    pairs = np.subtract(values, reference)
    error = pairs.std(ddof=1) / np.sqrt(3)
    found = paired_difference(values, reference)
    assert found.n == 3
    assert found.mean == pytest.approx(pairs.mean(), rel=1e-12)
    assert found.interval == pytest.approx([pairs.mean() - T_2 * error, pairs.mean() + T_2 * error], rel=1e-9)
    t = pairs.mean() / error
    assert found.p == pytest.approx(1 - t / np.sqrt(2 + t**2), rel=1e-9)  # two-sided, 2 degrees of freedom


def test_fewer_than_three_pairs_have_a_mean_and_no_interval() -> None:
    assert paired_difference([], []).mean is None
    found = paired_difference([60.0, 61.0], [59.0, 59.0])
    assert (found.mean, found.interval, found.p, found.n) == (1.5, None, None, 2)


def test_equal_differences_have_no_spread_to_be_judged_by() -> None:
    found = paired_difference([0.3, 0.2, 0.4], [0.2, 0.1, 0.3])
    assert found.mean == pytest.approx(0.1)
    assert (found.interval, found.p) == (None, None)


def test_the_spread_is_that_of_a_sample() -> None:
    assert mean_and_std([]) == (None, None)
    assert mean_and_std([5.0]) == (5.0, None)
    assert mean_and_std([1.0, 3.0]) == (2.0, pytest.approx(2**0.5))
