"""ShiftConv: the convolution path, a mix of the 3N maps followed by shift and sum."""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acmix.layers.derived import DerivedBuffers
from acmix.layers.path import ParityCase, Path, strided_numel
from acmix.ops import grouped_conv, shift_conv
from acmix.ops.implementations import Window
from acmix.ops.shift_conv import fold

KINDS = ("shift", "fixed", "random", "learned", "full")


class ShiftConv(DerivedBuffers, Path):
    """The convolution path of ACmix (paper sections 3.2 and 4, figure 4).

    q, k and v are 3N maps of width d, or as many as `in_maps` says. A fully connected layer over the map index makes k²
    maps of them; each is shifted to its place in a k × k kernel and all are summed, once for each of the N heads of the
    output.

    Args:
        heads: N.
        head_dim: d.
        kernel_size: k, odd.
        stride, dilation: of the convolution; the padding is dilation * (k // 2), with zeros.
        in_maps: Maps of width d that q, k and v have together; None: 3N.
        kind: How the maps are shifted and summed:
            `shift`: tensor shifts, no kernel at all;
            `fixed`: a grouped convolution whose kernels are the k² one-hot shifts, not trained;
            `random`: the same convolution, trained from a random kernel;
            `learned`: the same convolution, trained from the one-hot shifts (the paper's choice);
            `full`: no fully connected layer; one trained grouped convolution straight from the 3N maps to N.
        bias: Whether the fully connected layer has a bias (it has in Swin, not in ResNet; `full` has none).
        impl: Implementation of `acmix.ops.shift_conv`, and of `grouped_conv` for `full`. The kind `shift`, which uses
            neither, has two: `reference`, and the one that runs for every other name.

    Raises:
        ValueError: for an unknown kind or an even kernel size.
    """

    def __init__(
        self,
        heads: int,
        head_dim: int,
        kernel_size: int = 3,
        stride: int = 1,
        dilation: int = 1,
        *,
        in_maps: int | None = None,
        kind: str = "learned",
        bias: bool = False,
        impl: str = "auto",
    ) -> None:
        super().__init__(heads, head_dim, impl)
        if kind not in KINDS:
            raise ValueError(f"unknown shift {kind!r}: choose one of {', '.join(KINDS)}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_conv {kernel_size} has no centre: choose an odd size, such as 3")
        self.kernel_size, self.stride, self.dilation, self.kind = kernel_size, stride, dilation, kind
        self.in_maps = 3 * heads if in_maps is None else in_maps
        taps, channels = kernel_size**2, heads * head_dim
        if kind == "full":
            self.weight = nn.Parameter(torch.empty(channels, self.in_maps, kernel_size, kernel_size))
        else:
            self.fc_weight = nn.Parameter(torch.empty(taps, self.in_maps))
            self.fc_bias = nn.Parameter(torch.empty(taps)) if bias else None
        if kind in ("random", "learned"):
            self.shift_weight = nn.Parameter(torch.empty(channels, taps, kernel_size, kernel_size))
        self.register_derived_buffers()
        self.reset_parameters()

    def derived_buffers(self) -> dict[str, Tensor]:
        channels = self.heads * self.head_dim
        return {"shift_weight": one_hot_shifts(channels, self.kernel_size)} if self.kind == "fixed" else {}

    def reset_parameters(self) -> None:
        """Draw the fully connected layer anew; kernels to the one-hot shifts, or to random ones where so chosen."""
        if self.kind == "full":
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
            return
        nn.init.kaiming_uniform_(self.fc_weight, a=math.sqrt(5))
        if self.fc_bias is not None:
            bound = 1 / math.sqrt(self.fc_weight.shape[1])
            nn.init.uniform_(self.fc_bias, -bound, bound)
        if self.kind == "random":
            nn.init.kaiming_uniform_(self.shift_weight, a=math.sqrt(5))
        elif self.kind == "learned":
            with torch.no_grad():
                self.shift_weight.copy_(one_hot_shifts(len(self.shift_weight), self.kernel_size))

    def run(self, q: Tensor, k: Tensor, v: Tensor, scale: Tensor | float, add_to: Tensor | None) -> Tensor:
        """The path is linear, so the scale goes into its smallest matrix.

        The result has the shape (B, N * d, ceil(H / stride), ceil(W / stride)) and channels (head_dim, head).
        """
        if self.kind == "full":
            out = self._convolve(q, k, v, scale * self.weight, self.impl)
        else:
            fc_weight = scale * self.fc_weight
            fc_bias = None if self.fc_bias is None else scale * self.fc_bias
            if self.kind == "shift":
                out = self._shift(q, k, v, fc_weight, fc_bias)
            else:
                out = self._shift_conv(q, k, v, fc_weight, self.shift_weight, fc_bias, self.impl)
        return self.finish(out, 1.0, add_to)

    @property
    def window(self) -> Window:
        """The window of every output."""
        return Window(self.kernel_size, self.stride, self.dilation)

    def folded_weight(self, scale: Tensor | float) -> Tensor | None:
        """scale · the path as the weight of one grouped convolution, (N * d, 3N, k, k), rows (head_dim, head).

        None for a path that is more than that: tensor shifts, or a bias, which is cut off at the border.
        """
        if self.kind == "full":
            return scale * self.weight
        if self.kind == "shift" or self.fc_bias is not None:
            return None
        return fold(scale * self.fc_weight, self.shift_weight)

    def reference(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`acmix.ops.reference.shift_conv`, with one-hot kernels for tensor shifts; `full`: the convolution itself."""
        if self.kind == "full":
            return self._convolve(q, k, v, self.weight, "reference")
        if self.kind == "shift":
            shift_weight = one_hot_shifts(self.heads * self.head_dim, self.kernel_size).to(self.fc_weight)
        else:
            shift_weight = self.shift_weight
        return self._shift_conv(q, k, v, self.fc_weight, shift_weight, self.fc_bias, "reference")

    def multiply_adds(self, shape: Sequence[int]) -> int:
        """The fully connected layer, all maps to k², and a grouped convolution with k² kernels of k × k an output."""
        taps, outputs = self.kernel_size**2, strided_numel(shape, self.stride)
        if self.kind == "full":
            return self.in_maps * taps * outputs
        mixing = self.in_maps * taps * math.prod(shape) // self.heads  # for each of the d · H · W values of a map
        return mixing + (0 if self.kind == "shift" else taps * taps * outputs)

    @classmethod
    def parity_cases(cls) -> Iterator[ParityCase]:
        for kind in KINDS:
            yield {"heads": 3, "head_dim": 4, "kind": kind, "bias": kind != "full"}, (7, 5)
            yield {"heads": 2, "head_dim": 5, "kind": kind, "stride": 2, "dilation": 2}, (9, 8)

    def _shift_conv(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        fc_weight: Tensor,
        shift_weight: Tensor,
        fc_bias: Tensor | None,
        impl: str,
    ) -> Tensor:
        stride, dilation = self.stride, self.dilation
        return shift_conv(
            q, k, v, fc_weight, shift_weight, fc_bias=fc_bias, stride=stride, dilation=dilation, impl=impl
        )

    def _convolve(self, q: Tensor, k: Tensor, v: Tensor, weight: Tensor, impl: str) -> Tensor:
        return grouped_conv(q, k, v, weight, stride=self.stride, dilation=self.dilation, impl=impl)

    def _shift(self, q: Tensor, k: Tensor, v: Tensor, fc_weight: Tensor, fc_bias: Tensor | None) -> Tensor:
        height, width = q.shape[-2:]
        pad = self.dilation * (self.kernel_size // 2)
        maps = torch.cat([q, k, v], 1).unflatten(1, (self.in_maps, self.head_dim))  # (B, 3N, d, H, W)
        mixed = F.linear(maps.movedim(1, -1), fc_weight, fc_bias).movedim(-1, 1)  # (B, k², d, H, W)
        mixed = F.pad(mixed, (pad, pad, pad, pad))
        out = mixed.new_zeros(())
        for tap, shifted in enumerate(mixed.unbind(1)):
            dy, dx = (self.dilation * step for step in divmod(tap, self.kernel_size))
            out = out + shifted[..., dy : dy + height : self.stride, dx : dx + width : self.stride]
        return out.repeat_interleave(self.heads, 1)  # every head gets the same sum, as from one-hot kernels

    def extra_repr(self) -> str:
        return (
            f"heads={self.heads}, head_dim={self.head_dim}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"dilation={self.dilation}, in_maps={self.in_maps}, kind={self.kind}"
        )


def one_hot_shifts(channels: int, kernel_size: int) -> Tensor:
    """The k² one-hot kernels, one per tap, for each output channel: (channels, k², k, k)."""
    taps = kernel_size**2
    return torch.eye(taps).view(taps, kernel_size, kernel_size).repeat(channels, 1, 1, 1)
