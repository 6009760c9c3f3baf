"""Which tile each kernel uses: a small deterministic choice, not a search at run time.

A program owns TILE_H x TILE_W pixels and streams the rectangle around them that their windows reach, ROWS rows of COLS
columns at a time. COLS is a power of two, so some of it lies outside every window: the choice below takes the tile
with the fewest logits in all, which for 7x7 windows is 4x8 on a large map and whole rows on a small one.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache

import torch

from acmix.ops.gpu import power_of_two
from acmix.ops.implementations import Window

MIN_DOT = 16  # the smallest side of a product the tensor cores take


@dataclass(frozen=True)
class Surroundings:
    """A tile's surroundings on one problem: how far the rectangle it streams extends, along either axis."""

    height: int
    """Pixels that are tiled, along y."""
    width: int
    streamed_height: int
    """Pixels that are streamed, along y."""
    streamed_width: int
    window: Window
    owns_queries: bool
    """Whether queries are tiled and keys streamed, or the other way round."""

    def extent(self, side: int) -> int:
        """Side of the rectangle that must be streamed around a tile of this side, on an unbounded map."""
        if self.owns_queries:
            return (side - 1) * self.window.stride + 2 * self.window.reach + 1
        return (side - 1 + 2 * self.window.reach) // self.window.stride + 1


@dataclass(frozen=True)
class Tile:
    """Sizes a kernel is compiled for."""

    height: int
    width: int
    rows: int
    """Rows streamed in one step."""
    columns: int
    """Columns streamed in one step: the rectangle's width, rounded up to a power of two."""
    warps: int
    stages: int
    """Depth of the software pipeline over the steps."""


def padded_head_dim(head_dim: int) -> int:
    """The width a kernel gives a head: a power of two that the tensor cores take."""
    return max(MIN_DOT, power_of_two(head_dim))


def logits(surroundings: Surroundings, tile: Tile) -> int:
    """Logits that all programs of one head and image compute, useful or not: what the exponentials cost."""
    programs = -(-surroundings.height // tile.height) * -(-surroundings.width // tile.width)
    steps = -(-min(surroundings.extent(tile.height), surroundings.streamed_height) // tile.rows)
    return programs * steps * tile.height * tile.width * tile.rows * tile.columns


@dataclass(frozen=True)
class Budget:
    """How much of a problem one program holds at a time: what fits the registers."""

    pixels: int
    """Pixels of a tile."""
    slots: int
    """Pixels streamed in one step, about."""
    warps: int
    stages: int


def shape_tile(surroundings: Surroundings, height: int, width: int, budget: Budget) -> Tile:
    """The tile of `height` x `width` pixels on this problem that streams about `budget.slots` pixels a step."""
    columns = power_of_two(min(surroundings.extent(width), surroundings.streamed_width))
    rows = max(budget.slots, MIN_DOT, columns) // columns
    return Tile(height, width, rows, columns, budget.warps, budget.stages)


# Padded head dimension → budget, for 16-bit maps; the fastest of those that benchmarks/tune_triton.py tried on an H200.
_HALF = {
    "forward": {
        16: Budget(32, 32, 1, 3),
        32: Budget(16, 32, 1, 2),
        64: Budget(32, 32, 1, 2),
        128: Budget(64, 32, 4, 1),
    },
    "dq": {16: Budget(32, 16, 1, 3), 32: Budget(32, 16, 1, 3), 64: Budget(32, 16, 2, 3), 128: Budget(64, 32, 4, 1)},
    "dkv": {16: Budget(32, 16, 1, 2), 32: Budget(32, 32, 1, 2), 64: Budget(32, 16, 2, 2), 128: Budget(64, 32, 4, 1)},
}
# Found by counting instructions, registers and spills of the compiled kernels.
_TF32 = {16: Budget(32, 16, 2, 2), 32: Budget(32, 16, 2, 2), 64: Budget(32, 16, 4, 2)}
# Without tensor cores the operands of a product sit in registers too: smaller pieces, more warps.
_FLOAT32 = {16: Budget(32, 16, 2, 2), 32: Budget(32, 16, 4, 2), 64: Budget(32, 16, 8, 2)}
_WIDEST = Budget(16, 16, 8, 1)


def _budget(kernel: str, head_dim: int, dtype: torch.dtype, tf32: bool, scattered: bool) -> Budget:
    if dtype == torch.float32:
        table = _TF32 if tf32 else _FLOAT32
    else:
        table = _HALF[kernel]
    budget = table.get(padded_head_dim(head_dim), _WIDEST)
    # Channels that are not adjacent are loaded one by one, each through an address register of its own.
    return replace(budget, warps=min(2 * budget.warps, 8)) if scattered else budget


@cache
def choose_tile(
    kernel: str, surroundings: Surroundings, head_dim: int, dtype: torch.dtype, tf32: bool, scattered: bool = False
) -> Tile:
    """The tile with the fewest logits for `kernel` (forward, dq or dkv); among equals, the squarest, then the widest
    that the map holds.

    `scattered`: the channels of a pixel are not adjacent in memory (a contiguous map rather than a channels_last one).
    """
    if _override:
        return _override[-1](kernel, surroundings)
    budget = _budget(kernel, head_dim, dtype, tf32, scattered)
    shapes = [(budget.pixels // width, width) for width in (2, 4, 8, 16, 32) if width <= budget.pixels]
    tiles = [shape_tile(surroundings, *shape, budget) for shape in shapes]
    most = max(budget.slots, min(tile.rows * tile.columns for tile in tiles))
    fitting = [tile for tile in tiles if tile.rows * tile.columns <= most]

    def cost(tile: Tile) -> tuple[int, int, bool, int]:
        hangs_over = tile.width > surroundings.width
        return logits(surroundings, tile), abs(tile.width - tile.height), hangs_over, -tile.width

    return min(fitting, key=cost)


_override: list[Callable[[str, Surroundings], Tile]] = []


@contextmanager
def forced_tile(make: Callable[[str, Surroundings], Tile]) -> Iterator[None]:
    """Use `make(kernel, surroundings)` for every launch inside the context, as the tuning sweep does."""
    _override.append(make)
    choose_tile.cache_clear()
    try:
        yield
    finally:
        _override.pop()
        choose_tile.cache_clear()
