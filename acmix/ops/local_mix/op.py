"""Local attention and the folded convolution in one node: public operation, registration with torch.library.

Either path alone reads q, k and v and writes three gradients. Together the convolution writes and the attention adds,
in place: no gradient is ever copied or summed by itself.
"""

from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from acmix.ops import eager, reference
from acmix.ops.derivatives import plain_gradients, refuse_forward_ad, register_second_derivative
from acmix.ops.implementations import Problem, Window, transformed
from acmix.ops.local_attention.implementations import LOCAL_ATTENTION
from acmix.ops.maps import autocast_dtype, check_device, check_pixels, without_autocast
from acmix.ops.shift_conv.implementations import SHIFT_CONV
from acmix.ops.shift_conv.op import convolve_plain
from acmix.ops.shift_conv.weight import empty_like_folded


def local_mix(
    qkv: Tensor,
    position_weight: Tensor,
    weight: Tensor,
    alpha: Tensor,
    kernel_size: int,
    stride: int = 1,
    dilation: int = 1,
    *,
    channels_last: bool = True,
) -> Tensor:
    """alpha · local_attention(q, k, v) + grouped convolution of q, k, v: the sum of the paths (paper section 4).

    Args:
        qkv: (B, H, W, 3 * N*d), q, k and v side by side at every pixel, channels (head, head_dim) each; as `nn.Linear`
            gives them. Contiguous, or it is copied.
        position_weight, kernel_size: As in `acmix.ops.local_attention`.
        weight: (N*d, 3N, k, k): the folded weight of the convolution path, rows (head_dim, head), d groups; beta
            belongs in it.
        alpha: Scalar tensor.
        stride, dilation: Of both paths.
        channels_last: Memory format of the result.

    Returns:
        (B, N*d, ceil(H / stride), ceil(W / stride)).

    Raises:
        RuntimeError: if neither C++ nor Triton can run here; see `local_mix_refusal`.
        ValueError: for tensors whose shapes do not fit together, tensors on different devices, or an empty map.
    """
    _check(qkv, position_weight, weight, alpha)
    if (dtype := autocast_dtype(qkv)) is not None and qkv.dtype != torch.float64:
        qkv = qkv.to(dtype)
    # Five axes: Inductor takes a tensor of four that is kept for a backward pass for a map (B, C, H, W), and copies it
    # into the channels_last order of one.
    inputs = (qkv.contiguous().unflatten(3, (3, -1)), position_weight, weight, alpha)
    options = (kernel_size, stride, dilation, channels_last, _impl(qkv.device))
    if eager.is_eager(*inputs):
        kernels, windows = _kernels(options[-1]), _windows(inputs[0], weight, kernel_size, stride, dilation)
        return eager.call(
            lambda *tensors: kernels.forward(*tensors, *windows, channels_last),
            lambda *tensors: kernels.backward(*tensors, *windows),
            lambda grad, *tensors: _backward(grad, *tensors, *[grad.new_empty(0)] * (6 - len(tensors)), *options),
            lambda grad, *tensors: plain_gradients("local_mix", _plain, tensors, options[:3], grad),
            *inputs,
        )
    with without_autocast(qkv):
        out: Tensor = _forward(*inputs, *options)[0]
    return out


def _check(qkv: Tensor, position_weight: Tensor, weight: Tensor, alpha: Tensor) -> None:
    check_device(qkv, position_weight, weight, alpha)
    sizes, of_position, of_weight, of_alpha = qkv.shape, position_weight.shape, weight.shape, alpha.shape
    if (len(sizes), len(of_position), len(of_weight), len(of_alpha)) != (4, 2, 4, 0) or not qkv.is_floating_point():
        raise ValueError(
            "qkv must be a floating-point map (B, H, W, 3 * channels), position_weight (head_dim, 2), weight "
            f"(channels, 3 * heads, k, k) and alpha a scalar, got {qkv.dtype} {tuple(sizes)}, {tuple(of_position)}, "
            f"{tuple(of_weight)} and {tuple(of_alpha)}"
        )
    check_pixels(sizes[1], sizes[2])
    (channels, maps, rows, columns), (head_dim, axes) = of_weight, of_position
    if not (axes == 2 and rows == columns and channels > 0 and sizes[3] == 3 * channels == maps * head_dim):
        raise ValueError(
            f"weight must be (channels, 3 * heads, k, k) and position_weight (head_dim, 2) for {sizes[3]} channels of "
            f"q, k and v together, got {tuple(of_weight)} and {tuple(of_position)}"
        )


