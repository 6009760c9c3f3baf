"""Image folders: `ROOT/SPLIT/CLASS/**/IMAGE`."""

import hashlib
import os
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from mimetypes import MimeTypes
from pathlib import Path

import numpy as np
from PIL import Image

from acmix.data.images import EXTENSIONS, decode_image, read_image_file
from acmix.errors import UserError

_KINDS_OF_FILES = MimeTypes()  # Python's own table, the same on every machine

FolderId = tuple[int, int]
"""Device and inode of a folder."""


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

    def content(self) -> bytes:
        """All strings and where each ends."""
        return self._bytes.tobytes() + self._ends.tobytes()

    def __getitem__(self, index: int) -> str:
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(self._bytes[start : self._ends[index]].tobytes())


class FileSource:
    """Image files of one folder: their paths relative to it, and their classes as indices into `classes`."""

    def __init__(self, split: Path, classes: list[str], files: Sequence[str], targets: Sequence[int]) -> None:
        self.classes = classes
        self.targets = np.asarray(targets, dtype=np.int64)
        self._split = str(split)
        self._files = TextTable(files)

    def __len__(self) -> int:
        return len(self._files)

    def load(self, index: int) -> tuple[Image.Image, int]:
        """Decoded RGB image and class index. Raises BadImage."""
        data, target = self.read(index)
        return decode_image(data), target

    def read(self, index: int) -> tuple[bytes, int]:
        """The bytes of the file and class index. Raises BadImage."""
        return read_image_file(os.path.join(self._split, self._files[index])), int(self.targets[index])

    def describe(self, index: int) -> str:
        """Path and class, for messages."""
        return f"{os.path.join(self._split, self._files[index])} (class {self.classes[self.targets[index]]})"

    def fingerprint(self) -> str:
        """What tells these images from all others: the folder, names, sizes and times of change.

        Files out of an archive may share name, size and modification time with other ones; the folder and the time that
        the file system keeps itself do not.
        """
        digest = hashlib.blake2b(os.fsencode(os.path.realpath(self._split)), digest_size=16)
        for place in range(len(self)):
            with suppress(OSError):  # an image that cannot be read is reported when it is
                status = os.stat(os.path.join(self._split, self._files[place]))
                digest.update(struct.pack("<4q", place, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
        digest.update(self._files.content())
        digest.update(self.targets.tobytes())
        return digest.hexdigest()


class FolderSource(FileSource):
    """The images below one split folder, in sorted order, with the folder names as classes."""

    def __init__(self, split: Path) -> None:
        super().__init__(split, *scan_split(split))


def scan_split(split: Path) -> tuple[list[str], list[str], list[int]]:
    """Classes, image paths relative to the split, and class indices.

    Raises UserError naming the folders that are missing, empty or hidden, and links that lead nowhere or in a circle.
    """
    classes = class_folders(split)
    above = folders_above(split) | {folder_id(split)}
    files: list[str] = []
    targets: list[int] = []
    empty = []
    for target, name in enumerate(classes):
        before = len(files)
        files += sorted(os.path.join(name, file) for file in image_files(split / name, above))
        targets += [target] * (len(files) - before)
        if len(files) == before:
            empty.append(split / name)
    if empty:
        raise UserError(
            f"class folders without images: {some([str(folder) for folder in empty])}; fill or remove them"
            f"{other_formats(_names_below(empty))}"
        )
    return classes, files, targets


def class_folders(split: Path) -> list[str]:
    """Names of the class folders of a split, sorted as text.

    Raises UserError naming missing or hidden folders, names that are not UTF-8, and links that lead nowhere.
    """
    entries = split_entries(split)
    names = [entry.name for entry in entries if is_folder(entry)]
    hidden = [str(split / name) for name in names if name.startswith(".")]
    if hidden:
        raise UserError(f"hidden folders among the classes: {some(hidden)}; remove them")
    unreadable = [readable_name(str(split / name)) for name in names if not is_text(name)]
    if unreadable:
        raise UserError(f"names of class folders that are not UTF-8: {some(unreadable)}; rename them")
    lost = [describe_link(entry) for entry in entries if is_lost_folder(entry)]
    if lost:
        raise UserError(f"links among the classes that lead nowhere: {some(lost)}; mend or remove them")
    if not names:
        way_out = ", or name their classes in a file, data.labels=FILE" if any(map(is_image, entries)) else ""
        formats = other_formats(_names_below([split]))
        raise UserError(f"{split}: no class folders; images belong into {split}/CLASS/{way_out}{formats}")
    return names


def has_class_folders(split: Path) -> bool:
    """Whether a split holds folders and no images beside them. Raises UserError as `split_entries` does."""
    entries = split_entries(split)
    return any(map(is_folder, entries)) and not any(map(is_image, entries))


def split_entries(split: Path) -> list[os.DirEntry[str]]:
    """What lies directly in a split folder, sorted by name. Raises UserError when it is missing or cannot be read."""
    if not split.is_dir():
        raise UserError(missing_split(split))
    try:
        return sorted(os.scandir(split), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{split}: cannot be read: {error.strerror}") from None


def image_files(folder: Path, above: frozenset[FolderId] | None = None) -> Iterator[str]:
    """Paths, relative to `folder`, of the files below it that are named like images.

    `above` are the folders on the way to it, its real parents unless given. Raises UserError for a hidden folder, such
    as `.ipynb_checkpoints`, which is rarely meant for training, for a link back to a folder on the way, which would
    never end, and for one that leads nowhere and is named like a folder.
    """
    try:
        here = folder_id(folder)
        above = folders_above(folder) if above is None else above
        if here in above:
            raise UserError(f"{folder}: a link back to a folder it lies in ({folder.resolve()}); remove the link")
        with os.scandir(folder) as entries:
            for entry in entries:
                if is_folder(entry):
                    if entry.name.startswith("."):
                        raise UserError(f"hidden folder in a class: {entry.path}; remove it")
                    below = image_files(Path(entry.path), above | {here})
                    yield from (os.path.join(entry.name, file) for file in below)
                elif is_image(entry):
                    yield entry.name
                elif is_lost_folder(entry):
                    raise UserError(f"{describe_link(entry)}, which leads nowhere; mend or remove the link")
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {error.strerror}") from None


def folders_above(folder: Path) -> frozenset[FolderId]:
    """The real parents of a folder, up to the root of the file system."""
    return frozenset(folder_id(parent) for parent in folder.resolve().parents)


def folder_id(folder: Path) -> FolderId:
    """What tells a folder from every other, by whatever path it is reached."""
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or into a folder that cannot be entered
        return False


def is_image(entry: os.DirEntry[str]) -> bool:
    """Whether an entry that is no folder is named like an image."""
    return is_image_name(entry.name) and not is_folder(entry)


def is_lost_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a link that leads nowhere and, by its name, was one to a folder.

    One named like an image counts as an image that cannot be read, other names with the suffix of a known kind of file
    as files; v1.0, dogs.old and St. Bernard have none.
    """
    known = is_image_name(entry.name) or any(_KINDS_OF_FILES.guess_type(entry.name, strict=False))
    return entry.is_symlink() and not (known or entry.name.startswith(".")) and not os.path.exists(entry.path)


def is_text(name: str) -> bool:
    """Whether the name of a file or folder is UTF-8, and so can be written to a file of class names."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def readable_name(path: str) -> str:
    """A path for people, with the bytes that are not UTF-8 as escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def describe_link(entry: os.DirEntry[str]) -> str:
    """Path and target of a link, for messages."""
    return f"{entry.path} -> {os.readlink(entry.path)}"


def is_image_name(name: str) -> bool:
    """Whether a file is named like an image and not hidden."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS


def missing_split(split: Path) -> str:
    """The message for a split folder that does not exist."""
    parent = split.parent
    if not parent.is_dir():
        return f"{parent}: no such folder; set data.root to the folder that holds the splits{from_where(parent)}"
    found = sorted(entry.name for entry in os.scandir(parent) if is_folder(entry) and not entry.name.startswith("."))
    there = f"(folders there: {some(found) or 'none'}){from_where(split)}"
    return f"{split}: no such folder; set data.train_split or data.val_split {there}"


def no_images(folder: Path) -> str:
    """The message for a folder without images."""
    return f"{folder}: no images inside{other_formats(_names_below([folder]))}"


def other_formats(names: Iterable[str]) -> str:
    """For a message on missing images: the suffixes of the files that are of no image format; else empty."""
    suffixes = Counter(os.path.splitext(name)[1].lower() for name in names if not name.startswith("."))
    others = [suffix for suffix, _ in suffixes.most_common() if suffix and suffix not in EXTENSIONS]
    return f" (found {some(others)} files; images are read from {', '.join(sorted(EXTENSIONS))})" if others else ""


def from_where(path: Path) -> str:
    """For a message on a missing file: which folder a relative path starts from; empty for an absolute one."""
    return "" if path.is_absolute() else f" (a relative path, looked for from {Path.cwd()})"


def some(names: Sequence[str]) -> str:
    """The first of many names and how many more there are, for messages."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _names_below(folders: Iterable[Path]) -> Iterator[str]:
    return (name for folder in folders for _, _, names in os.walk(folder) for name in names)
