"""scripts/prepare_data.py, as it is called."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from acmix.data.shards import open_prepared
from scripts.prepare_data import main


def write_images(folder: Path, count: int, size: tuple[int, int] = (60, 40)) -> None:
    folder.mkdir(parents=True)
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg")


def targets(out: Path, split: str) -> list[int]:
    source = open_prepared(out, split)
    assert source is not None
    assert all(source.load(i)[0].size == (24, 16) for i in range(len(source)))
    return sorted(source.targets.tolist())


def test_a_folder_becomes_shards_and_a_second_call_finds_them_done(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for split, name, count in (("train", "a", 3), ("train", "b", 4), ("validation", "b", 2)):
        write_images(tmp_path / "in" / split / name, count)
    arguments = [str(tmp_path / "in"), str(tmp_path / "out"), "--short-side", "16", "--workers", "2", "--shards", "2"]
    assert main(arguments) == 0
    assert "train: 7 images" in (said := capfd.readouterr().out)
    assert f"train with data.dataset=wds/in data.root={tmp_path / 'out'}" in said
    assert targets(tmp_path / "out", "train") == [0, 0, 0, 1, 1, 1, 1]
    assert targets(tmp_path / "out", "val") == [1, 1], "whatever the folder is called"
    assert main(arguments) == 0


def test_the_keys_to_train_with_can_be_typed_as_they_are_told(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root, out = tmp_path / "my data", tmp_path / "the shards"
    write_images(root / "a", 2)
    assert main([str(root), str(out), "--workers", "1"]) == 0
    told = capfd.readouterr().out.splitlines()[-1].removeprefix("train with ")
    assert shlex.split(told) == ["data.dataset=wds/my data", f"data.root={out}"]


def test_a_folder_of_classes_becomes_training_shards(tmp_path: Path) -> None:
    write_images(tmp_path / "in" / "a", 3)
    assert main([str(tmp_path / "in"), str(tmp_path / "out"), "--short-side", "16", "--workers", "1"]) == 0
    assert [*json.loads((tmp_path / "out" / "_info.json").read_text())["splits"]] == ["train"]
    assert targets(tmp_path / "out", "train") == [0, 0, 0]


def test_any_data_set_can_be_prepared_with_the_keys_of_a_config(tmp_path: Path) -> None:
    write_images(tmp_path / "in" / "flat", 3)
    write_images(tmp_path / "in" / "more", 2)
    for role, text in (("train", "0.jpg,x\n1.jpg,y\n2.jpg,x\n"), ("val", "0.jpg,y\n1.jpg,y\n")):
        (tmp_path / f"{role}.csv").write_text(text)
    keys = ["data.train_split=flat", "data.val_split=more", f"data.labels={tmp_path}/{{split}}.csv"]
    assert main([str(tmp_path / "in"), str(tmp_path / "out"), "--short-side", "16", *keys]) == 0
    assert targets(tmp_path / "out", "train") == [0, 0, 1]
    assert targets(tmp_path / "out", "val") == [1, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--short-side", "0"], "--short-side: must be from 1 to 65535, got 0"),
        (["--quality", "101"], "--quality: must be from 1 to 100, got 101"),
        (["--format", "gif"], "invalid choice: 'gif'"),
        (["data.rot=x"], "data.rot"),
        (["data.root=x"], "data.root: ROOT says it"),
        (["optimizer.lr=1"], "optimizer.lr: the shards of a data set follow from data.* alone"),
    ],
)
def test_bad_usage_is_refused(
    arguments: list[str], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "in" / "a", 1)
    assert main([str(tmp_path / "in"), str(tmp_path / "out"), *arguments]) == 2
    assert message in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    assert main([str(tmp_path / "no data"), str(tmp_path / "file" / "out")]) == 2
    assert "cannot write there" in capfd.readouterr().err


@pytest.mark.parametrize("place", ["", "shards", "train", "train/shards", "val/a/shards"])
def test_an_output_among_the_images_is_refused_and_leaves_nothing_there(
    place: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "in"
    for split in ("train", "val") if place.startswith(("train", "val")) else (".",):
        write_images(root / split / "a", 1)
    before = sorted(root.rglob("*"))
    assert main([str(root), str(root / place)]) == 2
    assert "lies among the images of" in capfd.readouterr().err
    assert sorted(root.rglob("*")) == before


def test_a_bad_image_ends_with_status_2_or_is_listed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_images(tmp_path / "in" / "a", 3)
    (tmp_path / "in" / "a" / "1.jpg").write_bytes(b"no image")
    arguments = [str(tmp_path / "in"), str(tmp_path / "out")]
    assert main(arguments) == 2
    assert "1.jpg (class a): not an image" in capfd.readouterr().err
    assert main([str(tmp_path / "in"), str(tmp_path / "skip"), "--on-error", "skip"]) == 0
    assert f"skipped train: {tmp_path / 'in' / 'a' / '1.jpg'} (class a): not an image" in capfd.readouterr().out
