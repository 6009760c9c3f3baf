"""The parts of an ACmix network as modules: the block, its two paths and their mix."""

from acmix.layers.attention import (
    AttentionPath,
    LocalAttention,
    PatchwiseAttention,
    ReducedAttention,
    WindowAttention,
)
from acmix.layers.block import ACmix
from acmix.layers.convolution import ShiftConv
from acmix.layers.mix import PathMix, path_weights, tie_path_weights
from acmix.layers.path import Path

__all__ = [
    "ACmix",
    "AttentionPath",
    "LocalAttention",
    "PatchwiseAttention",
    "Path",
    "PathMix",
    "ReducedAttention",
    "ShiftConv",
    "WindowAttention",
    "path_weights",
    "tie_path_weights",
]
