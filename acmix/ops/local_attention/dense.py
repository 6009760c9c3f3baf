"""Sliding-window attention as dense attention over all pixels, in eager torch, for small maps.

Reflection padding only repeats pixels, so attention over the padded window equals attention over the pixels of the
map with the logarithm of each pixel's multiplicity in the window added to its logit: no padded copies, nothing to
fold back. The backward pass keeps nothing but q, k and v.

Shape legend: U heads of a part, d head width, Q = Ho * Wo queries, L = H * W keys.
"""

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from acmix.ops.implementations import Window
from acmix.ops.local_attention.products import over_channels, softmax_backward_
from acmix.ops.reference import positions

# Bytes of logits in flight, so that softmax and products find them in the cache.
LOGIT_BYTES = 600_000


def _multiplicity(size: int, window: Window) -> Tensor:
    """How often each of `size` pixels (columns) occurs in the reflected window of each query (rows), along one axis."""
    centre = torch.arange(0, size, window.stride)[:, None]
    offset = torch.arange(window.kernel_size) * window.dilation - window.reach
    pixel = (centre + offset).abs()
    pixel = torch.where(pixel >= size, 2 * (size - 1) - pixel, pixel)
    return torch.nn.functional.one_hot(pixel, size).sum(1)


@lru_cache(64)
def log_multiplicity(height: int, width: int, window: Window, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Bias (1, Q, L): the logarithm of how often a pixel occurs in a query's window, -inf where it does not."""
    rows = _multiplicity(height, window)[:, None, :, None]
    cols = _multiplicity(width, window)[None, :, None, :]
    count = (rows * cols).to(torch.float64)
    return count.log().to(dtype).flatten(0, 1).flatten(1).unsqueeze(0).to(device)


def _parts(heads: int, logits: int, itemsize: int) -> Iterator[slice]:
    step = max(1, LOGIT_BYTES // (logits * itemsize))
    for start in range(0, heads, step):
        yield slice(start, min(start + step, heads))


def _heads(maps: Tensor, head_dim: int) -> Tensor:
    return maps.reshape(-1, head_dim, maps.shape[-2] * maps.shape[-1])


def forward(q: Tensor, k: Tensor, v: Tensor, position_weight: Tensor, window: Window) -> Tensor:
    """The attended map (B, N*d, Ho, Wo); arguments as in the public operation."""
    dim, (height, width) = position_weight.shape[0], q.shape[-2:]
    p = positions(height, width, like=q).flatten(1)
    offset = position_weight.to(p.dtype) @ p
    bias = log_multiplicity(height, width, window, p.dtype, q.device)
    query = q[..., :: window.stride, :: window.stride]
    out = query.new_empty(query.shape)
    q, k, v, flat = (_heads(maps, dim) for maps in (query, k, v, out))
    for part in _parts(len(q), bias.numel(), p.itemsize):
        logits = over_channels(q[part].to(p.dtype) * dim**-0.5, k[part] - offset, bias=bias)
        flat[part] = torch.bmm(v[part].to(p.dtype), logits.softmax(-1).mT)
    return out


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, position_weight: Tensor, window: Window
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients with respect to q, k, v (contiguous) and the position weight; the logits are computed again."""
    dim, shape, scale = position_weight.shape[0], q.shape, position_weight.shape[0] ** -0.5
    p = positions(shape[-2], shape[-1], like=q).flatten(1)
    offset = position_weight.to(p.dtype) @ p
    bias = log_multiplicity(*shape[-2:], window, p.dtype, q.device)
    dk, dv = q.new_empty(shape), q.new_empty(shape)
    query = q[..., :: window.stride, :: window.stride]
    dquery = q.new_empty(query.shape)
    flat_dq, flat_dk, flat_dv = (_heads(grad, dim) for grad in (dquery, dk, dv))
    q, k, v, g = (_heads(maps, dim) for maps in (query, k, v, grad_out))
    pixels = p.new_zeros(offset.shape)
    for part in _parts(len(q), bias.numel(), p.itemsize):
        query, key, grad = q[part].to(p.dtype) * scale, k[part] - offset, g[part].to(p.dtype)
        weights = over_channels(query, key, bias=bias).softmax(-1)
        flat_dv[part] = torch.bmm(grad, weights)
        dweights = over_channels(grad, v[part].to(p.dtype))
        dlogits = softmax_backward_(dweights, weights)
        dkey = torch.bmm(query, dlogits)
        flat_dk[part] = dkey
        pixels += dkey.sum(0)
        flat_dq[part] = torch.bmm(key, dlogits.mT).mul_(scale)
    return _spread(dquery, shape, window.stride), dk, dv, (pixels @ -p.mT).to(position_weight.dtype)


def _spread(maps: Tensor, shape: torch.Size, stride: int) -> Tensor:
    """Put the gradient of every stride-th pixel back into a full map that is zero elsewhere."""
    if stride == 1:
        return maps
    full = maps.new_zeros(shape)
    full[..., ::stride, ::stride] = maps
    return full
