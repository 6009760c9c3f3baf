"""Every CPU implementation of local attention against the reference in float64, and the custom operation around."""

import itertools
import json
import platform
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from acmix.ops import local_attention, native, shift_conv
from acmix.ops.implementations import Window
from acmix.ops.local_attention import cpp, dense, tiled
from acmix.ops.native import cxx_compiler
from acmix.testing import AttentionCase as Case
from acmix.testing import assert_parity, relative_error

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
needs_compiler = pytest.mark.skipif(cxx_compiler() is None, reason="needs a C++ compiler")
FAST = ("dense", "tiled", pytest.param("cpp", marks=needs_compiler))

CASES = (
    Case(heads=2, head_dim=8, height=4, width=4, kernel_size=7),
    Case(heads=3, head_dim=12, height=9, width=11, kernel_size=7, batch=1, layout="sliced"),
    Case(heads=2, head_dim=16, height=15, width=22, kernel_size=7, layout="channels_last"),
    Case(heads=2, head_dim=24, height=11, width=8, kernel_size=5, stride=2, layout="sliced"),
    Case(heads=1, head_dim=48, height=7, width=7, kernel_size=13, batch=3),
    Case(heads=2, head_dim=64, height=5, width=9, kernel_size=3, stride=3),
    Case(heads=1, head_dim=128, height=6, width=6, kernel_size=7, stride=2),
    Case(heads=2, head_dim=8, height=17, width=13, kernel_size=3, dilation=3, layout="channels_last"),
    Case(heads=2, head_dim=8, height=14, width=19, kernel_size=5, stride=2, dilation=2),
    Case(heads=2, head_dim=8, height=11, width=10, kernel_size=3, stride=2, dilation=3),
    Case(heads=2, head_dim=16, height=9, width=10, kernel_size=7, dtype=torch.bfloat16),
    Case(
        heads=2, head_dim=16, height=9, width=10, kernel_size=5, stride=2, dtype=torch.float16, layout="channels_last"
    ),
    Case(heads=2, head_dim=16, height=9, width=10, kernel_size=7, stride=2, dtype=torch.float64),
)


