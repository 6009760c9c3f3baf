"""The two steps of patchwise attention, held to plain PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from acmix.ops import patch_aggregation, patch_features
from acmix.ops.patchwise.border import padded, reflected

SIZES = [(7, 5), (3, 4), (2, 3), (1, 1)]


def features_inputs(size: tuple[int, int], kernel_size: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """k, scale, offset and weight: 3 channels, 4 features."""
    shapes = (2, 3, *size), (3, kernel_size**2), (3, kernel_size**2), (4, 3, kernel_size**2)
    return draw(shapes, dtype)


def aggregation_inputs(size: tuple[int, int], kernel_size: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """v, the hidden map, weight and bias: 6 channels, 2 groups."""
    return draw(((2, 6, *size), (2, 2, *size), (2, kernel_size**2, 2), (2, kernel_size**2)), dtype)


def draw(shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


STEPS = pytest.mark.parametrize(
    ("step", "inputs"), [(patch_features, features_inputs), (patch_aggregation, aggregation_inputs)]
)


@STEPS
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kernel_size", [1, 3, 7])
def test_taps_give_the_output_and_every_gradient_of_the_reference(step, inputs, size, kernel_size):
    leaves = inputs(size, kernel_size)
    results = []
    for impl in ("taps", "reference"):
        out = step(*leaves, kernel_size, impl)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    torch.testing.assert_close(*results)


@STEPS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_in_float32_and_keeps_its_dtype(step, inputs, dtype):
    leaves = inputs((7, 5), 7, dtype)
    out = step(*leaves, 7)
    exact = step(*(leaf.double() for leaf in leaves), 7, "reference")
    assert out.dtype == dtype
    assert (
        float((out.double() - exact).norm().detach() / exact.norm().detach()) < torch.finfo(dtype).eps
    )  # one rounding, of the result


def test_the_sum_over_a_patch_is_the_one_written_out():
    v, hidden, weight, bias = aggregation_inputs((4, 5), 3)
    out = patch_aggregation(v, hidden, weight, bias, 3)
    b, c, y, x = 1, 3, 0, 4  # in a corner, where the patch is reflected
    group = c % 2
    total = 0.0
    for tap in range(9):
        row, column = abs(y + tap // 3 - 1), x + tap % 3 - 1
        column = 2 * 4 - column if column > 4 else column
        total = total + (weight[group, tap] @ hidden[b, :, y, x] + bias[group, tap]) * v[b, c, row, column]
    torch.testing.assert_close(out[b, c, y, x], total)


def test_reflection_is_pytorchs_where_the_map_is_larger_and_goes_on_where_it_is_not():
    maps = torch.randn(2, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    for reach in (0, 1, 4):
        wanted = F.pad(maps, (reach,) * 4, mode="reflect")
        assert torch.equal(reflected(maps, reach), wanted)
        assert torch.equal(padded(maps, reach), wanted)
    row = torch.tensor([[[[1.0, 2.0]]]])
    assert reflected(row, 3)[0, 0, 0].tolist() == [2, 1, 2, 1, 2, 1, 2, 1]
    assert reflected(row[..., :1], 2).unique().tolist() == [1]


def test_nothing_is_kept_for_the_backward_pass_but_the_inputs():
    kept = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    leaves = features_inputs((9, 9), 7) + aggregation_inputs((9, 9), 7)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        patch_features(*leaves[:4], 7), patch_aggregation(*leaves[4:], 7)
    assert kept == sum(leaf.numel() for leaf in leaves)


@STEPS
def test_the_operations_are_registered_as_pytorch_asks_and_have_second_derivatives(step, inputs):
    leaves = inputs((3, 4), 3)
    operation = getattr(torch.ops.acmix, step.__name__).default
    torch.library.opcheck(operation, (*leaves, 3, "taps"))
    results = []
    for impl in ("taps", "reference"):
        (slope,) = torch.autograd.grad(step(*leaves, 3, impl).square().sum(), leaves[0], create_graph=True)
        results.append(torch.autograd.grad(slope.square().sum(), leaves))
    torch.testing.assert_close(*results)


@STEPS
def test_flops_are_those_of_the_products_and_twice_that_backward(step, inputs):
    leaves = inputs((4, 5), 3)
    with FlopCounterMode(display=False) as forward:
        out = step(*leaves, 3)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    products = {"patch_features": 4 * 3 * 9, "patch_aggregation": 2 * 9 * 2 + 6 * 9}[step.__name__]
    assert forward.get_total_flops() == 2 * products * 2 * 4 * 5
    assert backward.get_total_flops() == 2 * forward.get_total_flops()


def test_shapes_that_do_not_fit_are_named():
    k, scale, offset, weight = features_inputs((4, 4), 3)
    with pytest.raises(ValueError, match=r"scale and offset must be \(3, 9\).*got \(3, 4\)"):
        patch_features(k, scale[:, :4], offset, weight, 3)
    v, hidden, weight, bias = aggregation_inputs((4, 4), 3)
    with pytest.raises(ValueError, match=r"weight be \(2, 25, 2\) and bias \(2, 25\)"):
        patch_aggregation(v, hidden, weight, bias, 5)
    with pytest.raises(ValueError, match="unknown impl 'fast'"):
        patch_aggregation(v, hidden, weight, bias, 3, "fast")
    with pytest.raises(ValueError, match=r"hidden must be maps .* of the size of v"):
        patch_aggregation(v, hidden[:1], weight, bias, 3)
    with pytest.raises(ValueError, match=r"a map of 0×4 pixels is empty"):
        patch_features(k[:, :, :0], scale, offset, weight, 3)
    with pytest.raises(ValueError, match=r"floating-point numbers: torch\.int64"):
        patch_features(k.long(), scale, offset, weight, 3)
