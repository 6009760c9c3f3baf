"""Multiply-adds of a model: what its mathematics asks for, whatever the implementation that runs."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from acmix.layers.path import Path


def multiply_adds(model: nn.Module, input_size: tuple[int, ...] = (3, 224, 224)) -> int:
    """Multiply-adds of one forward pass over one image of shape `input_size`; see `count_multiply_adds`."""
    parameter = next(model.parameters())
    return count_multiply_adds(model, torch.zeros(1, *input_size, device=parameter.device, dtype=parameter.dtype))


def count_multiply_adds(model: nn.Module, *inputs: Tensor) -> int:
    """Multiply-adds of one forward pass, in evaluation mode.

    Convolutions and matrix products are counted as PyTorch runs them. The paths of ACmix blocks say themselves what
    they ask for (`Path.multiply_adds`): a folded convolution or a fused attention does other arithmetic, but is the
    same model. Elementwise work (norms, activations, softmax, the position term) is not counted, as is usual.
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
    """Replaces what the counter sees inside a path by what the path says."""

    def __init__(self, counter: FlopCounterMode) -> None:
        self.counter = counter
        self.correction = 0
        self._before = 0

    def watch(self, module: nn.Module) -> list[Any]:
        """Hook a module if it is a path; returns the handles of the hooks."""
        if not isinstance(module, Path):
            return []
        return [module.register_forward_pre_hook(self._enter), module.register_forward_hook(self._leave)]

    def _enter(self, path: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._before = self.counter.get_total_flops()

    def _leave(self, path: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        assert isinstance(path, Path)
        seen = (self.counter.get_total_flops() - self._before) // 2
        batch, _, height, width = inputs[0].shape
        self.correction += path.multiply_adds((batch, path.heads * path.head_dim, height, width)) - seen