def wide_cases() -> Iterator[Case]:
    for head_dim, kernel_size, stride in itertools.product((8, 12, 16, 24, 48, 64, 128), (3, 5, 7, 9, 13), (1, 2)):
        yield Case(2, head_dim, 13, 21, kernel_size, stride, layout="sliced")
    for kernel_size, layout, stride in itertools.product((3, 5, 7, 9, 13), ("contiguous", "channels_last"), (1, 2, 3)):
        case = Case(2, 16, kernel_size // 2 + 1, kernel_size // 2 + 2, kernel_size, stride, layout=layout)
        yield from (case, replace(case, height=30, width=41), replace(case, batch=1, dtype=torch.bfloat16))
    for kernel_size, dilation, stride in itertools.product((3, 5, 7), (2, 3, 4), (1, 2, 3, 4)):
        yield Case(2, 8, 26, 25, kernel_size, stride, dilation)


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients_match_the_reference(case: Case, impl: str) -> None:
    assert_parity(case, impl)


@pytest.mark.slow
@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("case", list(wide_cases()), ids=str)
def test_outputs_and_gradients_match_the_reference_on_a_wide_grid(case: Case, impl: str) -> None:
    assert_parity(case, impl)


@pytest.mark.parametrize("impl", ["reference", *FAST])
def test_a_window_of_one_pixel_gives_the_values(impl: str) -> None:
    case = Case(heads=2, head_dim=8, height=3, width=2, kernel_size=1, stride=2)
    *inputs, grad_out = case.inputs()
    out, dq, dk, dv, dposition = case.run([*inputs, grad_out], impl)
    torch.testing.assert_close(out, inputs[2][:, :, ::2, ::2])
    torch.testing.assert_close(dv[:, :, ::2, ::2], grad_out)
    for zero in (dq, dk, dposition):
        torch.testing.assert_close(zero, torch.zeros_like(zero), rtol=0, atol=1e-5)


@pytest.mark.parametrize("impl", ["reference", *FAST, "auto"])
@pytest.mark.parametrize(
    ("size", "kernel_size", "dilation", "fitting"),
    [((1, 1), 7, 1, 1), ((2, 5), 7, 1, 3), ((6, 3), 7, 1, 5), ((4, 4), 9, 2, 3), ((2, 9), 5, 3, 1), ((4, 9), 7, 1, 7)],
    ids=str,
)
def test_on_a_smaller_map_the_window_is_the_largest_that_fits(
    size: tuple[int, int], kernel_size: int, dilation: int, fitting: int, impl: str
) -> None:
    case = Case(2, 8, *size, kernel_size, stride=2, dilation=dilation, layout="channels_last")
    assert Window(kernel_size, 2, dilation).on(*size) == Window(fitting, 2, dilation)
    if impl not in ("reference", "auto") and fitting > 1:
        assert_parity(case, impl)
    smaller = replace(case, kernel_size=fitting)
    for result, expected in zip(case.run(case.inputs(), impl), smaller.run(case.inputs(), impl), strict=True):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("module", [dense, tiled], ids=["dense", "tiled"])
@pytest.mark.parametrize("logit_bytes", [1, 40_000])
def test_results_do_not_depend_on_how_heads_and_images_are_cut(
    module: object, logit_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOGIT_BYTES", logit_bytes)
    impl = "dense" if module is dense else "tiled"
    assert_parity(Case(heads=3, head_dim=8, height=9, width=11, kernel_size=5, batch=3, layout="sliced"), impl)


@pytest.mark.parametrize("tile", [(1, 1), (2, 8), (4, 7), (5, 3)], ids=str)
def test_results_do_not_depend_on_the_tile(tile: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "choose_tile", lambda *_: tile)
    for stride, dilation in ((1, 1), (2, 1), (2, 3)):
        assert_parity(Case(2, 8, 13, 17, kernel_size=5, stride=stride, dilation=dilation), "tiled")


class ValuesAlike(Case):
    """Values that differ between pixels by a thirtieth of their size, so that gradients of logits nearly cancel."""

    def inputs(self) -> list[Tensor]:
        q, k, v, position, grad_out = super().inputs()
        return [q, k, v + 30 * torch.linspace(-1, 1, v.shape[1])[:, None, None], position, grad_out]


@pytest.mark.parametrize("impl", FAST)
def test_values_that_are_nearly_alike_cost_no_precision(impl: str) -> None:
    assert_parity(ValuesAlike(heads=4, head_dim=16, height=14, width=14, kernel_size=7), impl)


class LargeLogits(Case):
    """Keys that are far from zero and alike, as a network that is not trained yet gives: a rounding of a logit of many
    thousands changes its exponential by percents."""

    def inputs(self) -> list[Tensor]:
        *maps, position, grad_out = super().inputs()
        generator = torch.Generator().manual_seed(8)
        return [
            *(30 * (m + 4 * torch.randn(m.shape[1], 1, 1, generator=generator)) for m in maps),
            position,
            grad_out,
        ]


@needs_compiler
@pytest.mark.parametrize("head_dim", [4, 128])
def test_cpp_bears_large_logits(head_dim: int) -> None:
    assert_parity(LargeLogits(heads=4, head_dim=head_dim, height=14, width=14, kernel_size=7), "cpp")


class FarFromZero(Case):
    """Maps around 1, as after a ReLU: the products of a query's channels add up in place of cancelling."""

    def inputs(self) -> list[Tensor]:
        *maps, position, grad_out = super().inputs()
        return [*(m + 1 for m in maps), position, grad_out]


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("problem", [(128, 8, 28, 7, 1, 2), (32, 14, 28, 3, 2, 1)], ids=["wide", "strided"])
def test_sums_far_from_zero_err_at_most_twice_as_much_as_plain_pytorchs(problem: tuple[int, ...], impl: str) -> None:
    """With nothing granted for the order of sums; it matters in the position weight's gradient, which adds up all."""
    case = FarFromZero(4, *problem)
    inputs = case.inputs()
    exact = case.run([t.double() for t in inputs], "reference")
    plain, results = case.run(inputs, "reference"), case.run(inputs, impl)
    for result, naive, target in zip(results, plain, exact, strict=True):
        assert relative_error(result, target) <= 2 * relative_error(naive, target)


@needs_compiler
@pytest.mark.parametrize("head_dim", [4, 16])
def test_cpp_gives_the_same_bits_for_any_number_of_threads(head_dim: int) -> None:
    case = Case(heads=4, head_dim=head_dim, height=9, width=20, kernel_size=7, layout="channels_last")
    inputs, before = case.inputs(), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(case.run(inputs, "cpp"))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


@needs_compiler
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_cpp_adds_a_multiple_to_maps_of_any_strides(channels_last: bool, dtype: torch.dtype, stride: int) -> None:
    """What both paths together rely on: q, k, v and their gradients are slices of one map."""
    case = Case(heads=2, head_dim=16, height=10, width=19, kernel_size=7, stride=stride, dtype=dtype)
    window, alpha = Window(7, stride, 1), 0.3
    *inputs, grad_out = case.inputs()
    leaves = [t.double().requires_grad_() for t in (*inputs, torch.tensor(alpha))]
    exact = leaves[-1] * local_attention(*leaves[:-1], 7, stride, "reference")
    exact_grads = torch.autograd.grad(exact, leaves, grad_out.double())

    layout = torch.channels_last if channels_last else torch.contiguous_format
    together = torch.cat(inputs[:3], 1).contiguous(memory_format=layout)
    grads = torch.ones_like(together)
    out = torch.ones_like(grad_out).contiguous(memory_format=layout)
    lse = cpp.empty_lse(together.chunk(3, 1)[0], case.head_dim, window)
    cpp.attend(*together.chunk(3, 1), inputs[3], window, out, lse, alpha, accumulate=True)
    dposition, dalpha = cpp.attend_backward(
        grad_out, *together.chunk(3, 1), inputs[3], window, lse, *grads.chunk(3, 1), alpha, accumulate=True
    )
    results = (out, *grads.chunk(3, 1), dposition, dalpha)
    expected = (exact + 1, *(g + 1 for g in exact_grads[:3]), *exact_grads[3:])
    sizes = [target.abs().max().item() for target in expected]
    sizes[-1] = (grad_out.double() * exact / alpha).abs().sum().item()  # most of the terms of alpha's gradient cancel
    for result, target, size in zip(results, expected, sizes, strict=True):
        # sums of some 10^4 numbers, and the roundings of the operands and the result
        torch.testing.assert_close(result.double(), target, rtol=0, atol=8 * torch.finfo(dtype).eps * size)


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="needs the compiler's options for x86-64")
@pytest.mark.parametrize(("target", "register"), [(("-mavx2", "-mfma"), 32), ((), 16)], ids=["AVX2", "SSE2"])
def test_cpp_is_right_with_shorter_vectors(
    target: tuple[str, ...], register: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "_FLAGS", (*(flag for flag in native._FLAGS if flag != "-march=native"), *target))
    monkeypatch.setattr(native, "_VECTOR_BYTES", register)
    native.library.cache_clear()
    for stride, layout in ((1, "channels_last"), (2, "contiguous")):
        assert_parity(Case(2, 24, 13, 11, kernel_size=7, stride=stride, layout=layout), "cpp")
    assert_parity(Case(2, 3, 4, 5, kernel_size=3, dtype=torch.float64), "cpp")
    native.library.cache_clear()


def golden_block(name: str, impl: str, conv_impl: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, ours, the authors') for the block's output and every gradient, built from the two operations alone."""
    data = np.load(GOLDEN / f"{name}.npz")
    config = json.loads(str(data["config"]))
    weights = {k[6:]: torch.from_numpy(data[k]).requires_grad_() for k in data if k.startswith("param/")}
    x = torch.from_numpy(data["x"]).requires_grad_()
    q, k, v = (F.conv2d(x, weights[f"conv{i}.weight"], weights[f"conv{i}.bias"]) for i in (1, 2, 3))
    position, fc, shift = (
        weights["conv_p.weight"].flatten(1),
        weights["fc.weight"].flatten(1),
        weights["dep_conv.weight"],
    )
    attended = local_attention(q, k, v, position, config["kernel_att"], config["stride"], impl)
    convolved = shift_conv(q, k, v, fc, shift, stride=config["stride"], impl=conv_impl)
    y = weights["rate1"] * attended + weights["rate2"] * convolved
    y.backward(torch.from_numpy(data["grad_y"]))
    yield "y", y.detach(), torch.from_numpy(data["y"])
    for key, weight in {"x": x, **weights}.items():
        stored = "grad_x" if key == "x" else f"grad/{key}"
        if key != "conv_p.bias":  # it cancels: the authors' gradient is rounding noise
            assert weight.grad is not None
            yield stored, weight.grad, torch.from_numpy(data[stored])


@pytest.mark.parametrize(
    ("impl", "conv_impl"),
    [
        ("reference", "reference"),
        ("dense", "dense"),
        ("tiled", "folded"),
        pytest.param("cpp", "cpp", marks=needs_compiler),
        ("auto", "auto"),
    ],
)
@pytest.mark.parametrize("name", ["block_a", "block_b"])
def test_every_implementation_reproduces_the_golden_blocks(name: str, impl: str, conv_impl: str) -> None:
    for key, ours, theirs in golden_block(name, impl, conv_impl):
        error = (ours - theirs).abs().max() / theirs.abs().max()
        assert error <= 1e-10, f"{key}: {error:.1e}"


def test_gradients_of_the_reference_pass_gradcheck() -> None:
    for stride, dilation in ((1, 1), (2, 2)):
        case = Case(1, 2, 5, 6, kernel_size=3, stride=stride, dilation=dilation, batch=1, dtype=torch.float64)
        leaves = [t.requires_grad_() for t in case.inputs()[:4]]

        def run(*tensors: Tensor, case: Case = case) -> Tensor:
            return local_attention(*tensors, case.kernel_size, case.stride, "reference", dilation=case.dilation)

        assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("impl", FAST)
def test_opcheck_passes(impl: str) -> None:
    case = Case(heads=2, head_dim=8, height=9, width=7, kernel_size=5, stride=2)
    leaves = [t.requires_grad_() for t in case.inputs()[:4]]
    torch.library.opcheck(torch.ops.acmix.local_attention.default, (*leaves, 5, 2, 1, impl))


def run_both_paths(q: Tensor, k: Tensor, v: Tensor, position: Tensor, fc: Tensor, shift: Tensor) -> Tensor:
    attended = local_attention(q, k, v, position, 5, 2)
    return attended + shift_conv(q, k, v, fc, shift, stride=2)


def both_paths_inputs() -> list[Tensor]:
    maps = Case(heads=2, head_dim=8, height=17, width=23, kernel_size=5).inputs()[:4]
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(s, generator=generator) for s in ((9, 6), (16, 9, 3, 3))]
    return [t.requires_grad_() for t in (*maps, *weights)]


def assert_same_results(run: object, inputs: list[Tensor]) -> None:
    assert callable(run)
    expected, result = run_both_paths(*inputs), run(*inputs)
    torch.testing.assert_close(result, expected)
    grads = (torch.autograd.grad(out.square().sum(), inputs) for out in (expected, result))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5 * a.abs().max().item())


def test_torch_compile_sees_no_graph_break() -> None:
    assert_same_results(torch.compile(run_both_paths, fullgraph=True, backend="aot_eager"), both_paths_inputs())


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    assert_same_results(lambda *a: checkpoint(run_both_paths, *a, use_reentrant=False), both_paths_inputs())


def test_torch_export_keeps_one_node_per_operation() -> None:
    class Paths(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            return run_both_paths(*tensors)

    inputs = tuple(t.detach() for t in both_paths_inputs())
    program = torch.export.export(Paths(), inputs)
    nodes = [str(node.target) for node in program.graph.nodes if "acmix" in str(node.target)]
    assert nodes == ["acmix.local_attention.default", "acmix.grouped_conv.default"]
    torch.testing.assert_close(program.module()(*inputs), run_both_paths(*inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("impl", ["reference", *FAST])
def test_autocast_casts_the_maps_and_gives_float32_gradients(impl: str, dtype: torch.dtype) -> None:
    case = Case(heads=2, head_dim=8, height=9, width=8, kernel_size=5)
    *leaves, grad_out = case.inputs()
    leaves = [t.requires_grad_() for t in leaves]
    with torch.autocast("cpu", dtype):
        out = local_attention(*leaves, case.kernel_size, impl=impl)
    assert out.dtype == dtype
    exact = local_attention(
        *(t.detach().to(dtype).double() for t in leaves[:3]), leaves[3].double(), 5, impl="reference"
    )
    # one rounding of the output, and of weights and products before it
    assert (out.double() - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max()
    grads = torch.autograd.grad(out, leaves, grad_out.to(dtype))
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads)


def test_a_broadcast_gradient_is_read() -> None:
    case = Case(heads=2, head_dim=8, height=9, width=8, kernel_size=5)
    *inputs, grad_out = case.inputs()
    broadcast = torch.ones(()).expand(grad_out.shape)
    for impl in ("dense", "tiled", *(["cpp"] if cxx_compiler() else [])):
        results = (case.run([*inputs, grad], impl) for grad in (broadcast, broadcast.contiguous()))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_no_buffer_grows_with_the_window_and_the_channels_together() -> None:
    """Forward and backward of the reference's rival stay below the K² copies of k that an unfold would make."""
    case = Case(heads=4, head_dim=16, height=28, width=28, kernel_size=7, batch=2)
    inputs = case.inputs()
    copies = case.kernel_size**2 * inputs[1].numel() * 4
    with torch.profiler.profile(profile_memory=True) as profile:
        case.run(inputs, "tiled")
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest < copies / 4


BAD_CALLS = {
    "one shape": ({"k": torch.zeros(1, 8, 9, 10)}, r"q, k and v must be maps of one shape.*\(1, 8, 9, 10\)"),
    "one dtype": ({"v": torch.zeros(1, 8, 9, 9).double()}, r"one floating-point dtype.*torch\.float64"),
    "weight": (
        {"position_weight": torch.zeros(4, 3)},
        r"position_weight must have shape \(head_dim, 2\), got \(4, 3\)",
    ),
    "no width": ({"position_weight": torch.zeros(0, 2)}, r"must have shape \(head_dim, 2\), got \(0, 2\)"),
    "heads": ({"position_weight": torch.zeros(3, 2)}, r"8 channels do not divide into heads of width 3"),
    "even": ({"kernel_size": 4}, r"kernel_size 4 has no centre pixel: choose an odd size, such as 5"),
    "empty": ({name: torch.zeros(1, 8, 0, 9) for name in ("q", "k", "v")}, r"a map of 0×9 pixels is empty"),
    "stride": ({"stride": 0}, r"stride 0 and dilation 1"),
    "one device": ({"v": torch.zeros(1, 8, 9, 9, device="meta")}, r"tensors on cpu and on meta: move"),
    "a weight elsewhere": ({"position_weight": torch.zeros(4, 2, device="meta")}, r"tensors on cpu and on meta: move"),
    "impl": ({"impl": "fast"}, r"unknown impl 'fast': choose auto or one of triton, dense, cpp, tiled, reference"),
    "triton": (
        {"impl": "triton"},
        r"impl 'triton' cannot run local_attention for 1×8×9×9 float32 on cpu.*impl='auto'",
    ),
}


@pytest.mark.parametrize(("changes", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_a_call_that_cannot_work_says_why_and_what_to_do(changes: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {name: torch.zeros(1, 8, 9, 9) for name in ("q", "k", "v")}
    arguments |= {"position_weight": torch.zeros(4, 2), "kernel_size": 7}
    with pytest.raises(ValueError, match=message):
        local_attention(**(arguments | changes))  # type: ignore[arg-type]
