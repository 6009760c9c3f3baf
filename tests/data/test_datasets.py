"""Datasets by name: what they hold, and how a wrong name or place is refused."""

import hashlib
import importlib.util
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision

from acmix.config import Config
from acmix.data.arrays import read_digits
from acmix.data.datasets import build_source, build_sources
from acmix.data.images import BadImage
from acmix.errors import UserError

MakeFolder = Callable[..., Path]
MakeConfig = Callable[..., Config]


def test_digits_have_a_fixed_stratified_split(make_config: MakeConfig) -> None:
    train, val, _ = build_sources(make_config())
    again, _, _ = build_sources(make_config(run__seed=5))
    assert (len(train), len(val)) == (1437, 360)
    assert train.classes == [str(digit) for digit in range(10)]
    targets = [val.load(i)[1] for i in range(len(val))]
    assert max(np.bincount(targets)) - min(np.bincount(targets)) <= 2
    image, _ = train.load(0)
    assert (image.mode, image.size) == ("RGB", (32, 32))
    pixels = [source.load(7)[0].tobytes() for source in (train, again)]
    assert pixels[0] == pixels[1]
    assert len({train.load(i)[0].tobytes() for i in range(50)} & {val.load(i)[0].tobytes() for i in range(50)}) == 0


def test_digits_are_kept_between_runs_and_a_damaged_file_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = read_digits()
    monkeypatch.setenv("ACMIX_CACHE", str(tmp_path))
    read_digits.cache_clear()
    read_digits()
    [file] = tmp_path.iterdir()
    whole = file.read_bytes()
    for damaged in (whole, whole[:1000], b"", whole[:300] + b"\xff" + whole[301:]):
        file.write_bytes(damaged)
        read_digits.cache_clear()
        assert all(np.array_equal(a, b) for a, b in zip(read_digits(), expected, strict=True))
        assert file.read_bytes() == whole


def test_folders_work_under_all_their_names(tmp_path: Path, make_folder: MakeFolder, make_config: MakeConfig) -> None:
    root = make_folder(tmp_path)
    for name in ("folder", "imagefolder", "torch/image_folder"):
        train, val, _ = build_sources(make_config(data__dataset=name, data__root=root))
        assert (len(train), len(val), train.classes) == (12, 5, ["cat", "dog"])
        assert train.load(11)[1] == 1
    (root / "train" / "cat" / "000.png").write_bytes(b"text")
    for name in ("folder", "torch/image_folder"):
        train, _, _ = build_sources(make_config(data__dataset=name, data__root=root))
        with pytest.raises(BadImage, match="not an image"):
            train.load(0)
        assert str(root / "train" / "cat" / "000.png") in train.describe(0)
        assert pickle.dumps(train), "so it is sent to loader processes that are not forked"


def test_one_folder_may_serve_for_training_and_validation(
    tmp_path: Path, make_folder: MakeFolder, make_config: MakeConfig
) -> None:
    root = make_folder(tmp_path) / "train"
    config = make_config(data__dataset="folder", data__root=root, data__train_split=".", data__val_split=".")
    train, val, _ = build_sources(config)
    assert len(train) == len(val) == 12


def test_train_and_val_must_agree_on_their_classes(
    tmp_path: Path, make_folder: MakeFolder, make_config: MakeConfig
) -> None:
    root = make_folder(tmp_path)
    (root / "val" / "dog").rename(root / "val" / "wolf")
    with pytest.raises(UserError, match=rf"only in {root}/train: dog; only in {root}/val: wolf"):
        build_sources(make_config(data__dataset="folder", data__root=root))


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ("cifr10", "unknown dataset 'cifr10'; nearest: cifar10"),
        ("Folder", "unknown dataset 'Folder'; nearest: folder"),
        ("s3/bucket", "unknown dataset"),
        ("tfds/imagenet2012", "'tfds/imagenet2012': tfds/ streams cannot be replayed"),
        ("hfids/timm/mini-imagenet", "hfids/ streams cannot be replayed"),
        ("torch/imagenet22k", "Unknown torchvision dataset"),
        ("torch/mnist", "Dataset not found"),
        ("cifar10", "cifar10 not found or damaged; set data.download=true"),
        ("wds/shards", "neither train.tar"),
    ],
)
def test_datasets_that_cannot_be_opened_are_refused(
    dataset: str, expected: str, tmp_path: Path, make_config: MakeConfig
) -> None:
    with pytest.raises(UserError) as caught:
        build_sources(make_config(data__dataset=dataset, data__root=tmp_path))
    assert expected in str(caught.value)


def test_a_split_that_does_not_exist_is_refused(make_config: MakeConfig) -> None:
    with pytest.raises(UserError, match="no split 'holdout'; it has train and val"):
        build_source(make_config().data, "holdout")


@pytest.mark.skipif(importlib.util.find_spec("datasets") is not None, reason="the package is installed")
def test_a_missing_optional_package_is_named(make_config: MakeConfig) -> None:
    with pytest.raises(UserError, match=r"hfds/mnist needs a package that is not installed: .*datasets"):
        build_sources(make_config(data__dataset="hfds/mnist"))


def test_cifar_is_read_from_torchvisions_files(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(0)

    def write(name: str, content: dict[str, Any]) -> tuple[str, str]:
        path = tmp_path / "cifar-10-batches-py" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(pickle.dumps(content))
        return name, hashlib.md5(path.read_bytes()).hexdigest()

    names, digest = write("batches.meta", {"label_names": ["a", "b"]})
    pixels = random.integers(0, 256, (6, 3072), dtype=np.uint8)
    maker = torchvision.datasets.CIFAR10
    monkeypatch.setattr(maker, "train_list", [write("data_batch_1", {"data": pixels, "labels": [0, 1, 0, 1, 0, 1]})])
    monkeypatch.setattr(maker, "test_list", [write("test_batch", {"data": pixels[:2], "labels": [1, 0]})])
    monkeypatch.setattr(maker, "meta", {"filename": names, "key": "label_names", "md5": digest})
    train, val, statistics = build_sources(make_config(data__dataset="cifar10", data__root=tmp_path))
    assert (len(train), len(val), train.classes) == (6, 2, ["a", "b"])
    image, target = train.load(3)
    assert target == 1
    assert np.array_equal(np.asarray(image), pixels[3].reshape(3, 32, 32).transpose(1, 2, 0))
    assert statistics.mean == (0.4914, 0.4822, 0.4465)
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(b"damaged")
    with pytest.raises(UserError, match="not found or damaged"):
        build_sources(make_config(data__dataset="cifar10", data__root=tmp_path))
