"""Prepared shards: the same bytes however they are made, complete after a kill, refused when not as written."""

import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from acmix.config import Config
from acmix.data.arrays import ArraySource
from acmix.data.folders import FolderSource
from acmix.data.images import BadImage
from acmix.data.loader import build_data
from acmix.data.prepare import Options, prepare
from acmix.data.shards import MANIFEST, PreparedSource, open_prepared
from acmix.errors import UserError

MakeFolder = Callable[..., Path]
MakeConfig = Callable[..., Config]


@pytest.fixture
def photos(tmp_path: Path, make_folder: MakeFolder) -> Path:
    """13 + 5 images of 40 × 40: JPEG files, but for one PNG of the training images."""
    root = make_folder(tmp_path / "photos", train=13, val=5, size=40)
    for path in sorted(root.rglob("*.png"))[1:]:
        Image.open(path).save(path.with_suffix(".jpg"), quality=85)
        path.unlink()
    return root


def sources(root: Path) -> dict[str, FolderSource]:
    return {split: FolderSource(root / split) for split in ("train", "val")}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def opened(folder: Path, split: str = "train") -> PreparedSource:
    source = open_prepared(folder, split)
    assert source is not None
    return source


def multiset(source: Any) -> list[tuple[bytes, int]]:
    return sorted((source.load(i)[0].tobytes(), source.load(i)[1]) for i in range(len(source)))


def test_jpeg_files_that_fit_are_stored_as_they_are_and_read_back_with_their_classes(
    photos: Path, tmp_path: Path
) -> None:
    manifest = prepare(sources(photos), tmp_path / "out", Options(shards=3))
    assert manifest.classes == ("cat", "dog")
    assert [len(split) for split in manifest.splits.values()] == [13, 5]
    assert manifest.splits["train"].lengths == (5, 4, 4)
    source = opened(tmp_path / "out")
    assert source.classes == ["cat", "dog"]
    stored = {source.read(i)[0] for i in range(len(source))}
    files = {path.read_bytes() for path in photos.rglob("train/*/*.jpg")}
    assert files < stored, "the PNG alone was encoded"
    assert [source.load(i)[1] for i in range(13)] == source.targets.tolist()
    val = opened(tmp_path / "out", "val")
    in_order = [FolderSource(photos / "val").read(i) for i in range(5)]
    assert [val.read(i) for i in range(5)] == in_order, "validation keeps its order"


@pytest.mark.parametrize(("format", "suffix"), [("jpeg", "jpg"), ("webp", "webp")])
def test_larger_images_are_made_smaller_and_smaller_ones_stay(format: Any, suffix: str, tmp_path: Path) -> None:
    (tmp_path / "train" / "x").mkdir(parents=True)
    for number, size in enumerate([(100, 50), (50, 90), (20, 30)]):
        Image.new("RGB", size, (200, 30, 30)).save(tmp_path / "train" / "x" / f"{number}.jpg")
    source = {"val": FolderSource(tmp_path / "train")}
    prepare(source, tmp_path / "out", Options(short_side=32, format=format))
    found = opened(tmp_path / "out", "val")
    assert [found.load(i)[0].size for i in range(3)] == [(64, 32), (32, 58), (20, 30)]
    with tarfile.open(tmp_path / "out" / "val-000001.tar") as tar:
        assert tar.getnames() == [f"000000001.{suffix}", "000000001.cls"]


