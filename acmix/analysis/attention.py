"""How widely an attention path looks, from the probabilities that its reference computes."""

import math

import torch
from torch import Tensor

from acmix.layers.attention import AttentionPath, AttentionProbabilities

IMAGES_AT_ONCE = 8
"""Of which the probabilities are held in memory."""


def entropy_bits(weights: Tensor) -> Tensor:
    """Shannon entropy of each distribution along the last dimension, in bits, from 0 to log2 of its members.

    0: each query looks at one member; log2 M: at all M alike, as an average pool does.
    """
    return torch.special.entr(weights).sum(-1) / math.log(2)


def distances(where: AttentionProbabilities, scale: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """Euclidean distance of each member from its query, (Q, M), in pixels of the image.

    `scale` is how many rows and columns of the image stand for one of the map.
    """
    steps = (where.keys - where.queries[:, None]) * where.keys.new_tensor(scale)
    return steps.square().sum(-1).sqrt()


class AttentionSums:
    """Sums over queries and images from which the means of a path's entropy and distance follow, head by head.

    `sums` is float64, (2 N + 2,): Σ entropy and Σ mean distance of each head, Σ entropy of the uniform window, queries.
    """

    def __init__(self, heads: int) -> None:
        self.heads = heads
        self.sums = torch.zeros(2 * heads + 2, dtype=torch.float64)

    @torch.no_grad()
    def add(self, path: AttentionPath, q: Tensor, k: Tensor, size: tuple[int, int], scale: tuple[float, float]) -> bool:
        """Add the attention from q to k, maps (B, N * d, H, W); False for a path that has no probabilities.

        `size`: rows and columns of the map without padding; queries beyond them are left out.
        """
        for queries, keys in zip(q.split(IMAGES_AT_ONCE), k.split(IMAGES_AT_ONCE), strict=True):
            where = path.attention_probabilities(queries, keys)
            if where is None:
                return False
            self.sums = self.sums.to(q.device) + attention_sums(where, size, scale)
        return True

    def means(self) -> dict[str, float | list[float]]:
        """`entropy_bits`, in bits; `entropy_share`, its ratio to the uniform window's, 0 to 1; `distance_px`, in pixels
        of the image; the first and the last also for each head, as `..._heads`."""
        *totals, uniform, queries = self.sums.tolist()
        per_head = [total / queries for total in totals]
        entropies, lengths = per_head[: self.heads], per_head[self.heads :]
        entropy = sum(entropies) / self.heads
        return {
            "entropy_bits": entropy,
            "entropy_share": entropy / (uniform / queries) if uniform else 0.0,
            "distance_px": sum(lengths) / self.heads,
            "entropy_bits_heads": entropies,
            "distance_px_heads": lengths,
        }


def attention_sums(where: AttentionProbabilities, size: tuple[int, int], scale: tuple[float, float]) -> Tensor:
    """What `AttentionSums` adds up, of one call: (2 N + 2,), float64.

    The mean attention distance weighs each member's distance by its probability (Raghu et al., "Do vision transformers
    see like convolutional neural networks?", https://arxiv.org/abs/2108.08810); the uniform window's entropy is log2 of
    the members that a query can reach.
    """
    inside = (where.queries < where.queries.new_tensor(size)).all(-1)  # (Q,)
    entropy = entropy_bits(where.weights)[..., inside].sum((0, 2), dtype=torch.float64)
    distance = torch.einsum("bnqm,qm->bnq", where.weights, distances(where, scale).to(where.weights))
    distance = distance[..., inside].sum((0, 2), dtype=torch.float64)
    uniform = where.reachable.sum(-1)[inside].double().log2().sum() * len(where.weights)
    queries = (inside.sum() * len(where.weights)).double()
    return torch.cat([entropy, distance, uniform[None], queries[None]])
