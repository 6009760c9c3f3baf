"""Image folders: what is read, and which folders are refused by name."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from acmix.config import Config
from acmix.data.datasets import build_source
from acmix.data.folders import FolderSource, TextTable
from acmix.data.images import BadImage
from acmix.errors import UserError

MakeFolder = Callable[..., Path]


def test_a_text_table_gives_back_every_string() -> None:
    texts = ["a", "", "käse/übung.png", "x" * 1000, "bad \udcff byte", ""]
    table = TextTable(texts)
    assert [table[i] for i in range(len(table))] == texts
    assert len(TextTable([])) == 0


def test_images_come_sorted_with_their_folder_as_class(tmp_path: Path, make_folder: MakeFolder) -> None:
    split = make_folder(tmp_path, train=7, classes=("b", "a", "10")) / "train"
    (split / "a" / "deep").mkdir()
    (split / "a" / "001.png").rename(split / "a" / "deep" / "IMAGE.PNG")
    (split / "a" / "notes.txt").write_text("not an image")
    (split / "a" / ".hidden.png").write_text("not an image")
    (split / "stray.png").write_text("not in a class")
    source = FolderSource(split)
    assert source.classes == ["10", "a", "b"]
    assert [source.describe(i) for i in range(len(source))] == [
        *[f"{split}/10/{name} (class 10)" for name in ("002.png", "005.png")],
        *[f"{split}/a/{name} (class a)" for name in ("004.png", "deep/IMAGE.PNG")],
        *[f"{split}/b/{name} (class b)" for name in ("000.png", "003.png", "006.png")],
    ]
    assert [source.load(i)[1] for i in range(len(source))] == [0, 0, 1, 1, 2, 2, 2]
    assert source.load(0)[0].size == (16, 16)


def test_a_missing_split_names_the_path_and_what_is_there(tmp_path: Path, make_folder: MakeFolder) -> None:
    make_folder(tmp_path)
    with pytest.raises(UserError, match=rf"{tmp_path}/test: no such folder.*folders there: train, val"):
        FolderSource(tmp_path / "test")
    with pytest.raises(UserError, match=rf"{tmp_path}/nowhere: no such folder; set data.root"):
        FolderSource(tmp_path / "nowhere" / "train")


def test_empty_class_folders_are_refused_by_name(tmp_path: Path, make_folder: MakeFolder) -> None:
    split = make_folder(tmp_path) / "train"
    (split / "eel").mkdir()
    (split / "fox" / "sub").mkdir(parents=True)
    (split / "fox" / "readme.md").write_text("no image")
    with pytest.raises(UserError, match=rf"without images: {split}/eel, {split}/fox"):
        FolderSource(split)
    with pytest.raises(UserError, match="no class folders"):
        FolderSource(split / "eel")


def test_images_of_equal_names_sizes_and_times_in_another_place_are_told_apart(tmp_path: Path) -> None:
    found = set()
    for place, value in (("a", 10), ("b", 200), ("a", 200)):
        path = tmp_path / place / "x" / "1.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (value, value, value)).save(path)
        os.utime(path, (0, 0))  # as files out of a reproducible archive have it
        found.add(FolderSource(tmp_path / place).fingerprint())
        assert FolderSource(tmp_path / place).fingerprint() in found
    assert len(found) == 3


@pytest.mark.parametrize("place", [".ipynb_checkpoints", "cat/.ipynb_checkpoints"])
def test_hidden_folders_are_refused_by_name(place: str, tmp_path: Path, make_folder: MakeFolder) -> None:
    split = make_folder(tmp_path) / "train"
    (split / place).mkdir()
    with pytest.raises(UserError, match=rf"hidden folder.*{split}/{place}"):
        FolderSource(split)


def test_a_file_that_cannot_be_read_is_a_bad_image_and_keeps_its_place(tmp_path: Path, make_folder: MakeFolder) -> None:
    split = make_folder(tmp_path, train=4) / "train"
    (split / "cat" / "000.png").unlink()
    (split / "cat" / "000.png").symlink_to("gone.png")
    source = FolderSource(split)
    assert len(source) == 4
    with pytest.raises(BadImage, match="No such file"):
        source.load(0)


@pytest.mark.parametrize("target", [".", "..", "../..", "../../..", "/", "../cat/deep"])
def test_a_link_back_to_a_folder_on_the_way_is_named(
    target: str, tmp_path: Path, make_folder: MakeFolder, make_config: Callable[..., Config]
) -> None:
    split = make_folder(tmp_path / "data") / "train"
    (split / "cat" / "deep").mkdir()
    link = split / "cat" / ("deep/again" if target.endswith("deep") else "up")
    link.symlink_to(target if link.name == "up" else "../../cat/deep")
    expected = rf"^{link}: a link back to a folder it lies in \(.*\); remove the link$"
    for name in ("folder", "torch/image_folder"):
        data = make_config(data__dataset=name, data__root=tmp_path / "data").data
        with pytest.raises(UserError, match=expected):
            build_source(data, "train")


def test_links_that_form_a_circle_or_a_class_are_named(tmp_path: Path, make_folder: MakeFolder) -> None:
    split = make_folder(tmp_path) / "train"
    (split / "cat" / "a").symlink_to("../dog")
    (split / "dog" / "b").symlink_to("../cat")
    with pytest.raises(UserError, match=rf"^{split}/cat/a/b: a link back"):
        FolderSource(split)
    (split / "cat" / "a").unlink()
    (split / "dog" / "b").unlink()
    (split / "all").symlink_to("..")
    with pytest.raises(UserError, match=rf"^{split}/all: a link back"):
        FolderSource(split)


def test_links_to_other_folders_and_files_are_followed(tmp_path: Path, make_folder: MakeFolder) -> None:
    split = make_folder(tmp_path / "data", train=4) / "train"
    (tmp_path / "more").mkdir()
    (split / "dog" / "001.png").rename(tmp_path / "more" / "1.png")
    (split / "dog" / "more").symlink_to(tmp_path / "more")
    (split / "dog" / "cats").symlink_to("../cat")
    (split / "eel").symlink_to(tmp_path / "more")
    (split / "eel2").mkdir()
    (split / "eel2" / "1.png").symlink_to(tmp_path / "more" / "1.png")
    (tmp_path / "link").symlink_to(tmp_path / "data")
    source = FolderSource(tmp_path / "link" / "train")
    assert source.targets.tolist() == [0, 0, 1, 1, 1, 1, 2, 3]
    assert source.load(7)[0].size == (16, 16)


def test_links_that_lead_nowhere_are_named(tmp_path: Path, make_folder: MakeFolder) -> None:
    split = make_folder(tmp_path) / "train"
    for name in ("notes.txt", "classes.JSON", "more.tar.gz"):
        (split / name).symlink_to("gone")
    FolderSource(split)
    dotted = [(split / name, "/mnt/gone") for name in ("eel", "v1.0", "St. Bernard", "a.b_c", "eels.v2", "eel.old")]
    for link, target in (*dotted, (split / "cat" / "more", "more")):
        link.symlink_to(target)
        with pytest.raises(UserError, match=rf"{link} -> {target}.*mend or remove"):
            FolderSource(split)
        link.unlink()
    (split / "cat" / "z.png").symlink_to("z.png")
    with pytest.raises(BadImage, match=r"a link to z\.png"):
        FolderSource(split).load(6)


def test_files_of_other_formats_and_images_without_classes_are_explained(
    tmp_path: Path, make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = make_folder(tmp_path) / "train"
    for image in (split / "cat").iterdir():
        image.rename(image.with_suffix(".npy"))
    with pytest.raises(
        UserError, match=r"without images: .*/cat; .* \(found .npy files; images are read from .bmp, .gif"
    ):
        FolderSource(split)
    with pytest.raises(UserError, match=r"dog: no class folders; .*data.labels=FILE"):
        FolderSource(split / "dog")
    with pytest.raises(UserError, match=r"cat: no class folders; images belong into [^ ]*/CLASS/ \(found .npy files"):
        FolderSource(split / "cat")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"^gone: no such folder.*relative path, looked for from {tmp_path}\)"):
        FolderSource(Path("gone") / "train")
