"""Every implementation of the convolution path against the reference in float64."""

import itertools
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from acmix.ops import grouped_conv, shift_conv
from acmix.ops.implementations import Window
from acmix.ops.native import cxx_compiler
from acmix.ops.shift_conv import cpp, folded
from acmix.testing import ShiftConvCase as Case
from acmix.testing import assert_parity, error_budget, relative_error

needs_compiler = pytest.mark.skipif(cxx_compiler() is None, reason="needs a C++ compiler")
FAST = ("folded", "unfolded", "dense", pytest.param("cpp", marks=needs_compiler))

CASES = (
    Case(heads=4, head_dim=6, height=7, width=9),
    Case(heads=4, head_dim=5, height=14, width=20, stride=2, layout="sliced"),
    Case(heads=3, head_dim=4, height=9, width=8, layout="channels_last"),
    Case(heads=8, head_dim=2, height=5, width=6, stride=2, dilation=2),
    Case(heads=1, head_dim=8, height=11, width=7, kernel_size=5, dilation=3, batch=1),
    Case(heads=4, head_dim=3, height=2, width=1, stride=3),
    Case(heads=2, head_dim=4, height=6, width=5, kernel_size=1),
    Case(heads=4, head_dim=8, height=8, width=8, dtype=torch.bfloat16),
    Case(heads=4, head_dim=8, height=8, width=8, dtype=torch.float64),
    Case(heads=2, head_dim=8, height=5, width=6, dtype=torch.float16),
    Case(heads=24, head_dim=2, height=5, width=4, batch=1, layout="sliced"),
)


def wide_cases() -> Iterator[Case]:
    for heads, head_dim, kernel_size in itertools.product((1, 2, 3, 4, 6, 8, 12), (1, 4, 7, 16, 24), (1, 3, 5, 7)):
        yield Case(heads, head_dim, 12, 19, kernel_size, layout="sliced")
    for stride, dilation, width in itertools.product((1, 2, 3, 4), (1, 2, 3), (1, 2, 7, 16, 33)):
        yield Case(4, 4, 13, width, 3, stride, dilation, layout="channels_last")


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients_match_the_reference(case: Case, impl: str) -> None:
    assert_parity(case, impl)


@pytest.mark.slow
@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("case", list(wide_cases()), ids=str)
def test_outputs_and_gradients_match_the_reference_on_a_wide_grid(case: Case, impl: str) -> None:
    assert_parity(case, impl)


def test_results_do_not_depend_on_how_images_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folded, "CHUNK_BYTES", 1)
    assert_parity(Case(heads=4, head_dim=6, height=7, width=9, batch=3, layout="sliced"), "folded")


def nan_map(batch: int, channels: int, height: int, width: int, layout: str, dtype: torch.dtype) -> torch.Tensor:
    """NaN everywhere, also between the channels of a slice: contiguous, a channels_last slice, or columns outermost."""
    if layout == "slice":
        together = torch.full((batch, height, width, 3 * channels), torch.nan, dtype=dtype)
        return together.permute(0, 3, 1, 2)[:, channels : 2 * channels]
    if layout == "transposed":
        return torch.full((batch, channels, width, height), torch.nan, dtype=dtype).mT
    return torch.full((batch, channels, height, width), torch.nan, dtype=dtype)


STRIDED = (
    (3, 20, 9, 21, Window(3, 1, 1), torch.float32),  # a whole vector of channels and a part of one
    (4, 16, 13, 8, Window(3, 2, 1), torch.float32),
    (6, 4, 7, 18, Window(3, 1, 2), torch.float32),  # several pixels in a vector
    (12, 8, 5, 5, Window(5, 3, 1), torch.float64),
    (2, 17, 6, 19, Window(3, 2, 1), torch.bfloat16),
    (4, 2, 18, 3, Window(1, 1, 1), torch.bfloat16),
)


