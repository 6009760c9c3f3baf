"""Where attention looks: against its reference's output and against sums taken one by one."""

import math

import pytest
import torch
from torch import Tensor

from acmix.analysis.attention import AttentionSums, attention_sums, distances, entropy_bits
from acmix.layers import LocalAttention, ReducedAttention, WindowAttention
from acmix.layers.attention import AttentionPath

CASES = [
    (path, *case)
    for path in (LocalAttention, ReducedAttention, WindowAttention)
    for case in path.parity_cases()
    if case[1][0] > 1  # ReducedAttention takes a single row for tokens
]


def build(kind: type[AttentionPath], arguments: dict, size: tuple[int, int]) -> tuple[AttentionPath, list[Tensor]]:
    torch.manual_seed(0)
    path = kind(**arguments).double()
    channels = arguments["heads"] * arguments["head_dim"]
    return path, [torch.randn(2, channels, *size, dtype=torch.float64) for _ in range(3)]


@pytest.mark.parametrize(("kind", "arguments", "size"), CASES)
def test_probabilities_and_positions_give_the_references_output(
    kind: type[AttentionPath], arguments: dict, size: tuple[int, int]
) -> None:
    path, (q, k, v) = build(kind, arguments, size)
    where = path.attention_probabilities(q, k)
    assert where is not None
    rows, columns = where.keys.long().unbind(-1)
    values = v.unflatten(1, (path.heads, path.head_dim))[..., rows, columns]  # (B, N, d, Q, M)
    out = torch.einsum("bnqm,bndqm->bndq", where.weights, values).flatten(1, 2)
    stride = getattr(path, "stride", 1)
    rows, columns = (where.queries.long() // stride).unbind(-1)
    torch.testing.assert_close(out, path.reference(q, k, v)[..., rows, columns])
    assert torch.equal(where.weights > 1e-30, where.reachable.expand_as(where.weights))


def test_the_pixels_of_a_reduced_map_stand_in_the_middle_of_those_they_stand_for() -> None:
    path, (q, k, _) = build(ReducedAttention, {"heads": 1, "head_dim": 4, "reduction": 4}, (4, 8))
    where = path.attention_probabilities(q, k[..., :1, :2])
    assert where is not None
    assert where.keys[0].tolist() == [[1.5, 1.5], [1.5, 5.5]]
    assert where.queries[9].tolist() == [1, 1]
    tokens = torch.randn(2, 4, 1, 33, dtype=torch.float64)  # a class token and the pixels in a row
    assert ReducedAttention(1, 4).double().attention_probabilities(tokens, tokens) is None


def test_entropy_and_distance_are_what_loops_over_a_window_give() -> None:
    path, (q, k, _) = build(LocalAttention, {"heads": 2, "head_dim": 3, "kernel_size": 3}, (3, 4))
    sums = AttentionSums(2)
    sums.add(path, q, k, (3, 4), (2.0, 5.0))
    found = sums.means()
    weight = path.position_weight.detach()
    reflect = {-1: 1, 4: 2}
    for head in range(2):
        entropies, lengths = [], []
        for image in range(2):
            for y in range(3):
                for x in range(4):
                    query = q[image, 3 * head : 3 * head + 3, y, x]
                    logits, steps = [], []
                    for dy in (-1, 0, 1):
                        for dx in (-1, 0, 1):
                            row, column = {-1: 1, 3: 1}.get(y + dy, y + dy), reflect.get(x + dx, x + dx)
                            key = k[image, 3 * head : 3 * head + 3, row, column]
                            moved = torch.tensor([2 * (x - column) / 3, 2 * (y - row) / 2], dtype=torch.float64)
                            logits.append(float(query @ key + query @ weight @ moved) / math.sqrt(3))
                            steps.append(math.hypot(2 * (y - row), 5 * (x - column)))
                    weights = [math.exp(logit) / sum(map(math.exp, logits)) for logit in logits]
                    entropies.append(-sum(p * math.log2(p) for p in weights))
                    lengths.append(sum(p * step for p, step in zip(weights, steps, strict=True)))
        assert found["entropy_bits_heads"][head] == pytest.approx(sum(entropies) / 24)
        assert found["distance_px_heads"][head] == pytest.approx(sum(lengths) / 24)
    assert found["entropy_bits"] == pytest.approx(sum(found["entropy_bits_heads"]) / 2)
    assert found["entropy_share"] == pytest.approx(found["entropy_bits"] / math.log2(9))
    assert found["distance_px"] == pytest.approx(sum(found["distance_px_heads"]) / 2)


def test_attention_to_all_that_a_shifted_window_reaches_has_the_uniform_entropy() -> None:
    path = WindowAttention(1, 2, (4, 4), (2, 2), (8, 8)).double()
    torch.nn.init.zeros_(path.relative_position_bias_table)
    q = k = torch.zeros(1, 2, 8, 8, dtype=torch.float64)
    sums = AttentionSums(1)
    sums.add(path, q, k, (8, 8), (1.0, 1.0))
    assert sums.means()["entropy_share"] == pytest.approx(1.0)
    # windows of 16, of 2 × 8 twice over, and of 4 × 4 members that a query can reach
    assert sums.means()["entropy_bits"] == pytest.approx((16 * 4 + 32 * 3 + 16 * 2) / 64)


def test_queries_in_the_padding_do_not_count() -> None:
    path, _ = build(WindowAttention, {"heads": 1, "head_dim": 2, "window_size": (2, 2)}, (2, 2))
    q = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    where = path.attention_probabilities(q, q)
    assert where is not None
    *_, queries = attention_sums(where, (3, 3), (1.0, 1.0)).tolist()
    assert queries == 9


def test_the_ends_of_the_scales() -> None:
    weights = torch.tensor([[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    assert entropy_bits(weights).tolist() == [2.0, 0.0]
    path, (q, k, _) = build(LocalAttention, {"heads": 1, "head_dim": 2, "kernel_size": 1}, (2, 2))
    where = path.attention_probabilities(q, k)
    assert where is not None
    assert not distances(where).any()


def test_a_path_without_a_softmax_has_no_entropy() -> None:
    path = AttentionPath(1, 2)
    q = torch.zeros(1, 2, 2, 2)
    assert path.attention_probabilities(q, q) is None
    assert AttentionSums(1).add(path, q, q, (2, 2), (1.0, 1.0)) is False
