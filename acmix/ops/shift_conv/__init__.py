"""The folded shift convolution: the public operation and its implementations, one a file."""

from acmix.ops.shift_conv.op import fold, grouped_conv, shift_conv

__all__ = ["fold", "grouped_conv", "shift_conv"]
