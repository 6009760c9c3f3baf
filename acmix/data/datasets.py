"""Where images come from: the configured dataset as two sources of decoded images that agree on their classes.

Light (no torch). A dataset of your own needs a `Source` and one call of `acmix.config.register_dataset`.
"""

import pkgutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from PIL import Image

from acmix.config import Config, DataConfig, find_dataset
from acmix.data.classes import (
    Renumbered,
    check_trained_classes,
    check_val_classes,
    in_order,
    likely_meant,
    places_in,
    present_classes,
    read_classes,
    same_names,
)
from acmix.data.folders import FolderSource, has_class_folders, some
from acmix.data.labels import Warn, labelled_source
from acmix.data.remote import is_address, open_remote
from acmix.data.shards import open_prepared
from acmix.data.tars import shard_source, tar_source
from acmix.errors import UserError

Role = Literal["train", "val"]
"""What a split is for, whatever its name."""

SPLIT = "{split}"
"""Stands for the role in `data.labels`."""

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


class FileBacked(Source, Protocol):
    """A source whose images are files, which can also be had as they are."""

    def read(self, index: int) -> tuple[bytes, int]:
        """The bytes of an image file and the class index. Raises acmix.data.images.BadImage."""


def as_files(source: Source) -> FileBacked | None:
    """The source where it can `read` files, else None."""
    return source if hasattr(_innermost(source), "read") else None  # type: ignore[return-value]


def is_verified(source: Source) -> bool:
    """Whether all that the source reads went through Pillow once, and has not changed since."""
    return getattr(_innermost(source), "verified", False)


def to_repair(source: Source) -> str:
    """What to do about an image that cannot be read, for messages; the folder check reads class folders alone."""
    all_listed = " (scripts/check_data.py lists all)" if isinstance(_innermost(source), FolderSource) else ""
    return f"repair or remove it{all_listed}"


def _innermost(source: Source) -> Source:
    while isinstance(source, Renumbered):
        source = source.source
    return source


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation by which the channels are normalised: of R, G, B in 0..1, or of grey alone."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def build_sources(
    config: Config, trained: Sequence[str] | None = None, rank: int = 0
) -> tuple[Source, Source, Statistics]:
    """Training source, validation source and statistics of the configured dataset; both number the classes alike.

    trained: the classes of the run or weights to go on from; where the data has the same, in any order, they keep
        their numbers

    On rank 0 warns of classes without images. Raises UserError: missing data, validation classes that training lacks,
    a dataset that cannot be read in any order.
    """
    data = config.data
    warn = _warn if rank == 0 else _say_nothing
    listed = _listed_classes(data)
    train = _open_split(config, "train", listed, warn)
    order = listed or _own_order(config, train)
    if trained is not None and same_names(order, trained):
        order = list(trained)
    val = _open_split(config, "val", listed or order, warn)
    if listed is None:
        check_val_classes(order, val.classes, _split_name(data, "train"), _split_name(data, "val"))
    numbered: dict[Role, Source] = {"train": train, "val": val}
    for role, source in numbered.items():
        name = _split_name(data, role)
        numbered[role] = _numbered(source, order, f"{name}: not in data.classes ({data.classes})")
        missing = sorted(set(range(len(order))) - set(present_classes(numbered[role])))
        if missing:
            warn(f"{name}: no images of {len(missing)} of {len(order)} classes: {some([order[i] for i in missing])}")
    return numbered["train"], numbered["val"], statistics_of(data, config.model.in_chans)


def build_val_source(config: Config, trained: Sequence[str] | None = None, rank: int = 0) -> Source:
    """The validation source alone, for evaluation; it may hold a part of the classes.

    trained: the classes that the model was trained on, in order; None: the weights do not say. Then `data.classes` or
        `data.class_order` does; where neither is given and it matters, rank 0 warns

    Raises UserError for classes that the model was not trained on.
    """
    data = config.data
    warn = _warn if rank == 0 else _say_nothing
    listed = _listed_classes(data)
    source = _open_split(config, "val", listed or trained, warn)
    if trained is not None:
        check_trained_classes(source.classes, trained)
    elif listed is None and data.class_order is None:
        _warn_of_order(source.classes, warn)
    order = trained or listed or _own_order(config, source)
    return _numbered(source, order, f"{_split_name(data, 'val')}: not in data.classes ({data.classes})")


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
    """WebDataset shards: prepared ones by their manifest, others by a look at every member."""
    if is_address(data.root):
        return open_remote(data, split)
    root = data_root(data)
    return open_prepared(root, split) or shard_source(root, split)


def _open_split(config: Config, role: Role, known: Sequence[str] | None, warn: Warn) -> Source:
    """A split with classes of its own; `known` are those that numbers in a labels file count through."""
    data, split = config.data, _split(config.data, role)
    if data.labels is None:
        return build_source(data, split)
    shared = SPLIT not in data.labels
    if role == "train" and shared and has_class_folders(data_root(data) / split):
        warn(f"{data_root(data) / split}: its folders are its classes; data.labels, {data.labels}, is for validation")
        return build_source(data, split)
    path = Path(data.labels.replace(SPLIT, role)).expanduser()
    other = _split(data, "val" if role == "train" else "train") if shared else None
    count = None if known else config.model.num_classes
    return labelled_source(data_root(data), split, path, known, count, warn, other)


def _own_order(config: Config, source: Source) -> list[str]:
    """The classes of a split in the order of `data.class_order`; numbers in a labels file stand for all up to
    `model.num_classes`."""
    count = config.model.num_classes or 0
    labelled = config.data.labels is not None
    if labelled and len(source.classes) < count and all(name.isdecimal() for name in source.classes):
        return [str(number) for number in range(count)]
    return in_order(source.classes, config.data.class_order)


def _numbered(source: Source, order: Sequence[str], what: str) -> Source:
    """The source with its targets as indices into `order`. Raises UserError for classes that it lacks."""
    if source.classes == list(order):
        return source
    _, unknown = places_in(source.classes, order)
    if unknown:
        raise UserError(f"{what}: {some(unknown)}{likely_meant(unknown, order)}; name all classes there")
    return Renumbered(source, order)


def _listed_classes(data: DataConfig) -> list[str] | None:
    return None if data.classes is None else read_classes(Path(data.classes).expanduser())


def _warn_of_order(classes: Sequence[str], warn: Warn) -> None:
    """Where names sort as text in another way than naturally, and nothing says in which the model was trained."""
    if list(classes) == in_order(classes, "sorted") != in_order(classes, "natural"):
        warn(
            f"the weights do not say the order of their classes; it is taken to be that of text: {some(classes)}; for "
            "weights trained with timm set data.class_order=natural, for any other order data.classes=FILE, and "
            "data.class_order=sorted where it is right"
        )


def _split(data: DataConfig, role: Role) -> str:
    return data.train_split if role == "train" else data.val_split


def _split_name(data: DataConfig, role: Role) -> str:
    split = _split(data, role)
    return str(data_root(data) / split) if find_dataset(data.dataset).name == "folder" else split


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


def _say_nothing(text: str) -> None:
    pass
