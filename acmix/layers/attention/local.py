"""The sliding window of the ResNets."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from acmix.layers.attention.base import AttentionPath
from acmix.layers.attention.probabilities import AttentionProbabilities
from acmix.layers.path import ParityCase, strided_numel
from acmix.ops import local_attention
from acmix.ops.implementations import Window
from acmix.ops.reference import local_attention_probabilities, window_positions


class LocalAttention(AttentionPath):
    """Sliding-window attention with linear relative positions (paper section 4, the ResNet version).

    Args:
        heads: N.
        head_dim: d.
        kernel_size: Window K, odd; see `acmix.ops.local_attention` for maps smaller than that.
        stride: Queries are every stride-th pixel.
        dilation: Spacing of the window's members.
        impl: Implementation of `acmix.ops.local_attention`.

    Raises:
        ValueError: for an even kernel size.
    """

    def __init__(
        self, heads: int, head_dim: int, kernel_size: int = 7, stride: int = 1, dilation: int = 1, *, impl: str = "auto"
    ) -> None:
        super().__init__(heads, head_dim, impl=impl)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_att {kernel_size} has no centre pixel: choose an odd size, such as 7")
        self.kernel_size, self.stride, self.dilation = kernel_size, stride, dilation
        # No bias: it cancels in e_i - e_j, and an unused parameter would stop DistributedDataParallel.
        self.position_weight = nn.Parameter(torch.empty(head_dim, 2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the position weight uniformly, as a 1×1 convolution over the two coordinates would be."""
        nn.init.uniform_(self.position_weight, -1 / math.sqrt(2), 1 / math.sqrt(2))

    @property
    def window(self) -> Window:
        """The window of every query, on a map that is large enough for it."""
        return Window(self.kernel_size, self.stride, self.dilation)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._attend(q, k, v, self.impl)

    def reference(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`acmix.ops.reference.local_attention`."""
        return self._attend(q, k, v, "reference")

    def attention_probabilities(self, q: Tensor, k: Tensor) -> AttentionProbabilities:
        """The softmax over the K² members of each window; a border window sees some pixels twice, by reflection."""
        height, width = q.shape[-2:]
        window = self.window.on(height, width)
        sizes = (window.kernel_size, window.stride, window.dilation)
        weights = local_attention_probabilities(q, k, self.position_weight, *sizes).flatten(3).mT
        keys = window_positions(height, width, *sizes, device=q.device).flatten(2)  # (2, K², Q)
        queries = keys[:, window.kernel_size**2 // 2].T  # the middle of a window is its query
        return AttentionProbabilities(weights, queries, keys.permute(2, 1, 0), keys.new_ones(keys.shape[:0:-1]).bool())

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, impl: str) -> Tensor:
        return local_attention(
            q, k, v, self.position_weight, self.kernel_size, self.stride, impl, dilation=self.dilation
        )

    def multiply_adds(self, shape: Sequence[int]) -> int:
        """K² products of width d for the logits and as many for the values, for each head and query."""
        kernel_size = self.window.on(*shape[-2:]).kernel_size
        return 2 * kernel_size**2 * strided_numel(shape, self.stride)

    @classmethod
    def parity_cases(cls) -> Iterator[ParityCase]:
        yield {"heads": 3, "head_dim": 4}, (9, 7)
        yield {"heads": 2, "head_dim": 8, "kernel_size": 3, "stride": 2}, (7, 6)
        yield {"heads": 1, "head_dim": 5, "kernel_size": 5, "dilation": 2}, (8, 11)
        yield {"heads": 2, "head_dim": 4, "kernel_size": 7}, (2, 5)

    def extra_repr(self) -> str:
        return (
            f"heads={self.heads}, head_dim={self.head_dim}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"dilation={self.dilation}, impl={self.impl}"
        )
