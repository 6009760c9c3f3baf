"""Sliding-window attention in a handful of standard operators: dense for small maps, tile by tile for larger ones.

A tile is a block of queries with the keys that any of them may look at, and a mask for those that one of them may not.
Reflection at the border is in the indices by which keys are gathered.

Shape legend: B batch, N heads, d head width, H × W map, Q queries of the map, T tiles, t queries of a tile, L its keys.
"""

import math

import torch
from torch import Tensor, nn

from acmix.ops.implementations import Window
from acmix.ops.local_attention.dense import log_multiplicity

TILE = 7
"""Queries along a side of a tile. Larger ones multiply with more keys that the mask then drops."""

DENSE_KEYS = 256
"""Pixels up to which every query is multiplied with every key: gathering tiles would cost more."""


class WindowedAttention(nn.Module):
    """softmax(q kᵀ + bias) v in the window around every stride-th pixel; q comes scaled, k less its position term.

    Args:
        window: Of every query.
        size: (H, W) of all maps; None for maps of any size.
    """

    bias: Tensor
    queries: Tensor

    def __init__(self, window: Window, size: tuple[int, int] | None) -> None:
        super().__init__()
        self.window, self.size = window, size
        self.dense = size is not None and math.prod(size) <= DENSE_KEYS
        if size is None:
            return
        if self.dense:
            fitting = fitting_window(window, *size)
            bias = log_multiplicity(*size, fitting, torch.float32, torch.device("cpu"))
            tables = {"bias": bias.clone(), "queries": strided_pixels(*size, window.stride)}
        else:
            tables = tile_tables(*size, window)
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, height: int, width: int) -> Tensor:
        """q, k, v (B, N, H * W, d) to (B, N, Q, d)."""
        if self.dense:
            if self.window.stride > 1:
                q = q.index_select(2, self.queries)
            return ((q @ k.mT) + self.bias).softmax(-1) @ v
        tables = dict(self.named_buffers()) or tile_tables(height, width, self.window)
        tiles = [_gather(maps, tables[name]) for maps, name in ((q, "queries"), (k, "keys"), (v, "keys"))]
        out = ((tiles[0] @ tiles[1].mT) + tables["bias"]).softmax(-1) @ tiles[2]  # (B, N, T, t, d)
        return out.flatten(2, 3).index_select(2, tables["order"])


def position_term(position_weight: Tensor, height: int, width: int) -> Tensor:
    """P p of every pixel: what its position takes from a key, (H * W, d), up to a vector that the softmax cancels.

    The sizes may be symbols of a graph.
    """
    along = (torch.arange(side).to(position_weight) for side in (width, height))
    x, y = (line.mul(2 / torch.sym_max(side - 1, 1)) for line, side in zip(along, (width, height), strict=True))
    along_x, along_y = torch.outer(x, position_weight[:, 0]), torch.outer(y, position_weight[:, 1])
    return (along_y.unsqueeze(1) + along_x).flatten(0, 1)


def fitting_window(window: Window, height: int, width: int) -> Window:
    """The window, or on a map too small for it the largest that reflection at its border allows."""
    members = (min(height, width) - 1) // window.dilation
    return Window(min(window.kernel_size, 2 * members + 1), window.stride, window.dilation)


def strided_pixels(height: int, width: int, stride: int) -> Tensor:
    """Indices, row by row, of every stride-th pixel of a map: (Q,)."""
    return _flat(torch.arange(0, height, stride), torch.arange(0, width, stride), width)


def tile_tables(height: int, width: int, window: Window) -> dict[str, Tensor]:
    """Indices into the pixels of a map for each tile, and which tile and place each query comes from.

    queries: (T, t); keys: (T, L); bias: (t, L), 0 where the key lies in the query's window, -inf elsewhere;
    order: (Q,) into T * t. The sizes may be symbols of a graph.
    """
    rows, columns = _axis(height, window), _axis(width, window)
    y, x = (torch.arange(parts(side, window.stride)) for side in (height, width))
    y, across = y[:, None], columns["queries"].shape[0]
    tile, place = y // TILE * across + x // TILE, y % TILE * TILE + x % TILE
    inside = _members(window, height, width)
    return {
        "queries": _flat_tiles(rows["queries"], columns["queries"], width),
        "keys": _flat_tiles(rows["keys"], columns["keys"], width),
        "bias": torch.zeros(inside.shape).masked_fill(~inside, -math.inf),
        "order": (tile * TILE**2 + place).flatten(),
    }


def parts(size: int, length: int) -> int:
    """How many parts of this length cover a size, rounded up without a negative number, whose division ONNX rounds in
    the other direction."""
    return (size + length - 1) // length


def _axis(size: int, window: Window) -> dict[str, Tensor]:
    """Along one axis, the pixels of each tile: queries (tiles, TILE), keys (tiles, halo), reflected at the border."""
    count = parts(parts(size, window.stride), TILE)
    start = torch.arange(count)[:, None] * (TILE * window.stride)
    queries = start + torch.arange(TILE) * window.stride
    keys = (start + torch.arange(-window.reach, (TILE - 1) * window.stride + window.reach + 1)).abs()
    keys = torch.where(keys >= size, 2 * (size - 1) - keys, keys)
    return {"queries": queries.clamp(max=size - 1), "keys": keys.clamp(0, size - 1)}


def _members(window: Window, height: int, width: int) -> Tensor:
    """Whether a key of a tile (columns, row by row) is a member of a query's window (rows): (t, L)."""
    # On a map too small for the window, reflection at the border allows a smaller one. A number taken of symbolic sizes
    # by `min` would tie the graph to them, so it is taken of tensors.
    shorter = torch.minimum(torch.arange(height).amax(0), torch.arange(width).amax(0))
    reach = (shorter // window.dilation).clamp(max=window.kernel_size // 2) * window.dilation
    steps = torch.arange(-window.reach, (TILE - 1) * window.stride + window.reach + 1)
    offset = (steps - torch.arange(TILE)[:, None] * window.stride).abs()
    near = (offset <= reach) & (offset % window.dilation == 0)
    return (near[:, None, :, None] & near[None, :, None, :]).flatten(2).flatten(0, 1)


def _flat(rows: Tensor, columns: Tensor, width: int) -> Tensor:
    return (rows[:, None] * width + columns).flatten()


def _flat_tiles(rows: Tensor, columns: Tensor, width: int) -> Tensor:
    """(down, a) rows and (across, b) columns to pixels (down * across, a * b)."""
    return (rows[:, None, :, None] * width + columns[None, :, None, :]).flatten(2).flatten(0, 1)


def _gather(maps: Tensor, index: Tensor) -> Tensor:
    return maps.index_select(2, index.flatten()).unflatten(2, index.shape)
