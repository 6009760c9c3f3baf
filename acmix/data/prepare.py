"""Make prepared shards of any dataset: WebDataset tars of images that are small enough to be decoded quickly.

What is written depends on the images and the options alone, never on the number of processes or on interruptions.
"""

import fcntl
import hashlib
import io
import json
import os
import signal
import tarfile
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from acmix.checkpoint.atomic import remove_folder, replacing, write_atomically
from acmix.data.datasets import Source, to_repair
from acmix.data.encode import Format, encoded
from acmix.data.images import BadImage
from acmix.data.orphans import helpers_first_call
from acmix.data.shards import FORMAT, MANIFEST, ROW, Manifest, ShardFile, Split
from acmix.data.tars import index_tar, read_at
from acmix.errors import UserError

IMAGES_PER_SHARD = 4096
"""About 120 MB at a short side of 256 pixels."""

_FEWEST_SHARDS = 8  # for readers that give each process whole shards
_CHUNK = 16
_LARGEST_KEY = 10**9
_STATE, _PLAN = ".prepare", "plan.json"

Progress = Callable[[Iterator[Any], int, str], Iterator[Any]]


@dataclass(frozen=True)
class Options:
    """How images are stored.

    short_side: larger images are made smaller, to this; None: no image is
    quality: of the encoder; None: 90 where an image must be encoded, and JPEG files that fit are taken as they are
    shards: number of each split; None: one for 4096 images, and 8 at least
    on_error: for an image that cannot be read: stop, or skip it and list it in the manifest
    """

    short_side: int | None = None
    quality: int | None = None
    format: Format = "jpeg"
    shards: int | None = None
    on_error: Literal["stop", "skip"] = "stop"

    @property
    def suffix(self) -> str:
        """Of the images' names."""
        return "jpg" if self.format == "jpeg" else "webp"


class _Image(NamedTuple):
    """An image as it will be stored, or why it cannot be."""

    number: int
    data: bytes
    target: int
    error: str


def prepare(
    sources: Mapping[str, Source],
    out: Path,
    options: Options,
    workers: int = 1,
    progress: Progress = lambda items, total, name: items,
) -> Manifest:
    """Write the shards of each split, and at last the manifest; go on where a killed call left off.

    Of a finished set, the files that are damaged or gone are made again.

    sources: splits by name; all have the same classes in the same order
    progress: may wrap the stream of images, given their number and the split, as tqdm does

    Raises UserError: an image that cannot be read (unless they are skipped), an `out` that holds something else, or
    that another call is writing to.
    """
    plan = _plan(sources, options)
    classes = tuple(next(iter(sources.values())).classes)
    with _claimed(out, plan) as (state, manifest):
        before = {} if manifest is None else manifest.splits
        if manifest is None or not all(f.is_whole(out) for s in before.values() for f in (*s.shards, s.index)):
            splits = {}
            for name, source in sources.items():
                writer = _Writer(out, state, name, source, options, workers, progress)
                splits[name] = writer.write(before.get(name))
            manifest = Manifest(classes, options.suffix, splits, plan)
            write_atomically(out / MANIFEST, manifest.to_json())
        remove_folder(state)
    return manifest


