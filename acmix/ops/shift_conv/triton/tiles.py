"""How much of a problem each program of the convolution kernels holds."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from acmix.ops.gpu import power_of_two


@dataclass(frozen=True)
class Tile:
    """pixels, channels: those of a program; unroll: source maps in one turn of its loop."""

    pixels: int
    channels: int
    warps: int
    unroll: int = 4

    def splits(self, pixels: int, parts: int) -> int:
        """Into how many shares a sum over so many pixels is cut, where each is computed by `parts` programs.

        By the sizes alone, so that every GPU adds in the same order.
        """
        return max(1, min(-(-pixels // (4 * self.pixels)), -(-_PROGRAMS // parts)))


_PROGRAMS = 4096


def map_tile(head_dim: int) -> Tile:
    """The tile of the kernel that writes maps: a thread holds 32 values of each of four sums, the best on an H200."""
    channels = min(32, power_of_two(head_dim))
    tile = Tile(max(128, 1024 // channels), channels, max(1, channels // 8))
    return replace(tile, **_override[-1].get("maps", {})) if _override else tile


def weight_tile(head_dim: int) -> Tile:
    """The tile of the kernel that sums the weight's gradient."""
    channels = min(16, power_of_two(head_dim))
    few = head_dim > 16  # many blocks of channels make enough programs of fewer pixels each
    tile = Tile((256 if few else 512) // channels, channels, 2 if few else 4)
    return replace(tile, **_override[-1].get("weight", {})) if _override else tile


_override: list[dict[str, dict[str, Any]]] = []


@contextmanager
def forced_tile(**changes: dict[str, Any]) -> Iterator[None]:
    """Change the tiles of the kernels `maps` and `weight` inside the context, as the tuning sweep does."""
    _override.append(changes)
    try:
        yield
    finally:
        _override.pop()
