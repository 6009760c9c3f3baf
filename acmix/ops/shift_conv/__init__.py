"""The folded shift convolution: the public operation and its implementations, one a file."""

from acmix.ops.shift_conv.op import fold, shift_conv

__all__ = ["fold", "shift_conv"]
