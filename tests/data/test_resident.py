"""Images held decoded in memory: the same contract as loader processes, the same pixels, the same distribution."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torchvision.transforms import functional

from acmix.config import Config
from acmix.data import decoded
from acmix.data.draws import Draws
from acmix.data.jitter import jitter
from acmix.data.loader import Batch, build_data
from acmix.errors import UserError

MakeFolder = Callable[..., Path]
MakeConfig = Callable[..., Config]
ALL = {
    "data__loader": "resident",
    "augment__crop": "pad",
    "augment__pad": 3,
    "augment__color_jitter": 0.4,
    "augment__erase_prob": 0.5,
}


def batches(config: Config, epoch: int = 0, start: int = 0, rank: int = 0, world_size: int = 1) -> list[Batch]:
    data = build_data(config, rank=rank, world_size=world_size)
    assert data.loader == "resident"
    return [batch for update in data.train.epoch(epoch, start) for batch in update]


def test_batches_are_the_same_for_any_processes_and_interruptions(make_config: MakeConfig) -> None:
    alone = batches(make_config(data__batch_size=48, data__repeated_aug=2, **ALL), epoch=1, start=26)
    later = batches(make_config(data__batch_size=48, data__repeated_aug=2, **ALL), epoch=1, start=28)
    assert len(alone) == len(later) + 2 == 3
    assert torch.equal(alone[2].images, later[0].images)
    parts = make_config(data__batch_size=8, data__repeated_aug=2, optimizer__accumulate=3, **ALL)
    ranks = [batches(parts, epoch=1, start=26, rank=rank, world_size=2) for rank in (0, 1)]
    for number, expected in enumerate(alone):
        pieces = [ranks[rank][3 * number + micro] for micro in range(3) for rank in (0, 1)]
        assert torch.equal(torch.cat([piece.ids for piece in pieces]), expected.ids)
        assert torch.equal(torch.cat([piece.targets for piece in pieces]), expected.targets)
        assert torch.equal(torch.cat([piece.images for piece in pieces]), expected.images)


def test_seeds_epochs_and_repeats_give_other_images(make_config: MakeConfig) -> None:
    config = make_config(data__batch_size=60, data__repeated_aug=3, **ALL)
    first, again = batches(config)[0], batches(config, epoch=1)
    assert not torch.equal(first.images[0], first.images[1])
    shown = {int(index): image for batch in again for index, image in zip(batch.ids, batch.images, strict=True)}
    both = [(image, shown[int(i)]) for i, image in zip(first.ids, first.images, strict=True) if int(i) in shown]
    assert sum(torch.equal(*pair) for pair in both) < len(both) / 4
    other = batches(make_config(data__batch_size=60, run__seed=1, data__repeated_aug=3, **ALL))[0]
    assert not torch.equal(first.ids, other.ids)


def test_without_augmentation_both_loaders_give_the_same_batches(make_config: MakeConfig) -> None:
    plain = {"augment__crop": "none", "augment__hflip": 0.0, "data__batch_size": 100}
    for size in (16, [40, 24]):
        for grey in ({}, {"in_chans": 1}):
            model = {"model__kwargs": grey}
            config = make_config(**plain, **model, data__image_size=size, data__loader="resident")
            other = make_config(**plain, **model, data__image_size=size, data__loader="workers")
            expected = [batch for update in build_data(other).train.epoch(2, 12) for batch in update]
            for mine, theirs in zip(batches(config, 2, 12), expected, strict=True):
                assert torch.equal(mine.images, theirs.images)
                assert torch.equal(mine.targets, theirs.targets)


def test_crops_and_flips_are_exactly_those_of_torchvision_and_equally_likely(make_config: MakeConfig) -> None:
    pad = 2
    raw = {
        "data__loader": "resident",
        "data__batch_size": 1437,
        "data__image_size": 32,
        "data__mean": 0.0,
        "data__std": 1.0,
    }
    config = make_config(**raw, augment__crop="pad", augment__pad=pad)
    plain = make_config(**raw, augment__crop="none", augment__hflip=0.0)
    (whole,) = batches(plain)
    padded = functional.pad(whole.images, [pad] * 4)
    counts = np.zeros((2, 2 * pad + 1, 2 * pad + 1), dtype=int)
    places = [(flip, top, left) for flip in (0, 1) for top in range(2 * pad + 1) for left in range(2 * pad + 1)]
    order = whole.ids.argsort()
    for epoch in range(3):
        (seen,) = batches(config, epoch)
        images = seen.images[seen.ids.argsort()]
        found = np.zeros(len(images), dtype=int)
        for flip, top, left in places:
            crop = padded[order][:, :, top : top + 32, left : left + 32]
            same = (images == (crop.flip(3) if flip else crop)).all(dim=(1, 2, 3)).numpy()
            counts[flip, top, left] += same.sum()
            found += same
        assert (found == 1).all()
    assert stats.chisquare(counts.ravel()).pvalue > 1e-4


def test_colours_change_as_pillow_changes_them() -> None:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (64, 9, 7, 3), dtype=np.uint8)
    numbers = random.random((6, 64))
    expected = []
    for image, factors, order in zip(images, 0.6 + numbers[:3].T * 0.8, numbers[3:].argsort(0).T, strict=True):
        step = Image.fromarray(image)
        for kind in order:
            adjust = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)[kind]
            step = adjust(step, float(factors[kind]))
        expected.append(np.asarray(step))
    jitter(images, 0.4, numbers)
    assert np.array_equal(images, np.stack(expected))


def erased_parts(config: Config, epochs: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each image of some epochs whether, and how much of it, is erased; and the noise."""
    data = build_data(config)
    shares, noise = [], []
    for epoch in range(epochs):
        for update in data.train.epoch(epoch):
            images = update[0].images
            plain = images[:, 0] == images[:, 0].median()  # the pictures are of one colour
            shares += (~plain).float().mean(dim=(1, 2)).tolist()
            noise.append(images[:, 0][~plain].numpy())
    return np.array(shares), np.concatenate(noise)


