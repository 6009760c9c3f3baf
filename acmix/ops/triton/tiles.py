"""Which tile each kernel uses: a small deterministic choice, not a search at run time.

A program owns TILE_H x TILE_W pixels and streams the rectangle around them that their windows reach, ROWS rows of COLS
columns at a time. COLS is a power of two, so some of it lies outside every window: the choice below takes the tile
with the fewest logits in all, which for 7x7 windows is 4x8 on a large map and whole rows on a small one.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

MIN_DOT = 16  # the smallest side of a product the tensor cores take


@dataclass(frozen=True)
class Window:
    """A tile's surroundings on one problem: how far the rectangle it streams extends, along either axis."""

    height: int
    """Pixels that are tiled, along y."""
    width: int
    streamed_height: int
    """Pixels that are streamed, along y."""
    streamed_width: int
    extent: Callable[[int], int]
    """Side of a tile → side of the rectangle around it that must be streamed, on an unbounded map."""


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


def power_of_two(value: int) -> int:
    """The smallest power of two that is at least `value`."""
    return 1 << max(value - 1, 0).bit_length()


def padded_head_dim(head_dim: int) -> int:
    """The width a kernel gives a head: a power of two that the tensor cores take."""
    return max(MIN_DOT, power_of_two(head_dim))


def shape_tile(window: Window, height: int, width: int, slots: int, warps: int, stages: int) -> Tile:
    """The tile of `height` x `width` pixels on this problem that streams about `slots` pixels a step."""
    columns = power_of_two(min(window.extent(width), window.streamed_width))
    rows = max(slots, MIN_DOT, columns) // columns
    return Tile(height, width, rows, columns, warps, stages)


def logits(window: Window, tile: Tile) -> int:
    """Logits that all programs of one head and image compute, useful or not: what the exponentials cost."""
    programs = -(-window.height // tile.height) * -(-window.width // tile.width)
    steps = -(-min(window.extent(tile.height), window.streamed_height) // tile.rows)
    return programs * steps * tile.height * tile.width * tile.rows * tile.columns


def _pixels_slots_warps(head_dim: int, dtype: torch.dtype, tf32: bool) -> tuple[int, int, int]:
    """(pixels of a tile, pixels streamed a step, warps) by padded head dimension: what fits the registers.

    Float32 without tf32 runs on the plain multipliers, whose operands sit in registers too: smaller pieces, more warps.
    """
    if dtype == torch.float32 and not tf32:
        return {16: (32, 32, 2), 32: (32, 32, 4), 64: (32, 32, 8)}.get(head_dim, (16, 16, 8))
    if dtype == torch.float32:
        return {16: (32, 32, 2), 32: (32, 32, 4), 64: (32, 32, 4)}.get(head_dim, (32, 16, 8))
    return {16: (32, 32, 2), 32: (32, 32, 2), 64: (32, 32, 4)}.get(head_dim, (32, 32, 4))


def choose_tile(window: Window, head_dim: int, dtype: torch.dtype, tf32: bool) -> Tile:
    """The tile with the fewest logits; among equals, the one that streams the fewest pixels per pixel owned."""
    if _override:
        return _override[-1](window)
    pixels, slots, warps = _pixels_slots_warps(padded_head_dim(head_dim), dtype, tf32)
    shapes = [(pixels // width, width) for width in (2, 4, 8, 16, 32) if pixels // width >= 1]
    tiles = [shape_tile(window, height, width, slots, warps, stages=2) for height, width in shapes]
    return min(tiles, key=lambda tile: (logits(window, tile), abs(tile.width - tile.height)))


_override: list[Callable[[Window], Tile]] = []


@contextmanager
def forced_tile(make: Callable[[Window], Tile]) -> Iterator[None]:
    """Use `make(window)` for every launch inside the context: how the tuning sweep tries its candidates."""
    _override.append(make)
    try:
        yield
    finally:
        _override.pop()
