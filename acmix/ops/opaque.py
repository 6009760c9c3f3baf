"""A convolution on a CPU that torch.compile takes as it is, and lays no other map out for.

Inductor takes all that comes before a convolution of its own for maps (B, C, H, W), and lays it out as channels_last.
Of a map (B, H, W, C), such as Swin's, that makes W the outermost and H the innermost axis in memory. It is slow, and in
PyTorch 2.14 sums over its channels store past the end of their memory (pytorch #196681).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from acmix.ops.derivatives import refuse_forward_ad
from acmix.ops.implementations import transformed
from acmix.ops.maps import is_exporting


def convolve(
    maps: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, dilation: int, groups: int
) -> Tensor:
    """`F.conv2d`; one node of our own in a compiled graph for a CPU."""
    compiling = torch.compiler.is_compiling() and not is_exporting()
    if compiling and maps.device.type == "cpu" and not transformed():
        out: Tensor = _forward(maps, weight, bias, stride, padding, dilation, groups)
        return out
    return F.conv2d(maps, weight, bias, stride, padding, dilation, groups)


@torch.library.custom_op("acmix::convolution", mutates_args=())
def _forward(
    maps: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, dilation: int, groups: int
) -> Tensor:
    refuse_forward_ad("convolution")
    return F.conv2d(maps, weight, bias, stride, padding, dilation, groups)


@_forward.register_fake
def _(
    maps: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, dilation: int, groups: int
) -> Tensor:
    return F.conv2d(maps, weight, bias, stride, padding, dilation, groups)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:2])
    ctx.bias = None if inputs[2] is None else list(inputs[2].shape)
    ctx.options = inputs[3:]


def _autograd_backward(ctx, grad_out: Tensor):  # type: ignore[no-untyped-def]
    maps, weight = ctx.saved_tensors
    stride, padding, dilation, groups = ctx.options
    needed = [*ctx.needs_input_grad[:2], ctx.bias is not None and ctx.needs_input_grad[2]]
    grads = torch.ops.aten.convolution_backward(
        grad_out, maps, weight, ctx.bias, [stride] * 2, [padding] * 2, [dilation] * 2, False, [0, 0], groups, needed
    )
    return *grads, None, None, None, None


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
