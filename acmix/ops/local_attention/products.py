"""Sums of the implementations that are batched matrix products, taken so that they lose as little as PyTorch's own."""

import torch
from torch import Tensor

# Channels that are summed in one chain, which loses more to rounding the longer it is: one of 128 loses up to three
# times as much as PyTorch's own sums.
_SPAN = 32


def over_channels(a: Tensor, b: Tensor, out: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Products of a (U, d, Q) and b (U, d, L), summed over d, plus the bias (1, Q, L) if given: (U, Q, L)."""
    channels = zip(a.split(_SPAN, 1), b.split(_SPAN, 1), strict=True)
    first = next(channels)
    if bias is None:
        sums = torch.bmm(first[0].mT, first[1], out=out)
    else:
        sums = torch.baddbmm(bias, first[0].mT, first[1], out=out)
    for some_a, some_b in channels:
        sums.baddbmm_(some_a.mT, some_b)
    return sums


def softmax_backward_(dweights: Tensor, weights: Tensor) -> Tensor:
    """The gradient of the logits of softmax over the last dimension, in place of that of its weights.

    A query's must sum to 0: the gradient of the position weight adds them up times the place of the query. What the
    rounding of the first sum leaves is therefore taken off.
    """
    dlogits = torch.ops.aten._softmax_backward_data.out(dweights, weights, -1, weights.dtype, grad_input=dweights)
    return dlogits.addcmul_(weights, dlogits.sum(-1, keepdim=True), value=-1)
