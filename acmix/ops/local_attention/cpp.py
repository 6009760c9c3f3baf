"""Sliding-window attention on a CPU in C++ (attention.cpp), compiled at first use for each scalar type and window size.

One row of queries at a time, vectorised over its columns: no waste at the edges of tiles, logits of one row in flight.
"""

from ctypes import byref

import torch
from torch import Tensor

from acmix.ops import native
from acmix.ops.implementations import Window
from acmix.ops.reference import positions


def forward(q: Tensor, k: Tensor, v: Tensor, position_weight: Tensor, window: Window) -> Tensor:
    """The attended map (B, N*d, Ho, Wo); arguments as in the public operation."""
    batch, channels, height, width = q.shape
    dim, dtype = position_weight.shape[0], q.dtype
    p, offset = _position_terms(position_weight, q)
    q, k, v = (m.to(p.dtype) for m in (q, k, v))
    out = q.new_empty(batch, channels, *window.out_size(height, width))
    lanes = native.lanes(out.shape[-1], p.dtype)
    library = native.library("local_attention/attention.cpp", p.dtype, K=window.kernel_size, LANES=lanes)
    problem = native.sizes(channels // dim, dim, height, width, window.stride, window.dilation)
    maps = [byref(native.Map.of(m)) for m in (q, k, v)]
    native.run(library.forward, [problem, *maps, *map(native.pointer, (offset, out))], batch * channels // dim)
    return out.to(dtype)


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, position_weight: Tensor, window: Window
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients with respect to q, k, v (contiguous) and the position weight; the logits are computed again."""
    batch, channels, height, width = q.shape
    dim, dtype = position_weight.shape[0], q.dtype
    p, offset = _position_terms(position_weight, q)
    inputs = [m.to(p.dtype) for m in (grad_out, q, k, v)]
    grads = [p.new_empty(q.shape) for _ in range(3)]
    lanes = native.lanes(grad_out.shape[-1], p.dtype)
    library = native.library("local_attention/attention.cpp", p.dtype, K=window.kernel_size, LANES=lanes)
    problem = native.sizes(channels // dim, dim, height, width, window.stride, window.dilation)
    maps = [byref(native.Map.of(m)) for m in inputs]
    native.run(library.backward, [problem, *maps, *map(native.pointer, (offset, *grads))], batch * channels // dim)
    pixels = grads[1].view(-1, dim, height, width).sum(0)
    dposition = -torch.einsum("dyx,pyx->dp", pixels, p)
    dq, dk, dv = (grad.to(dtype) for grad in grads)
    return dq, dk, dv, dposition.to(position_weight.dtype)


def _position_terms(position_weight: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Positions (2, H, W) and the keys' position term P p (d, H, W), in the dtype of the computation."""
    p = positions(q.shape[-2], q.shape[-1], like=q)
    return p, torch.einsum("dp,pyx->dyx", position_weight.to(p.dtype), p).contiguous()
