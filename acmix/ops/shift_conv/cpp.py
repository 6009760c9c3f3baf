"""The folded convolution path on a CPU in C++ (convolution.cpp), compiled at first use for each dtype.

q, k and v are read where they lie and their gradients written where they shall lie, in any layout: the maps of a group
are never brought side by side in memory.
"""

import sys
from collections.abc import Sequence
from ctypes import Array, byref, c_int64

import torch
from torch import Tensor

from acmix.ops import native
from acmix.ops.implementations import Window
from acmix.ops.maps import empty_like_layout

# Pieces of work that a batch is cut into, about, so that every thread has some. By the sizes alone, since the gradient
# of the weight is summed piece by piece.
_TASKS = 32
_BAND_ROWS = 14  # rows of results that are worth a piece of their own


def forward(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, window: Window) -> Tensor:
    """Grouped convolution of q, k, v (B, N*d, H, W) with weight (N*d, 3N, k, k): (B, N*d, Ho, Wo), channels (d, N)."""
    inputs = [m.to(native.stored(q.dtype)) for m in (q, k, v)]
    out = empty_like_layout(inputs[0], *window.out_size(*q.shape[2:]))
    forward_into(out, inputs, weight, window)
    return out.to(q.dtype)


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, weight: Tensor, window: Window
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v (in the layout of q) and the weight."""
    grad, *inputs = [m.to(native.stored(q.dtype)) for m in (grad_out, q, k, v)]
    grads = [empty_like_layout(inputs[0], *q.shape[2:]) for _ in range(3)]
    dweight = backward_into(grads, grad, inputs, weight, window)
    dq, dk, dv = (m.to(q.dtype) for m in grads)
    return dq, dk, dv, dweight.to(weight.dtype)


def forward_into(out: Tensor, inputs: Sequence[Tensor], weight: Tensor, window: Window) -> None:
    """Write the convolution of q, k and v to `out`; all four of one dtype that `native.stored` keeps, any strides."""
    problem, tasks = _problem(inputs[0], weight, window)
    ordered = _ordered(weight, out.dtype)
    arguments = [problem, _maps(inputs), native.pointer(ordered), byref(native.Map.of(out))]
    native.run(_library(out.dtype).forward, arguments, tasks)


def backward_into(
    grads: Sequence[Tensor], grad_out: Tensor, inputs: Sequence[Tensor], weight: Tensor, window: Window
) -> Tensor:
    """Write the gradients of q, k and v to `grads`; return the weight's, in float32 or better.

    It is the same to the last bit for every number of threads. Dtypes and strides as for `forward_into`.
    """
    problem, tasks = _problem(inputs[0], weight, window)
    ordered = _ordered(weight, grad_out.dtype)
    shares = ordered.new_empty(problem[-1], *ordered.shape)
    maps = [byref(native.Map.of(grad_out)), _maps(inputs), native.pointer(ordered), _maps(grads)]
    native.run(_library(grad_out.dtype).backward, [problem, *maps, native.pointer(shares)], tasks)
    dweight = shares[0] if len(shares) == 1 else shares.sum(0)
    # (N, 3N, k, k, d) to (3N, k, k, d, N), which is where `fold` has its weight
    return dweight.permute(1, 2, 3, 4, 0).flatten(3).contiguous().permute(3, 0, 1, 2)


def _library(dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return native.library("shift_conv/convolution.cpp", dtype, LANES=_lanes(dtype))


def _lanes(dtype: torch.dtype) -> int:
    return native.lanes(sys.maxsize, torch.promote_types(dtype, torch.float32))


def _maps(maps: Sequence[Tensor]) -> Array[native.Map]:
    return (native.Map * 3)(*map(native.Map.of, maps))


def _problem(q: Tensor, weight: Tensor, window: Window) -> tuple[Array[c_int64], int]:
    """The `Problem` of the source, and the number of its tasks."""
    batch, channels, height, width = q.shape
    heads = weight.shape[1] // 3
    dim = channels // heads
    blocks = -(-dim // _lanes(q.dtype))
    wanted = -(-_TASKS // blocks)
    rows = -(-height // window.stride)
    bands = max(1, min(-(-wanted // max(1, batch)), rows // _BAND_ROWS))
    parts = min(batch * bands, wanted)
    sizes = (batch, heads, dim, height, width, window.kernel_size, window.stride, window.dilation, bands, parts)
    return native.sizes(*sizes), blocks * parts


def _ordered(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight (N*d, 3N, k, k), rows (d, N), in the order (N, 3N, k, k, d) and the dtype of the sums."""
    wide = torch.promote_types(dtype, torch.float32)
    in_heads = weight.to(wide).unflatten(0, (-1, weight.shape[1] // 3))
    return in_heads.permute(1, 2, 3, 4, 0).contiguous()