def local_mix_refusal(
    qkv: Tensor,
    heads: int,
    attended: Window,
    convolved: Window,
    impl: str = "auto",
    conv_impl: str = "auto",
) -> str | None:
    """Why the two operations should be called one after the other, or None: if C++ is the choice for both on a CPU, or
    Triton on a GPU.

    Args:
        qkv: As in `local_mix`.
        heads: N.
        attended, convolved: Windows of the two operations.
        impl, conv_impl: What is asked for in each.

    Raises:
        ValueError: for an impl that cannot run here, as the operations do.
    """
    q = qkv[..., : qkv.shape[-1] // 3].permute(0, 3, 1, 2)
    if transformed():
        return "it lacks the rules of torch.func and ONNX"
    if attended.stride != convolved.stride or q.numel() == 0:
        return "the windows do not fit together, or the map is empty"
    attended = attended.on(*q.shape[2:])
    for operation, name, window in ((LOCAL_ATTENTION, impl, attended), (SHIFT_CONV, conv_impl, convolved)):
        choice = operation.resolve(name, Problem.of(q, heads, window))
        if choice != _impl(q.device):
            return f"{operation.name} runs as {choice}"
    return None


def _impl(device: torch.device) -> str:
    return "cpp" if device.type == "cpu" else "triton"


@cache
def _kernels(impl: str) -> ModuleType:
    return import_module(f"acmix.ops.local_mix.{impl}")


def _plain(
    qkv: Tensor,
    position_weight: Tensor,
    weight: Tensor,
    alpha: Tensor,
    kernel_size: int,
    stride: int,
    dilation: int,
) -> Tensor:
    """The operation in plain PyTorch, for qkv (B, H, W, 3, N*d), as all below take it."""
    q, k, v = qkv.permute(3, 0, 4, 1, 2).unbind(0)
    attended = reference.local_attention(q, k, v, position_weight, kernel_size, stride, dilation)
    return alpha.to(attended.dtype) * attended + convolve_plain(q, k, v, weight.to(q.dtype), stride, dilation)


def _windows(qkv: Tensor, weight: Tensor, kernel_size: int, stride: int, dilation: int) -> tuple[Window, Window]:
    """Those of the attention, as large as the map allows, and of the convolution."""
    attended = Window(kernel_size, stride, dilation).on(*qkv.shape[1:3])
    return attended, Window(weight.shape[-1], stride, dilation)


@torch.library.custom_op("acmix::local_mix", mutates_args=())
def _forward(
    qkv: Tensor,
    position_weight: Tensor,
    weight: Tensor,
    alpha: Tensor,
    kernel_size: int,
    stride: int,
    dilation: int,
    channels_last: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of the paths and, for the backward pass, the log-sum-exp of the logits and what else it needs."""
    refuse_forward_ad("local_mix")
    windows = _windows(qkv, weight, kernel_size, stride, dilation)
    out, lse, *kept = _kernels(impl).forward(qkv, position_weight, weight, alpha, *windows, channels_last)
    return out, lse.flatten(2), kept[0] if kept else qkv.new_empty(0)


@_forward.register_fake
def _(
    qkv: Tensor,
    position_weight: Tensor,
    weight: Tensor,
    alpha: Tensor,
    kernel_size: int,
    stride: int,
    dilation: int,
    channels_last: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, height, width, _, channels = qkv.shape
    size = Window(kernel_size, stride, dilation).out_size(height, width)
    wide = torch.promote_types(qkv.dtype, torch.float32)
    lse = qkv.new_empty(batch, channels // len(position_weight), size[0] * size[1], dtype=wide)
    kept = _empty_map(qkv, *size) if impl == "triton" else qkv.new_empty(0)
    return _empty_map(qkv, *size) if channels_last else qkv.new_empty(batch, channels, *size), lse, kept


def _empty_map(qkv: Tensor, height: int, width: int) -> Tensor:
    """A channels_last map as wide as q."""
    return qkv.new_empty(qkv.shape[0], height, width, qkv.shape[4]).permute(0, 3, 1, 2)


@torch.library.custom_op("acmix::local_mix_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    qkv: Tensor,
    position_weight: Tensor,
    weight: Tensor,
    alpha: Tensor,
    lse: Tensor,
    kept: Tensor,
    kernel_size: int,
    stride: int,
    dilation: int,
    channels_last: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k and v side by side, the position weight, the convolution's weight and alpha."""
    windows = _windows(qkv, weight, kernel_size, stride, dilation)
    saved = (lse, kept) if kept.numel() else (lse,)
    with without_autocast(qkv):  # a backward pass may be started under autocast
        grads: tuple[Tensor, Tensor, Tensor, Tensor] = _kernels(impl).backward(
            grad_out, qkv, position_weight, weight, alpha, *saved, *windows
        )
    return grads


@_backward.register_fake
def _(
    grad_out: Tensor,
    qkv: Tensor,
    position_weight: Tensor,
    weight: Tensor,
    alpha: Tensor,
    lse: Tensor,
    kept: Tensor,
    kernel_size: int,
    stride: int,
    dilation: int,
    channels_last: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dposition, dalpha = (torch.empty_like(w, memory_format=torch.contiguous_format) for w in (position_weight, alpha))
    return qkv.new_empty(qkv.shape), dposition, empty_like_folded(weight), dalpha


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.set_materialize_grads(False)  # or zeros as large as a map are made for outputs without a gradient
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:4], *output[1:])
    ctx.options = inputs[4:]


def _autograd_backward(ctx, grad_out: Tensor | None, *_: None):  # type: ignore[no-untyped-def]
    if grad_out is None:
        return (None,) * 9
    if transformed():
        grads = plain_gradients("local_mix", _plain, ctx.saved_tensors[:4], ctx.options[:3], grad_out)
    else:
        grads = _backward(grad_out, *ctx.saved_tensors, *ctx.options)
    return *grads, None, None, None, None, None


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
register_second_derivative("local_mix", _backward, _plain, options=3, idle=2)
