"""Local attention on CUDA through Triton: forward and backward as plain functions on tensors.

Any strides are read as they are, but only channels_last maps (or channel slices of one) give vector loads; prefer
them. No atomic operations: two runs give the same bits. No buffer is larger than a map.
"""

from acmix.ops.local_attention.triton.backward import backward, backward_into
from acmix.ops.local_attention.triton.forward import forward

__all__ = ["backward", "backward_into", "forward"]
