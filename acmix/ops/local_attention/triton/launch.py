"""What every launch of a local-attention kernel needs to know, worked out once from the tensors."""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from acmix.ops.local_attention.triton.tiles import Tile, Window, choose_tile, padded_head_dim


@dataclass(frozen=True)
class Problem:
    """One local attention: its sizes, derived numbers and how its products are taken."""

    batch: int
    heads: int
    head_dim: int
    height: int
    width: int
    kernel_size: int
    stride: int
    dilation: int
    dtype: torch.dtype
    tf32: bool
    scattered: bool
    """Whether the channels of a pixel are apart in memory."""

    @classmethod
    def of(cls, q: Tensor, position_weight: Tensor, kernel_size: int, stride: int, dilation: int) -> "Problem":
        batch, channels, height, width = q.shape
        head_dim = position_weight.shape[0]
        sizes = (batch, channels // head_dim, head_dim, height, width, kernel_size, stride, dilation)
        tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
        return cls(*sizes, q.dtype, tf32, scattered=q.stride(1) != 1)

    @property
    def reach(self) -> int:
        """Pixels from a query to the edge of its window."""
        return self.dilation * (self.kernel_size // 2)

    @property
    def out_height(self) -> int:
        return -(-self.height // self.stride)

    @property
    def out_width(self) -> int:
        return -(-self.width // self.stride)

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    def query_tile(self, kernel: str) -> Tile:
        """The tile of a kernel (forward, dq) that owns queries and streams keys."""

        def extent(side: int) -> int:
            return (side - 1) * self.stride + 2 * self.reach + 1

        window = Window(self.out_height, self.out_width, self.height, self.width, extent)
        return choose_tile(kernel, window, self.head_dim, self.dtype, self.tf32, self.scattered)

    def key_tile(self, kernel: str) -> Tile:
        """The tile of a kernel (dkv) that owns keys and streams queries."""

        def extent(side: int) -> int:
            return (side - 1 + 2 * self.reach) // self.stride + 1

        window = Window(self.height, self.width, self.out_height, self.out_width, extent)
        return choose_tile(kernel, window, self.head_dim, self.dtype, self.tf32, self.scattered)

    def arguments(self, tile: Tile, tiled: tuple[int, int], *maps: Tensor) -> dict[str, Any]:
        """The keyword arguments that all kernels take alike: sizes, constants of the maths, compile-time choices."""
        tiles_y, tiles_x = -(-tiled[0] // tile.height), -(-tiled[1] // tile.width)
        return {
            "grid": (tiles_x * self.heads, tiles_y, self.batch),
            "heads": self.heads,
            "height": self.height,
            "width": self.width,
            "out_height": self.out_height,
            "out_width": self.out_width,
            "step_y": 2.0 / max(self.height - 1, 1),
            "step_x": 2.0 / max(self.width - 1, 1),
            "to_log2": self.scale * math.log2(math.e),
            "HEAD_DIM": self.head_dim,
            "D": padded_head_dim(self.head_dim),
            "REACH": self.reach,
            "STRIDE": self.stride,
            "DILATION": self.dilation,
            "TILE_H": tile.height,
            "TILE_W": tile.width,
            "ROWS": tile.rows,
            "COLS": tile.columns,
            "PRECISION": "tf32" if self.tf32 and self.dtype == torch.float32 else "ieee",
            "WIDE": any(_needs_64_bits(m) for m in maps),
            "num_warps": tile.warps,
            "num_stages": tile.stages,
        }


def launch(kernel: Any, arguments: dict[str, Any], *pointers_and_strides: Any) -> None:
    """Run `kernel` with one program per tile, head and image."""
    kernel[arguments.pop("grid")](*pointers_and_strides, **arguments)


def _needs_64_bits(maps: Tensor) -> bool:
    """Whether an offset inside one image can leave the range of int32, padding of the last tile included."""
    return (
        sum((size + 64) * abs(stride) for size, stride in zip(maps.shape[1:], maps.stride()[1:], strict=True)) >= 2**31
    )


def empty_like_layout(maps: Tensor, height: int, width: int) -> Tensor:
    """An uninitialised (B, C, height, width) map, channels_last where `maps` has its channels adjacent in memory."""
    channels_last = maps.stride(1) == 1 and maps.shape[1] > 1
    layout = torch.channels_last if channels_last else torch.contiguous_format
    size = (maps.shape[0], maps.shape[1], height, width)
    return torch.empty(size, dtype=maps.dtype, device=maps.device, memory_format=layout)


def device_guard(maps: Tensor) -> AbstractContextManager[Any]:
    """Make the tensors' device current: Triton launches on the current device and its current stream."""
    return torch.cuda.device(maps.device) if maps.is_cuda else nullcontext()
