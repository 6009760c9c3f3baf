"""Images held in memory: any array, scikit-learn's digits, CIFAR. Light: only CIFAR imports torch."""

import hashlib
import warnings
from contextlib import nullcontext, suppress
from functools import cache
from importlib.metadata import version
from io import BytesIO

import numpy as np
from PIL import Image

from acmix.checkpoint.atomic import replacing
from acmix.config import DataConfig
from acmix.data.datasets import data_root
from acmix.data.download import download_lock
from acmix.data.folders import from_where
from acmix.errors import UserError
from acmix.paths import cache_folder

_TRAIN_NAMES = ("train", "training")
_VAL_NAMES = ("val", "valid", "validation", "test", "eval")
_DIGITS_SIZE = 32
_DIGITS_VAL = 360
_DIGITS_FORMAT = 1  # of the file that keeps them
_DIGEST = 16  # bytes


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
    is_train = _is_train(data, split)
    images, targets, train, val = read_digits()
    chosen = train if is_train else val
    return ArraySource(f"digits/{split}", images[chosen], targets[chosen], [str(digit) for digit in range(10)])


@cache
def read_digits() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """All images (N, 32, 32, 3) and targets, and the indices of both splits.

    They are kept in the cache folder: scikit-learn takes a second to import. A damaged one is made anew.
    """
    with suppress(UserError, OSError):
        path = cache_folder() / f"digits-{_DIGITS_FORMAT}-{version('scikit-learn')}"
        kept = path.read_bytes() if path.is_file() else b""
        if kept[:_DIGEST] == _digest(kept[_DIGEST:]):
            with np.load(BytesIO(kept[_DIGEST:])) as arrays:
                return arrays["images"], arrays["targets"], arrays["train"], arrays["val"]
        images, targets, train, val = _make_digits()
        content = BytesIO()
        np.savez(content, images=images, targets=targets, train=train, val=val)
        with replacing(path) as temporary:
            temporary.write_bytes(_digest(content.getvalue()) + content.getvalue())
    return _make_digits()


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST).digest()


@cache
def _make_digits() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, targets = load_digits(return_X_y=True)
    train, val = train_test_split(np.arange(len(targets)), test_size=_DIGITS_VAL, random_state=0, stratify=targets)
    grey = np.rint(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    size = (_DIGITS_SIZE, _DIGITS_SIZE)
    large = [np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)) for image in grey]
    return np.repeat(np.stack(large)[..., None], 3, axis=3), targets, np.sort(train), np.sort(val)


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
