"""Both paths in Triton: the convolution adds to what the attention has written."""

import torch
from torch import Tensor

from acmix.ops.implementations import Window
from acmix.ops.local_attention.triton import kernels as attention
from acmix.ops.shift_conv.triton import kernels as convolution


def forward(
    qkv: Tensor,
    position_weight: Tensor,
    weight: Tensor,
    alpha: Tensor,
    attended: Window,
    convolved: Window,
    channels_last: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of the paths, the log-sum-exp of the logits and the attended map; arguments as in the operation, qkv
    (B, H, W, 3, N*d)."""
    maps = _as_map(qkv)
    q, k, v = maps.chunk(3, 1)
    out_of_attention, lse = attention.forward(q, k, v, position_weight, attended)
    out = torch.empty_like(out_of_attention)
    convolution.forward_into(out, maps, weight, convolved, out_of_attention, alpha)
    return out if channels_last else out.contiguous(), lse, out_of_attention


def backward(
    grad_out: Tensor,
    qkv: Tensor,
    position_weight: Tensor,
    weight: Tensor,
    alpha: Tensor,
    lse: Tensor,
    out_of_attention: Tensor,
    attended: Window,
    convolved: Window,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of qkv, the position weight, the convolution's weight and alpha."""
    dqkv = torch.empty_like(qkv)
    maps, dmaps = _as_map(qkv), _as_map(dqkv)
    (q, k, v), (dq, dk, dv) = maps.chunk(3, 1), dmaps.chunk(3, 1)
    dposition, delta = attention.backward_into(
        (dq, dk, dv), (grad_out, q, k, v), position_weight, out_of_attention, lse, attended, alpha
    )
    planar = convolution.as_maps(grad_out, len(position_weight))
    convolution.backward_maps_into([dmaps], planar, weight, convolved, accumulate=True)
    dweight = convolution.backward_weight(maps, planar, weight, convolved)
    return dqkv, dposition.to(position_weight.dtype), dweight.to(weight.dtype), delta.sum().to(alpha.dtype)


def _as_map(qkv: Tensor) -> Tensor:
    """q, k and v in one channels_last map (B, 3 * N*d, H, W), a view."""
    return qkv.flatten(3).permute(0, 3, 1, 2)
