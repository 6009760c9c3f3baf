"""Every implementation of the convolution path against the reference in float64."""

import itertools
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from acmix.ops import shift_conv
from acmix.ops.native import cxx_compiler
from acmix.ops.shift_conv import folded
from acmix.testing import ShiftConvCase as Case
from acmix.testing import assert_parity

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
)


def wide_cases() -> Iterator[Case]:
    for heads, head_dim, kernel_size in itertools.product((1, 2, 3, 4, 6, 8, 12), (1, 4, 7), (1, 3, 5, 7)):
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
    "impl": (
        {"impl": "fast"},
        r"unknown impl 'fast': choose auto or one of unfolded, cpp, folded, dense, reference",
    ),
}


@pytest.mark.parametrize(("changes", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_a_call_that_cannot_work_says_why_and_what_to_do(changes: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {name: torch.zeros(1, 8, 9, 9) for name in ("q", "k", "v")}
    arguments |= {"fc_weight": torch.zeros(9, 6), "shift_weight": torch.zeros(8, 9, 3, 3)}
    with pytest.raises(ValueError, match=message):
        shift_conv(**(arguments | changes))  # type: ignore[arg-type]
