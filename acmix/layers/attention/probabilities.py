"""Where the queries of an attention path look, for those who measure or draw it."""

from typing import NamedTuple

from torch import Tensor


class AttentionProbabilities(NamedTuple):
    """The softmax of an attention path, for Q queries with M members in each one's window; float32 or better.

    weights: (B, N, Q, M), at least 0, of sum 1 over the members;
    queries: (Q, 2), row and column of each query in the map that the path was given;
    keys: (Q, M, 2), row and column of each member, of a reflected one those of the pixel it shows;
    reachable: (Q, M), False where a mask forbids the member to the query.

    A path that pads its map has queries and members in the padding too: their rows or columns lie beyond the map.
    """

    weights: Tensor
    queries: Tensor
    keys: Tensor
    reachable: Tensor
