"""The attention paths of an ACmix block, a file each."""

from acmix.layers.attention.base import AttentionPath
from acmix.layers.attention.local import LocalAttention
from acmix.layers.attention.patchwise import PatchwiseAttention
from acmix.layers.attention.probabilities import AttentionProbabilities
from acmix.layers.attention.reduced import ReducedAttention
from acmix.layers.attention.window import WindowAttention

__all__ = [
    "AttentionPath",
    "AttentionProbabilities",
    "LocalAttention",
    "PatchwiseAttention",
    "ReducedAttention",
    "WindowAttention",
]
