"""The folded shift convolution: the public operation and its implementations, one a file."""

from acmix.ops.shift_conv.op import grouped_conv, shift_conv

__all__ = ["grouped_conv", "shift_conv"]
