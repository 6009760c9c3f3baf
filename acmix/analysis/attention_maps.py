"""Where one query of an attention path looks."""

import torch
from torch import Tensor

from acmix.layers import AttentionPath


def attention_map(path: AttentionPath, q: Tensor, k: Tensor, v: Tensor, query: tuple[int, int]) -> Tensor:
    """How much the output at one pixel takes of each pixel of v: the mean size of its weights over the channels.

    Attention is linear in v, so its weights are the derivative of `path.reference` with respect to v; a pixel that a
    window meets more than once, by reflection, gets the sum. Fused operations hold no weights, and here none need be
    kept: this works for every path with a reference, for one backward pass. Of a softmax it is the mean over the heads
    and sums to 1; of patchwise attention, whose weights may be negative, the mean over the channels without the signs.

    Args:
        path: The attention path.
        q, k, v: What the path was given for one image, (1, channels, H, W); of v only its shape counts.
        query: (row, column) of the output.

    Returns:
        (H, W), of the size of v.
    """
    v = torch.zeros_like(v, requires_grad=True)
    with torch.enable_grad():
        out = path.reference(q.detach(), k.detach(), v)
        (weights,) = torch.autograd.grad(out[0, :, query[0], query[1]].sum(), v)
    return weights[0].abs().mean(0)
