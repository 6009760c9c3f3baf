"""Images held in memory: any array, scikit-learn's digits, CIFAR. Light: only CIFAR imports torch."""

import hashlib
import warnings
from contextlib import nullcontext

import numpy as np
from PIL import Image

from acmix.config import DataConfig
from acmix.data.datasets import data_root
from acmix.data.download import download_lock
from acmix.data.folders import from_where
from acmix.errors import UserError

_TRAIN_NAMES = ("train", "training")
_VAL_NAMES = ("val", "valid", "validation", "test", "eval")
_DIGITS_SIZE = 32
_DIGITS_VAL = 360


class ArraySource:
    """Images held in memory.

    name: what messages call the images, e.g. "digits/train"
    images: (N, H, W, 3) uint8, RGB
    targets: (N,) integers, indices into `classes`

    Raises UserError for arrays of another shape or type.
    """

    def __init__(self, name: str, images: np.ndarray, targets: np.ndarray, classes: list[str]) -> None:
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise UserError(f"{name}: images must be (N, H, W, 3) uint8, got {images.shape} {images.dtype}")
        if targets.shape != images.shape[:1] or not np.isin(targets, np.arange(len(classes))).all():
            raise UserError(f"{name}: targets must be {len(images)} integers from 0 to {len(classes) - 1}")
        self.classes = classes
        self.targets = targets.astype(np.int64)
        self._images = images
        self._name = name

    def __len__(self) -> int:
        return len(self.targets)

    def load(self, index: int) -> tuple[Image.Image, int]:
        """The image and its class index."""
        return Image.fromarray(self._images[index]), int(self.targets[index])

    def fingerprint(self) -> str:
        """What tells these images from all others."""
        digest = hashlib.blake2b(np.ascontiguousarray(self._images).data, digest_size=16)
        digest.update(self.targets.tobytes())
        return digest.hexdigest()

    def describe(self, index: int) -> str:
        """Name of the dataset, number and class."""
        return f"{self._name} image {index} (class {self.classes[self.targets[index]]})"


def open_digits(data: DataConfig, split: str) -> ArraySource:
    """scikit-learn's 8 × 8 digits, enlarged to 32 × 32, in a fixed, stratified split. Raises UserError."""
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


def open_cifar(data: DataConfig, split: str) -> ArraySource:
    """CIFAR-10 or CIFAR-100 from torchvision's files, which `data.download` fetches. Raises UserError."""
    from torchvision.datasets import CIFAR10, CIFAR100  # imports torch

    root, train = data_root(data), _is_train(data, split)
    maker = {"cifar10": CIFAR10, "cifar100": CIFAR100}[data.dataset]
    with download_lock(root) if data.download else nullcontext():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torchvision's pickles announce numpy deprecations
                dataset = maker(str(root), train=train, download=data.download)
        except (RuntimeError, OSError, EOFError) as error:
            way_out = "check the connection and the disk" if data.download else "set data.download=true to fetch it"
            raise UserError(
                f"{root}: {data.dataset} not found or damaged; {way_out} ({error}){from_where(root)}"
            ) from None
    return ArraySource(f"{data.dataset}/{split}", dataset.data, np.asarray(dataset.targets), list(dataset.classes))


def _is_train(data: DataConfig, split: str) -> bool:
    if split not in (*_TRAIN_NAMES, *_VAL_NAMES):
        raise UserError(f"dataset {data.dataset}: no split {split!r}; it has train and val")
    return split in _TRAIN_NAMES
