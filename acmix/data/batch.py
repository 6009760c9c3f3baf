"""A batch on its way to the network: 8-bit pixels from the loader, normalised and erased on the network's device."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from acmix.data.buffers import Buffers
from acmix.data.datasets import Statistics

_CPU = torch.device("cpu")
_WHITE = 255.0
_CACHED = 1 << 18  # values
_ON_ONE_THREAD = (1 << 15) - 1  # values: the most that torch computes without a second thread


class Erased(NamedTuple):
    """Rectangles of a batch that noise replaces after the images are normalised.

    boxes: (K, 5) int64: image, top, left, height, width
    noise: float32, the (C, height, width) values of each box, one box after the other
    """

    boxes: np.ndarray
    noise: np.ndarray


class Normaliser:
    """8-bit images → float32: by 255, less the mean, by the standard deviation.

    Rounded after each step, as torchvision does, on every device alike.
    """

    def __init__(self, statistics: Statistics) -> None:
        self._statistics = statistics
        self._buffers = Buffers()
        self._constants: dict[tuple[torch.device, int], tuple[Tensor, Tensor, Tensor]] = {}

    def __call__(self, pixels: Tensor, *, channels_last: bool) -> Tensor:
        """(B, H, W, C) uint8, contiguous → (B, C, H, W) float32, contiguous or, in memory, channels last."""
        count, height, width, channels = pixels.shape
        if channels_last:
            rows = pixels.view(count, height, width * channels)  # rows keep the arithmetic vectorised
            values = self._computed(rows, self._repeated(pixels.device, width))
            return values.view(pixels.shape).permute(0, 3, 1, 2)
        white, mean, std = self._repeated(pixels.device, 1)
        return self._computed(pixels.permute(0, 3, 1, 2), (white, mean.view(-1, 1, 1), std.view(-1, 1, 1)))

    def _computed(self, pixels: Tensor, constants: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """The values of (B, ..., rows, columns), contiguous; on the CPU in parts.

        A part stays in the cache and is computed on one thread: several would spend their time waiting for each other,
        because loader processes keep the cores busy.
        """
        white, mean, std = constants
        if pixels.device != _CPU:
            values = pixels.to(torch.float32, memory_format=torch.contiguous_format)
            return values.div_(white).sub_(mean).div_(std)
        values, each = self._buffers.empty(pixels.shape), max(1, pixels[:1].numel())
        most = _CACHED if torch.get_num_threads() == 1 else _ON_ONE_THREAD
        images, rows = max(1, most // each), max(1, most * pixels.shape[-2] // each)
        for some, read in zip(values.split(images), pixels.split(images), strict=True):
            for part, source in zip(some.split(rows, dim=-2), read.split(rows, dim=-2), strict=True):
                part.copy_(source).div_(white).sub_(mean).div_(std)
        return values

    def _repeated(self, device: torch.device, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """White, and mean and deviation of each value of a row of `width` pixels."""
        if (device, width) not in self._constants:
            mean, std = (
                torch.tensor(values, dtype=torch.float32, device=device).repeat(width)
                for values in (self._statistics.mean, self._statistics.std)
            )
            # a tensor, because CUDA divides by a Python number as a product with its rounded inverse
            self._constants[device, width] = torch.full((1,), _WHITE, device=device), mean, std
        return self._constants[device, width]


@dataclass(frozen=True)
class Pixels:
    """Images as loaders hand them over.

    values: (B, H, W, C) uint8, contiguous
    erased: what noise replaces; None for nothing
    blank: whether no image of the batch could be read; the images are then 0
    """

    values: Tensor
    normaliser: Normaliser
    erased: Erased | None = None
    blank: bool = False

    def finish(self, device: torch.device, *, channels_last: bool) -> Tensor:
        """Images (B, C, H, W), float32, normalised and erased, on the device; contiguous unless `channels_last`."""
        images = self.normaliser(self.values.to(device, non_blocking=True), channels_last=channels_last)
        if self.blank:
            images.zero_()
        if self.erased is not None and len(self.erased.boxes):
            _erase(images, self.erased)
        return images


class Batch:
    """Images of one forward pass on one process.

    Where an image cannot be read, `valid` is False and the loss leaves it out; its place holds a copy of another
    image of the batch with that image's target, so that shapes stay and batch norm and mixup see a real image.
    `ids` are indices into the dataset, also of the unreadable images.

    Args:
        images: (B, C, H, W), normalised; or the pixels to make them from.
        targets: (B,) int64.
        ids: (B,) int64.
        valid: (B,) bool.
        errors: one message for each image left out.
    """

    def __init__(self, images: Tensor | Pixels, targets: Tensor, ids: Tensor, valid: Tensor, errors: list[str]) -> None:
        self._images = images
        self.targets = targets
        self.ids = ids
        self.valid = valid
        self.errors = errors

    @cached_property
    def images(self) -> Tensor:
        """(B, C, H, W) float32, normalised; C is 3, or 1 for grey."""
        return self._images if isinstance(self._images, Tensor) else self._images.finish(_CPU, channels_last=False)

    def to(self, device: torch.device, *, channels_last: bool = False) -> "Batch":
        """The batch with images and targets on a device, where pixels become images."""
        if isinstance(self._images, Tensor):
            images = self._images.to(device, non_blocking=True)
        else:
            images = self._images.finish(device, channels_last=channels_last)
        return Batch(images, self.targets.to(device, non_blocking=True), self.ids, self.valid, self.errors)

    def copy(self) -> "Batch":
        """The batch with images in memory of its own, no longer shared with a loader process."""
        images = self._images
        if isinstance(images, Tensor):
            images = images.clone()
        else:
            images = replace(images, values=images.values.clone())
        return Batch(images, self.targets, self.ids, self.valid, self.errors)

    def again(self) -> "Batch":
        """The batch as it came from the loader, without the images that were made of its pixels since."""
        return Batch(self._images, self.targets, self.ids, self.valid, self.errors)


def _erase(images: Tensor, erased: Erased) -> None:
    channels, start = images.shape[1], 0
    on_cpu = images.device == _CPU  # there numpy's assignment costs a fifth of torch's
    noise: Any = erased.noise if on_cpu else torch.from_numpy(erased.noise).to(images.device, non_blocking=True)
    target: Any = images.numpy() if on_cpu else images
    for image, top, left, height, width in erased.boxes.tolist():
        end = start + channels * height * width
        part = noise[start:end].reshape(channels, height, width)
        target[image, :, top : top + height, left : left + width] = part
        start = end
