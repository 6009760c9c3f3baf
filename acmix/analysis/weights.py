"""The balance of a block's path weights."""

import math


def log_ratio(alpha: float, beta: float) -> float:
    """log|alpha / beta|, natural: above 0 attention weighs more, below 0 convolution, 0 both alike (paper, figure 5).

    inf, -inf or NaN where a weight is 0.
    """
    if alpha == 0 or beta == 0:
        return math.nan if alpha == beta else math.inf if beta == 0 else -math.inf
    return math.log(abs(alpha)) - math.log(abs(beta))
