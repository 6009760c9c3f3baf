"""Window attention in C++ against the reference in float64."""

import pytest
import torch
from torch import Tensor
from torch.func import grad
from torch.utils.flop_counter import FlopCounterMode

from acmix.ops import native, reference, window_attention, window_attention_refusal
from acmix.testing import draw_maps, error_budget, fresh_memory_is_nan, relative_error

pytestmark = pytest.mark.skipif(native.cxx_compiler() is None, reason="needs a C++ compiler")

CASES = [  # heads, head_dim, height, width, window, shift
    (4, 8, 14, 14, (7, 7), (3, 3)),
    (5, 3, 8, 12, (4, 3), (0, 1)),
    (2, 40, 6, 5, (6, 5), (0, 0)),
    (1, 16, 9, 20, (3, 5), (1, 2)),
]
Case = tuple[int, int, int, int, tuple[int, int], tuple[int, int]]


def inputs_of(case: Case, dtype: torch.dtype, layout: str = "contiguous") -> list[Tensor]:
    """q, k, v, the bias and the gradient of the output."""
    heads, head_dim, height, width, (rows, columns), _ = case
    maps = draw_maps(2, heads * head_dim, height, width, dtype, layout)
    generator = torch.Generator().manual_seed(1)
    bias = torch.randn(heads, rows * columns, rows * columns, generator=generator)
    return [*maps, bias.to(dtype), torch.randn(maps[0].shape, generator=generator).to(dtype)]


def results(case: Case, inputs: list[Tensor], *, fast: bool) -> list[Tensor]:
    """The output and the gradients of q, k, v and the bias."""
    leaves, windows = [t.detach().requires_grad_() for t in inputs[:4]], case[4:]
    if fast:
        out = window_attention(*leaves, *windows)
    else:
        out = reference.window_attention(*leaves, *windows[0], *windows[1])
    return [out.detach(), *torch.autograd.grad(out, leaves, inputs[4])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients_are_within_twice_plain_pytorchs_error(case, dtype):
    exact = results(case, [t.double() for t in inputs_of(case, dtype)], fast=False)
    plain = results(case, inputs_of(case, dtype), fast=False)
    for layout in ("contiguous", "channels_last", "sliced"):
        with fresh_memory_is_nan():
            got = results(case, inputs_of(case, dtype, layout), fast=True)
        for i, (result, naive, target) in enumerate(zip(got, plain, exact, strict=True)):
            assert result.dtype == dtype
            terms = target.numel() if i == 4 else 0
            assert relative_error(result, target) <= error_budget(relative_error(naive, target), dtype, terms)


def test_derivatives_of_both_orders_are_those_of_finite_differences():
    case = (2, 3, 4, 6, (2, 3), (1, 1))
    leaves = [t.requires_grad_() for t in inputs_of(case, torch.float64)[:4]]

    def run(*tensors: Tensor) -> Tensor:
        return window_attention(*tensors, *case[4:])

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


def test_the_number_of_threads_changes_no_bit():
    case, before = CASES[0], torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            runs.append(results(case, inputs_of(case, torch.float32), fast=True))
    finally:
        torch.set_num_threads(before)
    for several in runs[1:]:
        torch.testing.assert_close(several, runs[0], rtol=0, atol=0)


def test_maps_may_be_compiled_together_with_what_surrounds_them():
    torch.compiler.reset()
    case = CASES[1]
    *leaves, _ = inputs_of(case, torch.float32)
    leaves = [t.requires_grad_() for t in leaves]

    def run(*tensors: Tensor) -> Tensor:
        return window_attention(*tensors, *case[4:]).square().sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    got, want = (torch.autograd.grad(f(*leaves), leaves) for f in (compiled, run))
    torch.testing.assert_close(got, want)


def test_both_products_are_counted_and_twice_that_backward():
    case = CASES[0]
    leaves = [t.requires_grad_() for t in inputs_of(case, torch.float32)[:4]]
    with FlopCounterMode(display=False) as forward:
        out = window_attention(*leaves, *case[4:])
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert forward.get_total_flops() == 2 * (2 * 49 * out.numel())
    assert backward.get_total_flops() == 2 * forward.get_total_flops()


def test_it_says_where_it_cannot_run(monkeypatch):
    maps = torch.ones(1, 2, 4, 4)
    assert window_attention_refusal(maps) is None
    assert "CPU" in str(window_attention_refusal(maps.to("meta")))
    assert "empty" in str(window_attention_refusal(maps[:0]))

    def inside(x: Tensor) -> Tensor:
        assert "torch.func" in str(window_attention_refusal(x))
        return x.sum()

    grad(inside)(maps)
    monkeypatch.setenv("ACMIX_COMPILE", "never")
    assert "ACMIX_COMPILE" in str(window_attention_refusal(maps))


def test_a_call_that_cannot_work_says_why_and_what_to_do():
    maps, bias = torch.zeros(1, 8, 8, 8), torch.zeros(2, 16, 16)
    bad_calls = [
        ((maps, maps[..., :4], maps, bias, (4, 4)), "q, k and v must be maps of one shape"),
        ((maps, maps.double(), maps, bias, (4, 4)), "one floating-point dtype"),
        ((maps, maps, maps, bias.to("meta"), (4, 4)), "tensors on cpu and on meta: move"),
        ((*[maps[..., :7, :]] * 3, bias, (4, 4)), "windows of 4×4 do not tile a map of 7×8: pad it first"),
        ((maps, maps, maps, bias, (0, 4)), "windows of 0×4 do not tile"),
        ((maps, maps, maps, bias[:, :4, :4], (4, 4)), r"bias must be .*\(heads, 16, 16\) .* got \(2, 4, 4\)"),
        ((maps, maps, maps, torch.zeros(3, 16, 16), (4, 4)), r"heads that divide 8 channels, got \(3, 16, 16\)"),
    ]
    for arguments, message in bad_calls:
        with pytest.raises(ValueError, match=message):
            window_attention(*arguments, (0, 0))