def test_the_files_do_not_depend_on_the_number_of_processes(photos: Path, tmp_path: Path) -> None:
    for workers in (1, 3):
        prepare(sources(photos), tmp_path / f"{workers}", Options(short_side=24, shards=2), workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


def test_images_in_memory_can_be_prepared(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)
    source = ArraySource("mine", pixels, np.arange(9) % 3, ["a", "b", "c"])
    prepare({"train": source}, tmp_path, Options(quality=95))
    assert sorted(opened(tmp_path).targets.tolist()) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


class Stopped(Exception):
    pass


def stopping_after(count: int) -> Callable[[Iterator[Any], int, str], Iterator[Any]]:
    def progress(items: Iterator[Any], total: int, name: str) -> Iterator[Any]:
        for number, item in enumerate(items):
            if number == count:
                raise Stopped
            yield item

    return progress


def test_a_call_that_was_stopped_goes_on_with_the_shards_that_are_missing(photos: Path, tmp_path: Path) -> None:
    options, out = Options(shards=4), tmp_path / "out"
    prepare(sources(photos), tmp_path / "whole", options)
    with pytest.raises(Stopped):
        prepare(sources(photos), out, options, progress=stopping_after(8))
    assert sorted(path.name for path in out.glob("*.tar")) == ["train-000000.tar", "train-000001.tar"]
    with pytest.raises(UserError, match="holds unfinished shards of other images or options"):
        prepare(sources(photos), out, Options(shards=3))
    assert open_prepared(out, "train") is None
    totals = []

    def count(items: Iterator[Any], total: int, name: str) -> Iterator[Any]:
        totals.append((name, total))
        return items

    prepare(sources(photos), out, options, workers=2, progress=count)
    assert totals == [("train", 6), ("val", 5)]
    assert contents(out) == contents(tmp_path / "whole")
    prepare(sources(photos), out, options, progress=count)
    assert len(totals) == 2, "a finished set is left alone"
    with pytest.raises(UserError, match="holds shards of other images or options"):
        prepare(sources(photos), out, Options(shards=5))
    assert contents(out) == contents(tmp_path / "whole"), "left as it was"


@pytest.mark.parametrize("names", [["train-000001.tar"], ["train-index.npy"], ["train-000002.tar", "val-index.npy"]])
def test_files_that_are_damaged_or_gone_are_made_again_and_no_others(
    names: list[str], photos: Path, tmp_path: Path
) -> None:
    options, out = Options(shards=3, on_error="skip"), tmp_path / "out"
    bad = [path for path in sorted((photos / "train").rglob("*.*")) if path.suffix == ".jpg"][:6]
    for path in bad:
        path.write_bytes(b"no image")
    manifest = prepare(sources(photos), out, options)
    assert len(manifest.splits["train"].skipped) == 6
    expected = contents(out)
    for number, name in enumerate(names):
        if number:
            (out / name).unlink()
        else:
            (out / name).write_bytes(expected[name][:-1] + b"x")
    made = []

    def note(items: Iterator[Any], total: int, name: str) -> Iterator[Any]:
        made.append((name, total))
        return items

    assert prepare(sources(photos), out, options, progress=note) == manifest
    assert contents(out) == expected
    assert made == [("train", 4 if names[0].endswith(".tar") else 0), ("val", 0)]
    text = (out / MANIFEST).read_text()
    (out / MANIFEST).write_text(text[:-20])
    with pytest.raises(UserError, match=rf"damaged .*; to make them again here, empty {out} first"):
        prepare(sources(photos), out, options)


KILLED = """
import os, signal, sys
from pathlib import Path
from acmix.data.folders import FolderSource
from acmix.data.prepare import Options, prepare

def progress(items, total, name):
    for number, item in enumerate(items):
        if number == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        yield item

root, out = map(Path, sys.argv[1:])
prepare({"train": FolderSource(root / "train"), "val": FolderSource(root / "val")}, out, Options(shards=4), 2, progress)
"""


def test_a_call_that_was_killed_goes_on_and_its_processes_end_with_it(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(photos), str(out)]
    # its processes hold the pipe: the call returns when all have ended
    done = subprocess.run(command, stdout=subprocess.PIPE, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    prepare(sources(photos), out, Options(shards=4))
    prepare(sources(photos), tmp_path / "whole", Options(shards=4))
    assert contents(out) == contents(tmp_path / "whole")


def test_a_bad_image_stops_or_is_listed_and_left_out(photos: Path, tmp_path: Path) -> None:
    bad = sorted((photos / "train" / "dog").iterdir())[2]
    bad.write_bytes(bad.read_bytes()[:-200])
    with pytest.raises(UserError, match=rf"cannot store {bad} \(class dog\): .*--on-error skip"):
        prepare(sources(photos), tmp_path / "stop", Options())
    manifest = prepare(sources(photos), tmp_path / "skip", Options(shards=2, on_error="skip"), workers=2)
    assert len(manifest.splits["train"]) == len(opened(tmp_path / "skip")) == 12
    [text] = manifest.splits["train"].skipped
    assert text.startswith(f"{bad} (class dog): ")
    prepare(sources(photos), tmp_path / "stop", Options(on_error="skip"))
    prepare(sources(photos), tmp_path / "whole", Options(on_error="skip"))
    assert contents(tmp_path / "stop") == contents(tmp_path / "whole"), "a call that stopped goes on without the image"


@pytest.mark.parametrize(("format", "side"), [("jpeg", 65501), ("webp", 16384)])
def test_an_image_too_large_for_its_format_is_named_or_left_out(format: Any, side: int, tmp_path: Path) -> None:
    (tmp_path / "val" / "x").mkdir(parents=True)
    for name, width in (("good", 30), ("wide", side)):
        Image.new("L", (width, 3)).save(tmp_path / "val" / "x" / f"{name}.png")
    source = {"val": FolderSource(tmp_path / "val")}
    with pytest.raises(UserError, match=rf"val/x/wide.png \(class x\): {side} × 3 pixels are more than {format} can"):
        prepare(source, tmp_path / "out", Options(format=format))
    manifest = prepare(source, tmp_path / "out", Options(format=format, on_error="skip"), workers=2)
    assert [len(manifest.splits["val"]), len(manifest.splits["val"].skipped)] == [1, 1]
    prepare(source, tmp_path / "smaller", Options(format=format, short_side=2))


def test_an_image_that_an_unfinished_call_left_out_stops_one_that_must_not(photos: Path, tmp_path: Path) -> None:
    bad = FolderSource(photos / "val").describe(0).split(" ")[0]
    Path(bad).write_bytes(b"no image")
    with pytest.raises(Stopped):
        prepare({"val": FolderSource(photos / "val")}, tmp_path / "out", Options(on_error="skip"), 1, stopping_after(3))
    with pytest.raises(UserError, match=bad):
        prepare({"val": FolderSource(photos / "val")}, tmp_path / "out", Options())


def test_a_folder_in_use_is_refused(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"not empty, it holds notes.txt"):
        prepare(sources(photos), tmp_path / "out", Options())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"], "left as it was"

    def again(items: Iterator[Any], total: int, name: str) -> Iterator[Any]:
        prepare(sources(photos), tmp_path / "busy", Options())
        return items

    with pytest.raises(UserError, match="another process is making shards there"):
        prepare(sources(photos), tmp_path / "busy", Options(), progress=again)


@pytest.fixture
def shards(photos: Path, tmp_path: Path) -> Path:
    prepare(sources(photos), tmp_path / "shards", Options(shards=3))
    return tmp_path / "shards"


def test_training_from_shards_sees_every_image_once_and_resumes_inside_a_shard(
    shards: Path, photos: Path, make_config: MakeConfig
) -> None:
    settings = {"data__dataset": "wds/photos", "data__root": shards, "data__batch_size": 2}
    data = build_data(make_config(**settings))
    assert data.classes == ["cat", "dog"]
    whole = [batch.ids.tolist() for update in data.train.epoch(0) for batch in update]
    assert len({number for numbers in whole for number in numbers}) == 12, "of 13 images, 6 batches of 2"
    resumed = [batch.ids.tolist() for update in data.train.epoch(0, start_update=2) for batch in update]
    assert resumed == whole[2:]
    ranks = [build_data(make_config(**settings | {"data__batch_size": 1}), rank=r, world_size=2) for r in (0, 1)]
    halves = [[batch.ids.tolist() for update in data.train.epoch(0) for batch in update] for data in ranks]
    assert [a + b for a, b in zip(*halves, strict=True)] == whole
    assert sorted(number for data in ranks for batch in data.val for number in batch.ids.tolist()) == list(range(5))
    assert multiset(opened(shards, "val")) == multiset(FolderSource(photos / "val"))


@pytest.mark.parametrize("decoder", ["pillow", "auto"])
def test_a_changed_member_is_named_and_stops_or_is_left_out(
    decoder: str, shards: Path, make_config: MakeConfig
) -> None:
    source = opened(shards)
    place = bytearray((shards / "train-000001.tar").read_bytes())
    with tarfile.open(shards / "train-000001.tar") as tar:
        member = tar.getmembers()[0]
    place[member.offset_data + 300] ^= 0xFF
    (shards / "train-000001.tar").write_bytes(place)
    index = next(i for i in range(13) if f"train-000001.tar: {member.name} (class " in source.describe(i))
    with pytest.raises(BadImage, match="its checksum is not that of the index"):
        source.load(index)
    settings = {"data__dataset": "wds/x", "data__root": shards, "data__batch_size": 13, "data__decoder": decoder}
    with pytest.raises(UserError, match=rf"unreadable image: {shards}/train-000001.tar: {member.name} .*checksum"):
        list(build_data(make_config(**settings)).train.epoch(0))
    [[batch]] = build_data(make_config(**settings, data__on_error="skip")).train.epoch(0)
    assert batch.ids[~batch.valid].tolist() == [index]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "No such file"),
        (lambda path: os.truncate(path, 500), r"cut off, 500 bytes where the manifest says"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "changed, "),
    ],
)
@pytest.mark.parametrize("name", ["train-000002.tar", "train-index.npy"])
def test_a_file_that_is_missing_or_of_another_size_is_refused_by_name(
    name: str, damage: Callable[[Path], None], message: str, shards: Path
) -> None:
    damage(shards / name)
    with pytest.raises(UserError, match=rf"{name}: {message}.*make it again with scripts/prepare_data.py"):
        open_prepared(shards, "train")
    assert len(opened(shards, "val")) == 5


