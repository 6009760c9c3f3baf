"""What every launch of a local-attention kernel needs to know, worked out once from the tensors."""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from acmix.ops.implementations import Window
from acmix.ops.local_attention.triton.tiles import Surroundings, Tile, choose_tile, padded_head_dim


@dataclass(frozen=True)
class Geometry:
    """One local attention: its sizes, derived numbers and how its products are taken."""

    batch: int
    heads: int
    head_dim: int
    height: int
    width: int
    window: Window
    dtype: torch.dtype
    tf32: bool
    scattered: bool
    """Whether the channels of a pixel are apart in memory."""

    @classmethod
    def of(cls, q: Tensor, position_weight: Tensor, window: Window) -> "Geometry":
        batch, channels, height, width = q.shape
        head_dim = position_weight.shape[0]
        tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
        sizes = (batch, channels // head_dim, head_dim, height, width)
        return cls(*sizes, window, q.dtype, tf32, scattered=q.stride(1) != 1)

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of keys."""
        return self.height, self.width

    @property
    def out_size(self) -> tuple[int, int]:
        """Rows and columns of queries."""
        return self.window.out_size(self.height, self.width)

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    def query_tile(self, kernel: str) -> Tile:
        """The tile of a kernel (forward, dq) that owns queries and streams keys."""
        surroundings = Surroundings(*self.out_size, *self.size, self.window, owns_queries=True)
        return choose_tile(kernel, surroundings, self.head_dim, self.dtype, self.tf32, self.scattered)

    def key_tile(self, kernel: str) -> Tile:
        """The tile of a kernel (dkv) that owns keys and streams queries."""
        surroundings = Surroundings(*self.size, *self.out_size, self.window, owns_queries=False)
        return choose_tile(kernel, surroundings, self.head_dim, self.dtype, self.tf32, self.scattered)

    def arguments(self, tile: Tile, tiled: tuple[int, int], *maps: Tensor) -> dict[str, Any]:
        """The keyword arguments that all kernels take alike: sizes, constants of the maths, compile-time choices."""
        out_height, out_width = self.out_size
        tiles_y, tiles_x = -(-tiled[0] // tile.height), -(-tiled[1] // tile.width)
        return {
            "grid": (tiles_x * self.heads, tiles_y, self.batch),
            "heads": self.heads,
            "height": self.height,
            "width": self.width,
            "out_height": out_height,
            "out_width": out_width,
            "step_y": 2.0 / max(self.height - 1, 1),
            "step_x": 2.0 / max(self.width - 1, 1),
            "to_log2": self.scale * math.log2(math.e),
            "HEAD_DIM": self.head_dim,
            "D": padded_head_dim(self.head_dim),
            "REACH": self.window.reach,
            "STRIDE": self.window.stride,
            "DILATION": self.window.dilation,
            "TILE_H": tile.height,
            "TILE_W": tile.width,
            "ROWS": tile.rows,
            "COLS": tile.columns,
            "PRECISION": "tf32" if self.tf32 and self.dtype == torch.float32 else "ieee",
            "WIDE": any(_needs_64_bits(m.shape[1:], m.stride()[1:]) for m in maps),
            "num_warps": tile.warps,
            "num_stages": tile.stages,
        }


def launch(kernel: Any, arguments: dict[str, Any], *pointers_and_strides: Any, **constants: Any) -> None:
    """Run `kernel` with one program per tile, head and image."""
    kernel[arguments.pop("grid")](*pointers_and_strides, **arguments, **constants)


@cache
def _needs_64_bits(sizes: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether an offset inside one image can leave the range of int32, padding of the last tile included."""
    return sum((size + 64) * abs(stride) for size, stride in zip(sizes, strides, strict=True)) >= 2**31
