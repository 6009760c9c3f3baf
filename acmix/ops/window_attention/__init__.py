"""Attention within the windows that tile a map."""

from acmix.ops.window_attention.op import window_attention, window_attention_refusal

__all__ = ["window_attention", "window_attention_refusal"]
