"""The folded shift convolution: the public operation and its implementations, one a file."""

from acmix.ops.shift_conv.op import grouped_conv, shift_conv
from acmix.ops.shift_conv.weight import fold

__all__ = ["fold", "grouped_conv", "shift_conv"]
