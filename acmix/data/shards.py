"""Prepared shards: WebDataset tars with a manifest, which scripts/prepare_data.py makes.

OUT/_info.json, the manifest, lists classes, shards and checksums, and is what timm's `wds/` reader looks for too.
OUT/SPLIT-index.npy says where each image lies, so that one is read in any order without a look at the rest.
"""

import hashlib
import json
import os
import zlib
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from acmix.data.folders import some
from acmix.data.images import BadImage, decode_image
from acmix.data.tars import read_at
from acmix.errors import UserError

MANIFEST = "_info.json"
FORMAT = 1
"""Of the manifest and the index; a reader refuses what is newer."""

ROW = np.dtype(
    [("key", "<u4"), ("shard", "<u4"), ("offset", "<u8"), ("size", "<u4"), ("target", "<u4"), ("crc32", "<u4")]
)
"""A row of the index: number in the member's name, shard, place of the bytes in it, class, checksum of the bytes."""

_AGAIN = "copy it again, or make it again with scripts/prepare_data.py"


@dataclass(frozen=True)
class ShardFile:
    """A file of the set: its name, size and SHA-256."""

    name: str
    bytes: int
    sha256: str

    @staticmethod
    def of(path: Path) -> "ShardFile":
        """A file as it is now. Raises OSError."""
        return ShardFile(path.name, path.stat().st_size, sha256_of(path))

    def is_whole(self, folder: Path) -> bool:
        """Whether the file is in that folder, every byte as it was written."""
        path = folder / self.name
        with suppress(OSError):
            return path.stat().st_size == self.bytes and sha256_of(path) == self.sha256
        return False


@dataclass(frozen=True)
class Split:
    """The shards of one split. `skipped`: what was left out because it could not be read, and why."""

    name: str
    shards: tuple[ShardFile, ...]
    lengths: tuple[int, ...]
    index: ShardFile
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return sum(self.lengths)

    @property
    def bytes(self) -> int:
        """Size of all shards."""
        return sum(shard.bytes for shard in self.shards)


@dataclass(frozen=True)
class Manifest:
    """What a set of shards holds. `suffix`: of the images' names, jpg or webp; `made_with`: the options, for people."""

    classes: tuple[str, ...]
    suffix: str
    splits: dict[str, Split]
    made_with: dict[str, Any]

    def to_json(self) -> str:
        """The text of the manifest; the keys of a split that timm reads come first."""
        splits = {}
        for name, split in self.splits.items():
            names = {"name": name, "filenames": [shard.name for shard in split.shards]}
            counts = {"shard_lengths": list(split.lengths), "num_samples": len(split)}
            files = {"shards": [asdict(shard) for shard in split.shards], "index": asdict(split.index)}
            splits[name] = names | counts | files | {"skipped": list(split.skipped)}
        values = {"acmix_shards": FORMAT, "classes": list(self.classes), "suffix": self.suffix, "splits": splits}
        return json.dumps(values | {"made_with": self.made_with}, indent=1, ensure_ascii=False) + "\n"

    @staticmethod
    def from_json(text: str | bytes, where: str) -> "Manifest | None":
        """Read a manifest; None for one that is not ours, such as timm's own. Raises UserError naming `where`."""
        try:
            values = json.loads(text)
            if not isinstance(values, dict) or "acmix_shards" not in values:
                return None
            if values["acmix_shards"] > FORMAT:
                raise UserError(f"{where}: made by a newer version of acmix; install that, or make the shards again")
            splits = {name: _split(name, split) for name, split in values["splits"].items()}
            classes = tuple(str(name) for name in values["classes"])
            return Manifest(classes, str(values["suffix"]), splits, dict(values["made_with"]))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{where}: damaged ({type(error).__name__}: {error}); {_AGAIN}") from None


def _split(name: str, values: dict[str, Any]) -> Split:
    shards = tuple(ShardFile(**shard) for shard in values["shards"])
    index, lengths = ShardFile(**values["index"]), tuple(int(length) for length in values["shard_lengths"])
    for file in (*shards, index):
        if file.name != os.path.basename(file.name) or file.name.startswith(".") or len(shards) != len(lengths):
            raise ValueError(f"{file.name}: not the name of a file of the set")
    return Split(name, shards, lengths, index, tuple(values["skipped"]))


class Place(Protocol):
    """Where the files of a set are: a folder, or a server with a cache before it."""

    def name(self, file: ShardFile) -> str:
        """Path or address, for messages."""

    def path(self, file: ShardFile) -> str:
        """A local path of the file. Raises BadImage where it cannot be had."""

    def renew(self, file: ShardFile) -> bool:
        """Get the file once more, because what is at `path` is damaged or gone; False where there is no other copy."""


