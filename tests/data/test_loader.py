"""Batches are the same whoever loads them, whenever they are asked for; nothing is counted twice or lost."""

import os
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from acmix.config import Config
from acmix.data.images import BadImage
from acmix.data.loader import Batch, Data, build_data, build_val, resolve_num_classes
from acmix.errors import UserError

MakeFolder = Callable[..., Path]
MakeConfig = Callable[..., Config]
AUGMENT = {
    "augment__auto_augment": "rand-m9-mstd0.5-inc1",
    "augment__color_jitter": 0.4,
    "augment__erase_prob": 0.5,
    "augment__crop": "random_resized",
}


def updates(config: Config, epoch: int = 0, start: int = 0, rank: int = 0, world_size: int = 1) -> list[list[Batch]]:
    data = build_data(config, rank=rank, world_size=world_size)
    return list(data.train.epoch(epoch, start))


def worker_source(data: Data) -> Any:
    """What the loader processes read from."""
    images: Any = data.train.images
    return images._reader._source


def assert_same(first: list[list[Batch]], second: list[list[Batch]]) -> None:
    assert len(first) == len(second) > 0
    for update, other in zip(first, second, strict=True):
        for a, b in zip(update, other, strict=True):
            for name in ("images", "targets", "ids", "valid"):
                assert torch.equal(getattr(a, name), getattr(b, name)), name
            assert a.errors == b.errors


def test_a_batch_has_the_promised_shapes_and_types(make_config: MakeConfig) -> None:
    data = build_data(make_config(data__batch_size=8, optimizer__accumulate=3))
    assert data.classes == [str(digit) for digit in range(10)]
    assert (data.num_classes, len(data.train), len(data.val)) == (10, 1437, 360)
    assert (data.train.global_batch, data.train.updates_per_epoch) == (24, 59)
    update = next(data.train.epoch(0))
    assert len(update) == 3
    for batch in update:
        assert (batch.images.shape, batch.images.dtype) == ((8, 3, 16, 16), torch.float32)
        assert (batch.targets.dtype, batch.ids.dtype, batch.valid.dtype) == (torch.int64, torch.int64, torch.bool)
        assert batch.valid.all()
        assert batch.errors == []


