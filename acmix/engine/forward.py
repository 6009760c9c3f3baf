"""What stands between a batch and the network: device, mixing, memory format, autocast."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from acmix.config import PrecisionConfig

if TYPE_CHECKING:
    from acmix.data.loader import Batch

AMP_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

Mixing = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def network_inputs(
    batch: "Batch", precision: PrecisionConfig, device: torch.device, mixing: Mixing | None = None
) -> tuple[Tensor, Tensor]:
    """Images (B, C, H, W) in the memory format of `precision` and targets, on the device, mixed where asked."""
    batch = batch.to(device, channels_last=precision.channels_last)
    images, targets = batch.images, batch.targets
    if mixing is not None:
        images, targets = mixing(images, targets)
    return in_memory_format(images, precision), targets


def in_memory_format(images: Tensor, precision: PrecisionConfig) -> Tensor:
    """Images in the memory format of `precision`."""
    return images.contiguous(memory_format=torch.channels_last) if precision.channels_last else images


def autocast(precision: PrecisionConfig, device: torch.device) -> AbstractContextManager[None]:
    """The autocast context of `precision.amp`; does nothing for `none`."""
    if precision.amp == "none":
        return nullcontext()
    return torch.autocast(device.type, dtype=AMP_TYPES[precision.amp])
