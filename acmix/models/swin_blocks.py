"""The blocks and stages of ACmix-Swin, which `acmix_swin.py` puts together."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import DropPath, Mlp
from timm.models import checkpoint_seq, register_notrace_module
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn
from torch.fx import Proxy

from acmix.layers import ACmix, WindowAttention
from acmix.layers.plain import is_plain
from acmix.models.checks import perceptron_width
from acmix.models.windows import set_windows
from acmix.ops.implementations import transformed

HIDDEN_VALUES = 150_000  # of a perceptron that are computed at a time in inference; measured
PIXELWISE = (nn.LayerNorm, nn.Linear, nn.GELU, nn.Dropout, nn.Identity)  # what a perceptron is made of


@register_notrace_module
class SwinBlock(nn.Module):
    """Normalisation, ACmix on the cyclically shifted map, and a multi-layer perceptron, each with a shortcut.

    Args:
        dim: Channels of the map.
        heads: Heads of the ACmix block.
        window_size: (height, width) of a window.
        shift_size: (rows, columns) of the cyclic shift.
        resolution: (H, W) that the network is built for.
        mlp_ratio: Hidden width of the perceptron over dim.
        proj_drop: Dropout after the block and in the perceptron.
        drop_path: Probability of leaving a branch out, per image, in training.
        acmix: Further arguments of the ACmix block.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        window_size: tuple[int, int],
        shift_size: tuple[int, int],
        resolution: tuple[int, int],
        mlp_ratio: float = 4.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        **acmix: Any,
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"{dim} channels do not divide into {heads} heads: choose embed_dim and heads that fit")
        self.shift_size = shift_size
        self.norm1 = nn.LayerNorm(dim)
        attention = WindowAttention(heads, dim // heads, window_size, shift_size, resolution)
        self.acmix = ACmix(dim, dim, heads, attention=attention, conv_bias=True, **acmix)
        self.proj_drop = nn.Dropout(proj_drop)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim)
        self.mlp_ratio = mlp_ratio
        self.mlp = Mlp(dim, perceptron_width(dim, mlp_ratio), drop=proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, dim) to the same shape."""
        rows, columns = self.shift_size
        mixed = self.norm1(x)
        if rows or columns:
            mixed = torch.roll(mixed, (-rows, -columns), (1, 2))
        mixed = self.acmix(mixed.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        if rows or columns:
            mixed = torch.roll(mixed, (rows, columns), (1, 2))
        x = x + self.drop_path(self.proj_drop(mixed))
        if rows := self._rows_in_part(x):
            for part in x.view(-1, x.shape[-1]).split(rows):
                part += self.mlp(self.norm2(part))
            return x
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def _rows_in_part(self, x: Tensor) -> int:
        """How many pixels the perceptron takes at a time in inference on a CPU; 0 for all at once.

        The hidden values of a part, four times as many as those of the map, stay in the cache. A part of fewer rows
        than columns would read the matrices too often. Layers put in place of these may look at the whole map.
        """
        if (
            isinstance(x, Proxy)
            or torch.is_grad_enabled()
            or self.training
            or x.device.type != "cpu"
            or not is_plain(self.mlp, Mlp)
        ):
            return 0
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or transformed():
            return 0
        if not all(is_plain(layer, PIXELWISE) for layer in (self.norm2, *self.mlp.children())):
            return 0
        pixels, channels = math.prod(x.shape[:3]), x.shape[-1]
        rows = HIDDEN_VALUES // perceptron_width(channels, self.mlp_ratio)
        return rows if pixels > 4 * rows and rows >= channels and x.is_contiguous() else 0

    def set_windows(
        self, window_size: tuple[int, int], shift_size: tuple[int, int], resolution: tuple[int, int]
    ) -> None:
        """Change these arguments; position biases are interpolated for other windows."""
        self.shift_size = shift_size
        if isinstance(self.acmix.attention, WindowAttention):
            set_windows(self.acmix.attention, window_size, shift_size, resolution)


class SwinStage(nn.Module):
    """Patch merging, except in the first stage, and a row of blocks with every second one shifted.

    Args:
        in_dim, dim: Channels before and after the merging.
        depth: Number of blocks.
        resolution: (H, W) after the merging that the network is built for.
        window_size: Largest (height, width) of a window; a smaller map is one window and is not shifted.
        drop_paths: Stochastic depth of each block.
        block: Further arguments of the blocks.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        depth: int,
        resolution: tuple[int, int],
        window_size: tuple[int, int],
        drop_paths: Sequence[float],
        **block: Any,
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = nn.Identity() if in_dim == dim else PatchMerging(in_dim, dim)
        windows, shift = _windows(resolution, window_size)
        self.blocks = nn.Sequential(
            *(
                SwinBlock(
                    dim,
                    window_size=windows,
                    shift_size=shift if index % 2 else (0, 0),
                    resolution=resolution,
                    drop_path=drop_paths[index],
                    **block,
                )
                for index in range(depth)
            )
        )

    def set_input_size(
        self, resolution: tuple[int, int], window_size: tuple[int, int], always_partition: bool = False
    ) -> None:
        """Change these arguments of all blocks; with `always_partition` small maps get whole windows and shifts too."""
        windows, shift = _windows(resolution, window_size)
        if always_partition:
            windows, shift = window_size, (window_size[0] // 2, window_size[1] // 2)
        for index, block in enumerate(self.blocks):
            assert isinstance(block, SwinBlock)
            block.set_windows(windows, shift if index % 2 else (0, 0), resolution)

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)


def _windows(resolution: tuple[int, int], limit: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Windows and shift of a map: a map no longer than the window along a side is one window there and not shifted."""
    sides = [(size, 0) if size <= most else (most, most // 2) for size, most in zip(resolution, limit, strict=True)]
    (rows, row_shift), (columns, column_shift) = sides
    return (rows, columns), (row_shift, column_shift)
