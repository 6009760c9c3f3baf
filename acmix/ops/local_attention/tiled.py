"""Sliding-window attention by tiles of queries with a halo of keys, in eager torch, for maps of any size.

The padded map is cut into overlapping vertical strips, once; a tile of `rows` × `cols` queries then finds the
`halo_rows` × `halo_cols` keys it can reach as one contiguous slice of a strip, so that logits, values and all three
gradients are batched matrix products without a copy, and a constant mask removes the keys outside each window.
Heads are taken in parts small enough to stay in the cache. The backward pass keeps nothing but q, k and v.

Shape legend: U heads of a part, d head width, T = U * across strips, Q queries of a tile, L keys of a tile.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from acmix.ops.implementations import Window
from acmix.ops.local_attention.products import over_channels, softmax_backward_
from acmix.ops.reference import positions

# Bytes of logits in flight: small enough for the second-level cache of a core, large enough to hide the call overhead.
LOGIT_BYTES = 400_000


@dataclass(frozen=True)
class Tiling:
    """How an Ho × Wo map of queries is cut, for dense windows of `kernel_size` keys at `stride`."""

    rows: int
    cols: int
    down: int
    across: int
    halo_rows: int
    halo_cols: int
    stride: int

    @classmethod
    def of(cls, height: int, width: int, kernel_size: int, stride: int, tile: tuple[int, int]) -> "Tiling":
        rows, cols = min(tile[0], height), min(tile[1], width)
        halo = ((rows - 1) * stride + kernel_size, (cols - 1) * stride + kernel_size)
        return cls(rows, cols, -(-height // rows), -(-width // cols), *halo, stride)

    @property
    def queries(self) -> int:
        return self.rows * self.cols

    @property
    def keys(self) -> int:
        return self.halo_rows * self.halo_cols

    @property
    def extent(self) -> tuple[int, int]:
        """Rows and columns of the padded map that the tiles touch; may exceed or fall short of the map."""
        down = (self.down - 1) * self.rows * self.stride + self.halo_rows
        return down, (self.across - 1) * self.cols * self.stride + self.halo_cols


def choose_tile(stride: int, width: int) -> tuple[int, int]:
    """The fastest tile over the maps measured: wide and flat, smaller where a stride spreads the keys."""
    if stride > 1:
        return 4, 4
    return (4, 7) if width % 8 and width % 7 == 0 else (2, 8)


@lru_cache(64)
def _mask(tiling: Tiling, kernel_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Bias (1, Q, L): 0 where the key lies in the query's window, -inf elsewhere."""

    def axis(count: int, halo: int) -> Tensor:
        offset = torch.arange(halo) - torch.arange(count)[:, None] * tiling.stride
        return (offset >= 0) & (offset < kernel_size)

    rows, cols = axis(tiling.rows, tiling.halo_rows), axis(tiling.cols, tiling.halo_cols)
    inside = rows[:, None, :, None] & cols[None, :, None, :]
    bias = torch.zeros(inside.shape, dtype=dtype).masked_fill_(~inside, -math.inf)
    return bias.view(1, tiling.queries, tiling.keys).to(device)


