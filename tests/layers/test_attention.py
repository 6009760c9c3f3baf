"""Window attention against timm's, and what the attention paths promise the block."""

import pytest
import torch
from timm.models.swin_transformer import SwinTransformerBlock

from acmix.layers import ACmix, LocalAttention, WindowAttention
from acmix.models.acmix_swin import SwinBlock

N, D = 2, 4


def twins(resolution: tuple[int, int], shift: int) -> tuple[SwinBlock, SwinTransformerBlock]:
    """A Swin block of ours without the convolution path, and timm's with the same weights."""
    torch.manual_seed(0)
    shifts = tuple(0 if size <= 4 else shift for size in resolution)
    window = tuple(min(size, 4) for size in resolution)
    ours = SwinBlock(N * D, N, window, shifts, resolution, mix="attention").double()
    theirs = SwinTransformerBlock(N * D, resolution, N, window_size=4, shift_size=shift, dynamic_mask=True).double()
    names = {"attn.": "acmix.", "acmix.proj": "acmix.attention.proj", "acmix.rel": "acmix.attention.rel"}
    weights = theirs.state_dict()
    for old, new in names.items():
        weights = {key.replace(old, new): value for key, value in weights.items()}
    ours.load_state_dict(weights)
    with torch.no_grad():
        ours.acmix.attention.relative_position_bias_table.normal_()
        theirs.attn.relative_position_bias_table.copy_(ours.acmix.attention.relative_position_bias_table)
    return ours, theirs


@pytest.mark.parametrize(
    ("resolution", "shift"),
    [((8, 8), 0), ((8, 12), 2), ((9, 7), 2), ((4, 4), 2), ((3, 10), 2)],
    ids=["plain", "shifted", "padded", "one-window", "narrow"],
)
def test_window_attention_and_its_gradients_equal_timms(resolution, shift):
    ours, theirs = twins(resolution, shift)
    x = torch.randn(2, *resolution, N * D, dtype=torch.float64)
    grad = torch.randn_like(x)
    results = []
    for block in (ours, theirs):
        leaf = x.clone().requires_grad_()
        out = block(leaf)
        out.backward(grad)
        results.append((out.detach(), leaf.grad))
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(
        ours.acmix.attention.relative_position_bias_table.grad, theirs.attn.relative_position_bias_table.grad
    )


def test_window_attention_takes_maps_of_another_size_than_it_was_built_for():
    ours, theirs = twins((8, 8), 2)
    x = torch.randn(1, 13, 9, N * D, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))


def test_window_attention_is_the_same_with_and_without_gradients():
    torch.manual_seed(0)
    path = WindowAttention(N, D, (4, 4), (2, 2), (8, 8)).double()
    q, k, v = torch.randn(3, 2, N * D, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        want = path(q, k, v)
    torch.testing.assert_close(path(q, k, v), want)


def test_the_bias_follows_the_table_when_weights_change_between_evaluations():
    path = WindowAttention(N, D, (4, 4)).eval()
    q, k, v = torch.randn(3, 1, N * D, 4, 4)
    with torch.no_grad():
        before = path(q, k, v)
        path.relative_position_bias_table.data.normal_()
        assert not torch.allclose(path(q, k, v), before)


@pytest.mark.parametrize("build", [lambda: LocalAttention(N, D, 3), lambda: WindowAttention(N, D, (4, 4))])
def test_scale_and_add_to_are_the_weighted_sum(build):
    torch.manual_seed(0)
    path = build().double()
    q, k, v, add_to = torch.randn(4, 2, N * D, 8, 8, dtype=torch.float64)
    scale = torch.tensor(0.3, dtype=torch.float64)
    want = add_to + 0.3 * path(q, k, v)
    for scalar in (scale, 0.3):
        torch.testing.assert_close(path(q, k, v, scale=scalar, add_to=add_to.clone()), want)


def test_local_attention_has_no_bias_that_would_go_without_a_gradient():
    block = ACmix(8, 8, heads=2, kernel_att=3)
    block(torch.randn(1, 8, 6, 6)).sum().backward()
    assert all(parameter.grad is not None for parameter in block.parameters())


def test_an_even_window_is_refused():
    with pytest.raises(ValueError, match="kernel_att 6 has no centre"):
        LocalAttention(N, D, 6)
