"""Attention within windows on a CPU: public operation, registration with torch.library."""

import torch
from torch import Tensor

from acmix.ops import native, reference
from acmix.ops.derivatives import plain_gradients, refuse_forward_ad, register_second_derivative
from acmix.ops.implementations import may_compile, transformed
from acmix.ops.maps import (
    autocast_dtype,
    cast_maps,
    check_contents,
    check_device,
    check_maps,
    keepable,
    without_autocast,
)

_SOURCE = "window_attention/window_attention.cpp"


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, window_size: tuple[int, int], shift: tuple[int, int]
) -> Tensor:
    """softmax(q kᵀ / sqrt(d) + bias) v in every window of a map (paper section 4, the Swin version).

    Args:
        q, k, v: Maps (B, N*d, H, W), channels (head, head_dim), any strides, one dtype; windows tile them.
        bias: (N, area, area): what is added to the logit of every query (rows) and key (columns) of a window.
        window_size: (height, width) of a window; area is their product.
        shift: (rows, columns) by which the map was rolled up and left: pixels of a window that were not neighbours
            before get -100 too.

    Returns:
        (B, N*d, H, W), channels_last.

    Raises:
        RuntimeError: if C++ cannot run here; see `window_attention_refusal`.
        ValueError: for maps of different shapes, dtypes or devices, windows that do not tile them, or a bias of another
            size.
    """
    _check(q, k, v, bias, window_size)
    if (dtype := autocast_dtype(q)) is not None:
        q, k, v = cast_maps(dtype, q, k, v)
    with without_autocast(q):
        out: Tensor = _forward(q, k, v, bias, *window_size, *shift)
        return out


def _check(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, window_size: tuple[int, int]) -> None:
    check_maps(q, k, v)
    check_contents(q, k, v)
    check_device(q, k, v, bias)
    (height, width), (rows, columns) = q.shape[2:], window_size
    if min(window_size) < 1 or height % rows or width % columns:
        raise ValueError(f"windows of {rows}×{columns} do not tile a map of {height}×{width}: pad it first")
    if bias.dim() != 3 or bias.shape[1:] != (rows * columns,) * 2 or not bias.shape[0] or q.shape[1] % bias.shape[0]:
        raise ValueError(
            f"bias must be (heads, area, area) = (heads, {rows * columns}, {rows * columns}) for windows of "
            f"{rows}×{columns}, with heads that divide {q.shape[1]} channels, got {tuple(bias.shape)}"
        )


def window_attention_refusal(q: Tensor) -> str | None:
    """Why `window_attention` cannot run on maps like q, or None."""
    if q.device.type != "cpu":
        return "it is written for the CPU"
    if transformed() or torch.jit.is_tracing():
        return "it lacks the rules of torch.func, ONNX and torch.jit"
    if not may_compile():
        return "ACMIX_COMPILE or torch.export keeps it from being compiled here"
    if q.numel() == 0:
        return "the map is empty"
    return native.refusal(_SOURCE, q.device, q.dtype)


@torch.library.custom_op("acmix::window_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, rows: int, columns: int, shift_rows: int, shift_columns: int
) -> Tensor:
    """The attended map."""
    from acmix.ops.window_attention import cpp

    refuse_forward_ad("window_attention")
    return cpp.forward(q, k, v, bias, (rows, columns, shift_rows, shift_columns))


@_forward.register_fake
def _(q: Tensor, *_: object) -> Tensor:
    return torch.empty_like(q, memory_format=torch.channels_last)


@torch.library.custom_op("acmix::window_attention_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    rows: int,
    columns: int,
    shift_rows: int,
    shift_columns: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the bias; the weights are computed again."""
    from acmix.ops.window_attention import cpp

    with without_autocast(q):  # a backward pass may be started under autocast
        return cpp.backward(grad_out, q, k, v, bias, (rows, columns, shift_rows, shift_columns))


@_backward.register_fake
def _(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(m, memory_format=torch.channels_last) for m in (q, k, v))
    return dq, dk, dv, torch.empty_like(bias, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*keepable(*inputs[:3]), inputs[3])
    ctx.options = inputs[4:]


def _autograd_backward(ctx, grad_out: Tensor):  # type: ignore[no-untyped-def]
    if transformed():
        grads = plain_gradients(
            "window_attention", reference.window_attention, ctx.saved_tensors, ctx.options, grad_out
        )
    else:
        grads = _backward(grad_out, *ctx.saved_tensors, *ctx.options)
    return *grads, None, None, None, None


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
register_second_derivative("window_attention", _backward, reference.window_attention, options=4, idle=0)