class Workspace:
    """Named buffers reused by every part of one call: touching fresh memory costs more than computing in it."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._flat: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        """A contiguous buffer of this shape with undefined contents; the same memory for the same name."""
        size = math.prod(shape)
        flat = self._flat.get(name)
        if flat is None or flat.numel() < size:
            flat = self._flat[name] = self._like.new_empty(size)
        return flat[:size].view(shape)


@dataclass(frozen=True)
class _Plan:
    """How one call is cut: into parts of heads, and a dilated window into dense ones."""

    batch: int
    heads: int
    height: int
    width: int
    window: Window
    tile: tuple[int, int]

    @classmethod
    def of(cls, q: Tensor, head_dim: int, window: Window) -> "_Plan":
        batch, channels, height, width = q.shape
        tile = choose_tile(window.stride, window.out_size(height, width)[1])
        return cls(batch, channels // head_dim, height, width, window, tile)

    @property
    def out_size(self) -> tuple[int, int]:
        return self.window.out_size(self.height, self.width)

    def cut(self, height: int, width: int) -> Tiling:
        """The tiling of a map of so many queries."""
        return Tiling.of(height, width, self.window.kernel_size, self.window.stride, self.tile)

    def parts(self, itemsize: int) -> Iterator[tuple[slice, slice]]:
        """Slices of images and heads: some heads of one image, or all heads of some images."""
        cut = self.cut(*(-(-n // self.window.dilation) for n in self.out_size))
        step = max(1, LOGIT_BYTES // (cut.across * cut.queries * cut.keys * itemsize))
        images, heads = max(1, step // self.heads), min(step, self.heads)
        for image in range(0, self.batch, images):
            for head in range(0, self.heads, heads):
                yield slice(image, image + images), slice(head, head + heads)

    def phases(self) -> Iterator[tuple[tuple[slice, slice], tuple[slice, slice]]]:
        """Pairs (queries, padded keys) of sub-grids on which a dilated window is a dense one."""
        stride, dilation = self.window.stride, self.window.dilation
        for y in range(min(dilation, self.out_size[0])):
            for x in range(min(dilation, self.out_size[1])):
                queries = (slice(y, None, dilation), slice(x, None, dilation))
                keys = (slice(y * stride, None, dilation), slice(x * stride, None, dilation))
                yield queries, keys


def _reflect(padded: Tensor, reach: int) -> None:
    """Fill the border of a padded map (..., H + 2 reach, W + 2 reach) by reflection of its inside."""
    if not reach:
        return
    inner = padded[..., reach:-reach, :]
    inner[..., :reach].copy_(inner[..., reach + 1 : 2 * reach + 1].flip(-1))
    inner[..., -reach:].copy_(inner[..., -2 * reach - 1 : -reach - 1].flip(-1))
    padded[..., :reach, :].copy_(padded[..., reach + 1 : 2 * reach + 1, :].flip(-2))
    padded[..., -reach:, :].copy_(padded[..., -2 * reach - 1 : -reach - 1, :].flip(-2))


def _unreflect(padded: Tensor, reach: int) -> Tensor:
    """The adjoint of `_reflect`: add the border's gradient to the pixels it mirrors; returns the inside."""
    if not reach:
        return padded
    padded[..., reach + 1 : 2 * reach + 1, :].add_(padded[..., :reach, :].flip(-2))
    padded[..., -2 * reach - 1 : -reach - 1, :].add_(padded[..., -reach:, :].flip(-2))
    inner = padded[..., reach:-reach, :]
    inner[..., reach + 1 : 2 * reach + 1].add_(inner[..., :reach].flip(-1))
    inner[..., -2 * reach - 1 : -reach - 1].add_(inner[..., -reach:].flip(-1))
    return inner[..., reach:-reach]


def _pad(ws: Workspace, name: str, maps: Tensor, reach: int, minus: Tensor | None = None) -> Tensor:
    """Reflection-padded copy (U, d, H + 2 reach, W + 2 reach) of a part of the maps, less the map `minus` if given."""
    height, width = maps.shape[-2:]
    padded = ws(name, *maps.shape[:-2], height + 2 * reach, width + 2 * reach)
    inside = padded[..., reach : reach + height, reach : reach + width]
    if minus is None:
        inside.copy_(maps)
    else:
        torch.sub(maps, minus, out=inside)
    _reflect(padded, reach)
    return padded.flatten(0, 1)


def _key_strips(ws: Workspace, name: str, padded: Tensor, cut: Tiling) -> Tensor:
    """Overlapping strips (T, d, extent * halo_cols) of a padded map; what lies beyond the map is zero."""
    units, dim, height, width = padded.shape
    need_height, need_width = cut.extent
    height, step = min(height, need_height), cut.cols * cut.stride
    strips = ws(name, units, cut.across, dim, need_height, cut.halo_cols)
    whole = cut.across if width >= need_width else cut.across - 1
    if height < need_height or whole < cut.across:
        strips.zero_()
    if whole:
        windows = padded[..., :height, :need_width].unfold(3, cut.halo_cols, step)[:, :, :, :whole]
        strips[:, :whole, :, :height].copy_(windows.permute(0, 3, 1, 2, 4))
    if whole < cut.across:
        rest = padded[..., :height, whole * step :]
        strips[:, whole, :, :height, : rest.shape[-1]].copy_(rest)
    return strips.view(units * cut.across, dim, -1)


