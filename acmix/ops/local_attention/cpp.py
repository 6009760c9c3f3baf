"""Sliding-window attention on a CPU in C++ (attention.cpp), compiled at first use for each dtype, window and width.

Blocks of a few rows of queries at a time; logits of one block and the rows of keys that it sees are all that exists.
"""

import ctypes
from ctypes import byref, c_double, c_int64

import torch
from torch import Tensor

from acmix.ops import native
from acmix.ops.implementations import Window
from acmix.ops.local_attention.implementations import cpp_macros
from acmix.ops.maps import empty_like_layout


def forward(q: Tensor, k: Tensor, v: Tensor, position_weight: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """The attended map (B, N*d, Ho, Wo) in the layout of q, and what `backward` needs of the softmax."""
    dtype, size = q.dtype, window.out_size(*q.shape[2:])
    q, k, v = (m.to(native.stored(dtype)) for m in (q, k, v))
    out, lse = empty_like_layout(q, *size), empty_lse(q, position_weight.shape[0], window)
    attend(q, k, v, position_weight, window, out, lse)
    return out.to(dtype), lse


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, position_weight: Tensor, lse: Tensor, window: Window
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients with respect to q, k, v, in their layouts, and the position weight; the logits are computed again."""
    dtype = q.dtype
    grad_out, q, k, v = (m.to(native.stored(dtype)) for m in (grad_out, q, k, v))
    grads = [empty_like_layout(m, *m.shape[2:]) for m in (q, k, v)]
    dposition, _ = attend_backward(grad_out, q, k, v, position_weight, window, lse, grads[0], grads[1], grads[2])
    dq, dk, dv = (grad.to(dtype) for grad in grads)
    return dq, dk, dv, dposition


def empty_lse(q: Tensor, head_dim: int, window: Window) -> Tensor:
    """An uninitialised (B, N, Ho, Wo) tensor for binary logarithms: of the sums of the logits' exponentials."""
    size = window.out_size(*q.shape[2:])
    return q.new_empty(q.shape[0], q.shape[1] // head_dim, *size, dtype=torch.promote_types(q.dtype, torch.float32))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position_weight: Tensor,
    window: Window,
    out: Tensor,
    lse: Tensor | None = None,
    alpha: float = 1.0,
    accumulate: bool = False,
) -> None:
    """out = alpha * attended map, or out += that; maps of any strides and one dtype of `native.stored`.

    Args:
        lse: of `empty_lse`, filled for `attend_backward`.
    """
    library, problem, tasks = _prepare(q, position_weight.shape[0], window)
    position = position_weight.to(torch.promote_types(q.dtype, torch.float32)).contiguous()
    maps = [byref(native.Map.of(m)) for m in (q, k, v)]
    options = [native.pointer(position), c_double(alpha), c_int64(accumulate)]
    results = [byref(native.Map.of(out)), None if lse is None else native.pointer(lse)]
    native.run(library.forward, [problem, *maps, *options, *results], tasks)


def attend_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position_weight: Tensor,
    window: Window,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    alpha: float = 1.0,
    accumulate: bool = False,
) -> tuple[Tensor, Tensor]:
    """The gradients of `attend`: written to dq, dk and dv, or added to them; of the position weight and of alpha."""
    dim, wide = position_weight.shape[0], torch.promote_types(q.dtype, torch.float32)
    library, problem, tasks = _prepare(q, dim, window)
    position = position_weight.to(wide).contiguous()
    maps = [byref(native.Map.of(m)) for m in (grad_out, q, k, v)]
    options = [*map(native.pointer, (position, lse)), c_double(alpha), c_int64(accumulate)]
    heads = q.shape[0] * q.shape[1] // dim
    dposition, dalpha = position.new_empty(heads, dim, 2), position.new_empty(heads)
    grads = [byref(native.Map.of(m)) for m in (dq, dk, dv)]
    native.run(library.backward, [problem, *maps, *options, *grads, *map(native.pointer, (dposition, dalpha))], tasks)
    return dposition.sum(0).to(position_weight.dtype), dalpha.sum()


def _prepare(q: Tensor, dim: int, window: Window) -> tuple[ctypes.CDLL, ctypes.Array[c_int64], int]:
    """The library for maps like q, the problem, and the number of its tasks."""
    batch, channels, height, width = q.shape
    heads, width_out = channels // dim, window.out_size(height, width)[1]
    library = native.library("local_attention/attention.cpp", q.dtype, **cpp_macros(q.dtype, dim, window, width_out))
    group = _heads_together(batch * heads, heads, dim * q.itemsize)
    problem = native.sizes(heads, dim, height, width, window.stride, window.dilation, group)
    return library, problem, batch * heads // group


def _heads_together(tasks: int, heads: int, head_bytes: int) -> int:
    """Heads that share a cache line of a channels_last map, so that no two threads write to one; enough are left."""
    together = max((n for n in range(1, heads + 1) if heads % n == 0 and n * head_bytes <= 256), default=1)
    return together if tasks // together >= 2 * torch.get_num_threads() else 1
