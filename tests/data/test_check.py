"""The folder check finds every planted problem, calls it by its kind, and agrees with training on what is fatal."""

import io
import os
import shutil
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from acmix.config import Config
from acmix.data.check import Report, check_folder, find_splits
from acmix.data.loader import build_data
from acmix.errors import UserError

MakeFolder = Callable[..., Path]
MakeConfig = Callable[..., Config]
FATAL = {"truncated", "empty", "not_image", "bomb", "corrupt", "unreadable"}
FATAL_FOLDERS = {"empty_class", "hidden_folder", "class_mismatch"}


def image_bytes(random: np.random.Generator, kind: str = "JPEG", mode: str = "RGB") -> bytes:
    pixels = random.integers(0, 256, (24, 24, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    if mode == "I;16":
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def bomb(random: np.random.Generator) -> bytes:
    data = bytearray(image_bytes(random, "PNG"))
    data[16:24] = (50_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def corrupt(random: np.random.Generator) -> bytes:
    data = bytearray(image_bytes(random, "PNG"))
    data[len(data) // 2] ^= 0xFF  # breaks the checksum of the compressed pixels
    return bytes(data)


PLANTS: dict[str, list[tuple[str, Callable[[np.random.Generator], bytes]]]] = {
    "truncated": [
        *[
            (f".{kind.lower()}", lambda r, kind=kind: image_bytes(r, kind)[:-40])
            for kind in ("JPEG", "PNG", "WEBP", "BMP")
        ],
        (".jpg", lambda r: (data := image_bytes(r))[: len(data) // 2]),
        (".jpg", lambda r: image_bytes(r)[:25]),
    ],
    "empty": [(".jpg", lambda r: b""), (".PNG", lambda r: b"")],
    "not_image": [(".jpg", lambda r: b"some text\n"), (".JPEG", lambda r: b"<html><body>404</body></html>")],
    "bomb": [(".png", bomb)],
    "corrupt": [(".png", corrupt)],
    "misnamed": [
        (".JPEG", lambda r: image_bytes(r, "PNG")),
        (".png", image_bytes),
        (".bmp", lambda r: image_bytes(r, "GIF")),
    ],
    "cmyk": [(".jpg", lambda r: image_bytes(r, "JPEG", "CMYK"))],
    "16bit": [(".png", lambda r: image_bytes(r, "PNG", "I;16")), (".tif", lambda r: image_bytes(r, "TIFF", "I;16"))],
}


def plant(root: Path, rounds: int, make_folder: MakeFolder) -> set[tuple[str, str]]:
    """A sound folder with problems in it; returns (path, kind) of each."""
    make_folder(root, train=24, val=8, classes=("ant", "bee", "cow"))
    random = np.random.default_rng(rounds)
    planted: set[tuple[str, str]] = set()
    for number in range(rounds):
        for kind, recipes in PLANTS.items():
            for place, (suffix, recipe) in enumerate(recipes):
                split, name = random.choice(["train", "val"]), random.choice(["ant", "bee", "cow"])
                path = root / str(split) / str(name) / f"{kind}_{number}_{place}{suffix}"
                path.write_bytes(recipe(random))
                planted.add((str(path), kind))
        source = root / "train" / "ant" / "000.png"
        twin = root / "val" / "bee" / f"twin_{number}.png"
        shutil.copy(source, twin)
        planted.add((str(twin), "duplicate"))
        link = root / "train" / "cow" / f"gone_{number}.jpg"
        link.symlink_to(root / "nowhere.jpg")
        pipe = root / "train" / "cow" / f"pipe_{number}.jpg"
        os.mkfifo(pipe)
        planted |= {(str(link), "unreadable"), (str(pipe), "unreadable")}
        for folder, kind in ((f"train/empty_{number}", "empty_class"), (f"train/.hidden_{number}", "hidden_folder")):
            (root / folder).mkdir()
            planted.add((str(root / folder), kind))
        planted.add((str(root / f"train/empty_{number}"), "not_validated"))
        only_val = root / "val" / f"extra_{number}"
        only_val.mkdir()
        (only_val / "1.jpg").write_bytes(image_bytes(random))
        planted.add((str(only_val), "class_mismatch"))
    return planted


def found(report: Report) -> set[tuple[str, str]]:
    return {(problem.path, problem.kind) for problem in report.problems}


def assert_all_found(
    root: Path, rounds: int, workers: int, make_folder: MakeFolder, report: Callable[..., None]
) -> None:
    planted = plant(root, rounds, make_folder)
    checked = check_folder(root, workers=workers)
    hits = planted & found(checked)
    report("bad images and folders found by check_data", "every one is listed by kind", len(hits), len(planted))
    assert found(checked) == planted
    for problem in checked.problems:
        assert problem.fatal == (problem.kind in FATAL | FATAL_FOLDERS), problem
    assert checked.fatal


def test_every_planted_problem_is_found_and_nothing_else(
    tmp_path: Path, make_folder: MakeFolder, report: Callable[..., None]
) -> None:
    assert_all_found(tmp_path, 2, 1, make_folder, report)


@pytest.mark.drill
def test_hundreds_of_planted_problems_are_found_by_parallel_readers(
    tmp_path: Path, make_folder: MakeFolder, report: Callable[..., None]
) -> None:
    assert_all_found(tmp_path, 20, 3, make_folder, report)


def test_a_sound_folder_has_no_problems_with_any_number_of_workers(tmp_path: Path, make_folder: MakeFolder) -> None:
    make_folder(tmp_path, train=70, val=6)
    for workers in (0, 2):
        report = check_folder(tmp_path, workers=workers)
        assert (report.files, report.problems, report.fatal) == (76, [], False)


def test_files_that_training_ignores_are_listed_but_not_fatal(tmp_path: Path, make_folder: MakeFolder) -> None:
    make_folder(tmp_path)
    ignored = {"train/cat/notes.txt": "not_image", "val/dog/.DS_Store": "hidden_file", "train/loose.png": "stray"}
    for name in ignored:
        (tmp_path / name).write_bytes(b"x")
    report = check_folder(tmp_path)
    assert found(report) == {(str(tmp_path / name), kind) for name, kind in ignored.items()}
    assert not report.fatal


@pytest.mark.parametrize("kind", [kind for kind in PLANTS if kind != "unreadable"])
def test_training_stops_exactly_at_what_is_called_fatal(
    kind: str, tmp_path: Path, make_folder: MakeFolder, make_config: MakeConfig
) -> None:
    suffix, recipe = PLANTS[kind][0]
    make_folder(tmp_path, train=4)
    (tmp_path / "train" / "cat" / f"planted{suffix}").write_bytes(recipe(np.random.default_rng(0)))
    data = build_data(make_config(data__dataset="folder", data__root=tmp_path, data__batch_size=5))
    fatal = check_folder(tmp_path).fatal
    assert fatal == (kind in FATAL)
    if fatal:
        with pytest.raises(UserError, match="planted"):
            list(data.train.epoch(0))
    else:
        assert len(list(data.train.epoch(0))) == 1


def test_duplicates_are_found_by_picture_and_not_by_file(tmp_path: Path, make_folder: MakeFolder) -> None:
    make_folder(tmp_path)
    picture = Image.open(tmp_path / "train" / "cat" / "000.png")
    picture.save(tmp_path / "val" / "dog" / "again.bmp")
    picture.rotate(90).save(tmp_path / "val" / "dog" / "other.bmp")
    (problem,) = check_folder(tmp_path).problems
    assert (problem.path, problem.kind) == (str(tmp_path / "val" / "dog" / "again.bmp"), "duplicate")
    assert str(tmp_path / "train" / "cat" / "000.png") in problem.detail


def test_splits_are_found_by_name_or_the_folder_is_taken_as_it_is(tmp_path: Path, make_folder: MakeFolder) -> None:
    make_folder(tmp_path)
    train, val = tmp_path / "train", tmp_path / "val"
    assert find_splits(tmp_path, None, None) == {"train": train, "val": val}
    assert find_splits(train, None, None) == {"train": train}
    assert find_splits(tmp_path, "val", "train") == {"train": val, "val": train}
    val.rename(tmp_path / "test")
    assert find_splits(tmp_path, None, None) == {"train": train, "val": tmp_path / "test"}
    with pytest.raises(UserError, match="val: no such folder"):
        find_splits(tmp_path, None, "val")
    with pytest.raises(UserError, match="gone: no such folder"):
        find_splits(tmp_path / "gone", None, None)


def test_loops_are_named_once_and_dead_links_too(tmp_path: Path, make_folder: MakeFolder) -> None:
    train = make_folder(tmp_path, train=6, classes=("ant", "bee", "cow")) / "train"
    (train / "ant" / "up").symlink_to("../..")
    (train / "bee" / "to_cow").symlink_to("../cow")
    (train / "cow" / "to_bee").symlink_to("../bee")
    (train / "cow" / "self").symlink_to("self")
    (train / "gone").symlink_to("nowhere")
    (train / "gone.jpg").symlink_to("nowhere.jpg")
    report = check_folder(tmp_path)
    assert found(report) == {
        (str(train / "ant" / "up"), "link_loop"),
        (str(train / "bee" / "to_cow" / "to_bee"), "link_loop"),
        (str(train / "bee" / "to_cow" / "self"), "dead_link"),
        (str(train / "cow" / "self"), "dead_link"),
        (str(train / "gone"), "dead_link"),
        (str(train / "gone.jpg"), "stray"),
    }
    assert report.fatal


def test_classes_that_people_take_for_one_are_noted(tmp_path: Path, make_folder: MakeFolder) -> None:
    make_folder(tmp_path, train=6, val=6, classes=("cat", "Cat", "cat "))
    report = check_folder(tmp_path)
    assert {problem.kind for problem in report.problems} == {"similar_classes"}
    assert not report.fatal


def test_a_class_that_is_not_validated_is_noted(
    tmp_path: Path, make_folder: MakeFolder, make_config: MakeConfig
) -> None:
    shutil.rmtree(make_folder(tmp_path) / "val" / "dog")
    report = check_folder(tmp_path)
    assert (found(report), report.fatal) == ({(str(tmp_path / "train" / "dog"), "not_validated")}, False)
    assert build_data(make_config(data__dataset="folder", data__root=tmp_path)).val.present == [0]


def test_class_names_that_cannot_be_written_are_named_by_the_check_and_by_training(
    tmp_path: Path, make_folder: MakeFolder, make_config: MakeConfig
) -> None:
    make_folder(tmp_path, classes=("cat", "d\udcffg"))
    report = check_folder(tmp_path)
    assert found(report) == {(str(tmp_path / split / "d\udcffg"), "bad_name") for split in ("train", "val")}
    with pytest.raises(UserError, match=r"not UTF-8: .*/train/d\\xffg; rename"):
        build_data(make_config(data__dataset="folder", data__root=tmp_path))


KILLED = """
import os, signal, sys
from pathlib import Path
from acmix.data.check import check_folder

def progress(items, total):
    next(items)
    os.kill(os.getpid(), signal.SIGKILL)

check_folder(Path(sys.argv[1]), workers=2, progress=progress)
"""


def test_the_processes_of_a_check_that_was_killed_end_with_it(tmp_path: Path, make_folder: MakeFolder) -> None:
    root = make_folder(tmp_path, train=150)
    # its processes hold the pipe: the call returns when all have ended
    command = [sys.executable, "-c", KILLED, str(root)]
    done = subprocess.run(command, stdout=subprocess.PIPE, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
