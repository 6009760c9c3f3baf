"""Augmentation for training, resize and crop for validation, mixup and CutMix: built from timm and torchvision."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup
from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, posterize, rand_augment_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation, str_to_interp_mode, str_to_pil_interp
from torchvision import transforms
from torchvision.transforms.functional import resize

from acmix.config import Config
from acmix.data.batch import Erased, Normaliser, Pixels
from acmix.data.datasets import Statistics
from acmix.data.pictures import Picture
from acmix.errors import UserError

Transform = Callable[[Image.Image | Picture], torch.Tensor]
"""RGB image of any size → (C, H, W) float32, normalised; C is 3, or 1 for grey."""


class Patch(NamedTuple):
    """What replaces a part of an image once it is normalised.

    box: top, left, height, width; noise: (C, height, width) float32
    """

    box: tuple[int, int, int, int]
    noise: np.ndarray


SingleStep = Callable[[Image.Image], Image.Image]
"""RGB image → RGB image."""

PixelTransform = Callable[[Image.Image | Picture], tuple[np.ndarray, Patch | None]]
"""RGB image of any size → (H, W, C) uint8, and the part to erase, if any."""

_PIXEL = torch.zeros(1)
_MAX_ASPECT = 16
_UNCROPPED_SIZE = 64  # up to this image_size validation crops nothing: small images are used whole


def build_train_transform(config: Config, statistics: Statistics) -> Transform:
    """Crop, flip, colour, normalise and erase as the `augment` section says.

    Random numbers come from the global generators of Python, numpy and torch. Raises UserError for a policy
    that timm does not understand.
    """
    return _finished(build_train_pixels(config, statistics), statistics)


def build_val_transform(config: Config, statistics: Statistics) -> Transform:
    """Resize until the crop fits, crop the centre, normalise; nothing random."""
    return _finished(build_val_pixels(config), statistics)


def build_train_pixels(config: Config, statistics: Statistics) -> PixelTransform:
    """As build_train_transform, with normalising and erasing left to do."""
    augment = config.augment
    steps = _crop(config)
    if augment.hflip:
        steps.append(_Flip(augment.hflip))
    colour: list[Callable] = []
    if augment.auto_augment is not None:
        colour.append(_auto_augment(augment.auto_augment, config, statistics))
    if augment.color_jitter:
        colour.append(transforms.ColorJitter(*[augment.color_jitter] * 3))
    if colour or config.model.in_chans == 1:
        steps += [_as_image, *colour]
    return _ToPixels(steps, config.model.in_chans, augment.erase_prob)


def fixed_steps(config: Config) -> SingleStep:
    """What an image goes through before the first random number is drawn."""
    size = config.data.size
    steps = {"pad": [_limit_aspect, _Cover(size, config.data.interpolation)], "none": _resize(config, size)}
    return transforms.Compose(steps.get(config.augment.crop, []))


def single_steps(config: Config, statistics: Statistics) -> tuple[SingleStep | None, SingleStep | None]:
    """The crop to a random area and the policy, where the config has them: the steps that take one image at a time.

    Raises UserError for a policy that timm does not understand.
    """
    augment = config.augment
    return (
        _crop(config)[0] if augment.crop == "random_resized" else None,
        None if augment.auto_augment is None else _auto_augment(augment.auto_augment, config, statistics),
    )


def build_val_pixels(config: Config) -> PixelTransform:
    """As build_val_transform, with normalising left to do."""
    height, width = config.data.size
    share = kept_share(config)
    covered = (math.floor(height / share), math.floor(width / share))
    return _ToPixels([_whole, *_resize(config, covered)], config.model.in_chans)


def kept_share(config: Config) -> float:
    """The share of the resized image that the centre crop keeps in validation."""
    return 1.0 if max(config.data.size) <= _UNCROPPED_SIZE else config.data.crop_pct


def build_mixup(config: Config, num_classes: int) -> Mixup | None:
    """Mixup and CutMix of a batch, or None when both are off.

    Called with images (B, C, H, W) and targets (B,), B even, it returns mixed images and targets (B, num_classes)
    that contain the label smoothing. It draws from numpy's global generator, to be seeded before each call
    (`seeding.seed_generators`).
    """
    augment = config.augment
    if not augment.mixup and not augment.cutmix:
        return None
    return Mixup(
        mixup_alpha=augment.mixup,
        cutmix_alpha=augment.cutmix,
        prob=augment.mixup_prob,
        switch_prob=augment.mixup_switch_prob,
        label_smoothing=config.loss.label_smoothing,
        num_classes=num_classes,
    )


def _crop(config: Config) -> list[Callable]:
    size, augment, interpolation = config.data.size, config.augment, config.data.interpolation
    if augment.crop == "random_resized":
        return [_RandomResizedCrop(size, augment.scale, augment.ratio, interpolation)]
    if augment.crop == "pad":
        return [_whole, _limit_aspect, _Cover(size, interpolation), transforms.RandomCrop(size, padding=augment.pad)]
    return [_whole, *_resize(config, size)]


def _resize(config: Config, covered: tuple[int, int]) -> list[Callable]:
    return [_limit_aspect, _Cover(covered, config.data.interpolation), transforms.CenterCrop(config.data.size)]


def _whole(image: Image.Image | Picture) -> Image.Image:
    return image.whole() if isinstance(image, Picture) else image


def _as_image(image: Image.Image | np.ndarray) -> Image.Image:
    return image if isinstance(image, Image.Image) else Image.fromarray(image)


class _RandomResizedCrop(RandomResizedCropAndInterpolation):
    """timm's crop; of a picture not decoded yet, the pixels of the crop alone are made, as an array."""

    def __init__(
        self,
        size: tuple[int, int],
        scale: tuple[float, float],
        ratio: tuple[float, float],
        interpolation: str,
    ) -> None:
        super().__init__(size, scale, ratio, interpolation)
        self._filter = interpolation

    @staticmethod
    def get_params(
        img: torch.Tensor | Image.Image, scale: tuple[float, float], ratio: tuple[float, float]
    ) -> tuple[int, int, int, int]:
        """Top, left, height and width by timm's draws; of a few pixels it may round a side down to nothing."""
        top, left, height, width = RandomResizedCropAndInterpolation.get_params(img, scale, ratio)
        high, wide = (img.height, img.width) if isinstance(img, Image.Image) else img.shape[-2:]
        return min(top, high - 1), min(left, wide - 1), max(1, height), max(1, width)

    def __call__(self, image: Image.Image | Picture) -> Image.Image | np.ndarray:
        if not isinstance(image, Picture):
            return super().__call__(image)
        full = _PIXEL.expand(image.size[::-1])  # stands for the image, of which the size alone is asked
        top, left, height, width = self.get_params(full, self.scale, self.ratio)
        return image.crop((left, top, left + width, top + height), self.size, self._filter)


