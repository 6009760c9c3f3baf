"""The augmentation of images held in memory: batches of 8-bit pixels at once, each sample by its own numbers.

The pixels are those that the transforms of single images (torchvision on Pillow, timm's erasing) make of the same crop,
flip and factors; the numbers are drawn from the same distributions.
"""

import math

import numpy as np
from PIL import Image

from acmix.config import Config
from acmix.data.batch import Erased
from acmix.data.datasets import Statistics
from acmix.data.draws import Draws, whole
from acmix.data.jitter import grey, jitter
from acmix.data.seeding import seed_generators, stream_seed
from acmix.data.transforms import SingleStep, single_steps

_CROP, _FLIP, _JITTER, _POLICY, _ERASE = 0, 2, 3, 9, 10
"""The first of each step's numbers."""

_MIN_AREA, _MAX_AREA = 0.02, 1 / 3  # of an erased part, as a share of the image; and its shape, height over width
_LOG_ASPECT = (math.log(0.3), math.log(1 / 0.3))
_ATTEMPTS = 10
_NOISE = 1 << 20


class BatchedAugment:
    """Crop, flip, colour and the choice of what is erased, as the `augment` section says.

    The images are those that `transforms.fixed_steps` leaves. A random area (augment.crop random_resized) and timm's
    policies (augment.auto_augment) have no form for batches: they take the images one by one, the generators seeded for
    each. `one_by_one` says whether there are such steps.

    Raises UserError for a policy that timm does not understand.
    """

    def __init__(self, config: Config, statistics: Statistics) -> None:
        self._augment = config.augment
        self._seed = config.run.seed
        self._size = config.data.size
        self._channels = config.model.in_chans
        self._pad = config.augment.pad if config.augment.crop == "pad" else 0
        self._area, self._policy = single_steps(config, statistics)
        self.one_by_one = self._area is not None or self._policy is not None
        self._noise: np.ndarray | None = None

    def __call__(
        self, images: np.ndarray, epoch: int, indices: np.ndarray, repeats: np.ndarray
    ) -> tuple[np.ndarray, Erased | None]:
        """Images (B, H, W, 3) uint8 of the samples → pixels (B, h, w, C) uint8 and what is to be erased, or None.

        The images may be changed.
        """
        draws = Draws(self._seed, epoch, indices, repeats)
        pixels = self._cropped(images, draws) if self._area is None else self._each(self._area, images, draws, _CROP)
        if self._augment.hflip:
            _flip(pixels, np.flatnonzero(draws.uniform(_FLIP, 1)[0] < self._augment.hflip))
        if self._policy is not None:
            pixels = self._each(self._policy, pixels, draws, _POLICY)
        if self._augment.color_jitter:
            jitter(pixels, self._augment.color_jitter, draws.uniform(_JITTER, 6))
        if self._channels == 1:
            pixels = grey(pixels)[..., None]
        return pixels, self._erased(draws, len(indices)) if self._augment.erase_prob else None

    def _each(self, step: SingleStep, images: np.ndarray, draws: Draws, number: int) -> np.ndarray:
        """The step done to one image after the other."""
        changed = np.empty((len(images), *self._size, images.shape[3]), dtype=np.uint8)
        for place, seed in enumerate(draws.seeds(number)):
            seed_generators(seed)
            changed[place] = np.asarray(step(Image.fromarray(images[place])))
        return changed

    def _cropped(self, images: np.ndarray, draws: Draws) -> np.ndarray:
        """A part of each padded image, copied."""
        pad, (height, width) = self._pad, self._size
        count, high, wide, channels = images.shape
        tops, lefts = high + 2 * pad - height + 1, wide + 2 * pad - width + 1
        if tops == lefts == 1:
            return images
        padded = np.zeros((count, high + 2 * pad, wide + 2 * pad, channels), dtype=np.uint8)
        padded[:, pad : pad + high, pad : pad + wide] = images
        image, row, column, channel = padded.strides
        windows = np.lib.stride_tricks.as_strided(  # every place the crop can have, and its rows as runs of bytes
            padded, (count, tops, lefts, height, width * channels), (image, row, column, row, channel), writeable=False
        )
        top, left = draws.uniform(_CROP, 2)
        cropped = windows[np.arange(count), whole(top, tops), whole(left, lefts)]
        return cropped.reshape(count, height, width, channels)

    def _erased(self, draws: Draws, count: int) -> Erased | None:
        """Rectangles as timm's RandomErasing chooses them: of ten attempts the first that is smaller than the image."""
        height, width = self._size
        places = np.flatnonzero(draws.uniform(_ERASE, 1)[0] < self._augment.erase_prob)
        numbers = draws.uniform(_ERASE + 1, 2 * _ATTEMPTS + 3, places)
        area = (_MIN_AREA + numbers[:_ATTEMPTS] * (_MAX_AREA - _MIN_AREA)) * (height * width)
        low, high = _LOG_ASPECT
        aspect = np.exp(low + numbers[_ATTEMPTS : 2 * _ATTEMPTS] * (high - low))
        heights, widths = (np.rint(np.sqrt(part)).astype(np.int64) for part in (area * aspect, area / aspect))
        fits = (heights < height) & (widths < width)
        chosen = fits.argmax(0), np.arange(len(places))
        down, across, start = numbers[-3:]
        boxes = np.stack(
            [
                places,
                whole(down, height - heights[chosen] + 1),
                whole(across, width - widths[chosen] + 1),
                heights[chosen],
                widths[chosen],
            ],
            axis=1,
        )[fits.any(0)]
        if not len(boxes):
            return None
        sizes = self._channels * boxes[:, 3] * boxes[:, 4]
        starts = whole(start[fits.any(0)], _NOISE)
        noise = self._all_noise()
        return Erased(boxes, np.concatenate([noise[a : a + n] for a, n in zip(starts, sizes, strict=True)]))

    def _all_noise(self) -> np.ndarray:
        """Normal numbers of which each erased part takes a run, from a place of its own.

        A draw for each pixel would cost more than all the rest.
        """
        if self._noise is None:
            words = stream_seed("noise", self._seed)
            # numpy promises that RandomState's streams never change
            random = np.random.RandomState([words & 0xFFFFFFFF, words >> 32])
            longest = self._channels * math.prod(self._size)
            self._noise = random.standard_normal(_NOISE + longest).astype(np.float32)
        return self._noise


def _flip(pixels: np.ndarray, chosen: np.ndarray) -> None:
    """Mirror the chosen images in place."""
    images = pixels[chosen]
    mirrored = np.empty_like(images)
    for channel in range(images.shape[3]):  # one channel at a time is three times as fast as pixels of three bytes
        mirrored[..., channel] = images[:, :, ::-1, channel]
    pixels[chosen] = mirrored
