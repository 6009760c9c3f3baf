"""ACmix blocks as few standard operators, with everything folded that inference keeps constant."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acmix.layers import ACmix, LocalAttention, ShiftConv, WindowAttention
from acmix.export.windows import WindowedAttention
from acmix.ops.reference import positions


class FoldedLocalBlock(nn.Module):
    """A block with local attention and a convolution path that is one weight, or with either alone.

    alpha goes into the rows of v, the softmax's scale into those of q; the convolution's weight takes the inverse of
    both, and beta. A batch norm after the block goes the same way.
    """

    def __init__(self, block: ACmix, size: tuple[int, int] | None, norm: nn.BatchNorm2d | None) -> None:
        super().__init__()
        attention = block.attention
        assert isinstance(attention, LocalAttention)
        heads, head_dim = block.heads, block.out_channels // block.heads
        self.heads, self.head_dim, self.stride = heads, head_dim, block.stride
        self.attention = WindowedAttention(attention.window, size)
        self.register_buffer("position_weight", attention.position_weight.detach().clone())
