"""Classes are matched by name, in one order everywhere, and every mistake in a file of names is named."""

import tarfile
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from timm.utils.misc import natural_key

from acmix.config import Config
from acmix.data.classes import Renumbered, check_val_classes, in_order, places_in, read_classes
from acmix.data.datasets import build_sources, build_val_source
from acmix.data.loader import build_data, build_val
from acmix.errors import UserError

MakeFolder = Callable[..., Path]
MakeConfig = Callable[..., Config]
NUMBERS = tuple(str(number) for number in range(12))


def as_tar(root: Path) -> Path:
    for split in ("train", "val"):
        with tarfile.open(root / f"{split}.tar", "w") as tar:
            tar.add(root / split, arcname=".")
    return root


def test_natural_order_is_that_of_timm_and_the_other_that_of_torchvision() -> None:
    names = ["n10", "n2", "N1", "b", "A", "10", "9", "1a10", "1a9", "é", "x"]
    assert in_order(names, "natural") == sorted(names, key=natural_key)
    assert in_order(names, "sorted") == sorted(names)
    assert in_order(names, None) == names


def test_folder_and_tar_number_the_same_classes_alike(
    tmp_path: Path, make_folder: MakeFolder, make_config: MakeConfig
) -> None:
    root = as_tar(make_folder(tmp_path, train=24, val=12, classes=NUMBERS))
    for order, expected in ((None, sorted(NUMBERS)), ("sorted", sorted(NUMBERS)), ("natural", list(NUMBERS))):
        targets = []
        for dataset in ("folder", "tar", "torch/image_folder"):
            config = make_config(data__dataset=dataset, data__root=root, data__class_order=order)
            train, val, _ = build_sources(config)
            assert train.classes == val.classes == expected
            targets.append([train.load(i)[1] for i in range(len(train))])
        assert targets[0] == targets[1] == targets[2]


def test_the_order_of_training_wins_and_the_images_keep_theirs(
    tmp_path: Path, make_folder: MakeFolder, make_config: MakeConfig
) -> None:
    root = as_tar(make_folder(tmp_path, train=24, val=12, classes=NUMBERS))
    trained = list(reversed(NUMBERS))
    for dataset in ("folder", "tar"):
        config = make_config(data__dataset=dataset, data__root=root)
        plain, resumed = build_data(config), build_data(config, classes=trained)
        assert resumed.classes == trained
        assert build_val(config, classes=trained).classes == trained
        for before, after in zip(plain.train.epoch(3), resumed.train.epoch(3), strict=True):
            assert before[0].ids.tolist() == after[0].ids.tolist()
            assert (before[0].images == after[0].images).all()
            names = [plain.classes[target] for target in before[0].targets]
            assert names == [trained[target] for target in after[0].targets]


def test_other_classes_than_those_of_the_weights_keep_their_own_order(
    tmp_path: Path, make_folder: MakeFolder, make_config: MakeConfig
) -> None:
    config = make_config(data__dataset="folder", data__root=make_folder(tmp_path))
    assert build_data(config, classes=["dog", "wolf"]).classes == ["cat", "dog"]


