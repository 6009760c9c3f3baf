"""The ACmix blocks of a network, and a look at what their paths compute."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from timm.utils import unwrap_model
from torch import Tensor, nn

from acmix.layers import ACmix
from acmix.layers.mix import PathMix


class PlacedBlock(NamedTuple):
    """A block and its place: dotted name in the model, stage and depth, both counted from 1."""

    layer: str
    stage: int
    depth: int
    module: ACmix

    @property
    def place(self) -> dict[str, Any]:
        """`layer`, `stage` and `depth`, with which each row of a measure begins."""
        return {"layer": self.layer, "stage": self.stage, "depth": self.depth}


class BlockMaps(NamedTuple):
    """What the paths of a block gave in one forward pass, before the mix; None for a path that the block lacks.

    attention, convolution: (B, C, H, W); q, k: what the attention path was given, padded where it pads;
    scale: (rows, columns) of the images for one row and column of the path's input.
    """

    attention: Tensor | None
    convolution: Tensor | None
    q: Tensor | None
    k: Tensor | None
    scale: tuple[float, float]

    def weighted(self, block: PlacedBlock) -> tuple[Tensor | None, Tensor | None]:
        """alpha · attention and beta · convolution, as the block adds them."""
        alpha, beta = block.module.mix.weights()
        attention = None if self.attention is None else alpha * self.attention
        return attention, None if self.convolution is None else beta * self.convolution


See = Callable[[PlacedBlock, BlockMaps], None]


def path_mixes(model: nn.Module) -> Iterator[tuple[str, nn.Module, PathMix]]:
    """Name, block and mix of every block that mixes paths, in depth order; a bare block is named `block`.

    The model may be wrapped in DistributedDataParallel, a timm EMA or `torch.compile`; the names stay the bare model's.
    """
    modules = dict(unwrap_model(model).named_modules())
    for name, module in modules.items():
        if isinstance(module, PathMix):
            block = name.replace("_orig_mod.", "").rpartition(".")[0]  # submodules may be compiled one by one
            yield block or "block", modules[name.rpartition(".")[0]], module


def acmix_blocks(model: nn.Module) -> list[PlacedBlock]:
    """Every ACmix block of a model, in depth order; empty for a model without any."""
    return [
        PlacedBlock(name, int(mix.stage), depth, block)
        for depth, (name, block, mix) in enumerate(path_mixes(model), start=1)
        if isinstance(block, ACmix)
    ]


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Let the model compute as in evaluation, eagerly; every module's train or eval mode is restored afterwards.

    In this mode nothing is drawn and no running statistic moves, so a measurement leaves no trace in a training.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def watch(model: nn.Module, images: Tensor, see: See) -> Tensor:
    """Run the model on images (B, C, H, W) and show `see` the maps of each block in turn; returns the logits.

    The model should be `measuring`. Blocks call their paths as modules meanwhile: the same result up to rounding.
    """
    height, width = images.shape[-2:]
    handles = []
    for block in acmix_blocks(model):
        seen: dict[str, Any] = {}

        def keep_input(_: nn.Module, inputs: tuple[Tensor, ...], seen: dict[str, Any] = seen) -> None:
            seen["size"] = inputs[0].shape[-2:]

        def keep_queries(_: nn.Module, inputs: tuple[Tensor, ...], seen: dict[str, Any] = seen) -> None:
            seen["q"], seen["k"] = inputs[:2]

        def show(
            _: nn.Module, inputs: tuple[Tensor, ...], block: PlacedBlock = block, seen: dict[str, Any] = seen
        ) -> None:
            rows, columns = seen.pop("size")
            queries, keys = seen.pop("q", None), seen.pop("k", None)
            attention, convolution = inputs
            see(block, BlockMaps(attention, convolution, queries, keys, (height / rows, width / columns)))

        handles.append(block.module.register_forward_pre_hook(keep_input))
        if block.module.attention is not None:
            handles.append(block.module.attention.register_forward_pre_hook(keep_queries))
        handles.append(block.module.mix.register_forward_pre_hook(show))
    try:
        logits: Tensor = model(images)
        return logits
    finally:
        for handle in handles:
            handle.remove()
