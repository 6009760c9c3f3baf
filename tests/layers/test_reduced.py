"""Global attention with spatial reduction, in a block: against the mathematics written out in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from acmix import ACmix
from acmix.layers import LocalAttention, ReducedAttention
from acmix.telemetry.flops import multiply_adds
from acmix.testing import error_budget, relative_error

HEADS, DIM = 2, 4
CASES = pytest.mark.parametrize(
    ("reduction", "shared", "size"),
    [(2, "qkv", (6, 4)), (2, "q", (5, 7)), (4, "qkv", (9, 3)), (1, "qkv", (3, 5)), (1, "q", (1, 1))],
)


def build(reduction: int, shared: str = "qkv", **more) -> ACmix:
    torch.manual_seed(0)
    attention = ReducedAttention(HEADS, DIM, reduction, shared=shared)
    return ACmix(HEADS * DIM, HEADS * DIM, HEADS, attention=attention, **more)


def images(*size: int) -> Tensor:
    return torch.randn(2, HEADS * DIM, *size, generator=torch.Generator().manual_seed(1))


def written_out(block: ACmix, x: Tensor, tokens: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """The block pixel by pixel, without a line of the package's: reduction, projections, attention, fc, shifts, mix."""
    path, channels, (height, width) = block.attention, HEADS * DIM, x.shape[-2:]
    source = x
    if path.reduction > 1:
        r = path.reduction
        source = F.pad(x, (0, max(0, r - width), 0, max(0, r - height)))
        source = F.conv2d(source, path.reducing.weight, path.reducing.bias, r)
        source = F.layer_norm(source.movedim(1, 3), (channels,), path.norm.weight, path.norm.bias).movedim(3, 1)
        q = torch.einsum("bcyx,oc->boyx", x, block.q.weight) + block.q.bias[:, None, None]
        k, v = (torch.einsum("bcyx,oc->boyx", source, block.kv.weight) + block.kv.bias[:, None, None]).chunk(2, 1)
    else:
        q, k, v = (torch.einsum("bcyx,oc->boyx", x, block.qkv.weight) + block.qkv.bias[:, None, None]).chunk(3, 1)
    rows = [m.flatten(2).mT for m in (q, k, v)]  # (B, pixels, channels)
    if tokens is not None:
        rows = [torch.cat((t, m), 1) for t, m in zip(block.qkv(tokens).chunk(3, 2), rows, strict=True)]
    heads = []
    for n in range(HEADS):
        a, b, c = (m[..., n * DIM : (n + 1) * DIM] for m in rows)
        heads.append(((a @ b.mT) * DIM**-0.5).softmax(-1) @ c)
    attended = path.proj(torch.cat(heads, 2)) * block.mix.alpha
    count = 0 if tokens is None else tokens.shape[1]
    attention = attended[:, count:].mT.unflatten(2, (height, width))
    maps = [q] if not path.shares_kv else [q, *(F.interpolate(m, (height, width)) for m in (k, v))]
    maps = torch.cat(maps, 1).unflatten(1, (-1, DIM))
    fc, kernel = block.convolution.fc_weight, block.convolution.shift_weight.unflatten(0, (DIM, HEADS))
    mixed = F.pad(torch.einsum("bmdyx,im->bidyx", maps, fc), (1, 1, 1, 1))
    convolution = 0
    for dy in range(3):
        for dx in range(3):
            part = mixed[..., dy : dy + height, dx : dx + width]
            convolution = convolution + torch.einsum("bidyx,dni->bdnyx", part, kernel[..., dy, dx])
    out = attention + block.mix.beta * convolution.flatten(1, 2)
    return out if tokens is None else (out, attended[:, :count])


