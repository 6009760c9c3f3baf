"""Parity checks: problems for the operations and the paths, inputs in every layout, and the one error budget.

The budget is derived, not tuned: against the exact result (the reference in float64), an implementation may err at most
twice as much as plain PyTorch (the reference in the same dtype), plus what the order of its own sums may cost: a
rounding of the result and one of what is folded beforehand (weights, positions); for the gradient of a weight, a sum
over the n positions of all heads, also the roundings of n partial sums of random terms, sqrt(n / 8) units of the
dtype that sums are kept in, float32 or better. For float64 itself, plain PyTorch's error is that in float32, scaled by
the units of rounding.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call

from acmix.layers.attention import AttentionPath
from acmix.layers.path import Path
from acmix.ops import local_attention, shift_conv

LAYOUTS = ("contiguous", "channels_last", "sliced")


@dataclass(frozen=True)
class AttentionCase:
    """One problem for `local_attention`."""

    heads: int
    head_dim: int
    height: int
    width: int
    kernel_size: int
    stride: int = 1
    dilation: int = 1
    batch: int = 2
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"

    def __str__(self) -> str:
        sizes = f"b{self.batch}-n{self.heads}-d{self.head_dim}-{self.height}x{self.width}-k{self.kernel_size}"
        return f"{sizes}-s{self.stride}-r{self.dilation}-{str(self.dtype).removeprefix('torch.')}-{self.layout}"

    def inputs(self) -> list[Tensor]:
        """q, k, v, the position weight and the gradient of the output, unit normal."""
        maps = draw_maps(self.batch, self.heads * self.head_dim, self.height, self.width, self.dtype, self.layout)
        return [*maps, _draw(1, self.head_dim, 2).to(self.dtype), self._grad_out()]

    def _grad_out(self) -> Tensor:
        size = (-(-self.height // self.stride), -(-self.width // self.stride))
        return _draw(2, self.batch, self.heads * self.head_dim, *size).to(self.dtype)

    def run(self, inputs: Sequence[Tensor], impl: str) -> list[Tensor]:
        """Output and the gradients of q, k, v and the position weight."""
        *tensors, grad_out = inputs
        leaves = [t.detach().requires_grad_() for t in tensors]
        q, k, v, weight = leaves
        out = local_attention(q, k, v, weight, self.kernel_size, self.stride, impl, dilation=self.dilation)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]


@dataclass(frozen=True)
class ShiftConvCase:
    """One problem for `shift_conv`, with both biases."""

    heads: int
    head_dim: int
    height: int
    width: int
    kernel_size: int = 3
    stride: int = 1
    dilation: int = 1
    batch: int = 2
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"

    def __str__(self) -> str:
        sizes = f"b{self.batch}-n{self.heads}-d{self.head_dim}-{self.height}x{self.width}-k{self.kernel_size}"
        return f"{sizes}-s{self.stride}-r{self.dilation}-{str(self.dtype).removeprefix('torch.')}-{self.layout}"

    def inputs(self) -> list[Tensor]:
        """q, k, v, both weights, both biases and the gradient of the output, unit normal."""
        channels, taps = self.heads * self.head_dim, self.kernel_size**2
        maps = draw_maps(self.batch, channels, self.height, self.width, self.dtype, self.layout)
        weights = [
            _draw(3, taps, 3 * self.heads),
            _draw(4, channels, taps, self.kernel_size, self.kernel_size),
            _draw(5, taps),
            _draw(6, channels),
            _draw(7, self.batch, channels, -(-self.height // self.stride), -(-self.width // self.stride)),
        ]
        return [*maps, *(w.to(self.dtype) for w in weights)]

    def run(self, inputs: Sequence[Tensor], impl: str) -> list[Tensor]:
        """Output and the gradients of q, k, v, both weights and both biases."""
        *tensors, grad_out = inputs
        leaves = [t.detach().requires_grad_() for t in tensors]
        q, k, v, fc, shift, fc_bias, bias = leaves
        out = shift_conv(
            q, k, v, fc, shift, fc_bias=fc_bias, bias=bias, stride=self.stride, dilation=self.dilation, impl=impl
        )
        return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]


@dataclass(frozen=True, eq=False)
class PathCase:
    """One problem for a path: maps of one size."""

    path: Path
    height: int
    width: int
    batch: int = 2
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"

    @property
    def heads(self) -> int:
        return self.path.heads

    def __str__(self) -> str:
        return f"{self.path} on {self.height}×{self.width} {self.layout} maps, {self.dtype}"

    def inputs(self) -> list[Tensor]:
        """q, k, v, the path's parameters and the gradient of the output.

        The parameters are moved by random numbers, so that one that starts at zero has an effect.
        """
        path = self.path
        counts = path.maps if isinstance(path, AttentionPath) else (path.heads,) * 3
        widths = [path.head_dim * count for count in counts]
        maps = draw_maps(self.batch, widths, self.height, self.width, self.dtype, self.layout)
        weights = [
            (p.detach().cpu() + 0.1 * _draw(1 + i, *p.shape)).to(self.dtype)
            for i, p in enumerate(self.path.parameters())
        ]
        with torch.no_grad():
            out = self._call([*maps, *weights], "reference")
        return [*maps, *weights, _draw(0, *out.shape).to(self.dtype)]

    def run(self, inputs: Sequence[Tensor], impl: str) -> list[Tensor]:
        """Output and the gradients of q, k, v and every parameter."""
        *tensors, grad_out = inputs
        leaves = [t.detach().requires_grad_() for t in tensors]
        out = self._call(leaves, impl)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]

    def _call(self, tensors: Sequence[Tensor], impl: str) -> Tensor:
        q, k, v, *weights = tensors
        path = copy.deepcopy(self.path).to("cpu", q.dtype).eval()
        path.impl = impl
        names = (name for name, _ in path.named_parameters())
        out: Tensor = functional_call(path, dict(zip(names, weights, strict=True)), (q, k, v))
        return out


def _draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def draw_maps(
    batch: int, channels: int | Sequence[int], height: int, width: int, dtype: torch.dtype, layout: str
) -> list[Tensor]:
    """q, k and v of so many channels each, unit normal: contiguous, channels_last, or slices of one map as a projection
    gives them.

    Raises:
        ValueError: for an unknown layout.
    """
    widths = [channels] * 3 if isinstance(channels, int) else list(channels)
    together = _draw(0, batch, sum(widths), height, width).to(dtype)
    if layout == "sliced":
        return list(together.split(widths, 1))
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}: choose one of {', '.join(LAYOUTS)}")
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    return [m.contiguous(memory_format=memory_format) for m in together.split(widths, 1)]


@contextmanager
def fresh_memory_is_nan(*, warn_only: bool = True) -> Iterator[None]:
    """torch.empty and its kin return NaN, so that an element nobody wrote shows.

    Operations of PyTorch that are not deterministic warn; they raise RuntimeError unless `warn_only`.
    """
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def relative_error(result: Tensor, exact: Tensor) -> float:
    """Euclidean distance over the norm of the exact result; both must have one shape."""
    if result.shape != exact.shape:
        raise AssertionError(f"shape {tuple(result.shape)} instead of {tuple(exact.shape)}")
    return ((result.double() - exact).norm() / exact.norm()).item()


def error_budget(plain: float, dtype: torch.dtype, terms: int = 0) -> float:
    """The relative error that an implementation may have; derived at the top of this file.

    Args:
        plain: Relative error of plain PyTorch in the same dtype.
        dtype: Of the maps.
        terms: How many values are summed, where the order of the sum counts: for a weight's gradient, the positions of
            all heads.
    """
    sums = torch.finfo(torch.promote_types(dtype, torch.float32))
    return 2 * plain + 2 * torch.finfo(dtype).eps + math.sqrt(terms / 8) * sums.eps


def assert_parity(case: AttentionCase | ShiftConvCase | PathCase, impl: str) -> None:
    """Hold an implementation to the error budget, output and every gradient, on NaN-filled fresh memory."""
    inputs = case.inputs()
    exact = case.run([t.double() for t in inputs], "reference")
    plain_dtype = torch.float32 if case.dtype == torch.float64 else case.dtype
    plain_inputs = [t.to(plain_dtype) for t in inputs]
    plain = case.run(plain_inputs, "reference")
    plain_exact = case.run([t.double() for t in plain_inputs], "reference")
    scale = torch.finfo(case.dtype).eps / torch.finfo(plain_dtype).eps
    with fresh_memory_is_nan():
        results = case.run(inputs, impl)
    positions = case.batch * case.heads * case.height * case.width
    for i, (result, target, naive, naive_target) in enumerate(zip(results, exact, plain, plain_exact, strict=True)):
        if result.dtype != case.dtype:
            raise AssertionError(f"result {i} of {case} by {impl} has dtype {result.dtype}")
        terms = 0 if i < 4 else positions  # the output and the gradients of q, k and v come first
        error = relative_error(result, target)
        allowed = error_budget(scale * relative_error(naive, naive_target), case.dtype, terms)
        if not error <= allowed:  # a NaN fails
            raise AssertionError(f"result {i} of {case} by {impl}: relative error {error:.2e}, allowed {allowed:.2e}")


def assert_path_parity(path: type[Path] | Path, *sizes: tuple[int, int], dtype: torch.dtype = torch.float32) -> None:
    """Hold a path to its own `reference`: the output and every gradient within the error budget, in every layout.

    Args:
        path: A class, built for each of its `parity_cases`; or a path as it stands, on maps of the given sizes.
        sizes: (H, W) of the maps, for a path that is built already.
        dtype: Of maps and parameters; the reference runs in float64 too.

    Raises:
        AssertionError: naming the result that is off (0: the output; then the gradients of q, k, v and the parameters).
        NotImplementedError: if the path lacks `reference` or `parity_cases`.
        ValueError: if there is nothing to check.
    """
    if isinstance(path, Path):
        problems = [(path, size) for size in sizes]
    else:
        problems = [(path(**arguments), size) for arguments, size in path.parity_cases()]
    if not problems:
        raise ValueError("nothing to check: give a path that is built already the map sizes, such as (14, 14)")
    for built, (height, width) in problems:
        for layout in LAYOUTS:
            assert_parity(PathCase(built, height, width, dtype=dtype, layout=layout), built.impl)
