"""Images in tar files, read in place: plain tars with class folders, and WebDataset shards.

timm reads shards as a stream, which cannot be replayed from the middle of an epoch, and scans tars without
checking their members. Here every member is checked and indexed once, and an image is one read at its offset,
which is safe in any number of loader processes.
"""

import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np
from PIL import Image

from acmix.data.folders import TextTable, from_where, is_image_name, is_text, other_formats, readable_name, some
from acmix.data.images import MAX_FILE_BYTES, BadImage, decode_image
from acmix.errors import UserError

_AGAIN = "copy it again, or make it again"
_IMAGES_FIRST = ("jpg", "jpeg", "png", "webp")  # of the images of a sample of a shard
_PIECE = 1 << 20  # bytes read at a time


@dataclass(frozen=True)
class Member:
    """A regular file in a tar: its name, and offset and size of its bytes in the outer file."""

    name: str
    offset: int
    size: int


class TarSource:
    """Images of several tar files with their classes."""

    def __init__(self, tars: Sequence[Path], members: Sequence[tuple[int, Member]], labels: Sequence[str]) -> None:
        self.classes = sorted(set(labels))
        index = {name: i for i, name in enumerate(self.classes)}
        self.targets = np.asarray([index[label] for label in labels], dtype=np.int64)
        self._tars = [str(tar) for tar in tars]
        self._names = TextTable([member.name for _, member in members])
        self._places = np.asarray([(tar, member.offset, member.size) for tar, member in members], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.targets)

    def load(self, index: int) -> tuple[Image.Image, int]:
        """Decoded RGB image and class index. Raises BadImage."""
        data, target = self.read(index)
        return decode_image(data), target

    def read(self, index: int) -> tuple[bytes, int]:
        """The bytes of the member and class index. Raises BadImage."""
        tar, offset, size = (int(value) for value in self._places[index])
        if size > MAX_FILE_BYTES:
            raise BadImage("bomb", f"{size} bytes, over the limit of {MAX_FILE_BYTES}")
        return read_at(self._tars[tar], offset, size), int(self.targets[index])

    def describe(self, index: int) -> str:
        """Tar, member and class, for messages."""
        tar = self._tars[self._places[index, 0]]
        return f"{tar}: {self._names[index]} (class {self.classes[self.targets[index]]})"


def tar_source(root: Path, split: str) -> TarSource:
    """`ROOT/SPLIT.tar`, or the tars in `ROOT/SPLIT/`; the class is the image's folder, else the tar's name.

    Raises UserError naming what is missing, a damaged tar, or a member that is refused.
    """
    tars = _find_tars(root, split)
    members: list[tuple[int, Member]] = []
    labels: list[str] = []
    others: list[str] = []
    for number, tar in enumerate(tars):
        for member in sorted(index_tar(tar), key=lambda member: member.name):
            if is_image_name(PurePosixPath(member.name).name):
                members.append((number, member))
                labels.append(_folder_of(tar, member) or tar.stem)
            else:
                others.append(member.name)
    if not members:
        raise UserError(f"{some([str(tar) for tar in tars])}: no images inside{other_formats(others)}")
    return TarSource(tars, members, labels)


def shard_source(root: Path, split: str) -> TarSource:
    """WebDataset shards `ROOT/SPLIT*.tar` or `ROOT/SPLIT/*.tar`: each KEY.jpg with its class in KEY.cls.

    Of a sample's images, the one whose name has a single suffix is taken, KEY.jpg before KEY.jpeg, KEY.png, KEY.webp
    and others; KEY.depth.png is another picture of it. Raises UserError naming what is missing, a damaged shard, a
    member that is refused or occurs twice, an image without class, a sample that has only such other pictures.
    """
    tars = _find_tars(root, split)
    members: list[tuple[int, Member]] = []
    labels: list[str] = []
    for number, tar in enumerate(tars):
        for key, files in _samples(tar).items():
            image = _shard_image(tar, key, files)
            if image is not None:
                members.append((number, image))
                labels.append(_shard_label(tar, key, files))
    if not members:
        raise UserError(f"{some([str(tar) for tar in tars])}: no images inside")
    return TarSource(tars, members, labels)


def index_tar(path: Path) -> list[Member]:
    """All regular files of a tar, including those of tars inside it.

    Raises UserError naming a damaged tar, or a member that could reach outside when extracted: an absolute
    name, a name with `..`, a link, a device.
    """
    try:
        with open(path, "rb") as file:
            return list(_members(file, path, "", 0))
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{path}: not a readable tar file: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def _members(file: IO[bytes], path: Path, inside: str, start: int) -> Iterator[Member]:
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for info in tar:
            where = f"{path}: member {inside}{info.name}"
            parts = PurePosixPath(info.name.replace("\\", "/")).parts
            if info.name.startswith(("/", "\\")) or ".." in parts:
                raise UserError(f"{where}: refused, the name climbs out of the archive")
            if info.issym() or info.islnk():
                raise UserError(f"{where}: refused, it is a link (to {info.linkname})")
            if info.isdir():
                continue
            if not info.isfile() or info.issparse():
                raise UserError(f"{where}: refused, it is not a plain file")
            if info.name.lower().endswith(".tar") and not inside:
                yield from _members(tar.extractfile(info), path, f"{info.name}/", info.offset_data)  # type: ignore[arg-type]
            else:
                yield Member(_nested_name(inside, info.name), start + info.offset_data, info.size)
        archive = f"{path}: member {inside.removesuffix('/')}" if inside else str(path)
        _check_end(file, tar.offset, archive, start)


