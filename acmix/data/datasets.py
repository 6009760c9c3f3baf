"""Where images come from: the configured dataset as two sources of decoded images that agree on their classes.

Light (no torch). A dataset of your own needs a `Source` and one call of `acmix.config.register_dataset`.
"""

import pkgutil
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image

from acmix.config import Config, DataConfig, find_dataset
from acmix.data.folders import FolderSource, check_same_classes
from acmix.data.tars import shard_source, tar_source
from acmix.errors import UserError

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, by which Pillow makes grey from R, G and B


class Source(Protocol):
    """Images that can be read in any order, any number of times, by any number of processes."""

    classes: list[str]
    """Class names; the index of a class is its place here."""

    def __len__(self) -> int: ...

    def load(self, index: int) -> tuple[Image.Image, int]:
        """Decoded RGB image and class index. Raises acmix.data.images.BadImage for an image that cannot be read."""

    def describe(self, index: int) -> str:
        """Where the image is and its class, for messages."""


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation by which the channels are normalised: of R, G, B in 0..1, or of grey alone."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def build_sources(config: Config) -> tuple[Source, Source, Statistics]:
    """Training source, validation source and statistics of the configured dataset.

    Raises UserError: missing data, classes that differ, a dataset that cannot be read in any order.
    """
    data = config.data
    train, val = build_source(data, data.train_split), build_source(data, data.val_split)
    check_same_classes(
        train.classes, val.classes, _split_name(data, data.train_split), _split_name(data, data.val_split)
    )
    if train.classes != val.classes:
        raise UserError(f"dataset {data.dataset}: training and validation list the same classes in another order")
    return train, val, statistics_of(data, config.model.in_chans)


def build_source(data: DataConfig, split: str) -> Source:
    """One split of the configured dataset. Raises UserError."""
    build = find_dataset(data.dataset).build
    if isinstance(build, str):
        build = pkgutil.resolve_name(build)
    source: Source = build(data, split)
    if not len(source):
        raise UserError(f"dataset {data.dataset}: the split {split} holds no images")
    return source


def statistics_of(data: DataConfig, channels: int = 3) -> Statistics:
    """Mean and standard deviation from the config, else those of the dataset, for images of 1 or 3 channels.

    Three numbers make those of the grey image by the weights that make it from R, G and B; the standard deviation
    is then that of images whose channels vary together. One number stands for every channel.
    """
    dataset = find_dataset(data.dataset)
    return Statistics(_for(channels, data.mean or dataset.mean), _for(channels, data.std or dataset.std))


def _for(channels: int, values: tuple[float, ...]) -> tuple[float, ...]:
    if len(values) == 1:
        return values * channels
    return values if channels == 3 else (sum(w * value for w, value in zip(_LUMA, values, strict=True)),)


def data_root(data: DataConfig) -> Path:
    """`data.root` as a path. Raises UserError where it is not set."""
    if data.root is None:
        raise UserError(f"data.root is required for the dataset {data.dataset}")
    return Path(data.root).expanduser()


def open_folder(data: DataConfig, split: str) -> Source:
    """`ROOT/SPLIT/CLASS/**/IMAGE`, or ROOT itself where it is a tar file."""
    root = data_root(data)
    return tar_source(root, split) if root.is_file() else FolderSource(root / split)


def open_tar(data: DataConfig, split: str) -> Source:
    """Plain tar files with class folders."""
    return tar_source(data_root(data), split)


def open_shards(data: DataConfig, split: str) -> Source:
    """WebDataset shards."""
    return shard_source(data_root(data), split)


def _split_name(data: DataConfig, split: str) -> str:
    return str(data_root(data) / split) if find_dataset(data.dataset).name == "folder" else split
