"""Images with boxes and masks, made on the spot: discs, squares and triangles that hide parts of each other."""

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

CLASSES = ("background", "disc", "square", "triangle")
Target = dict[str, Tensor]


class Shapes(Dataset[tuple[Tensor, Target]]):
    """Images (3, H, W) in [0, 1] of many sizes, odd ones and both orientations among them, and what they show.

    A target has `boxes` (N, 4) in pixels x1, y1, x2, y2, `labels` (N,) from 1, `masks` (N, H, W) of what is visible and
    `image_id`, as torchvision's detectors take them.

    Args:
        count: Number of images.
        size: Shortest side of an image; the longest is half as long again.
        seed: Another seed gives other images; the same gives the same.
    """

    def __init__(self, count: int, size: int = 96, seed: int = 0) -> None:
        self.count, self.size, self.seed = count, size, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        random = np.random.default_rng((self.seed, index))
        height, width = (int(side) for side in random.integers(self.size, self.size * 3 // 2 + 1, 2))
        image = random.uniform(0.0, 0.4, (3, 1, 1)) + random.normal(0.0, 0.03, (3, height, width))
        shown = np.zeros((height, width), dtype=int)  # 0, or 1 + the index of the shape on top
        labels = random.integers(1, len(CLASSES), random.integers(2, 6))
        for number, label in enumerate(labels, start=1):
            mask = _mask(random, int(label), height, width)
            shown[mask] = number
            image[:, mask] = random.uniform(0.5, 1.0, (3, 1)) + random.normal(0.0, 0.03, (3, int(mask.sum())))
        masks = shown == np.arange(1, len(labels) + 1)[:, None, None]
        visible = masks.sum((1, 2)) >= 20
        return torch.from_numpy(image.clip(0, 1)).float(), _target(masks[visible], labels[visible], index)


def semantic_map(target: Target) -> Tensor:
    """The class of each pixel, (H, W), 0 where there is no shape."""
    return (target["masks"] * target["labels"][:, None, None]).amax(0)


def _mask(random: np.random.Generator, label: int, height: int, width: int) -> np.ndarray:
    radius = random.uniform(0.12, 0.25) * min(height, width)
    y, x = random.uniform(radius, height - radius), random.uniform(radius, width - radius)
    rows, columns = np.arange(height)[:, None] - y, np.arange(width) - x
    if label == 1:
        return rows**2 + columns**2 <= radius**2
    if label == 2:
        return np.maximum(abs(rows), abs(columns)) <= 0.9 * radius
    return (abs(rows) <= radius) & (abs(columns) <= (rows + radius) / 2)


def _target(masks: np.ndarray, labels: np.ndarray, index: int) -> Target:
    boxes = []
    for mask in masks:
        rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
        boxes.append([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    return {
        "boxes": torch.tensor(np.array(boxes), dtype=torch.float32),
        "labels": torch.from_numpy(labels),
        "masks": torch.from_numpy(masks.astype(np.uint8)),
        "image_id": torch.tensor(index),
    }
