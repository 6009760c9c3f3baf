"""What tests of the operations share: problems, inputs in every layout, and the error budget.

The budget is derived, not tuned: against the exact result (the reference in float64), an implementation may err at most
twice as much as plain PyTorch (the reference in the same dtype), plus what the order of its own sums may cost: a
rounding of the result and one of what is folded beforehand (weights, positions); for the gradient of a weight, a sum
over the n positions of all heads, the roundings of n partial sums of random terms, sqrt(n / 8) units. For float64
itself, plain PyTorch's error is that in float32, scaled by the units of rounding.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

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


def _draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def draw_maps(batch: int, channels: int, height: int, width: int, dtype: torch.dtype, layout: str) -> list[Tensor]:
    """q, k and v, unit normal: contiguous, channels_last, or channel slices of one map as a projection gives them.

    Raises:
        ValueError: for an unknown layout.
    """
    together = _draw(0, batch, 3 * channels, height, width).to(dtype)
    if layout == "sliced":
        return list(together.chunk(3, 1))
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}: choose one of {', '.join(LAYOUTS)}")
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    return [m.contiguous(memory_format=memory_format) for m in together.chunk(3, 1)]


@contextmanager
def fresh_memory_is_nan() -> Iterator[None]:
    """torch.empty and its kin return NaN, so that an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def relative_error(result: Tensor, exact: Tensor) -> float:
    """Euclidean distance over the norm of the exact result; both must have one shape."""
    if result.shape != exact.shape:
        raise AssertionError(f"shape {tuple(result.shape)} instead of {tuple(exact.shape)}")
    return ((result.double() - exact).norm() / exact.norm()).item()


def assert_parity(case: AttentionCase | ShiftConvCase, impl: str) -> None:
    """Hold an implementation to the error budget, output and every gradient, on NaN-filled fresh memory."""
    inputs = case.inputs()
    exact = case.run([t.double() for t in inputs], "reference")
    plain_dtype = torch.float32 if case.dtype == torch.float64 else case.dtype
    plain_inputs = [t.to(plain_dtype) for t in inputs]
    plain = case.run(plain_inputs, "reference")
    plain_exact = case.run([t.double() for t in plain_inputs], "reference")
    rounding = torch.finfo(case.dtype).eps
    scale = rounding / torch.finfo(plain_dtype).eps
    with fresh_memory_is_nan():
        results = case.run(inputs, impl)
    positions = case.batch * case.heads * case.height * case.width
    for i, (result, target, naive, naive_target) in enumerate(zip(results, exact, plain, plain_exact, strict=True)):
        if result.dtype != case.dtype:
            raise AssertionError(f"result {i} of {case} by {impl} has dtype {result.dtype}")
        is_map = result.shape[0] == case.batch and result.dim() == 4
        units = 2 if is_map else max(2, math.sqrt(positions / 8))
        error, allowed = (
            relative_error(result, target),
            2 * scale * relative_error(naive, naive_target) + units * rounding,
        )
        if not error <= allowed:  # a NaN fails
            raise AssertionError(f"result {i} of {case} by {impl}: relative error {error:.2e}, allowed {allowed:.2e}")
