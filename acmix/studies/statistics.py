"""Means, spreads and paired differences over seeds."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEAST = 3
"""Pairs of seeds from which an interval is given: two leave one degree of freedom, and an interval of no use."""


@dataclass(frozen=True)
class Difference:
    """An arm less the reference, over the seeds that both have.

    mean: of the differences, None without a pair; interval: that holds the true mean with 95 % confidence (Student's t
    with n - 1 degrees of freedom); p: of the two-sided paired t-test; n: pairs. interval and p are None for
    n < `LEAST`, and where all differences are equal, so that there is no spread to judge the mean by.
    """

    mean: float | None
    interval: tuple[float, float] | None
    p: float | None
    n: int


def mean_and_std(values: Sequence[float]) -> tuple[float | None, float | None]:
    """The mean, and the standard deviation of a sample (n - 1); None where there are too few values."""
    if not values:
        return None, None
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def paired_difference(values: Sequence[float], reference: Sequence[float]) -> Difference:
    """Compare values that belong together in pairs: same seed, same place."""
    n = len(values)
    mean, spread = mean_and_std([a - b for a, b in zip(values, reference, strict=True)])
    if mean is None or spread is None or n < LEAST:
        return Difference(mean, None, None, n)
    if spread <= 1e-12 * max(map(abs, (*values, *reference))):  # the rounding of equal differences is no spread
        return Difference(mean, None, None, n)
    test = stats.ttest_rel(values, reference)
    low, high = test.confidence_interval(0.95)
    return Difference(mean, (float(low), float(high)), float(test.pvalue), n)
