"""Images with their classes in a file: every form in use is read, every mistake is named with its line."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from acmix.config import Config
from acmix.data.datasets import build_sources, build_val_source
from acmix.errors import UserError

MakeConfig = Callable[..., Config]
NAMES = ("a.png", "b.png", "sub/c.png", "ü.png")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Four images in `val` and, of the same names, in `train`."""
    for split in ("train", "val"):
        for number, name in enumerate(NAMES):
            path = tmp_path / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 8, 3), number, dtype=np.uint8)).save(path)
    return tmp_path


def labelled(
    make_config: MakeConfig, root: Path, text: str, trained: list[str] | None = None, **settings: object
) -> list[str]:
    """The class of each image of `val`, in the order of their names."""
    (root / "labels.csv").write_bytes(text.encode())
    settings = {"data__labels": root / "labels.csv", **settings}
    source = build_val_source(make_config(data__dataset="folder", data__root=root, **settings), trained)
    loaded = [source.load(i) for i in range(len(source))]
    grey = [np.asarray(image)[0, 0, 0] for image, _ in loaded]
    assert grey == sorted(grey), "the images come in the order of their names"
    return [source.classes[target] for _, target in loaded]


WANTED = ["cat", "dog", "cat", "dog"]


@pytest.mark.parametrize(
    "text",
    [
        "a.png,cat\nb.png,dog\nsub/c.png,cat\nü.png,dog\n",
        "\ufeffpath,label\r\nü.png,dog\r\nb.png,dog\r\nsub/c.png,cat\r\na.png,cat\r\n",
        "id,breed\na,cat\nb,dog\nsub/c,cat\nü,dog\n",
        'ID;Name\n"a.png";"cat"\n\n"b.png";dog\nsub\\c.png;cat\nu\u0308.png;dog',
        "label\tpath\ncat\tval/a.png\ndog\tval/b.png\ncat\tval/sub/c.png\ndog\tval/ü.png\n",
        "width,label,filename\n1,cat,a.png\n2,dog,b.png\n3,cat,./sub/c.png\n4,dog,ü.png\n",
        "a.png 0\nb.png 1\nsub/c.png 0\nü.png 1\n",
        "path,label\na.png,0.0\nb.png,1.0\nsub/c.png,0.0\nü.png,1.0\n",
        "ImageId,PredictionString\na,cat 1 2 3 4 cat 5 6 7 8 \nb,dog 1 2 3 4\nsub/c,cat 0 0 9 9 \nü,dog 1 1 2 2\n",
        "cat\ndog\ncat\ndog\n",
        "0\n1\n0\n1",
        "1\r\n2\r\n1\r\n2\r\n\r\n",
    ],
)
def test_every_form_in_use_is_read(text: str, root: Path, make_config: MakeConfig) -> None:
    assert labelled(make_config, root, text, trained=["cat", "dog"]) == WANTED


def test_numbers_are_said_to_count_from_one_where_a_list_has_no_zero(
    root: Path, make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    assert labelled(make_config, root, "2\n2\n1\n3\n", trained=["x", "y", "z"]) == ["y", "y", "x", "z"]
    assert "count from 1" in capsys.readouterr().err


def test_a_label_that_is_a_class_is_its_name_and_not_its_number(root: Path, make_config: MakeConfig) -> None:
    classes = ["1", "10", "2"]
    assert labelled(make_config, root, "1\n2\n10\n1\n", trained=classes) == ["1", "2", "10", "1"]


def test_numbers_without_known_classes_are_outputs_of_the_model(root: Path, make_config: MakeConfig) -> None:
    text = "a.png,0\nb.png,10\nsub/c.png,2\nü.png,0\n"
    assert labelled(make_config, root, text) == ["0", "10", "2", "0"]
    (root / "labels.csv").write_text(text)
    settings = {"data__dataset": "folder", "data__root": root, "data__labels": root / "labels.csv"}
    source = build_val_source(make_config(**settings))
    assert source.classes == ["0", "2", "10"]
    source = build_val_source(make_config(**settings, model__num_classes=12))
    assert source.classes == [str(number) for number in range(12)]
    assert [source.load(i)[1] for i in range(4)] == [0, 10, 2, 0]
    with pytest.raises(UserError, match=r"labels.csv:2: label 10 is out of range: the 5 classes have .* 0 to 4"):
        build_val_source(make_config(**settings, model__num_classes=5))


def test_the_file_of_classes_says_what_the_numbers_mean(root: Path, make_config: MakeConfig) -> None:
    (root / "names.txt").write_text("wolf\ncat\ndog\n")
    settings = {"trained": ["cat", "dog", "wolf"], "data__classes": root / "names.txt"}
    assert labelled(make_config, root, "2\n3\n2\n1\n", **settings) == ["cat", "dog", "cat", "wolf"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,label\na.png,cat\ngone.png,dog\n", r"labels.csv:3: no image 'gone.png' in .*/val"),
        ("a.png,cat\nb.png,dog\na,cat\n", r"labels.csv:3: 'a' is named on line 1 already"),
        ("a.png,cat\nb.png,\n", r"labels.csv:2: an empty label"),
        ("a.png,cat\n ,dog\n", r"labels.csv:2: an empty path"),
        ("a.png,cat\nb.png,cow\n", r"labels.csv:2: 'cow' is none of the 2 classes \(cat, dog\)"),
        ("a.png,cat\nb.png,Dog\n", r"labels.csv:2: 'Dog' .*'Dog' for 'dog'"),
        ("a.png,0\nb.png,2\n", r"labels.csv:2: label 2 is out of range: the 2 classes have the numbers 0 to 1"),
        ("a.png,-1\nb.png,0\n", r"labels.csv:1: label -1 is out of range"),
        ("1\n3\n1\n2\n", r"labels.csv:2: label 3 is out of range: .* 1 to 2"),
        ("a.png,cat\nb.png,dog,2\n", r"labels.csv:2: 3 columns, not 2"),
        ("a.png,1,cat\nb.png,2,dog\n", r"labels.csv:1: 3 columns; give lines of path,label"),
        ('a.png,cat\nb.png,"dog\n', r"labels.csv:2: not a valid table"),
        ("cat\ndog\ncat\n", r"labels.csv has 3 labels for the 4 images in .*/val"),
        ("cat\n\ncat\ndog\n", r"labels.csv:2: an empty label"),
        ("", r"labels.csv holds no labels"),
    ],
)
def test_every_mistake_is_named_with_its_line(text: str, message: str, root: Path, make_config: MakeConfig) -> None:
    with pytest.raises(UserError, match=message):
        labelled(make_config, root, text, trained=["cat", "dog"])


