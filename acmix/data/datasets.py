"""Where images come from: every dataset name → two sources of decoded images that agree on their classes."""

import fcntl
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torchvision
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from acmix.config import Config, DataConfig, dataset_kind
from acmix.data.folders import FolderSource, check_same_classes
from acmix.data.images import BadImage, decode_image, read_image_file
from acmix.data.tars import shard_source, tar_source
from acmix.errors import UserError

Triple = tuple[float, float, float]

_STATISTICS: dict[str, tuple[Triple, Triple]] = {  # mean, deviation of R, G, B over the training images
    "digits": ((0.309, 0.309, 0.309), (0.349, 0.349, 0.349)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
_TRAIN_NAMES = ("train", "training")
_VAL_NAMES = ("val", "valid", "validation", "test", "eval")
_DIGITS_SIZE = 32
_DIGITS_VAL = 360


class Source(Protocol):
    """Images that can be read in any order, any number of times."""

    classes: list[str]

    def __len__(self) -> int: ...

    def load(self, index: int) -> tuple[Image.Image, int]:
        """Decoded RGB image and class index. Raises BadImage."""

    def describe(self, index: int) -> str:
        """Where the image is and its class, for messages."""


@dataclass(frozen=True)
class Statistics:
    """Mean and deviation by which the channels (R, G, B in 0..1) are normalised."""

    mean: Triple
    std: Triple


class ArraySource:
    """Images held in memory, (N, H, W, 3) uint8."""

    def __init__(self, name: str, images: np.ndarray, targets: np.ndarray, classes: list[str]) -> None:
        self.classes = classes
        self.targets = targets.astype(np.int64)
        self._images = images
        self._name = name

    def __len__(self) -> int:
        return len(self.targets)

    def load(self, index: int) -> tuple[Image.Image, int]:
        """The image and its class index."""
        return Image.fromarray(self._images[index]), int(self.targets[index])

    def describe(self, index: int) -> str:
        """Name of the dataset, number and class."""
        return f"{self._name} image {index} (class {self.classes[self.targets[index]]})"


class TimmSource:
    """A random-access dataset made by timm, decoded by our own rules.

    timm's own loading replaces an image that cannot be read by the next one; here it is an error.
    """

    def __init__(self, name: str, dataset: Any) -> None:
        self.classes = _class_names(dataset)
        self._dataset = dataset
        self._name = name

    def __len__(self) -> int:
        return len(self._dataset)

    def load(self, index: int) -> tuple[Image.Image, int]:
        """Decoded RGB image and class index. Raises BadImage."""
        reader = getattr(self._dataset, "reader", None)
        try:
            if reader is None:
                image, target = self._dataset[index]
                return image.convert("RGB"), self._checked(target)
            file, target, *_ = reader[index]
            with file:
                return decode_image(file.read()), self._checked(target)
        except OSError as error:
            raise BadImage("unreadable", str(error)) from None

    def describe(self, index: int) -> str:
        """The file name where timm knows it, else the number."""
        reader = getattr(self._dataset, "reader", None)
        return f"{self._name}: {reader.filename(index) if reader is not None else f'image {index}'}"

    def _checked(self, target: Any) -> int:
        if not 0 <= int(target) < len(self.classes):
            raise UserError(f"{self._name}: label {target} outside 0..{len(self.classes) - 1}; unlabelled split?")
        return int(target)


def build_sources(config: Config) -> tuple[Source, Source, Statistics]:
    """Training source, validation source and statistics of the configured dataset.

    Raises UserError: missing data, classes that differ, a dataset that cannot give the guarantees.
    """
    data = config.data
    train, val = build_source(data, data.train_split), build_source(data, data.val_split)
    check_same_classes(train.classes, val.classes, _split_name(data, True), _split_name(data, False))
    if train.classes != val.classes:
        raise UserError(f"dataset {data.dataset}: training and validation list the same classes in another order")
    return train, val, statistics_of(data)


def build_source(data: DataConfig, split: str) -> Source:
    """One split of the configured dataset. Raises UserError."""
    source = _BUILDERS[dataset_kind(data.dataset)](data, split)
    if not len(source):
        raise UserError(f"dataset {data.dataset}: the split {split} holds no images")
    return source


def statistics_of(data: DataConfig) -> Statistics:
    """Mean and deviation from the config, else of the dataset, else of ImageNet."""
    mean, std = _STATISTICS.get(data.dataset, (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return Statistics(data.mean or mean, data.std or std)


def _root(data: DataConfig) -> Path:
    if data.root is None:
        raise UserError(f"data.root is required for the dataset {data.dataset}")
    return Path(data.root).expanduser()


def _split_name(data: DataConfig, train: bool) -> str:
    split = data.train_split if train else data.val_split
    return str(_root(data) / split) if data.dataset == "folder" else split


def _is_train(data: DataConfig, split: str) -> bool:
    if split not in (*_TRAIN_NAMES, *_VAL_NAMES):
        raise UserError(f"dataset {data.dataset}: no split {split!r}; it has train and val")
    return split in _TRAIN_NAMES


def _folder(data: DataConfig, split: str) -> Source:
    root = _root(data)
    return tar_source(root, split) if root.is_file() else FolderSource(root / split)


def _digits(data: DataConfig, split: str) -> Source:
    from sklearn.datasets import load_digits  # a second of imports that other datasets do not need
    from sklearn.model_selection import train_test_split

    images, targets = load_digits(return_X_y=True)
    train, val = train_test_split(np.arange(len(targets)), test_size=_DIGITS_VAL, random_state=0, stratify=targets)
    chosen = np.sort(train if _is_train(data, split) else val)
    grey = np.rint(images.reshape(-1, 8, 8)[chosen] * (255 / 16)).astype(np.uint8)
    size = (_DIGITS_SIZE, _DIGITS_SIZE)
    large = [np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)) for image in grey]
    colour = np.repeat(np.stack(large)[..., None], 3, axis=3)
    return ArraySource(f"digits/{split}", colour, targets[chosen], [str(digit) for digit in range(10)])


def _cifar(data: DataConfig, split: str) -> Source:
    root, train = _root(data), _is_train(data, split)
    maker = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[data.dataset]
    with _one_at_a_time(root) if data.download else _nothing():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torchvision's pickles announce numpy deprecations
                dataset = maker(str(root), train=train, download=data.download)
        except (RuntimeError, OSError, EOFError) as error:
            way_out = "check the connection and the disk" if data.download else "set data.download=true to fetch it"
            raise UserError(f"{root}: {data.dataset} not found or damaged; {way_out} ({error})") from None
    return ArraySource(f"{data.dataset}/{split}", dataset.data, np.asarray(dataset.targets), list(dataset.classes))


def _timm(data: DataConfig, split: str) -> Source:
    from timm.data import create_dataset  # slow to import, and not needed for the other datasets

    kwargs: dict[str, Any] = {"download": True} if data.download else {}
    root = None if data.root is None else str(Path(data.root).expanduser())
    if root is not None and not data.dataset.lower().startswith("hfds/") and not os.path.exists(root):
        raise UserError(f"{root}: no such folder; set data.root")
    try:
        with _one_at_a_time(Path(root)) if root and data.download else _nothing():
            dataset = create_dataset(data.dataset, root=root, split=split, **kwargs)
    except ImportError as error:
        raise UserError(f"dataset {data.dataset} needs a package that is not installed: {error}") from None
    except (AssertionError, OSError, RuntimeError, ValueError, LookupError, TypeError) as error:
        reason = str(error) or type(error).__name__
        raise UserError(f"dataset {data.dataset}, split {split}: timm cannot open it: {reason}") from None
    if not hasattr(dataset, "__getitem__") or not len(dataset):
        raise UserError(f"dataset {data.dataset}, split {split}: no images that can be read in any order")
    if hasattr(dataset, "loader"):  # torchvision's folders: decode as everywhere else
        dataset.loader = lambda path: decode_image(read_image_file(path))
    return TimmSource(f"{data.dataset}/{split}", dataset)


def _class_names(dataset: Any) -> list[str]:
    reader = getattr(dataset, "reader", None)
    mapping = next(
        (m for m in (getattr(x, "class_to_idx", None) for x in (reader, dataset) if x is not None) if m),
        None,
    )
    if mapping:
        return [str(name) for name in sorted(mapping, key=mapping.__getitem__)]
    classes: Sequence[object] = getattr(dataset, "classes", ())
    if not classes:
        raise UserError(f"dataset {type(dataset).__name__}: it does not name its classes")
    return [str(name) for name in classes]


_BUILDERS: dict[str, Callable[[DataConfig, str], Source]] = {
    "digits": _digits,
    "cifar10": _cifar,
    "cifar100": _cifar,
    **dict.fromkeys(("folder", "imagefolder", "image_folder"), _folder),
    "tar": lambda data, split: tar_source(_root(data), split),
    "wds/": lambda data, split: shard_source(_root(data), split),
    "torch/": _timm,
    "hfds/": _timm,
}


@contextmanager
def _one_at_a_time(root: Path) -> Iterator[None]:
    """Hold a lock beside the data, so that of several processes one downloads and the rest find it done."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with open(root / ".download.lock", "w") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise UserError(f"{root}: cannot be written: {error.strerror or error}") from None


@contextmanager
def _nothing() -> Iterator[None]:
    yield
