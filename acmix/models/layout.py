"""The memory format that a network computes in."""

import torch
from timm.models._features_fx import register_notrace_function
from torch import Tensor

from acmix.ops.implementations import transformed


@torch.fx.wrap
@register_notrace_function
def fast_layout(x: Tensor) -> Tensor:
    """Images in the memory format that a CPU is the faster in, in every convolution and norm; the blocks use it too."""
    if x.device.type == "cpu" and not transformed():  # vmap has no layouts
        return x.contiguous(memory_format=torch.channels_last)
    return x
