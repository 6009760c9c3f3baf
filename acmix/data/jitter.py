"""Brightness, contrast and saturation of whole batches, to the bit what Pillow makes of each image."""

from collections.abc import Callable

import numpy as np

_RED, _GREEN, _BLUE, _HALF = 19595, 38470, 7471, 0x8000  # ITU-R BT.601 in units of 2^-16, as Pillow has it


def jitter(pixels: np.ndarray, strength: float, numbers: np.ndarray) -> None:
    """Change (B, H, W, 3) uint8 in place as torchvision's ColorJitter(strength, strength, strength) does.

    numbers: (6, B) in [0, 1): of each sample the three factors and what puts the three steps in order
    """
    low, high = max(0.0, 1 - strength), 1 + strength
    factors = low + numbers[:3] * (high - low)
    order = numbers[3:].argsort(axis=0)
    for turn in order:
        for kind, away in enumerate(_STEPS):
            chosen = np.flatnonzero(turn == kind)
            if len(chosen):
                images = pixels[chosen]
                pixels[chosen] = _blend(away(images), images, factors[kind, chosen])


def grey(pixels: np.ndarray) -> np.ndarray:
    """(B, H, W, 3) uint8 → (B, H, W) uint8."""
    red, green, blue = (pixels[..., channel].astype(np.uint32) for channel in range(3))
    return ((red * _RED + green * _GREEN + blue * _BLUE + _HALF) >> 16).astype(np.uint8)


def _blend(away: np.ndarray, images: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """From `away` (factor 0) through the images (1) to more of them; fractions are cut off."""
    start = away.astype(np.float32)
    step = images.astype(np.float32) - start
    return np.clip(start + factors.astype(np.float32)[:, None, None, None] * step, 0, 255).astype(np.uint8)


def _black(images: np.ndarray) -> np.ndarray:
    return np.zeros((1, 1, 1, 1), dtype=np.uint8)


def _mean_grey(images: np.ndarray) -> np.ndarray:
    return (grey(images).mean(axis=(1, 2)) + 0.5).astype(np.uint8)[:, None, None, None]


def _own_grey(images: np.ndarray) -> np.ndarray:
    return grey(images)[..., None]


_STEPS: tuple[Callable[[np.ndarray], np.ndarray], ...] = (_black, _mean_grey, _own_grey)
"""What brightness, contrast and saturation lead away from."""
