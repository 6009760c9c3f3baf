"""Image files named on a command line, read and prepared as validation does it."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from acmix.data.datasets import build_val_source
from acmix.data.folders import image_files, no_images
from acmix.data.images import BadImage, decode_image, read_image_file
from acmix.data.transforms import Transform
from acmix.errors import UserError
from acmix.export.load import Trained
from acmix.export.preprocessing import Preprocessing


def list_images(paths: Iterable[Path]) -> list[Path]:
    """The files as given, and of each folder all images below it, sorted. Raises UserError for a folder without any."""
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        inside = [path / name for name in sorted(image_files(path))]
        if not inside:
            raise UserError(no_images(path))
        found += inside
    return found


def read_image(path: Path, transform: Transform) -> Tensor:
    """One image file as input of a network, (C, H, W). Raises BadImage."""
    return transform(decode_image(read_image_file(path)))


def validation_images(trained: Trained, count: int) -> Tensor:
    """Images of the run's validation split, evenly spread over it: (count, C, H, W). Raises UserError."""
    source = build_val_source(trained.config, trained.classes)
    transform = Preprocessing.of(trained.config).transform()
    places = [place * len(source) // count for place in range(count)]
    images = []
    for place in places:
        try:
            images.append(transform(source.load(place)[0]))
        except BadImage as error:
            raise UserError(f"{source.describe(place)}: {error.reason}") from None
    return torch.stack(images)
