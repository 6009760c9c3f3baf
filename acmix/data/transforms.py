"""Augmentation for training, resize and crop for validation, mixup and CutMix: built from timm and torchvision."""

import math
from collections.abc import Callable

import torch
from PIL import Image
from timm.data import Mixup
from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, posterize, rand_augment_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation, str_to_interp_mode, str_to_pil_interp
from torchvision import transforms

from acmix.config import AugmentConfig, Config
from acmix.data.datasets import Statistics
from acmix.errors import UserError

Transform = Callable[[Image.Image], torch.Tensor]
"""RGB image of any size → (3, S, S) float32, normalised."""

_MAX_ASPECT = 16
_UNCROPPED_SIZE = 64  # up to this image_size validation crops nothing: small images are used whole


def build_train_transform(config: Config, statistics: Statistics) -> Transform:
    """Crop, flip, colour, normalise and erase as the `augment` section says.

    Random numbers come from the global generators of Python, numpy and torch. Raises UserError for a policy
    that timm does not understand.
    """
    augment = config.augment
    steps = _crop(config)
    if augment.hflip:
        steps.append(transforms.RandomHorizontalFlip(augment.hflip))
    if augment.auto_augment is not None:
        steps.append(_auto_augment(augment.auto_augment, config, statistics))
    if augment.color_jitter:
        steps.append(transforms.ColorJitter(*[augment.color_jitter] * 3))
    steps += _to_tensor(statistics)
    if augment.erase_prob:
        steps.append(RandomErasing(augment.erase_prob, mode="pixel", device="cpu"))
    return transforms.Compose(steps)


def build_val_transform(config: Config, statistics: Statistics) -> Transform:
    """Resize the shorter side, crop the centre, normalise; nothing random."""
    size = config.data.image_size
    share = 1.0 if size <= _UNCROPPED_SIZE else config.data.crop_pct
    return transforms.Compose([*_resize(config, math.floor(size / share)), *_to_tensor(statistics)])


def build_mixup(config: Config, num_classes: int) -> Mixup | None:
    """Mixup and CutMix of a batch, or None when both are off.

    Called with images (B, 3, H, W) and targets (B,), B even, it returns mixed images and targets (B, num_classes)
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
    size, augment = config.data.image_size, config.augment
    if augment.crop == "random_resized":
        return [_random_resized_crop(size, augment, config.data.interpolation)]
    if augment.crop == "pad":
        resize = transforms.Resize(size, interpolation=str_to_interp_mode(config.data.interpolation))
        return [_limit_aspect, resize, transforms.RandomCrop(size, padding=augment.pad)]
    return _resize(config, size)


def _random_resized_crop(size: int, augment: AugmentConfig, interpolation: str) -> Callable:
    return RandomResizedCropAndInterpolation(size, augment.scale, augment.ratio, interpolation)


def _resize(config: Config, shorter_side: int) -> list[Callable]:
    interpolation = str_to_interp_mode(config.data.interpolation)
    return [
        _limit_aspect,
        transforms.Resize(shorter_side, interpolation=interpolation),
        transforms.CenterCrop(config.data.image_size),
    ]


def _limit_aspect(image: Image.Image) -> Image.Image:
    """Crop very long images: resizing the shorter side of 1 × 100,000 pixels to 224 would give 5 billion pixels."""
    longest = _MAX_ASPECT * min(image.size)
    if max(image.size) <= longest:
        return image
    left, top = max(0, (image.width - longest) // 2), max(0, (image.height - longest) // 2)
    return image.crop((left, top, left + min(image.width, longest), top + min(image.height, longest)))


def _to_tensor(statistics: Statistics) -> list[Callable]:
    return [transforms.ToTensor(), transforms.Normalize(statistics.mean, statistics.std)]


def _auto_augment(policy: str, config: Config, statistics: Statistics) -> Callable:
    parameters = {
        "translate_const": int(config.data.image_size * 0.45),
        "img_mean": tuple(min(255, round(255 * value)) for value in statistics.mean),
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
