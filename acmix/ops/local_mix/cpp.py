"""Both paths in C++, one after the other on the same memory."""

import torch
from torch import Tensor

from acmix.ops.implementations import Window
from acmix.ops.local_attention import cpp as attention
from acmix.ops.native import stored
from acmix.ops.shift_conv import cpp as convolution


def forward(
    qkv: Tensor,
    position_weight: Tensor,
    weight: Tensor,
    alpha: Tensor,
    attended: Window,
    convolved: Window,
    channels_last: bool,
) -> tuple[Tensor, Tensor]:
    """The sum of the paths, and the log-sum-exp of the logits; arguments as in the operation, qkv (B, H, W, 3, N*d)."""
    q, k, v = _maps(qkv.to(stored(qkv.dtype)))
    batch, channels, height, width = q.shape
    layout = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty(
        (batch, channels, *attended.out_size(height, width)), dtype=q.dtype, device=q.device, memory_format=layout
    )
    lse = attention.empty_lse(q, len(position_weight), attended)
    convolution.forward_into(out, (q, k, v), weight, convolved)
    attention.attend(q, k, v, position_weight, attended, out, lse, alpha=alpha.item(), accumulate=True)
    return out.to(qkv.dtype), lse


def backward(
    grad_out: Tensor,
    qkv: Tensor,
    position_weight: Tensor,
    weight: Tensor,
    alpha: Tensor,
    lse: Tensor,
    attended: Window,
    convolved: Window,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of qkv, the position weight, the convolution's weight and alpha."""
    inputs = qkv.to(stored(qkv.dtype))
    grad_out, dqkv = grad_out.to(inputs.dtype), torch.empty_like(inputs)
    maps, grads = _maps(inputs), _maps(dqkv)
    dweight = convolution.backward_into(grads, grad_out, maps, weight, convolved)
    dposition, dalpha = attention.attend_backward(
        grad_out, *maps, position_weight, attended, lse, *grads, alpha=alpha.item(), accumulate=True
    )
    return dqkv.to(qkv.dtype), dposition, dweight.to(weight.dtype), dalpha.to(alpha.dtype)


def _maps(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v (B, N*d, H, W), views."""
    q, k, v = qkv.permute(3, 0, 4, 1, 2).unbind(0)
    return q, k, v
