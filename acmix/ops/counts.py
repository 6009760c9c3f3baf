"""What torch.utils.flop_counter.FlopCounterMode counts for our custom operations: twice the multiply-adds of the paper.

The count is the same whichever implementation of a custom operation runs. What runs in plain PyTorch (`reference`, the
`unfolded` and `dense` convolutions, any convolution off the CPU, all inside torch.func) is counted by PyTorch as it
runs, and sums of products that are written as elementwise operations not at all; `acmix.telemetry.flops` counts every
path by the paper. A backward pass counts twice its forward pass: two gradients for each product, nothing for what is
computed again.
"""

from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from acmix.ops.implementations import Window

Shape = tuple[int, ...]


@register_flop_formula(torch.ops.acmix.local_attention)
def local_attention_flops(q: Shape, k: Shape, v: Shape, position_weight: Shape, *options: Any, **_: Any) -> int:
    """K² products of width d for the logits and as many for the values, for each head and query."""
    return 4 * _members(q, *options[:3]) * _strided_numel(q, options[1])


@register_flop_formula(torch.ops.acmix.local_attention_backward)
def local_attention_backward_flops(grad_out: Shape, *inputs: Any, **_: Any) -> int:
    """The gradients of both products."""
    return 8 * _members(inputs[0], *inputs[6:9]) * prod(grad_out)


@register_flop_formula(torch.ops.acmix.grouped_conv)
def grouped_conv_flops(q: Shape, k: Shape, v: Shape, weight: Shape, stride: int, *options: Any, **_: Any) -> int:
    """The paper's two steps, less the product that folded both weights into one, which PyTorch has counted."""
    return 2 * _two_steps(q, weight, stride)


@register_flop_formula(torch.ops.acmix.grouped_conv_backward)
def grouped_conv_backward_flops(
    grad_out: Shape, q: Shape, k: Shape, v: Shape, weight: Shape, stride: int, *options: Any, **_: Any
) -> int:
    """The gradients of the same."""
    return 4 * _two_steps(q, weight, stride)


@register_flop_formula(torch.ops.acmix.window_attention)
def window_attention_flops(q: Shape, k: Shape, v: Shape, bias: Shape, *options: Any, **_: Any) -> int:
    """Two products with every member of its window for each value of q."""
    return 4 * bias[1] * prod(q)


@register_flop_formula(torch.ops.acmix.window_attention_backward)
def window_attention_backward_flops(grad_out: Shape, *inputs: Any, **_: Any) -> int:
    """The gradients of both products."""
    return 8 * inputs[3][1] * prod(grad_out)


@register_flop_formula(torch.ops.acmix.local_mix)
def local_mix_flops(qkv: Shape, position_weight: Shape, weight: Shape, alpha: Shape, *options: Any, **_: Any) -> int:
    """Those of both operations."""
    q, stride = _one_of_three(qkv), options[1]
    return 4 * _members(q, *options[:3]) * _strided_numel(q, stride) + 2 * _two_steps(q, weight, stride)


@register_flop_formula(torch.ops.acmix.local_mix_backward)
def local_mix_backward_flops(grad_out: Shape, *inputs: Any, **_: Any) -> int:
    """The gradients of the same."""
    q, weight, options = _one_of_three(inputs[0]), inputs[2], inputs[6:9]
    return 8 * _members(q, *options) * prod(grad_out) + 4 * _two_steps(q, weight, options[1])


@register_flop_formula(torch.ops.acmix.patch_features)
def patch_features_flops(k: Shape, scale: Shape, offset: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    """A product for each feature, channel and tap at every pixel."""
    return 2 * prod(weight) * k[0] * k[2] * k[3]


@register_flop_formula(torch.ops.acmix.patch_features_backward)
def patch_features_backward_flops(grad_out: Shape, *inputs: Any, **_: Any) -> int:
    """The gradients of the same."""
    return 2 * patch_features_flops(*inputs)


@register_flop_formula(torch.ops.acmix.patch_aggregation)
def patch_aggregation_flops(v: Shape, hidden: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    """The weights of every tap, and K² products for each value."""
    return 2 * prod(weight) * v[0] * v[2] * v[3] + 2 * weight[1] * prod(v)


@register_flop_formula(torch.ops.acmix.patch_aggregation_backward)
def patch_aggregation_backward_flops(grad_out: Shape, *inputs: Any, **_: Any) -> int:
    """The gradients of the same."""
    return 2 * patch_aggregation_flops(*inputs)


def _members(q: Shape, kernel_size: int, stride: int, dilation: int) -> int:
    """Pixels of a window of attention on these maps."""
    return Window(kernel_size, stride, dilation).on(*q[2:]).kernel_size ** 2


def _one_of_three(qkv: Shape) -> Shape:
    batch, height, width, _, channels = qkv
    return batch, channels, height, width


def _two_steps(q: Shape, weight: Shape, stride: int) -> int:
    """Multiply-adds of k² mixtures of the 3N maps and of k² kernels of k × k for each output, less the folding."""
    taps = weight[2] * weight[3]
    mixing, shifting, folding = 3 * taps * prod(q), taps**2 * _strided_numel(q, stride), taps * prod(weight)
    return max(0, mixing + shifting - folding)


def _strided_numel(shape: Shape, stride: int) -> int:
    batch, channels, height, width = shape
    return batch * channels * -(-height // stride) * -(-width // stride)
