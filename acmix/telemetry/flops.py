"""Multiply-adds of a model: what its mathematics asks for, whatever the implementation that runs."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from acmix.layers import ACmix, PatchwiseAttention
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


def count_like_san(model: nn.Module, *inputs: Tensor) -> int:
    """What the counter of SAN's authors gives for one forward pass: more than its multiply-adds.

    To `count_multiply_adds` it adds a bias for each value of a convolution or a projection to q, k and v that has one,
    two for each value that a batch norm reads, one for each that a ReLU gives and one for each that a pooling reads.
    SAN's published figures, and so those of ACmix-SAN, are counted like this.
    """
    counted = 0

    def add(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
        nonlocal counted
        counted += _like_san(module, given, out)

    paths = [module for module in model.modules() if isinstance(module, Path)]
    inside = {part for path in paths for part in path.modules()} - set(paths)  # a path computes without its layers
    handles = [module.register_forward_hook(add) for module in model.modules() if module not in inside]
    try:
        return count_multiply_adds(model, *inputs) + counted
    finally:
        for handle in handles:
            handle.remove()


def _like_san(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> int:
    """What SAN's counter adds for this module itself to its multiply-adds."""
    if isinstance(module, nn.BatchNorm2d):
        return 2 * inputs[0].numel()
    if isinstance(module, nn.ReLU):
        return out.numel()
    if isinstance(module, nn.MaxPool2d | nn.AdaptiveAvgPool2d):
        return inputs[0].numel()
    if isinstance(module, nn.Conv2d) and module.bias is not None:
        return out.numel()
    if isinstance(module, ACmix) and not module.reduces and module.qkv.bias is not None:
        return sum(module.widths) * inputs[0].numel() // inputs[0].shape[1]
    if isinstance(module, PatchwiseAttention):
        first, second = module.reduce_patch, module.expand  # a norm and a ReLU before each
        pixels = inputs[0].numel() // inputs[0].shape[1]
        return pixels * (3 * (first.in_channels + second.in_channels) + second.out_channels)
    return 0


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
