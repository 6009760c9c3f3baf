"""The Triton kernels of the convolution path, alone and with attention, against plain PyTorch in float64.

As those of test_triton_parity.py, the checks run in Triton's interpreter, in a process of its own, where pytest
collects the functions named check_*; with a GPU `pytest -m gpu` runs compiled kernels over a larger grid.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from acmix.layers import ACmix
from acmix.ops.implementations import Window
from acmix.ops.local_mix import op as mix
from acmix.ops.local_mix import triton as mix_kernels
from acmix.ops.shift_conv.op import convolve_plain
from acmix.ops.shift_conv.triton import kernels
from acmix.testing import error_budget, fresh_memory_is_nan, relative_error

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """maps: numbers of heads of q, k and v. attended: window of the attention beside it."""

    heads: int
    head_dim: int
    height: int
    width: int
    kernel_size: int = 3
    stride: int = 1
    dilation: int = 1
    attended: int = 3
    maps: tuple[int, int, int] | None = None
    batch: int = 2
    dtype: torch.dtype = torch.float32
    sliced: bool = True

    @property
    def window(self) -> Window:
        return Window(self.kernel_size, self.stride, self.dilation)

    def draw(self, device: str) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v side by side (B, H, W, C), the folded weight and the gradient of the output."""
        generator = torch.Generator().manual_seed(0)
        channels = self.heads * self.head_dim
        count = sum(self.maps or (3 * self.heads,))
        out = self.window.out_size(self.height, self.width)
        sizes = (
            (self.batch, self.height, self.width, count * self.head_dim),
            (channels, count, self.kernel_size, self.kernel_size),
            (self.batch, channels, *out),
        )
        maps, weight, grad = (torch.randn(size, generator=generator).to(device) for size in sizes)
        return maps.to(self.dtype), weight, grad.to(self.dtype)

    def split(self, maps: Tensor) -> tuple[Tensor, ...]:
        """q, k and v as the path gets them: slices of one map, or maps of their own."""
        widths = [count * self.head_dim for count in self.maps or (self.heads,) * 3]
        parts = maps.permute(0, 3, 1, 2).split(widths, 1)
        return parts if self.sliced else tuple(part.contiguous() for part in parts)


def assert_close(
    case: Case, names: tuple[str, ...], results: list[Tensor], plain: list[Tensor], exact: list[Tensor]
) -> None:
    """Within the error budget, whose sums are over all positions: the longest, those of the weights' gradients."""
    positions = case.batch * case.height * case.width
    for name, result, naive, target in zip(names, results, plain, exact, strict=True):
        assert result.shape == target.shape
        assert result.dtype == naive.dtype
        error, allowed = (
            relative_error(result, target),
            error_budget(relative_error(naive, target), case.dtype, positions),
        )
        assert error <= allowed, f"{name} of {case}: relative error {error:.2e}, allowed {allowed:.2e}"


def convolution_results(case: Case, device: str) -> list[Tensor]:
    maps, weight, grad = case.draw(device)
    q, k, v = case.split(maps)
    with fresh_memory_is_nan(warn_only=False):
        out = kernels.forward(q, k, v, weight, case.window)
        return [out, *kernels.backward(grad, q, k, v, weight, case.window)]


def assert_convolution_parity(case: Case, device: str) -> None:
    maps, weight, grad = case.draw(device)

    def plain(dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in (*case.split(maps), weight)]
        q, k, v, w = leaves
        out = convolve_plain(q, k, v, w, case.stride, case.dilation)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]

    naive = plain(case.dtype)
    naive[-1] = naive[-1].float()  # ours is summed and kept in float32
    names = ("out", "dq", "dk", "dv", "dweight")
    assert_close(case, names, convolution_results(case, device), naive, plain(torch.float64))


def assert_mix_parity(case: Case, device: str) -> None:
    maps, weight, grad = case.draw(device)
    qkv = maps.unflatten(3, (3, -1))
    generator = torch.Generator().manual_seed(1)
    position, alpha = torch.randn(case.head_dim, 2, generator=generator).to(device), torch.tensor(0.6, device=device)
    options = (case.attended, case.stride, case.dilation)

    def joined(out: Tensor, dqkv: Tensor, dposition: Tensor, dweight: Tensor, dalpha: Tensor) -> list[Tensor]:
        """That of alpha beside others: a single scalar is a sum in which almost all cancels."""
        return [out.detach(), dqkv, torch.cat([dposition.flatten(), dalpha[None]]), dweight]

    def plain(dtype: torch.dtype) -> list[Tensor]:
        leaves = [qkv.to(dtype).requires_grad_(), *(t.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
                                                     for t in (position, weight, alpha))]  # fmt: skip
        out = mix._plain(*leaves, *options)
        return joined(out, *torch.autograd.grad(out, leaves, grad.to(dtype)))

    windows = mix._windows(qkv, weight, *options)
    with fresh_memory_is_nan(warn_only=False):
        out, *kept = mix_kernels.forward(qkv, position, weight, alpha, *windows, True)
        results = joined(out, *mix_kernels.backward(grad, qkv, position, weight, alpha, *kept, *windows))
    assert_close(case, ("out", "dqkv", "dP and dalpha", "dweight"), results, plain(case.dtype), plain(torch.float64))