def _add_strips(padded: Tensor, strips: Tensor, cut: Tiling) -> None:
    """The adjoint of `_key_strips`: add overlapping strips to the padded map."""
    units, dim, height, _ = padded.shape
    strips = strips.view(units, cut.across, dim, -1, cut.halo_cols)
    height, step = min(height, strips.shape[3]), cut.cols * cut.stride
    for i in range(cut.across):
        target = padded[..., :height, i * step : i * step + cut.halo_cols]
        target.add_(strips[:, i, :, :height, : target.shape[-1]])


def _query_strips(ws: Workspace, name: str, maps: Tensor, cut: Tiling) -> Tensor:
    """Disjoint strips (T, d, down * Q) of a map of queries; what lies beyond the map is zero."""
    *units, dim, height, width = maps.shape
    strips = ws(name, *units, cut.across, dim, cut.down * cut.rows, cut.cols)
    whole = width // cut.cols
    if height < cut.down * cut.rows or whole < cut.across:
        strips.zero_()
    if whole:
        columns = maps[..., : whole * cut.cols].unflatten(4, (whole, cut.cols))
        strips[:, :, :whole, :, :height].copy_(columns.permute(0, 1, 4, 2, 3, 5))
    if whole < cut.across:
        strips[:, :, whole, :, :height, : width - whole * cut.cols].copy_(maps[..., whole * cut.cols :])
    return strips.view(-1, dim, cut.down * cut.queries)


def _store(rows: Tensor, tiles: Tensor, cut: Tiling, scale: float = 1.0) -> None:
    """Write one row of tiles (T, d, Q), times `scale`, to the rows (images, heads, d, <= cut.rows, Wo) of a map."""
    *units, dim, height, width = rows.shape
    tiles = tiles.view(*units, cut.across, dim, cut.rows, cut.cols)[..., :height, :]
    whole = width // cut.cols
    if whole:
        target = rows[..., : whole * cut.cols].unflatten(4, (whole, cut.cols))
        torch.mul(tiles[:, :, :whole].permute(0, 1, 3, 4, 2, 5), scale, out=target)
    if whole < cut.across:
        rest = rows[..., whole * cut.cols :]
        torch.mul(tiles[:, :, whole, ..., : rest.shape[-1]], scale, out=rest)


def _attend(ws: Workspace, q: Tensor, key: Tensor, value: Tensor, out: Tensor, kernel_size: int, cut: Tiling) -> None:
    """Window attention of q (images, heads, d, Ho, Wo) over padded keys and values (U, d, ...), written to `out`."""
    queries, keys = cut.queries, cut.keys
    bias = _mask(cut, kernel_size, key.dtype, key.device)
    q_strips = _query_strips(ws, "q", q, cut).mul_(q.shape[2] ** -0.5)
    k_strips, v_strips = _key_strips(ws, "k", key, cut), _key_strips(ws, "v", value, cut)
    logits = ws("logits", q_strips.shape[0], queries, keys)
    weights = ws("weights", *logits.shape)
    tiles = ws("tiles", q_strips.shape[0], q.shape[2], queries)
    for i in range(cut.down):
        at = i * cut.rows * cut.stride * cut.halo_cols
        tile = q_strips[..., i * queries : (i + 1) * queries]
        over_channels(tile, k_strips[..., at : at + keys], out=logits, bias=bias)
        torch.softmax(logits, -1, out=weights)
        torch.bmm(v_strips[..., at : at + keys], weights.mT, out=tiles)
        _store(out[..., i * cut.rows : (i + 1) * cut.rows, :], tiles, cut)


