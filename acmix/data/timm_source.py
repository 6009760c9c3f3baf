"""Datasets that timm opens by name: `torch/NAME` and `hfds/NAME`."""

import os
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from acmix.config import DataConfig, find_dataset
from acmix.data.download import download_lock
from acmix.data.folders import from_where, image_files
from acmix.data.images import BadImage, decode_image, read_image_file
from acmix.errors import UserError

_FOLDERS = ("torch/image_folder", "torch/folder")
"""Walked once before torchvision does, which would follow a link back to a parent forty levels down."""


class TimmSource:
    """A random-access dataset made by timm, decoded by our own rules.

    timm's own loading replaces an image that cannot be read by the next one; here it is an error.
    """

    def __init__(self, name: str, dataset: Any) -> None:
        self.classes = _class_names(dataset)
        self._dataset = dataset
        self._name = name

    @property
    def targets(self) -> np.ndarray | None:
        """The class of each image, (N,), where the dataset holds them."""
        known = getattr(self._dataset, "targets", None)
        return None if known is None else np.asarray(known)

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
        """The file's name where timm or torchvision knows it, else the number."""
        reader = getattr(self._dataset, "reader", None)
        if reader is not None:
            return f"{self._name}: {reader.filename(index)}"
        samples = getattr(self._dataset, "samples", None)  # of torchvision's folders: path and class
        return f"{self._name}: {f'image {index}' if samples is None else samples[index][0]}"

    def _checked(self, target: Any) -> int:
        if not 0 <= int(target) < len(self.classes):
            raise UserError(f"{self._name}: label {target} outside 0..{len(self.classes) - 1}; unlabelled split?")
        return int(target)


def open_timm(data: DataConfig, split: str) -> TimmSource:
    """A dataset that `timm.data.create_dataset` opens and that can be read in any order. Raises UserError."""
    from timm.data import create_dataset  # slow to import, and not needed for the other datasets

    kwargs: dict[str, Any] = {"download": True} if data.download else {}
    root = None if data.root is None else str(Path(data.root).expanduser())
    if root is not None and find_dataset(data.dataset).needs_root and not os.path.exists(root):
        raise UserError(f"{root}: no such folder; set data.root{from_where(Path(root))}")
    if root is not None and data.dataset.lower() in _FOLDERS:
        deque(image_files(Path(root, split) if os.path.isdir(os.path.join(root, split)) else Path(root)), maxlen=0)
    try:
        with download_lock(Path(root)) if root and data.download else nullcontext():
            dataset = create_dataset(data.dataset, root=root, split=split, **kwargs)
    except ImportError as error:
        raise UserError(f"dataset {data.dataset} needs a package that is not installed: {error}") from None
    except (AssertionError, OSError, RuntimeError, ValueError, LookupError, TypeError) as error:
        reason = str(error) or type(error).__name__
        raise UserError(f"dataset {data.dataset}, split {split}: timm cannot open it: {reason}") from None
    if not hasattr(dataset, "__getitem__") or not len(dataset):
        raise UserError(f"dataset {data.dataset}, split {split}: no images that can be read in any order")
    if hasattr(dataset, "loader"):  # torchvision's folders: decode as everywhere else
        dataset.loader = _load_file
    return TimmSource(f"{data.dataset}/{split}", dataset)


def _load_file(path: str) -> Image.Image:
    return decode_image(read_image_file(path))


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
