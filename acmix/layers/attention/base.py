"""What every attention path has: maps in, a map out, and an optional projection after it."""

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from acmix.layers.attention.probabilities import AttentionProbabilities
from acmix.layers.path import Path
from acmix.layers.plain import is_plain
from acmix.ops.implementations import transformed


class AttentionPath(Path):
    """Base of the attention paths: a subclass writes `attend`, and says what a `Path` says.

    A path whose q, k and v are not N maps each of the block's input says what they are by `maps`, and by `reduces` and
    `reduce`: the block projects accordingly. What the convolution path gets of them follows from `share` and
    `shared_maps`.

    Args:
        heads: N.
        head_dim: d.
        project: Whether a linear layer `proj` follows the attention, as in transformers.
        impl: See `Path`.
    """

    def __init__(self, heads: int, head_dim: int, *, project: bool = False, impl: str = "auto") -> None:
        super().__init__(heads, head_dim, impl)
        self.proj = nn.Linear(heads * head_dim, heads * head_dim) if project else None

    @property
    def takes_tokens(self) -> bool:
        """Whether q, k and v may be rows of vectors, (B, channels, 1, length), as in global attention."""
        return False

    @property
    def maps(self) -> tuple[int, int, int]:
        """How many maps of width d q, k and v have; N each, unless a path says otherwise."""
        return self.heads, self.heads, self.heads

    @property
    def shared_maps(self) -> int:
        """How many maps of width d the convolution path gets from `share`."""
        return sum(self.maps)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The attention itself, before any projection: maps in, a map out. `reference` is its specification."""
        raise self._missing("attend")

    def attention_probabilities(self, q: Tensor, k: Tensor) -> AttentionProbabilities | None:
        """Where every query looks, by the reference's arithmetic; None for a path that weighs without a softmax."""
        return None

    def pad(self, x: Tensor) -> Tensor:
        """The block's input as this path needs it: a path that tiles the map pads it with zeros below and right."""
        return x

    @property
    def reduces(self) -> bool:
        """Whether k and v are projected from the smaller map that `reduce` gives, by a layer of their own."""
        return False

    def reduce(self, x: Tensor) -> Tensor:
        """The map that k and v are projected from, of the block's padded input."""
        return x

    def share(self, q: Tensor, k: Tensor, v: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """What the convolution path gets: maps of the size of the block's input, H × W; one may have no channels.

        This one gives q, k and v without what `pad` added.
        """
        return q[..., :height, :width], k[..., :height, :width], v[..., :height, :width]

    def run(self, q: Tensor, k: Tensor, v: Tensor, scale: Tensor | float, add_to: Tensor | None) -> Tensor:
        return self.finish(self.attend(q, k, v), scale, add_to)

    def finish(self, out: Tensor, scale: Tensor | float, add_to: Tensor | None) -> Tensor:
        """add_to + scale · projection of `out`; padding that exceeds `add_to` is cut off first."""
        if add_to is not None:
            out = out[..., : add_to.shape[-2], : add_to.shape[-1]]
        if self.proj is None:
            return super().finish(out, scale, add_to)
        if not is_plain(self.proj, nn.Linear):
            return super().finish(self.proj(out.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), scale, add_to)
        # scaling the matrix is cheaper than scaling a map
        bias = None if self.proj.bias is None else scale * self.proj.bias
        out = F.linear(out.permute(0, 2, 3, 1), scale * self.proj.weight, bias).permute(0, 3, 1, 2)
        if add_to is None:
            return out
        return out + add_to if transformed() else out.add_(add_to)  # vmap allows this only if `out` has its dimension

    def projection_multiply_adds(self, shape: Sequence[int]) -> int:
        """Multiply-adds of `proj` over maps of this shape; 0 without one. For `multiply_adds` of a path that has it."""
        return 0 if self.proj is None else math.prod(shape) * self.heads * self.head_dim