INTERPRETED = (
    Case(heads=4, head_dim=16, height=5, width=7),
    Case(heads=4, head_dim=16, height=6, width=7, stride=2, sliced=False),
    Case(heads=3, head_dim=8, height=4, width=5, dtype=torch.float16),
    Case(heads=1, head_dim=8, height=5, width=5, kernel_size=5, dilation=2),
    Case(heads=6, head_dim=5, height=4, width=4, stride=3),
    Case(heads=2, head_dim=3, height=3, width=3, kernel_size=1),
    Case(heads=4, head_dim=20, height=5, width=4, maps=(4, 2, 2)),
)
MIXED = (
    Case(heads=4, head_dim=16, height=6, width=7, attended=5),
    Case(heads=2, head_dim=8, height=7, width=6, stride=2),
    Case(heads=3, head_dim=8, height=6, width=5, dilation=2),
    Case(heads=4, head_dim=8, height=2, width=3, attended=7, dtype=torch.float16),
)


@pytest.mark.parametrize("case", INTERPRETED, ids=str)
def check_convolution_matches_plain_pytorch(case: Case) -> None:
    assert_convolution_parity(case, "cpu")


@pytest.mark.parametrize("case", MIXED, ids=str)
def check_both_paths_match_plain_pytorch(case: Case) -> None:
    assert_mix_parity(case, "cpu")


def check_rows_and_columns_beyond_32_bits_are_reached() -> None:
    """One image in a storage so long that the last of them start beyond element 2**31; untouched pages cost nothing.

    Its batch is broadcast, as of an expanded map: only the rows and the columns are far apart.
    """
    case = Case(heads=2, head_dim=4, height=4, width=4, kernel_size=3, batch=1, dtype=torch.float16)
    maps, weight, grad = case.draw("cpu")
    near = convolution_results(case, "cpu")
    storage = torch.empty(3 * 2**30 + 2**20, dtype=case.dtype)
    for row, column in ((2**30, maps.shape[3]), (maps.shape[3], 2**30)):
        far = storage.as_strided(maps.shape, (0, row, column, 1)).copy_(maps)
        dmaps = storage[2**16 :].as_strided(maps.shape, (0, row, column, 1))
        planar = kernels.as_maps(grad, case.head_dim)
        out = kernels.forward(*case.split(far), weight, case.window)
        dweight = kernels.backward_weight(far.permute(0, 3, 1, 2), planar, weight, case.window)
        kernels.backward_maps_into([dmaps.permute(0, 3, 1, 2)], planar, weight, case.window)
        assert torch.equal(out, near[0])
        assert torch.equal(dmaps.permute(0, 3, 1, 2), torch.cat(near[1:4], 1))
        assert torch.equal(dweight, near[4])


def check_a_block_runs_both_paths_in_one_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: `auto` takes Triton for both, and the block what a block without kernels computes."""
    monkeypatch.setattr(mix, "_impl", lambda device: "triton")
    torch.manual_seed(0)
    block = ACmix(16, 16, heads=2, kernel_att=3)
    plain = ACmix(16, 16, heads=2, kernel_att=3, impl="reference")
    plain.load_state_dict(block.state_dict())
    x = torch.randn(2, 16, 5, 6)
    results = []
    for module in (block, plain):
        leaf = x.clone().requires_grad_()
        out = module(leaf)
        grads = torch.autograd.grad(out.square().sum(), [leaf, *module.parameters()])
        results.append([out.detach(), *grads])
    assert results[0][0].is_contiguous()
    assert "_Eager" in type(block(x.to(memory_format=torch.channels_last)).grad_fn).__name__
    for mine, theirs in zip(*results, strict=True):
        assert relative_error(mine, theirs) < 1e-5


def test_kernels_pass_every_check_in_the_interpreter(pass_in_interpreter: Callable[[str, int], None]) -> None:
    pass_in_interpreter(__file__, len(INTERPRETED) + len(MIXED) + 2)


def gpu_cases() -> Iterator[Case]:
    """Head widths, numbers of heads, kernels, strides, dilations and dtypes, each crossed with what it meets."""
    for head_dim, heads in itertools.product((4, 12, 32), (1, 2, 3, 4, 6, 8)):
        yield Case(heads, head_dim, height=13, width=10, dtype=torch.bfloat16)
    for kernel_size, stride, dilation in itertools.product((1, 3, 5), (1, 2, 3), (1, 2)):
        yield Case(4, 16, 17, 23, kernel_size, stride, dilation)
    for head_dim, side in ((16, 56), (32, 28), (64, 14), (128, 7)):
        yield from (Case(4, head_dim, side, side, attended=7, dtype=dtype) for dtype in HALF)


@pytest.mark.gpu
@pytest.mark.parametrize("case", gpu_cases(), ids=str)
def test_the_compiled_convolution_matches_plain_pytorch(case: Case) -> None:
    assert_convolution_parity(case, "cuda")
    assert_convolution_parity(replace(case, sliced=False), "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("case", gpu_cases(), ids=str)
def test_both_compiled_paths_match_plain_pytorch(case: Case) -> None:
    assert_mix_parity(case, "cuda")


@pytest.mark.gpu
def test_two_runs_on_a_gpu_give_the_same_bits() -> None:
    case = Case(4, 16, 56, 56, batch=16, dtype=torch.bfloat16)
    first, second = (convolution_results(case, "cuda") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
