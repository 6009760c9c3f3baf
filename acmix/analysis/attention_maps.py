"""Where one query of an attention path looks."""

import torch
from torch import Tensor

from acmix.layers import AttentionPath


def attention_map(path: AttentionPath, q: Tensor, k: Tensor, query: tuple[int, int]) -> Tensor:
    """How much the output at one pixel takes of each pixel of v: the mean over heads, which sums to 1.

    Attention is linear in v, so its weights are the derivative of `path.reference` with respect to v; a pixel that a
    window meets more than once, by reflection, gets the sum. Fused operations hold no weights, the reference needs none
    to be kept: this works for every path with a reference, at the cost of one backward pass. Where the channels of a
    head have weights of their own, it is their mean; where a path reduces v first, negative weights are possible.

    Args:
        path: The attention path.
        q, k: What the path was given for one image, (1, C, H, W).
        query: (row, column) of the output.

    Returns:
        (H, W), of the size of v.
    """
    v = torch.zeros(k.shape, dtype=k.dtype, device=k.device, requires_grad=True)
    with torch.enable_grad():
        out = path.reference(q.detach(), k.detach(), v)
        (weights,) = torch.autograd.grad(out[0, :, query[0], query[1]].sum(), v)
    return weights[0].mean(0)
