"""The folded convolution path on a CPU in C++ (convolution.cpp), compiled at first use for each scalar type and size.

q, k and v are read where they lie: the maps of a group are never brought side by side in memory.
"""

from ctypes import byref, c_void_p
from math import gcd

import torch
from torch import Tensor

from acmix.ops import native
from acmix.ops.implementations import Window


def forward(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, window: Window) -> Tensor:
    """Grouped convolution of q, k, v (B, N*d, H, W) with weight (N*d, 3N, k, k): (B, N*d, Ho, Wo), channels (d, N)."""
    heads, dim, wide = _prepare(q, weight)
    inputs = [m.to(wide) for m in (q, k, v)]
    out = inputs[0].new_empty(*q.shape[:2], *window.out_size(*q.shape[2:]))
    ordered = _interleave(weight.to(wide).unflatten(0, (dim, heads)), 1, _divisor(heads, 8))
    library = native.library(
        "shift_conv/convolution.cpp", wide, K=window.kernel_size, N=heads, LANES=native.lanes(out.shape[-1], wide)
    )
    problem = native.sizes(q.shape[0], dim, *q.shape[2:], window.stride, window.dilation)
    maps = (native.Map * 3)(*map(native.Map.of, inputs))
    native.run(library.forward, [problem, maps, *map(native.pointer, (ordered, out))], dim)
    return out.to(q.dtype)


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, weight: Tensor, window: Window
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v (contiguous) and the weight."""
    heads, dim, wide = _prepare(q, weight)
    inputs, grad = [m.to(wide) for m in (q, k, v)], grad_out.to(wide)
    grads = [grad.new_empty(q.shape) for _ in range(3)]
    dweight = grad.new_zeros(weight.shape)
    ordered = _interleave(weight.to(wide).unflatten(0, (dim, heads)).transpose(1, 2), 1, _divisor(3 * heads, 12))
    lanes = native.lanes(grad_out.shape[-1], wide)
    library = native.library("shift_conv/convolution.cpp", wide, K=window.kernel_size, N=heads, LANES=lanes)
    problem = native.sizes(q.shape[0], dim, *q.shape[2:], window.stride, window.dilation)
    maps = (native.Map * 3)(*map(native.Map.of, inputs))
    targets = (c_void_p * 3)(*(m.data_ptr() for m in grads))
    arguments = [problem, byref(native.Map.of(grad)), maps, native.pointer(ordered), targets, native.pointer(dweight)]
    native.run(library.backward, arguments, dim)
    dq, dk, dv = (m.to(q.dtype) for m in grads)
    return dq, dk, dv, dweight.to(weight.dtype)


def _prepare(q: Tensor, weight: Tensor) -> tuple[int, int, torch.dtype]:
    """Heads, head width, and the dtype of the computation."""
    heads = weight.shape[1] // 3
    return heads, weight.shape[0] // heads, torch.promote_types(q.dtype, torch.float32)


def _divisor(count: int, most: int) -> int:
    """The largest divisor of `count` up to `most`: the outputs that the kernel computes side by side."""
    return max(n for n in range(1, most + 1) if gcd(n, count) == n)


def _interleave(weight: Tensor, dim: int, tile: int) -> Tensor:
    """Weight (groups, outputs, inputs, k, k) as (groups, tiles, inputs, k, k, outputs of a tile)."""
    return weight.unflatten(dim, (-1, tile)).movedim(dim + 1, -1).contiguous()
