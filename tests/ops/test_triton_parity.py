"""The Triton kernels against the reference in float64: outputs, log-sum-exp and every gradient.

The same checks run in two places. Without a GPU they run in Triton's interpreter, in a process of its own because
TRITON_INTERPRET counts only before Triton is imported: there pytest collects the functions named check_*. With a GPU,
`pytest -m gpu` runs the tests at the end of the file on compiled kernels, over a larger grid.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from acmix.ops import reference
from acmix.ops.implementations import Problem, Window
from acmix.ops.local_attention.implementations import LOCAL_ATTENTION
from acmix.ops.local_attention.triton import kernels
from acmix.testing import AttentionCase, error_budget, fresh_memory_is_nan, relative_error

NAMES = ("out", "dq", "dk", "dv", "dP")


@dataclass(frozen=True)
class Case(AttentionCase):
    """A problem as the kernels prefer it; small, as the interpreter is slow."""

    batch: int = 1
    layout: str = "channels_last"


def make_maps(case: Case, device: str) -> tuple[Tensor, ...]:
    """q, k, v, P and the gradient of the output, unit normal, in the case's layout."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device=device, dtype=case.dtype)

    size = (case.batch, case.heads * case.head_dim, case.height, case.width)
    if case.layout == "sliced":
        q, k, v = draw(size[0], 3 * size[1], *size[2:]).to(memory_format=torch.channels_last).chunk(3, 1)
    else:
        layout = torch.channels_last if case.layout == "channels_last" else torch.contiguous_format
        q, k, v = (draw(*size).to(memory_format=layout) for _ in range(3))
    grad_out = draw(*size[:2], -(-case.height // case.stride), -(-case.width // case.stride))
    return q, k, v, draw(case.head_dim, 2), grad_out


def reference_results(case: Case, maps: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients of the eager reference in `dtype`."""
    *inputs, grad_out = (m.to(dtype) for m in maps)
    leaves = [m.detach().requires_grad_() for m in inputs]
    out = reference.local_attention(*leaves, case.kernel_size, case.stride, case.dilation)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]


def kernel_results(case: Case, maps: tuple[Tensor, ...]) -> tuple[list[Tensor], Tensor]:
    """Output and gradients of the kernels, and the log-sum-exp."""
    *inputs, grad_out = maps
    window = Window(case.kernel_size, case.stride, case.dilation)
    with fresh_memory_is_nan(warn_only=False):
        assert torch.utils.deterministic.fill_uninitialized_memory
        out, lse = kernels.forward(*inputs, window)
        grads = kernels.backward(grad_out, *inputs, out, lse, window)
    return [out, *grads], lse


def assert_parity(case: Case, device: str) -> None:
    """At most twice the error of plain PyTorch in the same dtype, plus the rounding of results and sums."""
    maps = make_maps(case, device)
    exact = reference_results(case, maps, torch.float64)
    plain = reference_results(case, maps, case.dtype)
    results, lse = kernel_results(case, maps)
    assert lse.isfinite().all()
    for name, result, naive, target in zip(NAMES, results, plain, exact, strict=True):
        assert result.dtype == case.dtype
        terms = case.batch * case.heads * case.height * case.width if name == "dP" else 0  # it sums over all queries
        error, allowed = relative_error(result, target), error_budget(relative_error(naive, target), case.dtype, terms)
        assert error <= allowed, f"{name} of {case}: relative error {error:.2e}, allowed {allowed:.2e}"


HALF = (torch.bfloat16, torch.float16)
INTERPRETED = (
    Case(heads=1, head_dim=8, height=2, width=3, kernel_size=3),
    Case(heads=2, head_dim=12, height=9, width=7, kernel_size=7, dtype=torch.bfloat16),
    Case(heads=2, head_dim=16, height=4, width=5, kernel_size=7, batch=2, layout="contiguous"),
    Case(heads=1, head_dim=24, height=11, width=8, kernel_size=5, stride=2, layout="sliced"),
    Case(heads=1, head_dim=16, height=8, width=7, kernel_size=7, stride=2, dtype=torch.float16),
    Case(heads=1, head_dim=48, height=7, width=7, kernel_size=7),
    Case(heads=1, head_dim=8, height=9, width=8, kernel_size=13),
    Case(heads=1, head_dim=16, height=8, width=9, kernel_size=5, dilation=2),
    Case(heads=1, head_dim=16, height=9, width=7, kernel_size=3, stride=3),
)


@pytest.mark.parametrize("case", INTERPRETED, ids=str)
def check_kernels_match_the_reference(case: Case) -> None:
    assert_parity(case, "cpu")


def check_large_logits_leave_no_trace_where_a_tile_hangs_over_the_map() -> None:
    assert_parity_of_large_logits("cpu")


def check_two_runs_give_the_same_bits() -> None:
    assert_same_bits(Case(heads=2, head_dim=12, height=7, width=9, kernel_size=5), "cpu")


def check_a_gradient_of_any_strides_is_read() -> None:
    assert_expanded_gradient(Case(heads=1, head_dim=8, height=5, width=6, kernel_size=3), "cpu")


def check_offsets_beyond_32_bits_are_reached() -> None:
    """One map inside a storage so long that the last row starts beyond element 2**31; untouched pages cost nothing."""
    case = Case(heads=1, head_dim=16, height=4, width=4, kernel_size=3, dtype=torch.float16)
    assert_parity_of_far_rows(case, "cpu")


def check_auto_takes_triton_wherever_it_can_run() -> None:
    problem = Problem(torch.device("cpu"), torch.float32, shape=(4, 64, 7, 7), heads=4, window=Window(7, 1, 1))
    for shape in ((4, 64, 56, 56), (4, 64, 7, 7)):
        assert LOCAL_ATTENTION.resolve("auto", replace(problem, shape=shape)) == "triton"
    refused = {
        "dtype torch.float64 is not one of": replace(problem, dtype=torch.float64),
        "head width 320 is more than 256": replace(problem, shape=(4, 1280, 7, 7)),
        "batch size 65536 is more than": replace(problem, shape=(65536, 64, 7, 7)),
        "reaches 27 pixels is wider than the 24": replace(problem, window=Window(7, 1, 9)),
    }
    for reason, other in refused.items():
        with pytest.raises(ValueError, match=reason):
            LOCAL_ATTENTION.resolve("triton", other)


def assert_parity_of_large_logits(device: str) -> None:
    """Attention is all or nothing at logits of hundreds, whose exponentials overflow where nothing is subtracted.

    Then nearly nothing is left of the gradients that pass the softmax: only of the others can the error be bounded.
    """
    case = Case(heads=1, head_dim=8, height=5, width=6, kernel_size=3)
    q, *others = make_maps(case, device)
    maps = (200 * q, *others)
    results = dict(zip(NAMES, kernel_results(case, maps)[0], strict=True))
    exact = dict(zip(NAMES, reference_results(case, maps, torch.float64), strict=True))
    assert all(result.isfinite().all() for result in results.values())
    assert all(relative_error(results[name], exact[name]) < 1e-4 for name in ("out", "dv"))


def assert_same_bits(case: Case, device: str) -> None:
    maps = make_maps(case, device)
    first, second = kernel_results(case, maps)[0], kernel_results(case, maps)[0]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def assert_expanded_gradient(case: Case, device: str) -> None:
    """A broadcast gradient, as of out.sum(), has stride 0 everywhere."""
    *inputs, grad_out = make_maps(case, device)
    ones = torch.ones((), dtype=case.dtype, device=device).expand(grad_out.shape)
    broadcast, _ = kernel_results(case, (*inputs, ones))
    dense, _ = kernel_results(case, (*inputs, ones.contiguous()))
    assert all(torch.equal(a, b) for a, b in zip(broadcast, dense, strict=True))


def assert_parity_of_far_rows(case: Case, device: str) -> None:
    q, *others = make_maps(case, device)
    row = 2**30
    storage = torch.empty(row * (case.height - 1) + 2**20, dtype=case.dtype, device=device)
    far = storage.as_strided(q.shape, (0, 1, row, q.shape[1])).copy_(q)
    near, _ = kernel_results(case, (q, *others))
    results, _ = kernel_results(case, (far, *others))
    assert all(torch.equal(a, b) for a, b in zip(near, results, strict=True))


def test_kernels_pass_every_check_in_the_interpreter(pass_in_interpreter: Callable[[str, int], None]) -> None:
    pass_in_interpreter(__file__, len(INTERPRETED) + 5)


def gpu_cases() -> Iterator[Case]:
    """Head widths, windows, strides, dilations, layouts and dtypes, each crossed with what it interacts with."""
    for head_dim, dtype in itertools.product((8, 12, 16, 24, 48, 64, 128), (torch.float32, *HALF)):
        yield Case(heads=2, head_dim=head_dim, height=19, width=30, kernel_size=7, batch=2, dtype=dtype)
    for kernel_size, stride, layout in itertools.product((3, 5, 7, 9, 13), (1, 2, 3), ("contiguous", "sliced")):
        case = Case(2, 16, 17, 23, kernel_size, stride, batch=2, layout=layout)
        yield from (case, replace(case, dtype=torch.bfloat16))
    for kernel_size, dilation, stride in itertools.product((3, 5, 7), (2, 3), (1, 2)):
        yield Case(2, 16, 21, 26, kernel_size, stride, dilation, dtype=torch.bfloat16)
    for kernel_size in (3, 7, 13):
        yield Case(2, 32, kernel_size // 2 + 1, kernel_size // 2 + 2, kernel_size, dtype=torch.float16)
    for head_dim, side in ((16, 56), (32, 28), (64, 14), (128, 7)):
        yield Case(4, head_dim, side, side, kernel_size=7, batch=2, dtype=torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("case", gpu_cases(), ids=str)
def test_compiled_kernels_match_the_reference_on_a_gpu(case: Case) -> None:
    assert_parity(case, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("case", [c for c in gpu_cases() if c.dtype == torch.float32][:7], ids=str)
def test_tf32_products_stay_within_the_error_of_plain_tf32(case: Case) -> None:
    """Products in tf32 keep 10 mantissa bits of each factor, as float16 does; Triton cuts the others off, which errs by
    a whole unit in the last place where rounding errs by half of one."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        maps = make_maps(case, "cuda")
        exact = reference_results(case, maps, torch.float64)
        plain = reference_results(case, maps, torch.float16)
        results, _ = kernel_results(case, maps)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    for name, result, naive, target in zip(NAMES, results, plain, exact, strict=True):
        assert relative_error(result, target) <= 2 * 2 * relative_error(naive, target), name


@pytest.mark.gpu
def test_large_logits_leave_no_trace_on_a_gpu() -> None:
    assert_parity_of_large_logits("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_two_runs_on_a_gpu_give_the_same_bits(dtype: torch.dtype) -> None:
    assert_same_bits(Case(4, 16, 56, 56, kernel_size=7, batch=8, dtype=dtype), "cuda")


@pytest.mark.gpu
def test_a_broadcast_gradient_is_read_on_a_gpu() -> None:
    assert_expanded_gradient(Case(2, 16, 15, 16, kernel_size=7), "cuda")


@pytest.mark.gpu
def test_offsets_beyond_32_bits_are_reached_on_a_gpu() -> None:
    assert_parity_of_far_rows(Case(1, 16, 4, 4, kernel_size=3, dtype=torch.float16), "cuda")


@pytest.mark.gpu
def test_a_side_stream_and_a_cuda_graph_give_the_same_bits() -> None:
    case = Case(2, 16, 15, 16, kernel_size=7, batch=2, dtype=torch.bfloat16)
    maps = make_maps(case, "cuda")
    *inputs, grad_out = maps
    window = Window(case.kernel_size, case.stride, case.dilation)

    def step() -> list[Tensor]:
        out, lse = kernels.forward(*inputs, window)
        return [out, *kernels.backward(grad_out, *inputs, out, lse, window)]

    plain = step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        beside = step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    for a, b, c in zip(plain, beside, captured, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