@dataclass(frozen=True)
class Folder:
    """A set of shards in a local folder."""

    root: Path

    def name(self, file: ShardFile) -> str:
        """Path of the file."""
        return str(self.root / file.name)

    def path(self, file: ShardFile) -> str:
        """Path of the file."""
        return str(self.root / file.name)

    def renew(self, file: ShardFile) -> bool:
        """There is no other copy."""
        return False

    def check(self, split: Split) -> None:
        """Raises UserError naming files that are missing or of another size than the manifest says."""
        wrong = []
        for file in (*split.shards, split.index):
            try:
                size = os.stat(self.root / file.name).st_size
            except OSError as error:
                wrong.append(f"{self.root / file.name}: {error.strerror}")
                continue
            if size != file.bytes:
                kind = "cut off" if size < file.bytes else "changed"
                wrong.append(f"{self.root / file.name}: {kind}, {size} bytes where the manifest says {file.bytes}")
        if wrong:
            raise UserError(f"{some(wrong)}; {_AGAIN}")


class PreparedSource:
    """The images of one split of prepared shards. Raises UserError for an index that is not that of the manifest."""

    verified = True
    """Pillow has written or decoded what was stored, and the checksum of each image is compared when it is read."""

    def __init__(self, place: Place, manifest: Manifest, split: Split) -> None:
        self.classes = list(manifest.classes)
        self._place = place
        self._suffix = manifest.suffix
        self._split = split
        self._rows = _read_index(place, split, len(self.classes))

    @property
    def targets(self) -> np.ndarray:
        """(N,) int64, the class of each image."""
        return self._rows["target"].astype(np.int64)

    def __len__(self) -> int:
        return len(self._rows)

    def load(self, index: int) -> tuple[Image.Image, int]:
        """Decoded RGB image and class index. Raises BadImage."""
        data, target = self.read(index)
        return decode_image(data), target

    def read(self, index: int) -> tuple[bytes, int]:
        """The bytes of the image and class index. Raises BadImage, also for bytes that are not those written."""
        row = self._rows[index]
        shard = self._split.shards[row["shard"]]
        try:
            return self._read(row, shard), int(row["target"])
        except BadImage:
            if not self._place.renew(shard):
                raise
        return self._read(row, shard), int(row["target"])

    def describe(self, index: int) -> str:
        """Shard, member and class, for messages."""
        row = self._rows[index]
        name = f"{row['key']:09}.{self._suffix}"
        return f"{self._place.name(self._split.shards[row['shard']])}: {name} (class {self.classes[row['target']]})"

    def fingerprint(self) -> str:
        """What tells the images from all others: the index holds a checksum of each."""
        return f"shards {self._split.index.sha256}"

    def _read(self, row: np.void, shard: ShardFile) -> bytes:
        data = read_at(self._place.path(shard), int(row["offset"]), int(row["size"]))
        if zlib.crc32(data) != row["crc32"]:
            raise BadImage("corrupt", "its checksum is not that of the index: the shard was damaged or changed")
        return data


def open_prepared(root: Path, split: str) -> PreparedSource | None:
    """A split of the prepared shards in a folder; None where there is no manifest of ours.

    Raises UserError for a split that is not there, and for files that are missing, cut off or changed in size.
    """
    path = root / MANIFEST
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    manifest = Manifest.from_json(text, str(path))
    if manifest is None:
        return None
    folder, chosen = Folder(root), find_split(manifest, split, str(path))
    folder.check(chosen)
    return PreparedSource(folder, manifest, chosen)


def find_split(manifest: Manifest, split: str, where: str) -> Split:
    """A split by its name. Raises UserError naming those there are."""
    if split not in manifest.splits:
        raise UserError(f"{where}: no split {split}; set data.train_split or val_split to {some([*manifest.splits])}")
    return manifest.splits[split]


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_index(place: Place, split: Split, classes: int) -> np.ndarray:
    where = place.name(split.index)
    try:
        path = place.path(split.index)
        if sha256_of(path) != split.index.sha256:
            raise UserError(f"{where}: changed, its checksum is not that of the manifest; {_AGAIN}")
        rows: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except BadImage as error:
        raise UserError(f"{where}: {error.reason}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: cannot be read: {error}; {_AGAIN}") from None
    sound = rows.dtype == ROW and rows.shape == (len(split),)
    if not sound or (len(rows) and (rows["shard"].max() >= len(split.shards) or rows["target"].max() >= classes)):
        raise UserError(f"{where}: not the index of these shards; {_AGAIN}")
    return rows
