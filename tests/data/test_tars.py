"""Tars and WebDataset shards: read in place, hostile members refused."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from acmix.config import Config
from acmix.data.images import BadImage
from acmix.data.loader import build_data
from acmix.data.tars import index_tar, shard_source, tar_source
from acmix.errors import UserError

MakeFolder = Callable[..., Path]
MakeConfig = Callable[..., Config]


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value, value, value)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def values(source: object) -> list[tuple[int, int]]:
    """Grey value and target of every image."""
    loaded = [source.load(i) for i in range(len(source))]  # type: ignore[attr-defined, arg-type]
    return [(int(np.asarray(image)[0, 0, 0]), target) for image, target in loaded]


def test_a_tar_with_class_folders_reads_like_the_folder(
    tmp_path: Path, make_folder: MakeFolder, make_config: MakeConfig
) -> None:
    root = make_folder(tmp_path)
    for split in ("train", "val"):
        with tarfile.open(root / f"{split}.tar", "w") as tar:
            tar.add(root / split, arcname=".")
    batches = []
    for dataset in ("folder", "tar"):
        data = build_data(make_config(data__dataset=dataset, data__root=root, data__num_workers=2))
        batches.append([batch for update in data.train.epoch(0) for batch in update])
    assert len(batches[0]) == len(batches[1]) == 3
    for folder, tar in zip(*batches, strict=True):
        assert np.array_equal(folder.images, tar.images)
        assert np.array_equal(folder.targets, tar.targets)


def test_one_tar_per_class_and_tars_inside_a_tar_name_the_classes(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    write_tar(tmp_path / "train" / "cat.tar", {"1.png": png(10), "2.png": png(20)})
    write_tar(tmp_path / "train" / "dog.tar", {"1.png": png(30), "sub/readme.txt": b"no image", "._1.png": b"mac"})
    source = tar_source(tmp_path, "train")
    assert source.classes == ["cat", "dog"]
    assert values(source) == [(10, 0), (20, 0), (30, 1)]
    inner = {f"{name}.tar": (tmp_path / "train" / f"{name}.tar").read_bytes() for name in ("cat", "dog")}
    write_tar(tmp_path / "val.tar", inner)
    assert tar_source(tmp_path, "val").classes == ["cat", "dog"]
    assert values(tar_source(tmp_path, "val")) == [(10, 0), (20, 0), (30, 1)]
    assert tar_source(tmp_path, "val").describe(2) == f"{tmp_path}/val.tar: dog/1.png (class dog)"


def test_shards_pair_images_with_their_class(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-000.tar", {"a.cls": b"10\n", "a.png": png(1), "b.png": png(2), "b.cls": b"2"})
    write_tar(tmp_path / "train-001.tar", {"x/a.png": png(3), "x/a.json": b'{"label": 10}', "x/a.txt": b"caption"})
    source = shard_source(tmp_path, "train")
    assert source.classes == ["10", "2"], "as text, like folders"
    assert values(source) == [(1, 0), (2, 1), (3, 0)]


def test_shards_without_a_class_are_refused_naming_the_sample(tmp_path: Path) -> None:
    write_tar(tmp_path / "train.tar", {"a.png": png(1), "a.cls": b"0", "b.png": png(2)})
    with pytest.raises(UserError, match=r"train.tar: sample b: no class"):
        shard_source(tmp_path, "train")


def test_of_the_images_of_a_sample_the_one_with_a_single_suffix_is_taken_jpg_first(tmp_path: Path) -> None:
    first = {"a.depth.png": png(1), "a.cls": b"0", "a.png": png(2), "a.seg.png": png(3)}
    second = {"b.webp": png(4), "b.PNG": png(5), "b.JPG": png(6), "b.cls": b"0"}
    path = write_tar(tmp_path / "train.tar", first | second)
    assert values(shard_source(tmp_path, "train")) == [(2, 0), (6, 0)]
    write_tar(path, first | {"c.depth.png": png(7), "c.cls": b"0"})
    with pytest.raises(UserError, match=rf"^{path}: sample c: no KEY.jpg, but c.depth.png; name its image"):
        shard_source(tmp_path, "train")


def test_a_key_that_occurs_twice_in_a_shard_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "train.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in (("a.png", png(1)), ("a.cls", b"0"), ("b.png", png(2)), ("b.cls", b"1"), ("a.png", png(3))):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with pytest.raises(UserError, match=rf"^{path}: member a.png: occurs twice"):
        shard_source(tmp_path, "train")


def hostile_tar(path: Path, name: str, kind: bytes, target: str = "") -> Path:
    with tarfile.open(path, "w") as tar:
        good = tarfile.TarInfo("cat/1.png")
        good.size = len(png(1))
        tar.addfile(good, io.BytesIO(png(1)))
        bad = tarfile.TarInfo(name)
        bad.type, bad.linkname = kind, target
        bad.size = 3 if kind == tarfile.REGTYPE else 0
        tar.addfile(bad, io.BytesIO(b"bad"))
    return path


@pytest.mark.parametrize(
    ("name", "kind", "target"),
    [
        ("../evil.png", tarfile.REGTYPE, ""),
        ("cat/../../evil.png", tarfile.REGTYPE, ""),
        ("cat\\..\\..\\evil.png", tarfile.REGTYPE, ""),
        ("/tmp/evil.png", tarfile.REGTYPE, ""),
        ("../evil", tarfile.DIRTYPE, ""),
        ("cat/link.png", tarfile.SYMTYPE, "/etc/passwd"),
        ("cat/inside.png", tarfile.SYMTYPE, "1.png"),
        ("cat/hard.png", tarfile.LNKTYPE, "../../etc/passwd"),
        ("cat/pipe.png", tarfile.FIFOTYPE, ""),
        ("cat/device.png", tarfile.CHRTYPE, ""),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_members_that_climb_out_are_refused_by_name(
    name: str,
    kind: bytes,
    target: str,
    nested: bool,
    tmp_path: Path,
    make_config: MakeConfig,
    report: Callable[..., None],
) -> None:
    (tmp_path / "data").mkdir()
    path = hostile_tar(tmp_path / "data" / "train.tar", name, kind, target)
    if nested:
        write_tar(path, {"inner.tar": path.read_bytes()})
    before = sorted(tmp_path.rglob("*"))
    for dataset in ("tar", "wds/any"):
        with pytest.raises(UserError) as caught:
            build_data(make_config(data__dataset=dataset, data__root=tmp_path / "data"))
        assert f"{path}: member " in str(caught.value)
        assert name in str(caught.value)
        assert "refused" in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before
    report("hostile tar members", "refused by name, nothing is written", 2, 2)


def test_damaged_and_missing_tars_are_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "train.tar", {"cat/1.png": png(1), "cat/2.png": png(2) * 50})
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(UserError, match=r"train.tar: not a readable tar file"):
        index_tar(path)
    path.write_bytes(b"not a tar at all, but longer than nothing" * 100)
    with pytest.raises(UserError, match=r"train.tar: not a readable tar file"):
        index_tar(path)
    with pytest.raises(UserError, match=r"neither val.tar, val\*.tar nor val/\*.tar"):
        tar_source(tmp_path, "val")
    with pytest.raises(UserError, match=r"no such folder"):
        tar_source(tmp_path / "gone", "val")
    write_tar(path, {"readme.txt": b"x"})
    with pytest.raises(UserError, match=r"no images inside"):
        tar_source(tmp_path, "train")


def damaged(kind: str, data: bytes, second: tarfile.TarInfo) -> bytes:
    """The bytes of a tar whose second member or end is not as written."""
    header = second.offset
    if kind == "one byte of a header":
        return data[: header + 5] + b"\xff" + data[header + 6 :]
    if kind == "a header of zeros":
        return data[:header] + bytes(512) + data[header + 512 :]
    if kind == "two tars joined":
        return data + data
    length = {"between members": header, "inside a header": header + 100, "no end": second.offset_data + 512}[kind]
    return data[:length]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    "kind",
    [
        *["one byte of a header", "a header of zeros", "two tars joined"],
        *["between members", "inside a header", "no end"],
    ],
)
def test_a_damaged_header_or_a_missing_end_loses_no_member_silently(kind: str, nested: bool, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "train.tar", {f"cat/{number}.png": png(number) for number in range(2)})
    with tarfile.open(path) as tar:
        second = tar.getmembers()[1]
    data = path.read_bytes()
    path.write_bytes(damaged(kind, data, second))
    place = {"two tars joined": 2048, "no end": 2048}.get(kind, second.offset)
    if nested:
        write_tar(path, {"cat.tar": path.read_bytes()})
        place += 512
    where = f"{path}: member cat.tar" if nested else str(path)
    with pytest.raises(UserError, match=rf"^{where}: .*at byte {place}"):
        index_tar(path)
    path.write_bytes(data[: second.offset_data + 512] + bytes(512))
    assert len(index_tar(path)) == 2, "one block of zeros is an end"


def test_classes_of_a_tar_sort_as_text_and_hidden_folders_are_no_classes(tmp_path: Path) -> None:
    files = {f"{number}/1.png": png(number) for number in (1, 2, 10, 100)}
    write_tar(tmp_path / "train.tar", {**files, "1/._1.png": b"mac"})
    source = tar_source(tmp_path, "train")
    assert source.classes == ["1", "10", "100", "2"]
    assert values(source) == [(1, 0), (10, 1), (100, 2), (2, 3)]
    write_tar(tmp_path / "val.tar", {**files, "1/.ipynb_checkpoints/1.png": png(1)})
    with pytest.raises(UserError, match=r"val.tar: member 1/.ipynb_checkpoints/1.png: a hidden folder"):
        tar_source(tmp_path, "val")
    write_tar(tmp_path / "val.tar", {"cat/1.npy": b"x"})
    with pytest.raises(UserError, match=r"no images inside \(found .npy files; images are read from"):
        tar_source(tmp_path, "val")


def test_a_tar_that_shrinks_after_it_was_indexed_gives_a_bad_image(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "train.tar", {"cat/1.png": png(1)})
    source = tar_source(tmp_path, "train")
    path.write_bytes(path.read_bytes()[:520])
    with pytest.raises(BadImage, match="ends before the member does"):
        source.load(0)
