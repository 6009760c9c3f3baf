"""Image folders: what is read, and which folders are refused by name."""

from collections.abc import Callable
from pathlib import Path

import pytest

from acmix.data.folders import FolderSource, TextTable, check_same_classes
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


@pytest.mark.parametrize("place", [".ipynb_checkpoints", "cat/.ipynb_checkpoints"])
def test_hidden_folders_are_refused_by_name(place: str, tmp_path: Path, make_folder: MakeFolder) -> None:
    split = make_folder(tmp_path) / "train"
    (split / place).mkdir()
    with pytest.raises(UserError, match=rf"hidden folder.*{split}/{place}"):
        FolderSource(split)


def test_classes_that_differ_are_named() -> None:
    check_same_classes(["a", "b"], ["a", "b"], "train", "val")
    with pytest.raises(UserError, match=r"only in T: c; only in V: d"):
        check_same_classes(["a", "b", "c"], ["a", "b", "d"], "T", "V")
    with pytest.raises(UserError, match=r"only in T: 0, 1, 2, 3, 4 and 5 more$"):
        check_same_classes([str(i) for i in range(10)], [], "T", "V")


def test_a_file_that_cannot_be_read_is_a_bad_image_and_keeps_its_place(tmp_path: Path, make_folder: MakeFolder) -> None:
    split = make_folder(tmp_path, train=4) / "train"
    (split / "cat" / "000.png").unlink()
    (split / "cat" / "000.png").symlink_to("gone.png")
    source = FolderSource(split)
    assert len(source) == 4
    with pytest.raises(BadImage, match="No such file"):
        source.load(0)