def test_a_validation_split_may_lack_classes_with_a_warning_but_not_add_any(
    tmp_path: Path, make_folder: MakeFolder, make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_folder(tmp_path, val=3, train=9, classes=("ant", "bee", "cow"))
    config = make_config(data__dataset="folder", data__root=root)
    for image in (root / "val" / "bee").iterdir():
        image.unlink()
    (root / "val" / "bee").rmdir()
    data = build_data(config)
    assert (data.classes, data.val.classes, data.val.present) == (["ant", "bee", "cow"], ["ant", "bee", "cow"], [0, 2])
    assert [target for batch in data.val for target in batch.targets.tolist()] == [0, 2]
    assert capsys.readouterr().err == f"warning: {root}/val: no images of 1 of 3 classes: bee\n"
    build_data(config, rank=1, world_size=2)
    assert capsys.readouterr().err == "", "one rank warns"
    (root / "val" / "cow").rename(root / "val" / "Cow")
    with pytest.raises(UserError, match=r"only in .*/train: bee, cow; only in .*/val: Cow .*'Cow' for 'cow'.*rename"):
        build_data(config)


def test_evaluation_takes_a_part_of_the_classes_and_names_those_it_does_not_know(
    tmp_path: Path, make_folder: MakeFolder, make_config: MakeConfig
) -> None:
    config = make_config(data__dataset="folder", data__root=make_folder(tmp_path))
    loader = build_val(config, classes=["ant", "dog", "bee", "cat"])
    assert (loader.classes, loader.present) == (["ant", "dog", "bee", "cat"], [1, 3])
    with pytest.raises(UserError, match=r"unknown there \['cat'\].*'cat' for 'Cat'"):
        build_val(config, classes=["Cat", "dog"])


def test_loose_weights_are_warned_of_where_the_order_matters(
    tmp_path: Path, make_folder: MakeFolder, make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_folder(tmp_path, train=12, val=12, classes=NUMBERS)
    settings = {"data__dataset": "folder", "data__root": root}
    build_val(make_config(**settings))
    assert "0, 1, 10, 11, 2 and 7 more" in (err := capsys.readouterr().err)
    assert "data.class_order=natural" in err
    build_val(make_config(**settings), classes=NUMBERS)
    build_val(make_config(**settings, data__class_order="sorted"))
    assert build_val(make_config(**settings, data__class_order="natural")).classes == list(NUMBERS)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("text", ["dog\ncat\neel\n", "\ufeffdog\r\ncat\r\neel\r\n\r\n", '["dog", "cat", "eel"]\n'])
def test_a_file_names_the_classes_in_order(
    text: str, tmp_path: Path, make_folder: MakeFolder, make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    root, file = make_folder(tmp_path / "data"), tmp_path / "names.txt"
    file.write_bytes(text.encode())
    config = make_config(data__dataset="folder", data__root=root, data__classes=file)
    train, val, _ = build_sources(config)
    assert train.classes == val.classes == build_val_source(config).classes == ["dog", "cat", "eel"]
    assert {train.describe(i)[-4:-1]: train.load(i)[1] for i in range(len(train))} == {"dog": 0, "cat": 1}
    assert "train: no images of 1 of 3 classes: eel" in capsys.readouterr().err
    file.write_text("dog\nCat\n")
    with pytest.raises(UserError, match=r"train: not in data.classes \(.*names.txt\): cat .*'cat' for 'Cat'"):
        build_sources(config)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"cat\n\ndog\n", ":2: an empty class name"),
        (b"cat\ndog\ncat\n", ":3: the class 'cat' is listed already, .*:1"),
        ("é\ne\u0301\n".encode(), ":2: the class .* is listed already"),
        (b"", "lists no classes"),
        (b"[]", "lists no classes"),
        (b'["a", "a"]', "entry 1: the class 'a' is listed already"),
        (b'["a", " "]', "entry 1: an empty class name"),
        (b'["a", 1]', "must be a JSON list of class names"),
        (b'["a",\n b]', ":2: not valid JSON"),
        (b"\xff\xfec\0a\0t\0", "not a text file in UTF-8"),
    ],
)
def test_mistakes_in_a_file_of_classes_are_named(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "names.txt"
    file.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_classes(file)
    assert str(file) in str(caught.value)


def test_a_missing_file_says_what_its_path_starts_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"names.txt: No such file.*relative path, looked for from {tmp_path}"):
        read_classes(Path("names.txt"))
    with pytest.raises(UserError, match="Is a directory"):
        read_classes(tmp_path)


def test_names_match_over_normal_forms_and_outer_spaces_but_exactly_where_they_can() -> None:
    composed, decomposed = "é", unicodedata.normalize("NFD", "é")
    assert places_in([decomposed, "cat "], [composed, "cat"]) == ([0, 1], [])
    assert places_in([decomposed, "cat "], [composed, decomposed, "cat", "cat "]) == ([1, 3], [])
    assert places_in(["Cat"], ["cat"]) == ([-1], ["Cat"])
    with pytest.raises(UserError, match=r"same classes, other order: .* because crane is the name of more than one"):
        places_in(["crane", "a", "crane"], ["a", "crane", "crane"])
    assert places_in(["crane", "crane"], ["crane", "crane"]) == ([0, 1], [])


def test_classes_that_differ_are_named() -> None:
    check_val_classes(["a", "b"], ["b", "a"], "train", "val")
    check_val_classes(["a", "b"], ["b"], "train", "val")
    with pytest.raises(UserError, match=r"only in T: c; only in V: d; rename"):
        check_val_classes(["a", "b", "c"], ["a", "b", "d"], "T", "V")
    with pytest.raises(UserError, match=r"differ: only in V: 0, 1, 2, 3, 4 and 5 more;"):
        check_val_classes([], [str(i) for i in range(10)], "T", "V")


def test_keys_that_contradict_each_other_are_refused(tmp_path: Path, make_config: MakeConfig) -> None:
    from acmix.config.contradictions import contradictions

    both = make_config(data__classes="names.txt", data__class_order="natural")
    assert [path for path, _ in contradictions(both)] == [("data", "class_order")]
    assert [path for path, _ in contradictions(make_config(data__labels="labels.csv"))] == [("data", "labels")]


def test_a_renumbered_source_refuses_classes_that_the_list_lacks(make_config: MakeConfig) -> None:
    with pytest.raises(UserError, match="unknown classes: 0, 1, 2, 3, 4 and 5 more"):
        Renumbered(build_sources(make_config())[0], ["cat"])
