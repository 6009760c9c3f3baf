"""All images of a source decoded at once, in parallel, and kept in a file that the processes of a machine share."""

import fcntl
import hashlib
import math
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import torch
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from acmix.config import Config
from acmix.cores import cores_per_process, usable_cores
from acmix.data.datasets import Source
from acmix.data.images import BadImage
from acmix.data.sampler import BatchPlan
from acmix.data.seeding import preserved_generators
from acmix.data.shared import hand_over
from acmix.data.workers import WorkerPool
from acmix.errors import UserError
from acmix.paths import cache_folder

Fixed = Callable[[Image.Image], Image.Image]

LIMIT = 2 << 30
"""Bytes that the decoded images of a split may have to be kept in memory unasked."""

_WORTH_A_FILE = 32 << 20  # bytes; fewer are decoded again in a second
_FILES = 8 << 30  # bytes of decoded images to keep on disk
_BLOCK = 1 << 20  # bytes that a loader process decodes at a time
_BLOCKS_EACH = 8  # with fewer for each process, starting one takes longer than it saves
_CHANNELS = 3
_TARGET = 8  # bytes
_FORMAT = 1


class Unsuitable(Exception):
    """Why images cannot be held in memory as one array; the message is for people."""


@dataclass(frozen=True)
class Decoded:
    """Images of one size.

    rows: (N, H · W · 3 + 8) uint8, each an image and the eight bytes of its class index
    shape: H, W, 3
    problems: what is wrong with each image that cannot be read
    """

    rows: np.ndarray
    shape: tuple[int, int, int]
    problems: dict[int, str] = field(default_factory=dict)

    @property
    def pixels(self) -> np.ndarray:
        """(N, H, W, 3) uint8, a view."""
        _, width, channels = self.shape
        strides = (self.rows.strides[0], width * channels, channels, 1)
        return np.lib.stride_tricks.as_strided(self.rows, (len(self.rows), *self.shape), strides)

    @property
    def targets(self) -> np.ndarray:
        """(N,) int64, a copy."""
        return np.ascontiguousarray(self.rows[:, -_TARGET:]).view(np.int64)[:, 0]


def decode_all(source: Source, fixed: Fixed, steps: str, config: Config, limit: int | None = LIMIT) -> Decoded:
    """Decode every image and apply `fixed`, which `steps` describes; or map the file that an earlier run left.

    The file lies in $ACMIX_CACHE/decoded, or ~/.cache/acmix/decoded, under a digest of the source's `fingerprint` (a
    method that tells its images from all others), its classes and `steps`; without a fingerprint there is no file. One
    process of a machine decodes while the others wait.

    Raises Unsuitable for images that differ in size or are more than `limit` bytes; UserError as loader processes do.
    """
    shape = _shape(source, fixed)
    size = len(source) * math.prod(shape)
    if limit is not None and size > limit:
        raise Unsuitable(f"decoded, the images have {size / 2**30:.1f} GiB, more than {limit / 2**30:g}")
    fingerprint = getattr(source, "fingerprint", lambda: None)() if size >= _WORTH_A_FILE else None
    if fingerprint is None:
        return _decode(source, fixed, shape, config, cores_per_process())
    identity = "\x1f".join([str(_FORMAT), PIL.__version__, steps, str(shape), *source.classes, fingerprint])
    key = hashlib.blake2b(identity.encode(errors="surrogateescape"), digest_size=16).hexdigest()
    decoded: Decoded | None = None
    try:
        with _locked(key) as folder:
            if (kept := _open(folder, key, shape)) is not None:
                return kept
            decoded = _decode(source, fixed, shape, config, usable_cores())
            if not decoded.problems:
                _write(folder, key, decoded)
                decoded = _open(folder, key, shape) or decoded
    except OSError as error:
        print(f"warning: decoded images are not kept on disk: {error}", file=sys.stderr, flush=True)
    return decoded or _decode(source, fixed, shape, config, cores_per_process())


class _Block(NamedTuple):
    """Some images as a worker returns them; `unlike` names one of another size."""

    pixels: torch.Tensor | np.ndarray
    targets: np.ndarray
    problems: dict[int, str]
    unlike: str | None = None
    fatal: str | None = None