def _attend_backward(
    ws: Workspace, maps: tuple[Tensor, ...], grads: tuple[Tensor, Tensor, Tensor], kernel_size: int, cut: Tiling
) -> None:
    """Gradients of `_attend`: maps are (grad_out, q, padded key, padded value), grads (dq, padded dk, padded dv).

    dq is written, the padded gradients are added to.
    """
    grad_out, q, key, value = maps
    queries, keys, scale = cut.queries, cut.keys, q.shape[2] ** -0.5
    bias = _mask(cut, kernel_size, key.dtype, key.device)
    g_strips, q_strips = _query_strips(ws, "g", grad_out, cut), _query_strips(ws, "q", q, cut).mul_(scale)
    k_strips, v_strips = _key_strips(ws, "k", key, cut), _key_strips(ws, "v", value, cut)
    dk_strips, dv_strips = ws("dk", *k_strips.shape).zero_(), ws("dv", *v_strips.shape).zero_()
    logits = ws("logits", q_strips.shape[0], queries, keys)
    weights = ws("weights", *logits.shape)
    key_tiles = ws("key tiles", q_strips.shape[0], q.shape[2], keys)
    tiles = ws("tiles", q_strips.shape[0], q.shape[2], queries)
    for i in range(cut.down):
        at = i * cut.rows * cut.stride * cut.halo_cols
        halo, tile = slice(at, at + keys), slice(i * queries, (i + 1) * queries)
        over_channels(q_strips[..., tile], k_strips[..., halo], out=logits, bias=bias)
        torch.softmax(logits, -1, out=weights)
        dv_strips[..., halo].add_(torch.bmm(g_strips[..., tile], weights, out=key_tiles))
        over_channels(g_strips[..., tile], v_strips[..., halo], out=logits)
        dlogits = softmax_backward_(logits, weights)
        dk_strips[..., halo].add_(torch.bmm(q_strips[..., tile], dlogits, out=key_tiles))
        torch.bmm(k_strips[..., halo], dlogits.mT, out=tiles)
        _store(grads[0][..., i * cut.rows : (i + 1) * cut.rows, :], tiles, cut, scale)
    _add_strips(grads[1], dk_strips, cut)
    _add_strips(grads[2], dv_strips, cut)


def forward(q: Tensor, k: Tensor, v: Tensor, position_weight: Tensor, window: Window) -> Tensor:
    """The attended map (B, N*d, Ho, Wo); arguments as in the public operation."""
    head_dim, stride, reach = position_weight.shape[0], window.stride, window.reach
    plan = _Plan.of(q, head_dim, window)
    p = positions(q.shape[-2], q.shape[-1], like=q)
    offset = torch.einsum("dp,pyx->dyx", position_weight.to(p.dtype), p)
    out = q.new_empty(q.shape[0], q.shape[1], *plan.out_size)
    q, k, v, split = (maps.unflatten(1, (-1, head_dim)) for maps in (q[..., ::stride, ::stride], k, v, out))
    ws = Workspace(p)
    for part in plan.parts(p.itemsize):
        key, value = _pad(ws, "key", k[part], reach, minus=offset), _pad(ws, "value", v[part], reach)
        for at_q, at_k in plan.phases():
            target = split[part][..., *at_q]
            cut = plan.cut(*target.shape[-2:])
            _attend(ws, q[part][..., *at_q], key[..., *at_k], value[..., *at_k], target, window.kernel_size, cut)
    return out


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, position_weight: Tensor, window: Window
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients with respect to q, k, v (contiguous) and the position weight; the logits are computed again."""
    head_dim, shape, stride, reach = position_weight.shape[0], q.shape, window.stride, window.reach
    plan = _Plan.of(q, head_dim, window)
    p = positions(q.shape[-2], q.shape[-1], like=q)
    offset = torch.einsum("dp,pyx->dyx", position_weight.to(p.dtype), p)
    dq, dk, dv = (q.new_empty(shape) for _ in range(3))
    if stride > 1:
        dq.zero_()
    maps = (q[..., ::stride, ::stride], k, v, grad_out, dq[..., ::stride, ::stride], dk, dv)
    q, k, v, g, split_dq, split_dk, split_dv = (m.unflatten(1, (-1, head_dim)) for m in maps)
    ws, pixels = Workspace(p), p.new_zeros(head_dim, *shape[-2:])
    for part in plan.parts(p.itemsize):
        key, value = _pad(ws, "key", k[part], reach, minus=offset), _pad(ws, "value", v[part], reach)
        dkey, dvalue = ws("dkey", *key.shape).zero_(), ws("dvalue", *value.shape).zero_()
        for at_q, at_k in plan.phases():
            pieces = (g[part][..., *at_q], q[part][..., *at_q], key[..., *at_k], value[..., *at_k])
            cut = plan.cut(*pieces[0].shape[-2:])
            grads = (split_dq[part][..., *at_q], dkey[..., *at_k], dvalue[..., *at_k])
            _attend_backward(ws, pieces, grads, window.kernel_size, cut)
        dkey = _unreflect(dkey, reach)
        split_dk[part].copy_(dkey.unflatten(0, split_dk[part].shape[:2]))
        split_dv[part].copy_(_unreflect(dvalue, reach).unflatten(0, split_dv[part].shape[:2]))
        pixels += dkey.sum(0)
    dposition = -torch.einsum("dyx,pyx->dp", pixels, p)
    return dq, dk, dv, dposition.to(position_weight.dtype)