def test_parts_are_erased_as_by_loader_processes(tmp_path: Path, make_config: MakeConfig) -> None:
    for split in ("train", "val"):
        (tmp_path / split / "only").mkdir(parents=True)
        for number in range(40):
            Image.new("RGB", (16, 16), (99, 99, 99)).save(tmp_path / split / "only" / f"{number}.png")
    settings = {"data__dataset": "folder", "data__root": tmp_path, "augment__crop": "none", "augment__erase_prob": 0.5}
    config = {kind: make_config(**settings, data__loader=kind, data__batch_size=40) for kind in ("resident", "workers")}
    mine, noise = erased_parts(config["resident"], 30)
    theirs, _ = erased_parts(config["workers"], 30)
    assert abs((mine > 0).mean() - (theirs > 0).mean()) < 5 * np.sqrt(2 * 0.25 / len(mine))
    assert stats.ks_2samp(mine[mine > 0], theirs[theirs > 0]).pvalue > 1e-4
    assert stats.kstest(noise[::7], "norm").pvalue > 1e-4


def test_numbers_are_uniform_and_independent_of_the_batch() -> None:
    index = np.arange(20_000)
    draws = Draws(3, 1, index, np.zeros_like(index))
    numbers = draws.uniform(0, 5)
    assert ((numbers >= 0) & (numbers < 1)).all()
    assert all(stats.kstest(row, "uniform").pvalue > 1e-4 for row in numbers)
    assert np.abs(np.corrcoef(numbers) - np.eye(5)).max() < 5 / np.sqrt(len(index))
    alone = Draws(3, 1, index[777:778], np.zeros(1, dtype=int))
    assert np.array_equal(alone.uniform(2, 3), numbers[2:, 777:778])
    assert np.array_equal(draws.uniform(2, 3, index[5:9]), numbers[2:, 5:9])
    # SplitMix64 as published: the first output of the state 0
    zero = Draws.__new__(Draws)
    zero._states = np.zeros(1, dtype=np.uint64)
    assert zero.uniform(0, 1)[0, 0] == (0xE220A8397B1DCDAF >> 11) / 2**53


def test_auto_is_resident_where_it_can_be_and_says_why_not(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    tmp_path: Path, make_folder: MakeFolder,
) -> None:  # fmt: skip
    monkeypatch.setenv("ACMIX_DEBUG", "1")
    assert build_data(make_config(data__loader="auto")).loader == "resident"
    assert build_data(make_config(data__loader="workers")).loader == "workers"
    assert capsys.readouterr().err == ""
    root = make_folder(tmp_path)
    Image.new("RGB", (20, 30)).save(root / "train" / "dog" / "999.png")
    unlike = {"data__dataset": "folder", "data__root": root}
    assert build_data(make_config(**unlike, data__loader="auto")).loader == "workers"
    assert "differ in size: " in capsys.readouterr().err
    with pytest.raises(UserError, match=r"data.loader: resident cannot be: .*differ in size.*; use data.loader=auto"):
        build_data(make_config(**unlike, data__loader="resident"))
    assert build_data(make_config(**unlike, augment__crop="none", data__loader="auto")).loader == "resident"
    monkeypatch.setattr("acmix.data.resident.LIMIT", 1 << 20)
    assert build_data(make_config(data__loader="auto")).loader == "workers"
    assert "more than 0.000976562" in capsys.readouterr().err
    assert build_data(make_config(data__loader="resident")).loader == "resident"


