"""Patchwise attention as a path: training, statistics, small maps, observed layers, memory."""

import copy
import itertools

import pytest
import torch
from torch import nn

from acmix import ACmix
from acmix.layers import PatchwiseAttention


def inputs(size: tuple[int, int], batch: int = 3, mean: float = 2.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, c, *size, generator=generator).double() + mean for c in (2, 2, 8)]


def path(kernel_size: int = 7, **options) -> PatchwiseAttention:
    torch.manual_seed(0)
    return PatchwiseAttention(4, 2, kernel_size, sharing=4, **options).double()


@pytest.mark.parametrize("size", [(8, 9), (3, 2), (1, 1)], ids=str)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_training_gives_the_references_output_gradients_and_running_statistics(size, momentum):
    taps = path()
    taps.norm1.momentum = momentum
    reference = copy.deepcopy(taps)
    reference.impl = "reference"
    results = []
    for attention in (taps, reference):
        for _ in range(2):  # the second step starts from running statistics of the first
            leaves = [m.requires_grad_() for m in inputs(size)]
            out = attention(*leaves)
        grads = torch.autograd.grad(out.square().sum(), [*leaves, *attention.parameters()])
        results.append([out, *grads, *attention.buffers(), attention.eval()(*leaves)])
    torch.testing.assert_close(*results)


def test_a_small_map_gets_what_its_repeated_reflection_gets():
    attention, maps = path(5).eval(), inputs((2, 3))
    row, column = [0, 1, 0, 1, 0, 1, 0], [0, 1, 2, 1, 0, 1, 2, 1, 0]  # the map reflected until a patch fits
    large = [m[:, :, row][:, :, :, column] for m in maps]
    torch.testing.assert_close(attention(*maps)[:, :, 1, 1], attention(*large)[:, :, 3, 5])


def test_a_hook_on_a_layer_is_called():
    attention, plain = path(3).eval(), path(3).eval()
    seen = []
    attention.norm1.register_forward_hook(lambda module, given, out: seen.append(out.shape[1]))
    torch.testing.assert_close(attention(*inputs((5, 4))), plain(*inputs((5, 4))))
    assert seen == [2 * 10]


def test_training_keeps_less_than_a_tenth_of_what_the_reference_keeps():
    kept = {}
    for impl in ("auto", "reference"):
        sizes: list[int] = []

        def count(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        attention = path(impl=impl)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            attention(*(m.requires_grad_() for m in inputs((14, 14))))
        kept[impl] = sum(sizes)
    assert 10 * kept["auto"] < kept["reference"]


def test_the_block_projects_six_maps_and_its_convolution_mixes_them():
    block = ACmix(16, 8, heads=4, attention=PatchwiseAttention(4, 2, 3))
    assert block.qkv.out_features == 12
    assert block.convolution.fc_weight.shape == (9, 6)
    assert block(torch.randn(2, 16, 5, 6)).shape == (2, 8, 5, 6)
    alone = ACmix(16, 8, heads=4, attention=PatchwiseAttention(4, 2, 3), mix="convolution")
    assert alone.attention is None
    assert alone(torch.randn(2, 16, 5, 6)).shape == (2, 8, 5, 6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [False, True])
def test_a_block_runs_in_half_precision(dtype, training):
    block = ACmix(16, 8, heads=4, attention=PatchwiseAttention(4, 2, 3)).train(training)
    x = torch.randn(2, 16, 6, 5, generator=torch.Generator().manual_seed(0))
    half, single = copy.deepcopy(block).to(dtype)(x.to(dtype)), block(x)
    assert half.dtype == dtype
    assert float((half.float() - single).detach().norm() / single.detach().norm()) < 8 * torch.finfo(dtype).eps


def test_every_choice_that_cannot_work_is_refused():
    for arguments, message in (((4, 2, 4), "no centre"), ((4, 2, 3, 3), "does not divide 8 channels")):
        with pytest.raises(ValueError, match=message):
            PatchwiseAttention(*arguments)
    with pytest.raises(ValueError, match="unknown impl"):
        PatchwiseAttention(4, 2, 3, impl="cpp")


def test_the_layers_keep_pytorchs_names_and_initialisation():
    names = [name for name, _ in PatchwiseAttention(4, 2, 3).named_parameters()]
    layers = ("norm1", ("weight", "bias")), ("reduce_patch", ("weight",)), ("norm2", ("weight", "bias"))
    wanted = [*itertools.chain(*([f"{a}.{b}" for b in parts] for a, parts in layers)), "expand.weight", "expand.bias"]
    assert names == wanted
    assert isinstance(PatchwiseAttention(4, 2, 3).norm1, nn.BatchNorm2d)


def test_an_exported_block_takes_maps_of_any_size_down_to_a_pixel():
    block = ACmix(16, 8, heads=4, attention=PatchwiseAttention(4, 2, 7)).eval()
    dynamic = torch.export.Dim.DYNAMIC
    program = torch.export.export(
        block, (torch.randn(2, 16, 6, 7),), dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic},)
    )
    for shape in ((2, 16, 6, 7), (3, 16, 2, 5), (1, 16, 12, 9), (2, 16, 1, 1)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(program.module()(x), block(x))


@pytest.mark.slow
def test_compiled_training_on_maps_of_any_size_gives_the_gradients_and_statistics_of_eager_training():
    eager = ACmix(16, 8, heads=4, attention=PatchwiseAttention(4, 2, 7)).double()
    blocks = eager, copy.deepcopy(eager)
    torch.compiler.reset()
    compiled = torch.compile(blocks[1], backend="aot_eager", fullgraph=True, dynamic=True)
    for shape in ((2, 16, 6, 7), (3, 16, 4, 5), (2, 16, 12, 9)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
        outs = eager(x), compiled(x)
        grads = [
            torch.autograd.grad(out.square().sum(), list(block.parameters()))
            for out, block in zip(outs, blocks, strict=True)
        ]
        torch.testing.assert_close((outs[0], *grads[0]), (outs[1], *grads[1]))
    torch.testing.assert_close(*(list(block.buffers()) for block in blocks))
