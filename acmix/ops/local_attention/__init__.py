"""Sliding-window attention: the public operation and its implementations, one a file."""

from acmix.ops.local_attention.op import local_attention

__all__ = ["local_attention"]