class _Decoder(Dataset):
    """BatchPlan → its images, decoded."""

    def __init__(self, source: Source, fixed: Fixed, shape: tuple[int, ...]) -> None:
        self._source = source
        self._fixed = fixed
        self._shape = shape

    def __getitem__(self, plan: BatchPlan) -> _Block:
        pixels = torch.zeros(len(plan.indices), *self._shape, dtype=torch.uint8)
        block = _Block(pixels, np.zeros(len(plan.indices), dtype=np.int64), {})
        try:
            return self._fill(block._replace(pixels=hand_over(pixels)), plan)
        except UserError as error:
            return block._replace(pixels=np.zeros(0), fatal=str(error))

    def _fill(self, block: _Block, plan: BatchPlan) -> _Block:
        values = np.asarray(block.pixels)
        for place, index in enumerate(plan.indices.tolist()):
            try:
                image, block.targets[place] = self._source.load(index)
            except BadImage as error:
                block.problems[index] = f"{self._source.describe(index)}: {error.reason}"
                continue
            image = self._fixed(image)
            if (image.height, image.width) != self._shape[:2]:
                unlike = f"{self._source.describe(index)} has {image.height} × {image.width}"
                return block._replace(unlike=unlike)
            values[place] = np.asarray(image)
        return block


def _shape(source: Source, fixed: Fixed) -> tuple[int, int, int]:
    """Height, width and channels of the first image that can be read."""
    for index in range(len(source)):
        with suppress(BadImage):
            image = fixed(source.load(index)[0])
            return image.height, image.width, _CHANNELS
    raise Unsuitable("no image can be read")


def _decode(source: Source, fixed: Fixed, shape: tuple[int, int, int], config: Config, cores: int) -> Decoded:
    """Decode with `data.num_workers` processes; with `auto` on `cores` cores."""
    count = len(source)
    decoded = Decoded(np.empty((count, math.prod(shape) + _TARGET), dtype=np.uint8), shape)
    pixels = decoded.pixels
    places = np.arange(count, dtype=np.int64)
    each = max(1, _BLOCK // math.prod(shape))
    blocks = [places[start : start + each] for start in range(0, count, each)]
    asked = config.data.num_workers
    workers = min(cores if asked == "auto" else asked, len(blocks) // _BLOCKS_EACH)
    pool = WorkerPool(_Decoder(source, fixed, shape), config, workers, each * math.prod(shape))
    plans = iter([BatchPlan(0, block, np.zeros_like(block)) for block in blocks])
    silent = not sys.stderr.isatty()
    with preserved_generators(), tqdm(total=count, desc="decoding", unit=" images", leave=False, disable=silent) as bar:
        for chosen, block in zip(blocks, pool.run(plans), strict=True):
            if block.fatal:
                raise UserError(block.fatal)
            if block.unlike:
                raise Unsuitable(f"the images differ in size: {block.unlike} pixels, the first {shape[0]} × {shape[1]}")
            pixels[chosen] = np.asarray(block.pixels)
            decoded.rows[chosen, -_TARGET:] = block.targets[:, None].view(np.uint8)
            decoded.problems.update(block.problems)
            bar.update(len(chosen))
    pool.close()
    return decoded


@contextmanager
def _locked(key: str) -> Iterator[Path]:
    """The folder of decoded images, held by this process alone for one key. Raises OSError."""
    folder = cache_folder() / "decoded"
    folder.mkdir(exist_ok=True)
    with open(folder / f"{key}.lock", "w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        yield folder


def _open(folder: Path, key: str, shape: tuple[int, int, int]) -> Decoded | None:
    """The images in the file of a key, mapped: processes share its memory. None without a whole file."""
    for path in folder.glob(f"{key}-*.npy"):
        with suppress(ValueError, EOFError):  # not a whole array
            rows = np.load(path, mmap_mode="r", allow_pickle=False)
            if path.stem.rpartition("-")[2] == _checksum(rows):
                os.utime(path)
                return Decoded(rows, shape)
        path.unlink()
    return None


def _write(folder: Path, key: str, decoded: Decoded) -> None:
    """Keep the rows in a file whose name ends in their checksum. Raises OSError."""
    _make_room(folder, decoded.rows.nbytes)
    temporary = folder / f"{key}.part"  # one that a killed run left is overwritten
    try:
        with open(temporary, "wb") as file:
            np.save(file, decoded.rows)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder / f"{key}-{_checksum(decoded.rows)}.npy")
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _make_room(folder: Path, size: int) -> None:
    """Remove the files that were not used for longest, so that all stay below a limit."""
    files = sorted(folder.glob("*.npy"), key=lambda path: path.stat().st_mtime)
    total = size + sum(path.stat().st_size for path in files)
    for path in files:
        if total <= _FILES:
            return
        total -= path.stat().st_size
        path.unlink(missing_ok=True)


def _checksum(rows: np.ndarray) -> str:
    return f"{zlib.crc32(rows.data):08x}"
