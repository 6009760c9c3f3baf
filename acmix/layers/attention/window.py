"""The shifted window of Swin."""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.fx import Proxy

from acmix.layers.attention.base import AttentionPath
from acmix.layers.attention.probabilities import AttentionProbabilities
from acmix.layers.derived import DerivedBuffers
from acmix.layers.fixed_size import with_fixed_size
from acmix.layers.path import ParityCase
from acmix.ops import reference, window_attention, window_attention_refusal


class WindowAttention(DerivedBuffers, AttentionPath):
    """Swin's window attention with relative position bias and output projection (paper section 4, the Swin version).

    The map is taken as already shifted: `shift` only says which pixels of a window were not neighbours before.

    Args:
        heads: N.
        head_dim: d.
        window_size: (height, width) of a window.
        shift: (rows, columns) by which the map was rolled up and left; (0, 0) for plain windows.
        resolution: (H, W) to prepare the shift mask for; for another size it is made at the call.
        impl: `auto` or `reference`.

    Raises:
        ValueError: for an unknown impl.
    """

    relative_position_index: Tensor
    shift_mask: Tensor | None

    def __init__(
        self,
        heads: int,
        head_dim: int,
        window_size: tuple[int, int] = (7, 7),
        shift: tuple[int, int] = (0, 0),
        resolution: tuple[int, int] | None = None,
        *,
        impl: str = "auto",
    ) -> None:
        if impl not in ("auto", "reference"):
            raise ValueError(f"unknown impl {impl!r}: window attention has auto and reference")
        super().__init__(heads, head_dim, project=True, impl=impl)
        self.window_size, self.shift = window_size, shift
        rows, columns = window_size
        table = torch.empty((2 * rows - 1) * (2 * columns - 1), heads)
        self.relative_position_bias_table = nn.Parameter(table)
        self.mask_resolution = None if resolution is None else self._padded(*resolution)
        self.register_buffer("shift_mask", None, persistent=False)
        self.register_derived_buffers()
        self.reset_parameters()

    def derived_buffers(self) -> dict[str, Tensor]:
        buffers = {"relative_position_index": relative_position_index(self.window_size)}
        if self.mask_resolution is not None and any(self.shift):
            buffers["shift_mask"] = reference.shift_mask(*self.mask_resolution, self.window_size, self.shift)
        return buffers

    def reset_parameters(self) -> None:
        """Draw the bias table from a normal distribution of standard deviation 0.02, as Swin does."""
        if not is_fake(self.relative_position_bias_table):  # PyTorch draws again what falls outside, so it must see it
            nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def pad(self, x: Tensor) -> Tensor:
        x = with_fixed_size(x)
        height, width = x.shape[-2:]
        rows, columns = self._padded(height, width)
        fits = not isinstance(x, Proxy) and (rows, columns) == (height, width)  # a graph of torch.fx is for any size
        return x if fits else F.pad(x, (0, columns - width, 0, rows - height))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if window_attention_refusal(q) is None:
            return window_attention(q, k, v, self._position_bias(), self.window_size, self.shift)
        height, width = q.shape[-2:]
        bias = self.bias(height, width)
        q, k, v = (self._to_windows(m, len(bias)) for m in (q, k, v))
        bias = bias.flatten(0, 1).to(q.dtype)
        if q.device.type == "cpu" and bias.requires_grad and not torch.jit.is_tracing():
            # The CPU's fused kernel has no gradient for the bias, and its fallback takes a third longer than this.
            out = ((q * self.head_dim**-0.5) @ k.mT).add_(bias).softmax(-1) @ v
        else:
            # of four dimensions: the CPU's fused kernel takes no mask of three
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])
        return self._from_windows(out, height, width)

    def reference(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`acmix.ops.reference.window_attention`."""
        return reference.window_attention(q, k, v, self._position_bias(), *self.window_size, *self.shift)

    def attention_probabilities(self, q: Tensor, k: Tensor) -> AttentionProbabilities:
        """The softmax of every pixel over its window, window by window; rows and columns are those of the shifted map.

        Members that the shift mask forbids have next to no weight.
        """
        height, width = q.shape[-2:]
        area = self.window_size[0] * self.window_size[1]
        bias = self.bias(height, width)
        weights = reference.window_attention_probabilities(q, k, bias, self.window_size)
        weights = weights.transpose(1, 2).flatten(2, 3)  # (B, N, windows * area, area)
        weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
        rows = torch.arange(height, dtype=weights.dtype, device=q.device)[:, None].expand(height, width)
        columns = torch.arange(width, dtype=weights.dtype, device=q.device).expand(height, width)
        pixels = torch.stack([rows, columns])[:, None]
        members = F.unfold(pixels, self.window_size, stride=self.window_size).permute(2, 1, 0)  # (windows, area, 2)
        keys = members[:, None].expand(-1, area, -1, -1).flatten(0, 1)
        mask = self._mask(height, width)
        reachable = torch.ones(keys.shape[:2], dtype=torch.bool, device=q.device)
        if mask is not None:
            reachable = (mask.to(q.device) == 0).flatten(0, 2)
        return AttentionProbabilities(weights, members.flatten(0, 1), keys, reachable)

    def multiply_adds(self, shape: Sequence[int]) -> int:
        """Every pixel attends to its window, and is projected."""
        area = self.window_size[0] * self.window_size[1]
        return 2 * area * math.prod(shape) + self.projection_multiply_adds(shape)

    @classmethod
    def parity_cases(cls) -> Iterator[ParityCase]:
        yield {"heads": 3, "head_dim": 4, "window_size": (4, 3)}, (8, 9)
        yield {"heads": 2, "head_dim": 5, "window_size": (4, 4), "shift": (2, 1), "resolution": (8, 12)}, (8, 12)
        yield {"heads": 1, "head_dim": 8, "window_size": (3, 5), "shift": (0, 2), "resolution": (6, 10)}, (9, 15)

    def bias(self, height: int, width: int) -> Tensor:
        """Relative position bias and shift mask in one: (windows of an H × W map or 1, N, area, area).

        Mask and index are kept; their sum with the table is taken once a call, about a hundredth of the attention, and
        is not kept: a table may change in ways that cannot be noticed, such as through `.data`.
        """
        bias = self._position_bias()[None]
        mask = self._mask(height, width)
        return bias if mask is None else bias + mask.to(bias)

    def _position_bias(self) -> Tensor:
        """(N, area, area)."""
        area = self.window_size[0] * self.window_size[1]
        bias = self.relative_position_bias_table[self.relative_position_index.flatten()]
        return bias.view(area, area, self.heads).permute(2, 0, 1)

    def _padded(self, height: int, width: int) -> tuple[int, int]:
        rows, columns = self.window_size
        return -(-height // rows) * rows, -(-width // columns) * columns

    def _to_windows(self, maps: Tensor, groups: int) -> Tensor:
        """(B, N * d, H, W) to (B * windows / groups, groups * N, area, d)."""
        rows, columns = self.window_size
        x = maps.permute(0, 2, 3, 1)
        x = x.unflatten(3, (self.heads, self.head_dim)).unflatten(2, (-1, columns)).unflatten(1, (-1, rows))
        x = x.permute(0, 1, 3, 5, 2, 4, 6)  # (B, H / rows, W / columns, N, rows, columns, d)
        return x.reshape(-1, groups * self.heads, rows * columns, self.head_dim)

    def _from_windows(self, windows: Tensor, height: int, width: int) -> Tensor:
        """Undo `_to_windows`: (B, N * d, H, W), a channels_last view."""
        rows, columns = self.window_size
        x = windows.reshape(-1, height // rows, width // columns, self.heads, rows, columns, self.head_dim)
        return x.permute(0, 1, 4, 2, 5, 3, 6).reshape(-1, height, width, self.heads * self.head_dim).permute(0, 3, 1, 2)

    def _mask(self, height: int, width: int) -> Tensor | None:
        """The shift mask of an H × W map, (windows, 1, area, area); None for plain windows."""
        if not any(self.shift):
            return None
        if self.shift_mask is not None and self.mask_resolution == (height, width):
            return self.shift_mask
        return reference.shift_mask(height, width, self.window_size, self.shift)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, head_dim={self.head_dim}, window_size={self.window_size}, shift={self.shift}"


def relative_position_index(window_size: tuple[int, int]) -> Tensor:
    """Row of the bias table for every pair of pixels of a window: (area, area)."""
    rows, columns = window_size
    y, x = torch.arange(rows * columns) // columns, torch.arange(rows * columns) % columns
    return (y[:, None] - y + rows - 1) * (2 * columns - 1) + (x[:, None] - x + columns - 1)