def test_a_name_without_suffix_that_fits_two_images_is_refused(root: Path, make_config: MakeConfig) -> None:
    (root / "val" / "a.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"labels.csv:1: 'a' is the name of several images"):
        labelled(make_config, root, "a,cat\nb,dog\n")


def test_images_without_a_label_are_left_out_and_counted(
    root: Path, make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    assert labelled(make_config, root, "a.png,cat\nb.png,dog\n") == ["cat", "dog"]
    assert f"2 of the 4 images in {root}/val have no label in {root}/labels.csv: left out" in capsys.readouterr().err


def test_one_file_serves_both_splits_or_each_has_its_own(root: Path, make_config: MakeConfig) -> None:
    rows = [f"{split}/{name},{label}" for split in ("train", "val") for name, label in zip(NAMES, WANTED, strict=True)]
    (root / "all.csv").write_text("\n".join(rows))
    config = make_config(data__dataset="folder", data__root=root, data__labels=root / "all.csv")
    train, val, _ = build_sources(config)
    assert (len(train), len(val), train.classes) == (4, 4, ["cat", "dog"])
    (root / "train.csv").write_text("a,cat\nb,dog\n")
    (root / "val.csv").write_text("sub/c,cat\nü,dog\n")
    own = {"data__labels": root / "{split}.csv", "data__train_split": "train", "data__val_split": "train"}
    train, val, _ = build_sources(make_config(data__dataset="folder", data__root=root, **own))
    assert [train.describe(i)[-15:] for i in range(2)] == ["a.png (class cat)"[-15:], "b.png (class dog)"[-15:]]
    assert (len(val), val.classes) == (2, ["cat", "dog"])


def test_class_folders_train_while_a_list_labels_flat_validation(
    root: Path, make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, name in enumerate(("n2", "n10", "n1")):
        (root / "imagenet" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(root / "imagenet" / name / "1.png")
    (root / "truth.txt").write_text("1\n3\n2\n1\n")
    (root / "ids.txt").write_text("n2\nn10\nn1\n")
    settings = {"data__labels": root / "truth.txt", "data__classes": root / "ids.txt"}
    config = make_config(data__dataset="folder", data__root=root, data__train_split="imagenet", **settings)
    train, val, _ = build_sources(config)
    assert train.classes == val.classes == ["n2", "n10", "n1"]
    assert [val.load(i)[1] for i in range(4)] == [0, 2, 1, 0]
    assert "is for validation" in capsys.readouterr().err


def test_labels_need_not_be_classes_of_the_weights_to_start_from(root: Path, make_config: MakeConfig) -> None:
    (root / "labels.csv").write_text("train/a,cat\ntrain/b,eel\nval/a,cat\nval/b,eel\n")
    config = make_config(data__dataset="folder", data__root=root, data__labels=root / "labels.csv")
    assert build_sources(config, trained=["cat", "dog"])[0].classes == ["cat", "eel"]
    assert build_sources(config, trained=["eel", "cat"])[0].classes == ["eel", "cat"]
