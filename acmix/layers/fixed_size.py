"""Maps of one size in a graph, for code whose padding and windows follow from the size."""

import warnings

import torch
from torch import Tensor

from acmix.ops.maps import is_exporting


def with_fixed_size(maps: Tensor) -> Tensor:
    """The maps (B, C, H, W) as they are, with H and W constants of the graph that is being made, if any.

    torch.compile makes a graph for each size: one for all takes it many minutes. A graph of torch.jit.trace fails here
    on another size: it would go on with the padding and the windows of the traced one. torch.export decides by its
    dynamic shapes.
    """
    if torch.jit.is_tracing():
        height, width = (int(side) for side in maps.shape[2:])
        message = f"the traced graph takes maps of {height}×{width} only: trace once for each size, or use torch.export"
        warnings.warn(message, torch.jit.TracerWarning, stacklevel=2)
        return maps.expand(-1, -1, height, width)
    if torch.compiler.is_compiling() and not is_exporting():
        for side in maps.shape[2:]:
            range(side)  # what asks for a number makes a dynamic side a constant
    return maps