class _Writer:
    """Writes the shards of one split."""

    def __init__(
        self, out: Path, state: Path, name: str, source: Source, options: Options, workers: int, progress: Progress
    ) -> None:
        self.out, self.state, self.name = out, state, name
        self.source, self.options = source, options
        self.workers, self.progress = workers, progress
        count = options.shards or max(_FEWEST_SHARDS, -(-len(source) // IMAGES_PER_SHARD))
        self.parts = np.array_split(_order(name, len(source)), min(count, len(source)))

    def write(self, before: Split | None) -> Split:
        """The finished split; `before` is what an earlier call made of it."""
        done = {} if before is None else self._whole_shards(before)
        done |= {shard: state for shard in range(len(self.parts)) if (state := self._state_of(shard)) is not None}
        missing = [shard for shard in range(len(self.parts)) if shard not in done]
        numbers = [int(number) for shard in missing for number in self.parts[shard]]
        stored = _stored(self.source, numbers, self.options, self.workers)
        images = self.progress(stored, len(numbers), self.name)
        try:
            for shard in missing:
                done[shard] = self._write_shard(shard, images)
        finally:
            stored.close()  # ends its processes
        return self._finish([done[shard] for shard in range(len(self.parts))])

    def _shard_name(self, shard: int) -> str:
        return f"{self.name}-{shard:06}.tar"

    def _state_of(self, shard: int) -> dict[str, Any] | None:
        """What an earlier call noted of a shard that it finished."""
        try:
            state: dict[str, Any] = json.loads((self.state / f"{self._shard_name(shard)}.json").read_bytes())
            if state["skipped"] and self.options.on_error == "stop":
                return None
            path = self.out / self._shard_name(shard)
            return state if os.stat(path).st_size == state["file"]["bytes"] else None
        except (OSError, ValueError):
            return None

    def _whole_shards(self, before: Split) -> dict[int, dict[str, Any]]:
        """The states of the shards of a finished split that are as they were written."""
        done = {}
        skipped = iter(before.skipped)
        for shard, (file, length, part) in enumerate(zip(before.shards, before.lengths, self.parts, strict=True)):
            left_out = list(islice(skipped, len(part) - length))
            if file.is_whole(self.out):
                done[shard] = {"file": asdict(file), "rows": _rows_of(self.out / file.name), "skipped": left_out}
        return done

    def _write_shard(self, shard: int, images: Iterator[_Image]) -> dict[str, Any]:
        rows, skipped = [], []
        path = self.out / self._shard_name(shard)
        with replacing(path) as temporary, open(temporary, "wb") as file:
            for _ in range(len(self.parts[shard])):
                image = next(images)
                if not image.error:
                    key = f"{image.number:09}"
                    offset = _add_member(file, f"{key}.{self.options.suffix}", image.data)
                    _add_member(file, f"{key}.cls", str(image.target).encode())
                    rows.append([image.number, offset, len(image.data), image.target, zlib.crc32(image.data)])
                elif self.options.on_error == "skip":
                    skipped.append(image.error)
                else:
                    way_out = f"{to_repair(self.source)}, or skip it with --on-error skip"
                    raise UserError(f"cannot store {image.error}; {way_out}")
            file.write(bytes(2 * tarfile.BLOCKSIZE))
        state = {"file": asdict(ShardFile.of(path)), "rows": rows, "skipped": skipped}
        write_atomically(self.state / f"{path.name}.json", json.dumps(state))
        return state

    def _finish(self, states: Sequence[dict[str, Any]]) -> Split:
        rows = [(key, shard, *rest) for shard, state in enumerate(states) for key, *rest in state["rows"]]
        if not rows:
            raise UserError(f"split {self.name}: no image could be read: {states[0]['skipped'][0]}")
        path = self.out / f"{self.name}-index.npy"
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.save(file, np.array(rows, dtype=ROW), allow_pickle=False)
        lengths = tuple(len(state["rows"]) for state in states)
        skipped = tuple(text for state in states for text in state["skipped"])
        return Split(
            self.name, tuple(ShardFile(**state["file"]) for state in states), lengths, ShardFile.of(path), skipped
        )


def _order(name: str, count: int) -> np.ndarray:
    """Training images are shuffled once, for readers that stream; of others the order is kept."""
    if count >= _LARGEST_KEY:
        raise UserError(f"{count} images: more than a set of shards can name")
    return np.random.RandomState(0).permutation(count) if name.startswith("train") else np.arange(count)


def _add_member(file: io.BufferedWriter, name: str, data: bytes) -> int:
    """Append a file to a tar, with nothing in the header that differs between calls; returns where its bytes begin."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    file.write(info.tobuf(tarfile.USTAR_FORMAT))
    offset = file.tell()
    file.write(data + bytes(-len(data) % tarfile.BLOCKSIZE))
    return offset


def _rows_of(path: Path) -> list[list[int]]:
    """The rows of a shard's images in the index, but for the number of the shard."""
    rows = []
    members = iter(index_tar(path))
    for image, label in zip(members, members, strict=True):  # as `_write_shard` writes them
        data, target = (read_at(str(path), member.offset, member.size) for member in (image, label))
        rows.append([int(Path(image.name).stem), image.offset, image.size, int(target), zlib.crc32(data)])
    return rows


def _plan(sources: Mapping[str, Source], options: Options) -> dict[str, Any]:
    """What decides on the bytes that are written; of the images, their names and classes."""
    digest = hashlib.sha256()
    for name, source in sources.items():
        digest.update(json.dumps([name, len(source), list(source.classes)]).encode())
        for number in range(len(source)):
            digest.update(source.describe(number).encode("utf-8", "surrogateescape") + b"\n")
    return {"format": FORMAT, **asdict(options), "images": digest.hexdigest()}


@contextmanager
def _claimed(out: Path, plan: dict[str, Any]) -> Iterator[tuple[Path, Manifest | None]]:
    """Hold the folder for this call alone; yields where the state of unfinished work is kept, and what is finished."""
    state = out / _STATE
    try:
        _found(out, plan)  # what is refused is left as it was
        state.mkdir(parents=True, exist_ok=True)
        with open(state / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{out}: another process is making shards there; wait for it") from None
            manifest = _found(out, plan)
            if manifest is None:
                write_atomically(state / _PLAN, json.dumps(plan))
            yield state, manifest
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror or error}") from None


def _found(out: Path, plan: dict[str, Any]) -> Manifest | None:
    """The manifest of an earlier call with the same plan. Raises UserError for a folder that holds something else."""
    path, unfinished = out / MANIFEST, out / _STATE / _PLAN
    if path.exists():
        try:
            manifest = Manifest.from_json(path.read_bytes(), str(path))
        except UserError as error:
            raise UserError(f"{error}; to make them again here, empty {out} first") from None
        if manifest is None or manifest.made_with != plan:
            raise UserError(f"{out}: holds shards of other images or options; empty it, or choose another folder")
        return manifest
    if unfinished.exists():
        try:
            before = json.loads(unfinished.read_bytes())
        except ValueError:
            before = {}
        if {**before, "on_error": plan["on_error"]} != plan:  # a call that stopped at an image may go on without it
            raise UserError(f"{out}: holds unfinished shards of other images or options; empty it, or choose another")
    elif strangers := sorted(set(os.listdir(out)) - {_STATE}) if out.exists() else []:
        raise UserError(f"{out}: not empty, it holds {strangers[0]}; choose an empty folder for the shards")
    return None


_source: Source | None = None
_options = Options()


def _hold(source: Source, options: Options) -> None:
    global _source, _options
    _source, _options = source, options


def _start_process(source: Source, options: Options, first_call: Callable[[], None]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of Ctrl-C, the main process tells
    first_call()
    _hold(source, options)


def _stored(source: Source, numbers: Sequence[int], options: Options, workers: int) -> Generator[_Image, None, None]:
    """The images of those numbers, in that order, as they will be stored; a bounded number of them is held."""
    _hold(source, options)
    if workers <= 1:
        for number in numbers:
            yield from _store([number])
        return
    chunks = iter([numbers[start : start + _CHUNK] for start in range(0, len(numbers), _CHUNK)])
    ahead: deque[Future[list[_Image]]] = deque()
    given = (source, options, helpers_first_call())
    pool = ProcessPoolExecutor(workers, initializer=_start_process, initargs=given)
    try:
        for chunk in chunks:
            ahead.append(pool.submit(_store, chunk))
            if len(ahead) > 4 * workers:
                yield from ahead.popleft().result()
        while ahead:
            yield from ahead.popleft().result()
    except BrokenProcessPool:
        raise UserError("a process was killed, likely for lack of memory; try fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _store(numbers: Sequence[int]) -> list[_Image]:
    assert _source is not None
    how = _options.format, _options.short_side, _options.quality
    images = []
    for number in numbers:
        try:
            images.append(_Image(number, *encoded(_source, number, *how), ""))
        except BadImage as error:
            images.append(_Image(number, b"", 0, f"{_source.describe(number)}: {error.reason}"))
    return images
