"""Arithmetic of the ACmix block on tensors: the attentions, and the folded shift convolution."""

from acmix.ops.local_attention import local_attention
from acmix.ops.local_mix import local_mix, local_mix_refusal
from acmix.ops.patchwise import patch_aggregation, patch_features
from acmix.ops.shift_conv import grouped_conv, shift_conv
from acmix.ops.window_attention import window_attention, window_attention_refusal

from acmix.ops import counts  # isort: skip - it registers formulas for the operations defined above

__all__ = [
    "counts",
    "grouped_conv",
    "local_attention",
    "local_mix",
    "local_mix_refusal",
    "patch_aggregation",
    "patch_features",
    "shift_conv",
    "window_attention",
    "window_attention_refusal",
]
