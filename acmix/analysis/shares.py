"""How much each path adds to a block's output."""

from collections.abc import Sequence

import torch
from torch import Tensor


def path_energies(attention: Tensor | None, convolution: Tensor | None) -> Tensor:
    """Σ a², Σ c² and Σ a·c over all values of two weighted maps of one shape: (3,), float64.

    They add up over batches, and `rms`, `attention_share` and `cosine` follow from their sums. A path that a block
    lacks (None) counts as zeros.
    """
    a, c = (None if path is None else path.double().flatten() for path in (attention, convolution))
    zero = torch.zeros((), dtype=torch.float64, device=(attention if attention is not None else convolution).device)  # type: ignore[union-attr]
    return torch.stack(
        [
            zero if a is None else a.dot(a),
            zero if c is None else c.dot(c),
            zero if a is None or c is None else a.dot(c),
        ]
    )


def rms(energy: float, values: int) -> float:
    """Root mean square of a path's weighted output (alpha · attention or beta · convolution) over `values` values.

    At least 0, in the units of the map.
    """
    return float((energy / max(values, 1)) ** 0.5)


def attention_share(attention_rms: float, convolution_rms: float) -> float | None:
    """The effective share of attention: attention_rms / (attention_rms + convolution_rms), from 0 to 1.

    0.5 where both paths add as much, whatever alpha and beta are: a small weight on a large output is no small
    contribution. None where both paths are 0.
    """
    total = attention_rms + convolution_rms
    return attention_rms / total if total > 0 else None


def cosine(energies: Sequence[float]) -> float | None:
    """Cosine of the angle between the weighted outputs, all values as one vector, from -1 to 1; None if one is 0.

    1: the paths say the same; 0: each adds what the other lacks; below 0: they cancel in part. `energies` are
    sums of `path_energies`.
    """
    attention, convolution, product = energies
    scale = (attention * convolution) ** 0.5
    return product / scale if scale > 0 else None