def test_batches_do_not_depend_on_the_number_of_workers(
    tmp_path: Path, make_folder: MakeFolder, make_config: MakeConfig
) -> None:
    root = make_folder(tmp_path, train=26)
    settings = {"data__dataset": "folder", "data__root": root, "optimizer__accumulate": 2, **AUGMENT}
    expected = updates(make_config(**settings), epoch=3)
    for workers in (1, 2):
        assert_same(updates(make_config(**settings, data__num_workers=workers), epoch=3), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_do_not_depend_on_interruptions(workers: int, make_config: MakeConfig) -> None:
    config = make_config(data__batch_size=100, data__num_workers=workers, **AUGMENT)
    expected = updates(config, epoch=1, start=9)
    data = build_data(config)
    abandoned = data.train.epoch(1, start_update=9)
    assert_same([next(abandoned), next(abandoned)], expected[:2])
    assert_same(list(data.train.epoch(1, start_update=11)), expected[2:])
    assert sum(len(batch.ids) for batch in data.val) == 360
    assert_same(list(data.train.epoch(1, start_update=13)), expected[4:])
    assert list(data.train.epoch(1, start_update=data.train.updates_per_epoch)) == []


def test_batches_do_not_depend_on_the_number_of_processes(make_config: MakeConfig) -> None:
    alone = updates(make_config(data__batch_size=48, data__repeated_aug=2, **AUGMENT), start=27)
    for world_size, accumulate in ((2, 1), (3, 2), (4, 4)):
        config = make_config(
            data__batch_size=48 // world_size // accumulate,
            optimizer__accumulate=accumulate,
            data__repeated_aug=2,
            **AUGMENT,
        )
        ranks = [updates(config, start=27, rank=rank, world_size=world_size) for rank in range(world_size)]
        for number, (expected,) in enumerate(alone):
            parts = [ranks[rank][number][micro] for micro in range(accumulate) for rank in range(world_size)]
            assert torch.equal(torch.cat([part.ids for part in parts]), expected.ids)
            assert torch.equal(torch.cat([part.images for part in parts]), expected.images)


def test_copies_of_repeated_augmentation_differ_and_epochs_differ(make_config: MakeConfig) -> None:
    config = make_config(data__batch_size=60, data__repeated_aug=3, augment__crop="random_resized")
    data = build_data(config)
    (batch,) = next(data.train.epoch(0))
    (later,) = next(data.train.epoch(1))
    assert torch.equal(batch.ids[0::3], batch.ids[1::3])
    assert len(batch.ids.unique()) == 20
    assert not torch.equal(batch.images[0], batch.images[1])
    assert not torch.equal(batch.ids, later.ids)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_global_generators_are_left_alone(workers: int, make_config: MakeConfig) -> None:
    data = build_data(make_config(data__num_workers=workers, data__batch_size=200, **AUGMENT))
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert len(list(data.train.epoch(0, start_update=5))) == 2
    assert len(list(data.val)) == 2
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


@pytest.mark.parametrize(("val", "world_size"), [(13, 1), (13, 2), (13, 3), (2, 3), (1, 4)])
def test_validation_counts_every_image_once_over_any_number_of_processes(
    val: int, world_size: int, tmp_path: Path, make_folder: MakeFolder, make_config: MakeConfig
) -> None:
    root = make_folder(tmp_path, train=8, val=val, classes=("only",))
    config = make_config(data__dataset="folder", data__root=root, data__val_batch_size=3, data__batch_size=2)
    ids: list[int] = []
    for rank in range(world_size):
        loader = build_val(config, rank=rank, world_size=world_size, classes=["only"])
        batches = list(loader)
        assert len(loader) == val
        assert loader.batches == len(batches)
        ids += [index for batch in batches for index in batch.ids.tolist()]
    assert sorted(ids) == list(range(val))


def test_no_image_before_the_start_is_read(make_config: MakeConfig) -> None:
    config = make_config(data__batch_size=100)
    data = build_data(config)
    read: list[int] = []
    source = worker_source(data)
    load = source.load
    source.load = lambda index: (read.append(index), load(index))[1]
    expected = data.train.order.epoch_order(2)[0][1300:1400].tolist()
    (batch,) = next(data.train.epoch(2, start_update=13))
    assert read == batch.ids.tolist() == expected


@pytest.fixture
def damaged(tmp_path: Path, make_folder: MakeFolder) -> tuple[Path, set[str]]:
    """16 training images, of which three cannot be read."""
    root = make_folder(tmp_path, train=16)
    bad = {"cat/004.png": b"", "dog/007.png": b"just text", "dog/011.png": None}
    for name, data in bad.items():
        path = root / "train" / name
        path.write_bytes(path.read_bytes()[:60] if data is None else data)
    return root, {str(root / "train" / name) for name in bad}


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_stops_training_by_default_naming_path_and_class(
    workers: int, damaged: tuple[Path, set[str]], make_config: MakeConfig
) -> None:
    root, bad = damaged
    config = make_config(data__dataset="folder", data__root=root, data__num_workers=workers)
    with pytest.raises(UserError) as caught:
        updates(config)
    message = str(caught.value)
    assert any(f"{path} (class {Path(path).parent.name}): " in message for path in bad)
    assert "Traceback" not in message
    assert "data.on_error=skip" in message
    assert "scripts/check_data.py lists all" in message


def test_the_folder_check_is_advised_only_where_it_can_read_the_images(
    damaged: tuple[Path, set[str]], make_config: MakeConfig
) -> None:
    root, _ = damaged
    for split in ("train", "val"):
        with tarfile.open(root / f"{split}.tar", "w") as tar:
            tar.add(root / split, arcname=".")
    for loader in ("workers", "resident"):
        with pytest.raises(UserError, match=r"train.tar: .*; repair or remove it, or train without it"):
            updates(make_config(data__dataset="tar", data__root=root, data__loader=loader, augment__crop="none"))


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_images_are_masked_named_and_replaced_by_a_neighbour(
    workers: int, damaged: tuple[Path, set[str]], make_config: MakeConfig
) -> None:
    root, bad = damaged
    settings = {"data__dataset": "folder", "data__root": root, "data__on_error": "skip", "data__num_workers": workers}
    config = make_config(**settings, augment__crop="none", augment__hflip=0.0)
    batches = [batch for update in updates(config) for batch in update]
    named = {message.split(" (class")[0] for batch in batches for message in batch.errors}
    assert named == bad
    for batch in batches:
        assert int((~batch.valid).sum()) == len(batch.errors)
        donor = int(batch.valid.int().argmax())
        for place in (~batch.valid).nonzero().flatten().tolist():
            assert torch.equal(batch.images[place], batch.images[donor])
            assert batch.targets[place] == batch.targets[donor]
    again = [batch for update in updates(config, start=2) for batch in update]
    assert_same([again], [batches[2:]])


def test_a_batch_without_any_readable_image_is_all_masked(
    tmp_path: Path, make_folder: MakeFolder, make_config: MakeConfig
) -> None:
    root = make_folder(tmp_path, train=4)
    for path in (root / "train").rglob("*.png"):
        path.write_bytes(b"")
    config = make_config(data__dataset="folder", data__root=root, data__on_error="skip")
    ((batch,),) = updates(config)
    assert not batch.valid.any()
    assert len(batch.errors) == 4
    assert batch.images.abs().max() == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_validation_never_leaves_an_image_out(
    workers: int, tmp_path: Path, make_folder: MakeFolder, make_config: MakeConfig
) -> None:
    root = make_folder(tmp_path)
    bad = root / "val" / "dog" / "001.png"
    bad.write_bytes(bad.read_bytes()[:100])
    config = make_config(data__dataset="folder", data__root=root, data__on_error="skip", data__num_workers=workers)
    data = build_data(config)
    with pytest.raises(UserError, match=rf"{bad} \(class dog\): .*; validation counts every"):
        list(data.val)


def test_a_label_out_of_range_is_an_error_without_a_workers_traceback(make_config: MakeConfig) -> None:
    data = build_data(make_config(data__num_workers=1))
    source = worker_source(data)

    def load(index: int) -> None:
        raise UserError(f"label of {index} outside 0..9") from BadImage("corrupt", "x")

    source.load = load
    with pytest.raises(UserError, match=r"^label of \d+ outside 0..9$"):
        next(data.train.epoch(0))


def test_num_classes_must_fit_the_data(make_config: MakeConfig) -> None:
    data = build_data(make_config())
    assert resolve_num_classes(make_config(), data) == 10
    assert resolve_num_classes(make_config(model__num_classes=10), data.val) == 10
    with pytest.raises(UserError, match=r"model.num_classes is 7, but the data .* has 10 classes"):
        resolve_num_classes(make_config(model__num_classes=7), data)


def test_evaluation_refuses_classes_other_than_those_of_training(make_config: MakeConfig) -> None:
    with pytest.raises(UserError, match=r"10 classes are not the 2 of training: missing here \['cat'\]"):
        build_val(make_config(), classes=["cat", "0"])


def test_less_data_than_a_global_batch_is_refused(make_config: MakeConfig) -> None:
    with pytest.raises(UserError, match="1437 training images are less than one global batch of 2000"):
        build_data(make_config(data__batch_size=1000), world_size=2)


def test_epochs_leave_no_file_descriptors_behind(make_config: MakeConfig) -> None:
    data = build_data(make_config(data__num_workers=2, data__batch_size=100))
    kept = [list(data.train.epoch(epoch, start_update=12)) for epoch in range(2)]
    before = len(os.listdir("/proc/self/fd"))
    kept += [list(data.train.epoch(epoch, start_update=12)) for epoch in range(2, 5)]
    kept.append([list(data.val)])
    images = sum(len(update) for epoch in kept for update in epoch)
    workers_of_val = 2 * 4  # pipes of the processes that the first validation starts
    assert len(os.listdir("/proc/self/fd")) - before <= images + workers_of_val
    del kept
