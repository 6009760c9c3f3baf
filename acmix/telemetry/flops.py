"""Multiply-adds of a model: what its mathematics asks for, whatever the implementation that runs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from acmix.layers.attention import AttentionPath, LocalAttention, WindowAttention
from acmix.layers.convolution import ShiftConv


def multiply_adds(model: nn.Module, input_size: tuple[int, ...] = (3, 224, 224)) -> int:
    """Multiply-adds of one forward pass over one image of shape `input_size`; see `count_multiply_adds`."""
    parameter = next(model.parameters())
    return count_multiply_adds(model, torch.zeros(1, *input_size, device=parameter.device, dtype=parameter.dtype))


def count_multiply_adds(model: nn.Module, *inputs: Tensor) -> int:
    """Multiply-adds of one forward pass, in evaluation mode.

    Convolutions and matrix products are counted as PyTorch runs them. The paths of ACmix blocks are counted by formula,
    as the paper defines them: a folded convolution or a fused attention does other arithmetic in another time, but is
    the same model. Elementwise work (norms, activations, softmax, the position term) is not counted, as is usual.
    """
    counter = FlopCounterMode(display=False)
    paths = _PathCounts(counter)
    handles = [handle for module in model.modules() for handle in paths.watch(module)]
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad(), counter:
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode
    return counter.get_total_flops() // 2 + paths.correction


class _PathCounts:
    """Replaces what the counter sees inside an ACmix path by the formula of that path."""

    def __init__(self, counter: FlopCounterMode) -> None:
        self.counter = counter
        self.correction = 0
        self._before = 0

    def watch(self, module: nn.Module) -> list[Any]:
        """Hook a module if it is such a path; returns the handles of the hooks."""
        formula = next((count for kind, count in _FORMULAS.items() if isinstance(module, kind)), None)
        if formula is None:
            return []
        return [
            module.register_forward_pre_hook(self._enter),
            module.register_forward_hook(lambda path, inputs, out: self._leave(formula(path, inputs[0], out))),
        ]

    def _enter(self, path: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._before = self.counter.get_total_flops()

    def _leave(self, count: int) -> None:
        self.correction += count - (self.counter.get_total_flops() - self._before) // 2


def _local_attention(path: LocalAttention, q: Tensor, out: Tensor) -> int:
    """K² products of width d for the logits and as many for the values, for each head and query."""
    return 2 * path.kernel_size**2 * out.numel() + _projection(path, out)


def _window_attention(path: WindowAttention, q: Tensor, out: Tensor) -> int:
    """Every pixel of the padded map attends to its window."""
    return 2 * path.window_size[0] * path.window_size[1] * q.numel() + _projection(path, out)


def _projection(path: AttentionPath, out: Tensor) -> int:
    return 0 if path.proj is None else out.numel() * path.proj.in_features


def _shift_conv(path: ShiftConv, q: Tensor, out: Tensor) -> int:
    """The fully connected layer, 3N maps to k², and a grouped convolution with k² kernels of k × k for each output."""
    taps = path.kernel_size**2
    if path.kind == "full":
        return 3 * path.heads * taps * out.numel()
    mixing = 3 * taps * q.numel()  # k² · 3N for each of the d · H · W values of a map
    return mixing + (0 if path.kind == "shift" else taps * taps * out.numel())


_FORMULAS: dict[type[nn.Module], Callable[[Any, Tensor, Tensor], int]] = {
    LocalAttention: _local_attention,
    WindowAttention: _window_attention,
    ShiftConv: _shift_conv,
}