def _check_end(file: IO[bytes], end: int, archive: str, start: int) -> None:
    """Refuse an archive that goes on after its last member, or lacks the zeros that end it.

    tarfile takes a header that is damaged or cut off for the end. Raises UserError.
    """
    file.seek(end)
    blocks = file.read(tarfile.BLOCKSIZE)
    if len(blocks) < tarfile.BLOCKSIZE or any(blocks):
        raise UserError(f"{archive}: damaged or cut off at byte {start + end}; {_AGAIN}")
    while blocks := file.read(_PIECE):
        if blocks.count(0) < len(blocks):
            raise UserError(f"{archive}: more follows its end at byte {start + end}: damaged, or tars joined; {_AGAIN}")


def _nested_name(inside: str, name: str) -> str:
    return str(PurePosixPath(inside.removesuffix(".tar/")) / name) if inside else str(PurePosixPath(name))


def _find_tars(root: Path, split: str) -> list[Path]:
    if not root.exists():
        way_out = f"set data.root to the folder that holds the tar files{from_where(root)}"
        raise UserError(f"{root}: no such folder; {way_out}")
    if root.is_file():
        return [root]
    if (root / f"{split.removesuffix('.tar')}.tar").is_file():
        return [root / f"{split.removesuffix('.tar')}.tar"]
    found = sorted((root / split).glob("*.tar")) or sorted(root.glob(f"{split}*.tar"))
    if not found:
        raise UserError(
            f"{root}: neither {split}.tar, {split}*.tar nor {split}/*.tar; set data.train_split or val_split"
        )
    return found


def _folder_of(tar: Path, member: Member) -> str:
    name = PurePosixPath(member.name).parent.name
    if name.startswith("."):
        raise UserError(f"{tar}: member {member.name}: a hidden folder among the classes; leave it out of the tar")
    if not is_text(name):
        raise UserError(f"{tar}: member {readable_name(member.name)}: the folder's name is not UTF-8; rename it")
    return name


def _samples(tar: Path) -> dict[str, dict[str, Member]]:
    """The files of each sample of a shard, by key and then by extension in lower case."""
    samples: dict[str, dict[str, Member]] = {}
    for member in index_tar(tar):
        folder, _, name = member.name.rpartition("/")
        key, _, extension = name.partition(".")  # WebDataset's rule: the key ends at the first dot
        files = samples.setdefault(f"{folder}/{key}", {})
        if extension.lower() in files:
            raise UserError(f"{tar}: member {member.name}: occurs twice; give each sample a key of its own")
        files[extension.lower()] = member
    return samples


def _shard_image(tar: Path, key: str, files: dict[str, Member]) -> Member | None:
    images = [extension for extension in files if is_image_name("x." + extension)]
    single = [extension for extension in images if "." not in extension]
    if images and not single:
        found = some([files[extension].name for extension in images])
        raise UserError(
            f"{tar}: sample {key.lstrip('/')}: no KEY.jpg, but {found}; name its image with a single suffix"
        )
    rank = {extension: place for place, extension in enumerate(_IMAGES_FIRST)}
    return files[min(single, key=lambda extension: (rank.get(extension, len(rank)), extension))] if single else None


def _shard_label(tar: Path, key: str, files: dict[str, Member]) -> str:
    if "cls" in files:
        text = _small_text(tar, files["cls"]).strip()
        if text:
            return text
    if "json" in files:
        try:
            values = json.loads(_small_text(tar, files["json"]))
        except ValueError:
            values = None
        if isinstance(values, dict) and isinstance(values.get("label"), int | str):
            return str(values["label"])
    raise UserError(f"{tar}: sample {key.lstrip('/')}: no class; each image needs KEY.cls, or KEY.json with `label`")


def _small_text(tar: Path, member: Member) -> str:
    try:
        return read_at(str(tar), member.offset, min(member.size, 1 << 20)).decode("utf-8", "replace")
    except BadImage as error:
        raise UserError(f"{tar}: member {member.name}: {error.reason}") from None


def read_at(path: str, offset: int, size: int) -> bytes:
    """A piece of a file. Raises BadImage (unreadable, truncated)."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            data = os.pread(descriptor, size, offset)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise BadImage("unreadable", f"{path}: {error.strerror}") from None
    if len(data) < size:
        raise BadImage("truncated", f"{path} ends before the member does")
    return data