def test_a_shard_that_vanishes_during_the_run_gives_a_bad_image(shards: Path) -> None:
    source = opened(shards)
    for path in shards.glob("train-*.tar"):
        path.unlink()
    with pytest.raises(BadImage, match=r"train-00000\d.tar: No such file"):
        source.load(0)


def test_a_damaged_manifest_or_index_is_refused(shards: Path) -> None:
    with pytest.raises(UserError, match=r"no split test; set data.train_split or val_split to train, val"):
        open_prepared(shards, "test")
    index = shards / "train-index.npy"
    index.write_bytes(index.read_bytes()[:-1] + b"\x01")
    with pytest.raises(UserError, match=r"train-index.npy: changed, its checksum is not that of the manifest"):
        open_prepared(shards, "train")
    text = (shards / MANIFEST).read_text()
    for damaged, message in (
        (text[:-20], "damaged"),
        (text.replace('"sha256"', '"md5"'), "damaged"),
        (text.replace("train-000000.tar", "../000000.tar"), "not the name of a file of the set"),
        (text.replace('"acmix_shards": 1', '"acmix_shards": 99'), "newer version"),
    ):
        (shards / MANIFEST).write_text(damaged)
        with pytest.raises(UserError, match=message):
            open_prepared(shards, "train")


def test_a_member_that_is_no_image_is_refused_as_everywhere(shards: Path) -> None:
    """Of shards made by others: there is no manifest of ours, so every member is looked at."""
    other = shards / "other"
    other.mkdir()
    with tarfile.open(other / "train-0.tar", "w") as tar:
        for name, data in (("a.jpg", b"not an image"), ("a.cls", b"0")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert open_prepared(other, "train") is None
    shutil.copy(other / "train-0.tar", other / "val-0.tar")
    from acmix.data.tars import shard_source

    with pytest.raises(BadImage, match="not an image in a supported format"):
        shard_source(other, "train").load(0)


def test_the_webdataset_package_reads_the_same_images(shards: Path) -> None:
    wds = pytest.importorskip("webdataset")
    urls = [str(path) for path in sorted(shards.glob("train-*.tar"))]
    found = wds.WebDataset(urls, shardshuffle=False, empty_check=False).decode("pil").to_tuple("jpg", "cls")
    assert sorted((image.tobytes(), target) for image, target in found) == multiset(opened(shards))


def test_timm_reads_the_same_images(shards: Path) -> None:
    pytest.importorskip("webdataset")
    from timm.data import create_dataset

    for split, count in (("train", 13), ("val", 5)):
        dataset = create_dataset("wds/photos", root=str(shards), split=split, batch_size=1, is_training=False)
        assert len(dataset) == count
        assert sorted((image.tobytes(), target) for image, target in dataset) == multiset(opened(shards, split))
