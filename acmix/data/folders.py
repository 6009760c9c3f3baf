"""Image folders: `ROOT/SPLIT/CLASS/**/IMAGE`."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from acmix.data.images import EXTENSIONS, decode_image, read_image_file
from acmix.errors import UserError


class TextTable:
    """A read-only list of strings in two arrays, whose memory the loader workers share.

    Forked workers would end up copying a list of a million str objects, because reading an object changes its
    reference count.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        encoded = [os.fsencode(text) for text in texts]
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self._ends = np.cumsum([len(text) for text in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(self._bytes[start : self._ends[index]].tobytes())


class FolderSource:
    """The images below one split folder, in sorted order, with the folder names as classes."""

    def __init__(self, split: Path) -> None:
        self.classes, files, targets = scan_split(split)
        self.targets = np.asarray(targets, dtype=np.int64)
        self._split = str(split)
        self._files = TextTable(files)

    def __len__(self) -> int:
        return len(self._files)

    def load(self, index: int) -> tuple[Image.Image, int]:
        """Decoded RGB image and class index. Raises BadImage."""
        return decode_image(read_image_file(os.path.join(self._split, self._files[index]))), int(self.targets[index])

    def describe(self, index: int) -> str:
        """Path and class, for messages."""
        return f"{os.path.join(self._split, self._files[index])} (class {self.classes[self.targets[index]]})"


def scan_split(split: Path) -> tuple[list[str], list[str], list[int]]:
    """Classes, image paths relative to the split, and class indices.

    Raises UserError naming the folders that are missing, empty or hidden.
    """
    classes = class_folders(split)
    files: list[str] = []
    targets: list[int] = []
    empty = []
    for target, name in enumerate(classes):
        before = len(files)
        files += sorted(os.path.join(name, file) for file in image_files(split / name))
        targets += [target] * (len(files) - before)
        if len(files) == before:
            empty.append(str(split / name))
    if empty:
        raise UserError(f"class folders without images: {_some(empty)}; fill or remove them")
    return classes, files, targets


def class_folders(split: Path) -> list[str]:
    """Names of the class folders of a split, sorted. Raises UserError naming missing or hidden folders."""
    if not split.is_dir():
        raise UserError(_missing_split(split))
    try:
        names = sorted(entry.name for entry in os.scandir(split) if entry.is_dir())
    except OSError as error:
        raise UserError(f"{split}: cannot be read: {error.strerror}") from None
    hidden = [str(split / name) for name in names if name.startswith(".")]
    if hidden:
        raise UserError(f"hidden folders among the classes: {_some(hidden)}; remove them")
    if not names:
        raise UserError(f"{split}: no class folders; images belong into {split}/CLASS/")
    return names


def image_files(folder: Path) -> Iterator[str]:
    """Paths, relative to `folder`, of the files below it that are named like images.

    Raises UserError for a hidden folder, such as `.ipynb_checkpoints`, which is rarely meant for training.
    """
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir():
                    if entry.name.startswith("."):
                        raise UserError(f"hidden folder in a class: {entry.path}; remove it")
                    yield from (os.path.join(entry.name, file) for file in image_files(Path(entry.path)))
                elif is_image_name(entry.name):
                    yield entry.name
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {error.strerror}") from None


def is_image_name(name: str) -> bool:
    """Whether a file is named like an image and not hidden."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS


def check_same_classes(train: Sequence[str], val: Sequence[str], train_name: str, val_name: str) -> None:
    """Raises UserError naming the classes that only one of the two splits has."""
    only_train, only_val = sorted(set(train) - set(val)), sorted(set(val) - set(train))
    if not only_train and not only_val:
        return
    parts = [f"only in {train_name}: {_some(only_train)}"] * bool(only_train)
    parts += [f"only in {val_name}: {_some(only_val)}"] * bool(only_val)
    raise UserError(f"training and validation classes differ: {'; '.join(parts)}")


def _missing_split(split: Path) -> str:
    parent = split.parent
    if not parent.is_dir():
        return f"{parent}: no such folder; set data.root to the folder that holds the splits"
    found = sorted(entry.name for entry in os.scandir(parent) if entry.is_dir() and not entry.name.startswith("."))
    return f"{split}: no such folder; set data.train_split or data.val_split (folders there: {_some(found) or 'none'})"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