@needs_compiler
@pytest.mark.parametrize(("heads", "head_dim", "height", "width", "window", "dtype"), STRIDED)
@pytest.mark.parametrize(
    ("inside", "outside"), [("slice", "slice"), ("slice", "contiguous"), ("contiguous", "slice"), ("transposed",) * 2]
)
def test_cpp_reads_and_writes_maps_of_any_strides(
    heads: int, head_dim: int, height: int, width: int, window: Window, dtype: torch.dtype, inside: str, outside: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = (height, width), window.out_size(height, width)
    inputs = [nan_map(2, heads * head_dim, *sizes[0], inside, dtype) for _ in range(3)]
    grads = [nan_map(2, heads * head_dim, *sizes[0], inside, dtype) for _ in range(3)]
    out, grad_out = (nan_map(2, heads * head_dim, *sizes[1], outside, dtype) for _ in range(2))
    for m in (*inputs, grad_out):
        m.copy_(torch.randn(m.shape, generator=generator))
    k = window.kernel_size
    weight = torch.randn(heads * head_dim, 3 * heads, k, k, generator=generator)
    cpp.forward_into(out, inputs, weight, window)
    dweight = cpp.backward_into(grads, grad_out, inputs, weight, window)

    def plain(wide: torch.dtype) -> list[torch.Tensor]:
        leaves = [m.to(wide).requires_grad_() for m in (*inputs, weight)]
        maps = torch.stack([m.unflatten(1, (heads, -1)) for m in leaves[:3]], 1).permute(0, 3, 1, 2, 4, 5).flatten(1, 3)
        result = F.conv2d(maps, leaves[3], None, window.stride, window.reach, window.dilation, head_dim)
        return [result.detach(), *torch.autograd.grad(result, leaves, grad_out.to(wide))]

    positions = 2 * heads * height * width
    naive = plain(torch.float32)  # the sums are in float32 or better, whatever the maps are
    for i, (mine, theirs, exact) in enumerate(zip([out, *grads, dweight], naive, plain(torch.float64), strict=True)):
        stored = torch.promote_types(dtype, torch.float32) if i == 4 else dtype
        units = 1 if dtype != torch.float64 else torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
        allowed = error_budget(units * relative_error(theirs, exact), stored, positions if i == 4 else 0)
        assert relative_error(mine, exact) <= allowed, i


@needs_compiler
def test_results_of_cpp_are_the_same_bits_for_any_number_of_threads() -> None:
    threads = torch.get_num_threads()
    *tensors, grad_out = Case(heads=4, head_dim=18, height=30, width=11, batch=3, layout="sliced").inputs()
    q, k, v = tensors[:3]
    weight = torch.randn(72, 12, 3, 3, generator=torch.Generator().manual_seed(0))
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            out = cpp.forward(q, k, v, weight, Window(3, 1, 1))
            results.append([out, *cpp.backward(grad_out, q, k, v, weight, Window(3, 1, 1))])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@needs_compiler
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_results_of_cpp_have_the_layout_of_q(layout: str) -> None:
    *tensors, grad_out = Case(heads=2, head_dim=4, height=6, width=5, layout=layout).inputs()
    leaves = [t.requires_grad_() for t in tensors[:3]]
    out = shift_conv(*leaves, *tensors[3:5], impl="cpp")
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    for m in (out, *torch.autograd.grad(out, leaves, grad_out)):
        assert m.is_contiguous(memory_format=memory_format)


def test_one_hot_kernels_shift_and_sum() -> None:
    """With the paper's initialisation, the convolution path is shift and sum of the maps that the fc layer gives."""
    case = Case(heads=2, head_dim=3, height=6, width=7, dtype=torch.float64)
    q, k, v, fc = case.inputs()[:4]
    one_hot = torch.eye(9, dtype=torch.float64).view(9, 3, 3).repeat(6, 1, 1, 1)
    maps = torch.cat([m.unflatten(1, (2, 3)) for m in (q, k, v)], 1)
    mixed = F.pad(torch.einsum("im,bmdyx->bidyx", fc, maps), (1, 1, 1, 1))
    shifted = sum(mixed[:, i, :, i // 3 : i // 3 + 6, i % 3 : i % 3 + 7] for i in range(9))
    expected = torch.stack([shifted, shifted], 2).flatten(1, 2)  # channels (head_dim, head)
    for impl in ("reference", "folded", "dense"):
        torch.testing.assert_close(shift_conv(q, k, v, fc, one_hot, impl=impl), expected)


def test_gradients_of_the_reference_pass_gradcheck() -> None:
    case = Case(heads=2, head_dim=2, height=4, width=5, stride=2, batch=1, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in case.inputs()[:7]]

    def run(*t: torch.Tensor) -> torch.Tensor:
        return shift_conv(*t[:5], fc_bias=t[5], bias=t[6], stride=2, impl="reference")

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("impl", ["folded", pytest.param("cpp", marks=needs_compiler)])
def test_opcheck_passes(impl: str) -> None:
    q, k, v = (t.requires_grad_() for t in Case(heads=2, head_dim=4, height=7, width=5).inputs()[:3])
    weight = torch.randn(8, 6, 3, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    torch.library.opcheck(torch.ops.acmix.grouped_conv.default, (q, k, v, weight, 2, 1, impl))


@pytest.mark.parametrize("impl", ["reference", *FAST])
def test_autocast_casts_the_maps_and_gives_float32_gradients(impl: str) -> None:
    case = Case(heads=4, head_dim=4, height=7, width=6)
    *tensors, grad_out = case.inputs()
    leaves = [t.requires_grad_() for t in tensors]
    with torch.autocast("cpu", torch.bfloat16):
        out = shift_conv(*leaves[:5], fc_bias=leaves[5], bias=leaves[6], impl=impl)
    assert out.dtype == torch.bfloat16
    grads = torch.autograd.grad(out, leaves, grad_out.bfloat16())
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads)


@pytest.mark.parametrize("impl", ["auto", "reference", *FAST])
def test_an_empty_batch_gives_an_empty_map_and_gradients_of_zero(impl: str) -> None:
    out, *grads = (case := Case(heads=2, head_dim=4, height=7, width=6, stride=2, batch=0)).run(case.inputs(), impl)
    assert out.shape == (0, 8, 4, 3)
    assert all((grad == 0).all() for grad in grads)


def test_the_gradient_of_the_bias_is_exact_where_its_sum_cancels() -> None:
    """It is a sum over all channels and positions, of maps here whose mean is not zero."""
    case = Case(heads=4, head_dim=32, height=14, width=14, batch=8)
    inputs = [t + 1 for t in case.inputs()]
    exact = case.run([t.double() for t in inputs], "reference")[6]
    ours, plain = (relative_error(case.run(inputs, impl)[6], exact) for impl in ("auto", "reference"))
    assert ours <= plain


@pytest.mark.parametrize("impl", ["auto", "reference", *FAST])
def test_the_gradients_of_a_single_bf16_pixel_are_right_at_any_stride(impl: str) -> None:
    for _ in range(5):  # oneDNN leaves memory unwritten, which need not show
        junk = [torch.full((size,), 3e37) for size in (576, 5000, 20000)]
        del junk
        assert_parity(Case(heads=9, head_dim=8, height=1, width=1, stride=2, dtype=torch.bfloat16), impl)


BAD_CALLS = {
    "one shape": ({"k": torch.zeros(1, 8, 9, 10)}, r"q, k and v must be maps of one shape"),
    "even": (
        {"shift_weight": torch.zeros(8, 4, 2, 2)},
        r"kernel_size 2 has no centre pixel: choose an odd size, such as 3",
    ),
    "shift": (
        {"shift_weight": torch.zeros(8, 9, 5, 5)},
        r"shift_weight must be .*\(8, 25, 5, 5\).*got \(8, 9, 5, 5\)",
    ),
    "fc": ({"fc_weight": torch.zeros(9, 7)}, r"fc_weight must be .*\(9, 3 \* heads\), got \(9, 7\)"),
    "heads": ({"fc_weight": torch.zeros(9, 9)}, r"8 channels do not divide into 3 heads"),
    "fc bias": ({"fc_bias": torch.zeros(8)}, r"fc_bias must be \(k²,\) = \(9,\), got \(8,\)"),
    "bias": ({"bias": torch.zeros(9)}, r"bias must be \(channels,\) = \(8,\), got \(9,\)"),
    "stride": ({"stride": 0}, r"stride 0 and dilation 1"),
    "one dtype": ({"v": torch.zeros(1, 8, 9, 9).double()}, r"one floating-point dtype.*torch\.float64"),
    "empty": ({name: torch.zeros(1, 8, 5, 0) for name in ("q", "k", "v")}, r"a map of 5×0 pixels is empty"),
    "no channels": (
        {"shift_weight": torch.zeros(0, 9, 3, 3)} | {name: torch.zeros(1, 0, 9, 9) for name in ("q", "k", "v")},
        r"0 channels do not divide into 2 heads",
    ),
    "one device": ({"k": torch.zeros(1, 8, 9, 9, device="meta")}, r"tensors on cpu and on meta: move"),
    "weights elsewhere": ({"fc_weight": torch.zeros(9, 6, device="meta")}, r"tensors on cpu and on meta: move"),
    "impl": (
        {"impl": "fast"},
        r"unknown impl 'fast': choose auto or one of triton, unfolded, cpp, dense, folded, reference",
    ),
}


@pytest.mark.parametrize(("changes", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_a_call_that_cannot_work_says_why_and_what_to_do(changes: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {name: torch.zeros(1, 8, 9, 9) for name in ("q", "k", "v")}
    arguments |= {"fc_weight": torch.zeros(9, 6), "shift_weight": torch.zeros(8, 9, 3, 3)}
    with pytest.raises(ValueError, match=message):
        shift_conv(**(arguments | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [(8, 6, 1, 3), (8, 6, 3, 1), (8, 6, 3), (8, 0, 3, 3), (8, 9, 3, 3), (4, 6, 3, 3)])
def test_a_folded_weight_that_does_not_fit_the_maps_is_refused(size: tuple[int, ...]) -> None:
    maps = torch.zeros(1, 8, 9, 9)
    with pytest.raises(ValueError, match=r"weight must be \(channels, 3 \* heads, k, k\), got .* for 8 channels"):
        grouped_conv(maps, maps, maps, torch.zeros(size))


@pytest.mark.parametrize("impl", ["auto", "unfolded", "folded"])
@pytest.mark.parametrize("widths", [(1, 1, 4), (3, 0, 0), (0, 2, 1)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_maps_of_different_counts_give_what_the_reference_gives(impl: str, widths: tuple, channels_last: bool) -> None:
    generator, d, heads = torch.Generator().manual_seed(0), 4, 2
    layout = torch.channels_last if channels_last else torch.contiguous_format
    maps = torch.randn(2, sum(widths) * d, 6, 5, generator=generator, dtype=torch.float64).to(memory_format=layout)
    weights = [torch.randn(s, generator=generator).double() for s in ((9, sum(widths)), (heads * d, 9, 3, 3))]
    leaves = [t.requires_grad_() for t in (maps, *weights)]
    results = []
    for name in (impl, "reference"):
        out = shift_conv(*leaves[0].split([d * n for n in widths], 1), *leaves[1:], stride=2, impl=name)
        assert out.shape == (2, heads * d, 3, 3)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    torch.testing.assert_close(*results)


def test_maps_of_different_counts_are_refused_where_they_do_not_fit() -> None:
    q, v = torch.zeros(1, 4, 5, 5), torch.zeros(1, 16, 5, 5)
    with pytest.raises(ValueError, match="4, 4 and 16 channels and an output of 8 do not divide into maps"):
        shift_conv(q, q, v, torch.zeros(9, 5), torch.zeros(8, 9, 3, 3))
    with pytest.raises(ValueError, match="as many heads each only"):
        shift_conv(q, q, v, torch.zeros(9, 6), torch.zeros(8, 9, 3, 3), impl="dense")


@pytest.mark.parametrize("impl", ["cpp", "folded"])
@pytest.mark.parametrize("heads", [1, 2])
def test_a_graph_knows_the_strides_of_the_gradients(impl: str, heads: int) -> None:
    grad, q, k, v = torch.randn(4, 2, 8, 5, 5).unbind()
    weight = torch.randn(3 * heads, 3, 3, 8).permute(3, 0, 1, 2)
    arguments = (grad, q, k, v, weight, 1, 1, impl)
    torch.library.opcheck(torch.ops.acmix.grouped_conv_backward.default, arguments, test_utils="test_faketensor")
