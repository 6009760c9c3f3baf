"""The folded convolution path: one grouped convolution over q, k and v, some images at a time.

The grouped convolution wants the 3N maps of a channel side by side, (d, 3N), while q, k and v hold them as (N, d). The
reordered copy is made for a few images at a time, so that it stays in the cache, and again in the backward pass.
"""

from collections.abc import Iterator
from math import gcd, prod

import torch
from torch import Tensor

from acmix.ops.implementations import Window

# Bytes of reordered maps in flight.
CHUNK_BYTES = 2_500_000
# Channels that the CPU's convolution kernels handle as one vector.
_VECTOR = 8


def merged_groups(heads: int, head_dim: int) -> int:
    """How many groups to compute as one, zeros between them: N outputs a group may be too few to fill a vector.

    Twice the products in half the groups is faster by a third to a half at N = 4; more merging loses.
    """
    merge = _VECTOR // gcd(heads, _VECTOR)
    return merge if merge == 2 and head_dim % merge == 0 else 1


def merge_weight(weight: Tensor, heads: int, merge: int) -> Tensor:
    """Block-diagonal weight (N*d, merge * 3N, k, k) of `merge` neighbouring groups from (N*d, 3N, k, k)."""
    if merge == 1:
        return weight
    blocks = weight.view(-1, merge, heads, *weight.shape[1:])
    merged = weight.new_zeros(len(blocks), merge, heads, merge, *weight.shape[1:])
    for i in range(merge):
        merged[:, i, :, i] = blocks[:, i]
    return merged.flatten(3, 4).flatten(0, 2)


def split_weight(merged: Tensor, heads: int, merge: int) -> Tensor:
    """The adjoint of `merge_weight`: the diagonal blocks."""
    if merge == 1:
        return merged
    blocks = merged.view(-1, merge, heads, merge, merged.shape[1] // merge, *merged.shape[2:])
    return torch.stack([blocks[:, i, :, i] for i in range(merge)], 1).flatten(0, 2)


def _chunks(q: Tensor) -> Iterator[slice]:
    step = max(1, CHUNK_BYTES // (3 * prod(q.shape[1:]) * q.itemsize))
    for start in range(0, q.shape[0], step):
        yield slice(start, start + step)


def _reorder(maps: list[Tensor], head_dim: int) -> Tensor:
    """q, k, v (b, N*d, H, W) as one map (b, d*3N, H, W)."""
    batch, channels, *size = maps[0].shape
    together = maps[0].new_empty(batch, head_dim, 3, channels // head_dim, *size)
    for i, m in enumerate(maps):
        together[:, :, i].copy_(m.unflatten(1, (-1, head_dim)).transpose(1, 2))
    return together.flatten(1, 3)


def forward(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, window: Window) -> Tensor:
    """Grouped convolution of q, k, v (B, N*d, H, W) with weight (N*d, 3N, k, k): (B, N*d, Ho, Wo), channels (d, N)."""
    heads = weight.shape[1] // 3
    head_dim = weight.shape[0] // heads
    merge = merged_groups(heads, head_dim)
    merged = merge_weight(weight, heads, merge)
    out = q.new_empty(*q.shape[:2], *window.out_size(*q.shape[2:]))
    for part in _chunks(q):
        maps = _reorder([q[part], k[part], v[part]], head_dim)
        out[part] = torch.conv2d(maps, merged, None, window.stride, window.reach, window.dilation, head_dim // merge)
    return out


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, weight: Tensor, window: Window
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v (contiguous) and the weight."""
    heads = weight.shape[1] // 3
    head_dim = weight.shape[0] // heads
    merge = merged_groups(heads, head_dim)
    merged = merge_weight(weight, heads, merge)
    grads = tuple(q.new_empty(q.shape) for _ in range(3))
    dweight = merged.new_zeros(merged.shape, dtype=torch.promote_types(weight.dtype, torch.float32))
    for part in _chunks(q):
        maps = _reorder([q[part], k[part], v[part]], head_dim)
        dmaps, share, _ = torch.ops.aten.convolution_backward(
            grad_out[part], maps, merged, None, [window.stride] * 2, [window.reach] * 2,
            [window.dilation] * 2, False, [0, 0], head_dim // merge, [True, True, False],
        )  # fmt: skip
        dweight += share
        dmaps = dmaps.unflatten(1, (head_dim, 3, heads))
        for i, grad in enumerate(grads):
            grad[part].unflatten(1, (heads, head_dim)).copy_(dmaps[:, :, i].transpose(1, 2))
    return grads[0], grads[1], grads[2], split_weight(dweight, heads, merge).to(weight.dtype)
