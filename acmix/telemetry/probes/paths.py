"""The probe `paths`: the path weights alpha (attention) and beta (convolution) of every ACmix block."""

from typing import TypedDict

import torch
from torch import Tensor, nn

from acmix.analysis.blocks import path_mixes
from acmix.telemetry.probes.probe import Probe, register_probe


class PathRow(TypedDict):
    """One block's path weights.

    layer: dotted name of the block in the model; stage: 1-based; depth: 1-based position among the blocks;
    alpha, beta: the weights in effect (of the attention and of the convolution path), whatever the mix's mode; where
    each head or channel has its own, their mean.
    """

    layer: str
    stage: int
    depth: int
    alpha: float
    beta: float


def path_layers(model: nn.Module) -> list[PathRow]:
    """Read alpha and beta of every ACmix block, in depth order; an empty list for a model without such blocks.

    A block that has one path by design, as the last of a PVT with a class token, is left out where others mix two: its
    weights, 1 and 0, would pass for a finding in the mean of its stage.

    The model may be wrapped in DistributedDataParallel, a timm EMA or `torch.compile`; the names stay the bare model's.
    """
    mixes = list(path_mixes(model))
    mixes = [row for row in mixes if row[2].has_attention and row[2].has_convolution] or mixes
    weights = _as_floats([weight for _, _, mix in mixes for weight in mix.weights()])
    return [
        PathRow(layer=name, stage=int(mix.stage), depth=i + 1, alpha=weights[2 * i], beta=weights[2 * i + 1])
        for i, (name, _, mix) in enumerate(mixes)
    ]


def _as_floats(weights: list[Tensor | float]) -> list[float]:
    """Convert with a single device synchronisation: a `float()` for each of 32 scalars would stall a GPU 32 times."""
    tensors = [weight.detach().float().mean() for weight in weights if isinstance(weight, Tensor)]
    values = iter(torch.stack(tensors).tolist() if tensors else [])
    return [next(values) if isinstance(weight, Tensor) else float(weight) for weight in weights]


register_probe(Probe("paths", path_layers))
