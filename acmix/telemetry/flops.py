"""Multiply-adds of a model: what its mathematics asks for, whatever the implementation that runs."""

from collections.abc import Sequence
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
    count = RunningCount()
    count.run(model, *inputs)
    return count.total


class RunningCount:
    """The multiply-adds of a forward pass up to now, each path by what it says.

    Made for subclasses that look at `total` while the pass runs: they add hooks in `watch` and hear of paths in `said`.
    """

    def __init__(self) -> None:
        self._counter = FlopCounterMode(display=False)
        self._correction = 0
        self._before = 0

    @property
    def total(self) -> int:
        """Multiply-adds up to now."""
        return self._seen() + self._correction

    def run(self, model: nn.Module, *inputs: Tensor) -> None:
        """Run the model in evaluation mode; it is left as it was."""
        handles = [handle for module in model.modules() for handle in self.watch(module)]
        training = {module: module.training for module in model.modules()}
        try:
            model.eval()
            with torch.no_grad(), self._counter:
                model(*inputs)
        finally:
            for handle in handles:
                handle.remove()
            for module, mode in training.items():
                module.training = mode

    def watch(self, module: nn.Module) -> list[Any]:
        """Hook a module; returns the handles of the hooks."""
        if not isinstance(module, Path):
            return []
        return [module.register_forward_pre_hook(self._enter), module.register_forward_hook(self._leave)]

    def said(self, path: Path, multiply_adds: int, shape: Sequence[int]) -> None:
        """Called when a path has run on maps of this shape, with what it says."""

    def _seen(self) -> int:
        return self._counter.get_total_flops() // 2

    def _enter(self, path: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._before = self._seen()

    def _leave(self, path: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        assert isinstance(path, Path)
        batch, _, height, width = inputs[0].shape
        shape = (batch, path.heads * path.head_dim, height, width)  # q may have fewer maps
        multiply_adds = path.multiply_adds(shape)
        self._correction += multiply_adds - (self._seen() - self._before)
        self.said(path, multiply_adds, shape)
