"""Where a query looks: weights that sum to 1, within its window, and give the output when they weigh v."""

import pytest
import torch

from acmix.analysis.attention_maps import attention_map
from acmix.layers import LocalAttention, PatchwiseAttention, ReducedAttention, WindowAttention


@pytest.mark.parametrize(
    ("path", "query", "reach"),
    [
        (LocalAttention(2, 3, kernel_size=3), (4, 5), (slice(3, 6), slice(4, 7))),
        (LocalAttention(2, 3, kernel_size=5, stride=2), (0, 3), (slice(0, 3), slice(4, 9))),
        (WindowAttention(2, 3, (3, 4)), (4, 5), (slice(3, 6), slice(4, 8))),
    ],
)
def test_the_map_of_a_query_is_its_attention(path, query, reach):
    torch.manual_seed(0)
    path = path.double()
    q, k = torch.randn(2, 1, 6, 9, 12, dtype=torch.float64)
    weights = attention_map(path, q, k, q, query)
    assert weights.shape == (9, 12)
    assert weights.sum().item() == pytest.approx(1)
    inside = torch.zeros(9, 12, dtype=torch.bool)
    inside[reach] = True
    assert weights[~inside].abs().max() == 0
    assert weights[inside].min() > 0
    v = torch.randn(9, 12, dtype=torch.float64).expand(1, 6, 9, 12)
    with torch.no_grad():
        out = path.reference(q, k, v)[0, :, query[0], query[1]].mean()
    assert out.item() == pytest.approx((weights * v[0, 0]).sum().item())


def test_patchwise_attention_has_a_map_though_its_weights_have_signs():
    torch.manual_seed(0)
    path = PatchwiseAttention(4, 2, 3, sharing=4).eval()
    q, k, v = torch.randn(1, 2, 5, 6), torch.randn(1, 2, 5, 6), torch.randn(1, 8, 5, 6)
    weights = attention_map(path, q, k, v, (2, 3))
    inside = torch.zeros(5, 6, dtype=torch.bool)
    inside[1:4, 2:5] = True
    assert weights[inside].min() > 0
    assert weights[~inside].abs().max() == 0


def test_the_map_of_a_reduced_attention_has_the_size_of_what_it_attends_to():
    torch.manual_seed(0)
    path = ReducedAttention(2, 3, reduction=2)
    q, kv = torch.randn(1, 6, 8, 6), torch.randn(1, 6, 4, 3)
    weights = attention_map(path, q, kv, kv, (7, 0))
    assert weights.shape == (4, 3)
    assert weights.sum().item() == pytest.approx(1, abs=1e-6)
