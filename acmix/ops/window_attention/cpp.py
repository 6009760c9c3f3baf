"""Attention within windows on a CPU in C++ (window_attention.cpp), compiled at first use for each dtype.

q, k and v are read window by window where they lie, and their gradients written where they shall lie: windows are never
brought side by side in memory, and their logits exist one window at a time.
"""

import sys
from collections.abc import Sequence
from ctypes import CDLL, Array, byref, c_int64

import torch
from torch import Tensor

from acmix.ops import native

# Pieces of work that a batch is cut into, about, so that every thread has some. By the sizes alone, since the gradient
# of the bias is summed piece by piece.
_TASKS = 32
_GROUP = 4  # heads that are done together, at most: they lie on the same pages


def forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, windows: Sequence[int]) -> Tensor:
    """The attended map (B, N*d, H, W), channels_last; arguments as in the public operation.

    Args:
        windows: rows and columns of a window, rows and columns of the shift.
    """
    inputs = [m.to(native.stored(q.dtype)) for m in (q, k, v)]
    out = torch.empty_like(inputs[0], memory_format=torch.channels_last)
    problem, tasks = _problem(q, bias, windows)
    ready = _contiguous(bias, out)
    maps = [byref(native.Map.of(m)) for m in inputs]
    arguments = [problem, *maps, native.pointer(ready), byref(native.Map.of(out))]
    native.run(_library(out.dtype).forward, arguments, tasks)
    return out.to(q.dtype)


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, windows: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, channels_last, and of the bias."""
    grad, *inputs = [m.to(native.stored(q.dtype)) for m in (grad_out, q, k, v)]
    grads = [torch.empty_like(grad, memory_format=torch.channels_last) for _ in range(3)]
    dbias = backward_into(grads, grad, inputs, bias, windows)
    dq, dk, dv = (m.to(q.dtype) for m in grads)
    return dq, dk, dv, dbias


def backward_into(
    grads: Sequence[Tensor],
    grad_out: Tensor,
    inputs: Sequence[Tensor],
    bias: Tensor,
    windows: Sequence[int],
    accumulate: bool = False,
) -> Tensor:
    """Write the gradients of q, k and v to `grads`, or add them; return the bias's.

    All maps are of one dtype that `native.stored` keeps, of any strides. The gradient of the bias is the same to the
    last bit for every number of threads.
    """
    problem, tasks = _problem(inputs[0], bias, windows)
    ready = _contiguous(bias, grad_out)
    heads, area = bias.shape[:2]
    lanes = _lanes(grad_out.dtype)
    shares = ready.new_empty(problem[-1], heads, area, -(-area // lanes) * lanes)
    maps = [byref(native.Map.of(m)) for m in (grad_out, *inputs)]
    results = [byref(native.Map.of(m)) for m in grads]
    arguments = [problem, *maps, native.pointer(ready), c_int64(accumulate), *results, native.pointer(shares)]
    native.run(_library(grad_out.dtype).backward, arguments, tasks)
    return shares.sum(0)[..., :area].mT.to(bias.dtype).contiguous()


def _contiguous(bias: Tensor, maps: Tensor) -> Tensor:
    return bias.to(torch.promote_types(maps.dtype, torch.float32)).contiguous()


def _library(dtype: torch.dtype) -> CDLL:
    return native.library("window_attention/window_attention.cpp", dtype, LANES=_lanes(dtype))


def _lanes(dtype: torch.dtype) -> int:
    return native.lanes(sys.maxsize, torch.promote_types(dtype, torch.float32))


def _problem(q: Tensor, bias: Tensor, windows: Sequence[int]) -> tuple[Array[c_int64], int]:
    """The `Problem` of the source, and the number of its tasks."""
    batch, channels, height, width = q.shape
    heads = bias.shape[0]
    group = max(n for n in range(1, _GROUP + 1) if heads % n == 0)
    count = batch * (height // windows[0]) * (width // windows[1])
    parts = min(count, -(-_TASKS * group // heads))
    sizes = (batch, heads, channels // heads, height, width, *windows, group, parts)
    return native.sizes(*sizes), heads // group * parts
