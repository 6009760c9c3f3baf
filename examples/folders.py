"""COCO and ADE20K as they lie on disk once their archives are unpacked."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.transforms import v2

from acmix.errors import UserError, one_line
from acmix.paths import missing_path_hint


def coco(root: Path, split: str, *, train: bool) -> tuple[Dataset[tuple[Tensor, dict[str, Tensor]]], Any]:
    """ROOT/SPLIT/*.jpg with ROOT/annotations/instances_SPLIT.json, as images with targets like those of `Shapes`.

    Beside them the ground truth, a `pycocotools.coco.COCO`.

    For training images are flipped at random; crowds, boxes without an area and images without objects are left out.
    Raises UserError.
    """
    annotations = _existing(root / "annotations" / f"instances_{split}.json")
    flip = [v2.RandomHorizontalFlip()] if train else []
    transforms = v2.Compose([v2.ToImage(), *flip, v2.ToDtype(torch.float32, scale=True)])
    try:
        dataset = CocoDetection(_existing(root / split), annotations, transforms=transforms)
        truth = dataset.coco
        if not truth.dataset["categories"]:
            raise ValueError("it has no categories")
    except (ValueError, LookupError, TypeError, AssertionError) as error:
        raise UserError(f"{annotations}: is no file of COCO's instances: {one_line(error)}") from error
    if train:
        for image, found in truth.imgToAnns.items():
            truth.imgToAnns[image] = [a for a in found if not a["iscrowd"] and min(a["bbox"][2:]) >= 1]
        dataset.ids = [image for image in dataset.ids if truth.imgToAnns.get(image)]
    return wrap_dataset_for_transforms_v2(dataset, ("image_id", "boxes", "labels", "masks")), dataset.coco


class ADE20K(Dataset[tuple[Tensor, Tensor]]):
    """ROOT/images/SPLIT/*.jpg with ROOT/annotations/SPLIT/*.png: images (3, H, W) in [0, 1] and classes (H, W).

    In the files 0 is unlabelled and classes count from 1; here they count from 0, and unlabelled is 255.

    Args:
        root: ROOT.
        split: SPLIT, such as training or validation.
        short_side: Images are resized to it.
        crop: Cut a square of that side at random, and flip at random: for training.

    Raises:
        UserError: for folders that are not there, or an image without its annotation.
    """

    def __init__(self, root: Path, split: str, short_side: int, *, crop: bool) -> None:
        self.images = sorted(_existing(root / "images" / split).glob("*.jpg"))
        self.annotations = _existing(root / "annotations" / split)
        if not self.images:
            raise UserError(f"{root / 'images' / split}: holds no .jpg")
        for image in self.images:
            _existing(self._annotation(image))
        self.short_side, self.crop = short_side, crop

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        path = self.images[index]
        with Image.open(path) as image, Image.open(self._annotation(path)) as classes:
            scale = self.short_side / min(image.size)
            size = (round(image.width * scale), round(image.height * scale))
            colours = image.convert("RGB").resize(size, Image.Resampling.BILINEAR)
            numbers = classes.resize(size, Image.Resampling.NEAREST)
        pixels = torch.from_numpy(np.array(colours)).permute(2, 0, 1).float() / 255
        labels = torch.from_numpy(np.array(numbers)).long()
        labels = torch.where(labels == 0, 255, labels - 1)
        if not self.crop:
            return pixels, labels
        top, left = (int(torch.randint(side - self.short_side + 1, ())) for side in labels.shape)
        window = (..., slice(top, top + self.short_side), slice(left, left + self.short_side))
        pixels, labels = pixels[window], labels[window]
        return (pixels.flip(-1), labels.flip(-1)) if torch.rand(()) < 0.5 else (pixels, labels)

    def _annotation(self, image: Path) -> Path:
        return self.annotations / f"{image.stem}.png"


def _existing(path: Path) -> Path:
    if not path.exists():
        raise UserError(f"{path}: no such file or folder{missing_path_hint(path)}")
    return path