def test_steps_without_a_form_for_batches_take_the_images_one_by_one(make_config: MakeConfig) -> None:
    steps = {"augment__auto_augment": "rand-m9-mstd0.5-inc1", "augment__crop": "random_resized"}
    expected = batches(make_config(data__batch_size=100, data__loader="resident", **steps), start=12)
    assert len({image.numpy().tobytes() for batch in expected for image in batch.images}) > 195
    torch.manual_seed(0)
    before = torch.get_rng_state()
    workers = make_config(data__batch_size=100, data__loader="resident", data__num_workers=2, **steps)
    for mine, theirs in zip(batches(workers, start=12), expected, strict=True):
        assert torch.equal(mine.images, theirs.images)
    assert torch.equal(torch.get_rng_state(), before)
    both = [{**steps, "data__batch_size": 1437, "data__loader": kind} for kind in ("resident", "workers")]
    mine, theirs = (next(build_data(make_config(**settings)).train.epoch(0))[0].images for settings in both)
    assert stats.ks_2samp(mine.mean(dim=(1, 2, 3)), theirs.mean(dim=(1, 2, 3))).pvalue > 1e-4
    assert stats.ks_2samp(mine.std(dim=(1, 2, 3)), theirs.std(dim=(1, 2, 3))).pvalue > 1e-4


def test_an_image_that_cannot_be_read_stops_the_run_or_is_replaced(
    tmp_path: Path, make_folder: MakeFolder, make_config: MakeConfig
) -> None:
    root = make_folder(tmp_path, train=16)
    bad = root / "train" / "cat" / "004.png"
    bad.write_bytes(b"just text")
    settings = {"data__dataset": "folder", "data__root": root, **ALL}
    with pytest.raises(UserError, match=rf"unreadable image: {bad} \(class cat\): .*data.on_error=skip"):
        build_data(make_config(**settings))
    found = [batch for batch in batches(make_config(**settings, data__on_error="skip")) if batch.errors]
    assert len(found) == 1
    (place,) = (~found[0].valid).nonzero().flatten().tolist()
    donor = int(found[0].valid.int().argmax())
    assert torch.equal(found[0].images[place], found[0].images[donor])
    assert found[0].targets[place] == found[0].targets[donor]
    assert found[0].errors[0].startswith(str(bad))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own, which takes files of any size."""
    monkeypatch.setenv("ACMIX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(decoded, "_WORTH_A_FILE", 0)
    return tmp_path / "cache" / "decoded"


def test_decoded_images_are_kept_in_a_file_until_the_images_change(
    cache: Path, tmp_path: Path, make_folder: MakeFolder, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_folder(tmp_path / "images")
    config = make_config(data__dataset="folder", data__root=root, **ALL)
    expected = batches(config)
    (file,) = cache.glob("*.npy")
    with monkeypatch.context() as patch:
        patch.setattr(decoded, "_decode", None)  # now it would fail
        for mine, theirs in zip(batches(config), expected, strict=True):
            assert torch.equal(mine.images, theirs.images)
            assert torch.equal(mine.targets, theirs.targets)
    damaged = bytearray(file.read_bytes())
    damaged[-30] ^= 1
    for content in (bytes(damaged), bytes(damaged[:200]), b""):
        file.write_bytes(content)
        assert torch.equal(batches(config)[0].images, expected[0].images)
    first = root / "train" / "cat" / "000.png"
    Image.new("RGB", (16, 16), "white").save(first)
    os.utime(first, ns=(0, 0))
    batches(config)
    assert len(list(cache.glob("*.npy"))) == 2


def test_decoded_images_that_cannot_be_kept_are_used_and_that_is_said(
    cache: Path, make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    cache.parent.mkdir()
    cache.write_text("not a folder")
    assert len(batches(make_config(data__batch_size=700, **ALL))) == 2
    assert "warning: decoded images are not kept on disk: " in capsys.readouterr().err


def test_a_run_killed_while_it_keeps_images_leaves_nothing_half(
    cache: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(source: object, target: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            batches(make_config(data__batch_size=700, **ALL))
    assert list(cache.glob("*.npy")) == []
    assert len(list(cache.glob("*.part"))) == 1
    batches(make_config(data__batch_size=700, **ALL))
    assert len(list(cache.glob("*.npy"))) == 1
    assert list(cache.glob("*.part")) == []


def test_the_files_used_last_are_kept_within_a_limit(
    cache: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for size in (16, 18, 20):
        batches(make_config(data__batch_size=700, data__image_size=size, **ALL))
    assert len(list(cache.glob("*.npy"))) == 3
    monkeypatch.setattr(decoded, "_FILES", 4 << 20)  # those of 22 and 20 pixels: 1437 × 3 × (22² + 20²) bytes
    batches(make_config(data__batch_size=700, data__image_size=22, **ALL))
    assert len(list(cache.glob("*.npy"))) == 2


def test_validation_is_read_once_and_then_kept(make_config: MakeConfig) -> None:
    data = build_data(make_config(data__val_batch_size=100, data__num_workers=1))
    first = [(batch.images.clone(), batch.targets.clone()) for batch in data.val]
    for batch in data.val:
        batch.images.zero_()
    for batch, (images, targets) in zip(data.val, first, strict=True):
        assert torch.equal(batch.images, images)
        assert torch.equal(batch.targets, targets)
    assert not data.val.images.pool.close.alive