class _Flip(transforms.RandomHorizontalFlip):
    """torchvision's flip, by the same random number; also of an array (H, W, C)."""

    def forward(self, image: Image.Image | np.ndarray) -> Image.Image | np.ndarray:
        if isinstance(image, Image.Image):
            return super().forward(image)
        # numpy mirrors pixels of three bytes at a fortieth of torch's speed
        return torch.from_numpy(image).flip(1).numpy() if torch.rand(1) < self.p else image


class _Cover:
    """Resize an image, its shape kept, until it just covers (height, width); of a square, that is its shorter side."""

    def __init__(self, size: tuple[int, int], interpolation: str) -> None:
        self.size = size
        self.interpolation = str_to_interp_mode(interpolation)

    def __call__(self, image: Image.Image) -> Image.Image:
        height, width = self.size
        if height * image.width >= width * image.height:
            width = int(height * image.width / image.height)
        else:
            height = int(width * image.height / image.width)
        return resize(image, [height, width], self.interpolation)


def _limit_aspect(image: Image.Image) -> Image.Image:
    """Crop very long images: resizing the shorter side of 1 × 100,000 pixels to 224 would give 5 billion pixels."""
    longest = _MAX_ASPECT * min(image.size)
    if max(image.size) <= longest:
        return image
    left, top = max(0, (image.width - longest) // 2), max(0, (image.height - longest) // 2)
    return image.crop((left, top, left + min(image.width, longest), top + min(image.height, longest)))


class _ToPixels:
    """Steps on images, then the array of their pixels, with `erase_prob` and a part to erase."""

    def __init__(self, steps: list[Callable], channels: int, erase_prob: float = 0.0) -> None:
        self._transform = transforms.Compose([*steps, *([transforms.Grayscale()] if channels == 1 else [])])
        self._channels = channels
        self._erasing = RandomErasing(erase_prob, mode="pixel", device="cpu") if erase_prob else None

    def __call__(self, image: Image.Image | Picture) -> tuple[np.ndarray, Patch | None]:
        pixels = np.asarray(self._transform(image))
        pixels = pixels.reshape(*pixels.shape[:2], self._channels)
        if self._erasing is None:
            return pixels, None
        height, width = pixels.shape[:2]
        part = _Canvas(self._channels, height, width)
        self._erasing(part)
        return pixels, part.patch


class _Canvas:
    """What timm's RandomErasing takes for an image: remembers what it would write, and where."""

    dtype = torch.float32

    def __init__(self, *shape: int) -> None:
        self._shape = shape
        self.patch: Patch | None = None

    def size(self) -> tuple[int, ...]:
        return self._shape

    def __setitem__(self, place: tuple[slice, slice, slice], noise: torch.Tensor) -> None:
        _, rows, columns = place
        box = (rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start)
        self.patch = Patch(box, noise.numpy())


def _finished(transform: PixelTransform, statistics: Statistics) -> Transform:
    normaliser = Normaliser(statistics)

    def finished(image: Image.Image | Picture) -> torch.Tensor:
        pixels, patch = transform(image)
        erased = None if patch is None else Erased(np.array([(0, *patch.box)]), patch.noise.ravel())
        batch = Pixels(torch.from_numpy(pixels.copy())[None], normaliser, erased)
        return batch.finish(torch.device("cpu"), channels_last=False)[0]

    return finished


def _auto_augment(policy: str, config: Config, statistics: Statistics) -> Callable:
    colour = statistics.mean * (3 // len(statistics.mean))  # images are still RGB here
    parameters = {
        "translate_const": int(min(config.data.size) * 0.45),
        "img_mean": tuple(min(255, round(255 * value)) for value in colour),
        "interpolation": str_to_pil_interp(config.data.interpolation),
    }
    makers = {"rand": rand_augment_transform, "augmix": augment_and_mix_transform}
    try:
        transform = makers.get(policy.partition("-")[0], auto_augment_transform)(policy, parameters)
    except (AssertionError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"augment.auto_augment: timm does not understand {policy!r} {error}".rstrip()) from None
    groups = getattr(transform, "policy", None) or [transform.ops]
    for operation in (operation for group in groups for operation in group):
        if operation.aug_fn is posterize:
            operation.aug_fn = _posterize
    return transform


def _posterize(image: Image.Image, bits_to_keep: int, **options: object) -> Image.Image:
    """timm's posterize; at full strength it keeps 0 bits, which means black but is an error since Pillow 13."""
    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    return posterize(image, bits_to_keep, **options)
