"""What every path of an ACmix block states about itself."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from acmix.ops.implementations import transformed

ParityCase = tuple[dict[str, Any], tuple[int, int]]


class Path(nn.Module):
    """Base of what an ACmix block mixes: a module that makes one map of the block's q, k and v maps.

    Besides `run`, a subclass writes `reference`, `multiply_adds` and `parity_cases`. Counts, benchmarks and
    `acmix.testing.assert_path_parity` ask the path for them, so a new path needs no entry in any table.

    Args:
        heads: N.
        head_dim: d.
        impl: Which implementation runs: `reference` is the path's own `reference`, which `auto` takes inside transforms
            of torch.func; the other names are the subclass's.
    """

    def __init__(self, heads: int, head_dim: int, impl: str = "auto") -> None:
        super().__init__()
        self.heads, self.head_dim, self.impl = heads, head_dim, impl

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: Tensor | float = 1.0, add_to: Tensor | None = None
    ) -> Tensor:
        """add_to + scale · path(q, k, v).

        Args:
            q, k, v: Maps (B, N * d, H, W), channels (head, head_dim), or as `AttentionPath.maps` and `reduce` say.
            scale: Scalar that multiplies the path.
            add_to: Map to add the path to.
        """
        if self.impl == "reference" or (self.impl == "auto" and transformed()):
            return self.finish(self.reference(q, k, v), scale, add_to)
        return self.run(q, k, v, scale, add_to)

    def run(self, q: Tensor, k: Tensor, v: Tensor, scale: Tensor | float, add_to: Tensor | None) -> Tensor:
        """`forward` by every implementation but the reference; it may apply the scale wherever that is cheapest."""
        raise self._missing("run")

    def finish(self, out: Tensor, scale: Tensor | float, add_to: Tensor | None) -> Tensor:
        """add_to + scale · out."""
        if add_to is None:
            return out if isinstance(scale, float) and scale == 1.0 else out * scale
        if isinstance(scale, float):
            return torch.add(add_to, out, alpha=scale)
        # the scalar takes the maps' dtype: autocast would widen the whole product to float32 for its sake
        return torch.addcmul(add_to, out, scale.to(out.dtype))

    def reference(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The specification: the path in plain torch, for any floating-point dtype, before `finish`."""
        raise self._missing("reference")

    def multiply_adds(self, shape: Sequence[int]) -> int:
        """Multiply-adds of one forward pass, whatever runs it, where N maps of the size of q are (B, N * d, H, W)."""
        raise self._missing("multiply_adds")

    @classmethod
    def parity_cases(cls) -> Iterator[ParityCase]:
        """Arguments of the constructor, each with a map size (H, W), on which the path is held to its reference."""
        raise NotImplementedError(f"{cls.__name__} must define parity_cases; see acmix.layers.Path")

    def _missing(self, method: str) -> NotImplementedError:
        return NotImplementedError(f"{type(self).__name__} must define {method}; see acmix.layers.Path")


def strided_numel(shape: Sequence[int], stride: int) -> int:
    """Number of values of a map (B, C, H, W) at every stride-th row and column."""
    batch, channels, height, width = shape
    return math.prod((batch, channels, -(-height // stride), -(-width // stride)))