def gradients(block: ACmix, function, *inputs: Tensor) -> list[Tensor]:
    """The outputs, and the gradients of their squares for the inputs and every parameter."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    out = function(*leaves)
    outputs = out if isinstance(out, tuple) else (out,)
    loss = sum(output.square().sum() for output in outputs)
    return [*outputs, *torch.autograd.grad(loss, [*leaves, *block.parameters()])]


@CASES
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_block_and_every_gradient_match_the_mathematics_in_float64(reduction, shared, size, layout):
    block, x = build(reduction, shared), images(*size)
    exact_block = copy.deepcopy(block).double()
    exact = gradients(exact_block, lambda x: written_out(exact_block, x), x.double())
    plain = gradients(block, lambda x: written_out(block, x), x)
    results = gradients(block, block, x.contiguous(memory_format=layout))
    terms = x.shape[0] * HEADS * size[0] * size[1]
    for result, naive, target in zip(results, plain, exact, strict=True):
        if target.norm() > 1e-9:  # on one pixel the softmax is constant, and so is a bias of k always
            budget = error_budget(relative_error(naive, target), torch.float32, terms)
            assert relative_error(result, target) <= budget


def test_tokens_take_part_in_the_attention_and_go_past_the_convolution():
    block = build(1).double()
    x, tokens = images(3, 4).double(), images(1, 2).double().flatten(2).mT
    results = gradients(block, block, x, tokens)
    expected = gradients(block, lambda x, tokens: written_out(block, x, tokens), x, tokens)
    torch.testing.assert_close(results, expected)
    alone, _ = block(x, tokens)
    without = build(1, mix="attention").double()
    without.load_state_dict(block.state_dict(), strict=False)
    torch.testing.assert_close(without(x, tokens)[1] * 0.5, block(x, tokens)[1])  # alpha
    assert alone.shape == x.shape


def test_a_path_that_is_not_global_refuses_tokens():
    tokens = torch.randn(2, 1, 8)
    for block in (ACmix(8, 8, 2, attention=LocalAttention(2, 4, 3)), build(2), build(1, mix="convolution")):
        with pytest.raises(ValueError, match="takes no tokens beside the map"):
            block(images(4, 4), tokens)


def test_one_pixel_attends_to_itself_and_small_maps_are_reduced_to_one_pixel():
    block = build(8).double()
    assert block(images(1, 1).double()).shape == (2, 8, 1, 1)
    assert block.attention.reduce(images(3, 9).double()).shape == (2, 8, 1, 1)
    plain = build(1, mix="attention").double()
    x = images(1, 1).double()
    v = plain.qkv(x.flatten(1))[:, 16:]
    torch.testing.assert_close(plain(x).flatten(1), plain.attention.proj(v))


def test_the_path_counts_the_reduced_map_and_the_block_its_reduction():
    channels, pixels, keys = HEADS * DIM, 6 * 8, 3 * 4
    for shared, maps in (("qkv", 3 * HEADS), ("q", HEADS)):
        projections = channels**2 * (2 * pixels + 2 * keys) + 4 * channels**2 * keys
        attention = 2 * pixels * keys * channels
        convolution = 9 * maps * DIM * pixels + 81 * channels * pixels
        assert multiply_adds(build(2, shared), (channels, 6, 8)) == projections + attention + convolution


def test_the_gradient_can_be_differentiated_again():
    for reduction in (1, 2):
        block, x = build(reduction).double(), images(4, 4).double().requires_grad_()
        results = []
        for function in (block, lambda x, block=block: written_out(block, x)):
            (slope,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
            results.append(torch.autograd.grad(slope.square().sum(), [x, *block.parameters()], allow_unused=True))
        torch.testing.assert_close(*results)


def test_a_backward_pass_may_run_twice():
    block, x = build(2), images(4, 4)
    loss = block(x).square().sum()
    first, second = (torch.autograd.grad(loss, list(block.parameters()), retain_graph=True) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_the_convolution_alone_projects_what_it_gets():
    assert build(2, "q", mix="convolution").qkv.out_features == HEADS * DIM
    assert build(2, "qkv", mix="convolution").qkv.out_features == 3 * HEADS * DIM
    for shared in ("q", "qkv"):
        block = build(2, shared, mix="convolution")
        block(images(4, 5)).sum().backward()
        assert all(parameter.grad is not None for parameter in block.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"impl": "fast"}, "unknown impl 'fast'"), ({"shared": "k"}, "choose qkv or q"), ({"reduction": 0}, "at least 1")],
)
def test_what_the_path_does_not_know_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ReducedAttention(2, 4, **arguments)
