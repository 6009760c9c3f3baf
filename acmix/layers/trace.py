"""What a graph of torch.jit.trace may be used for."""

import warnings

import torch
from torch import Tensor


def keep_traced_size(maps: Tensor) -> Tensor:
    """The maps (B, C, H, W) as they are; a traced graph will fail here on maps of another height or width.

    For code whose padding or windows follow from the size: the graph would go on with those of the traced size.
    """
    if not torch.jit.is_tracing():
        return maps
    height, width = (int(side) for side in maps.shape[2:])
    message = f"the traced graph takes maps of {height}×{width} only: trace once for each size, or use torch.export"
    warnings.warn(message, torch.jit.TracerWarning, stacklevel=2)
    return maps.expand(-1, -1, height, width)
