"""Work tap by tap on some images at a time, so that what is made for one tap stays in the cache."""

from collections.abc import Iterator
from math import prod

from torch import Tensor

PART_BYTES = 1_000_000  # of one map in flight on a CPU; measured


def parts(maps: Tensor) -> Iterator[slice]:
    """Slices of the batch for maps like these; all at once off the CPU."""
    images = maps.shape[0]
    step = images if maps.device.type != "cpu" else PART_BYTES // max(1, 4 * prod(maps.shape[1:]))
    for start in range(0, images, max(1, step)):
        yield slice(start, start + max(1, step))


def taps(maps: Tensor, kernel_size: int) -> Iterator[Tensor]:
    """The K² shifted views (B, C, H, W) of maps padded by K // 2, row by row."""
    height, width = (side - kernel_size + 1 for side in maps.shape[-2:])
    for dy in range(kernel_size):
        for dx in range(kernel_size):
            yield maps[..., dy : dy + height, dx : dx + width]
