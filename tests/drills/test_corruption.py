"""Flipped bits and truncated files: every one is noticed before anything is used."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from acmix.checkpoint.manifest import DamagedCheckpoint
from acmix.checkpoint.read import load_checkpoint
from acmix.checkpoint.snapshot import Snapshot
from acmix.checkpoint.store import CheckpointStore


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound checkpoint at step 2, an older one beside it."""
    store = CheckpointStore(tmp_path, 3, background=False, on_error="stop")
    for step in (1, 2):
        torch.manual_seed(step)
        weights = {f"layer{index}.weight": torch.randn(32, 9) for index in range(4)}
        training = {"optimizer": {"state": {0: {"momentum_buffer": torch.randn(32, 9)}}}}
        store.save(Snapshot(weights, weights, training, {"step": step, "history": [1.5] * 20}), best=False)
    return store.folder / "step_00000002"


@pytest.mark.parametrize("tries", [300, pytest.param(5000, marks=pytest.mark.drill)])
def test_flipped_bits_and_truncations_are_all_noticed(tries: int, folder: Path, report: Callable[..., None]) -> None:
    chance = random.Random(tries)
    files = sorted(folder.iterdir())
    noticed = 0
    for number in range(tries):
        file = files[number % len(files)]
        whole = file.read_bytes()
        place = chance.randrange(len(whole))
        if chance.random() < 0.25:
            file.write_bytes(whole[:place])
        else:
            flipped = bytearray(whole)
            flipped[place] ^= 1 << chance.randrange(8)
            file.write_bytes(flipped)
        with pytest.raises(DamagedCheckpoint, match=file.name):
            load_checkpoint(folder)
        noticed += 1
        file.write_bytes(whole)
    assert load_checkpoint(folder).step == 2
    report("Flipped bit or truncated file", "Named before anything is changed", noticed, tries)


def test_every_single_bit_of_the_manifest_counts(folder: Path) -> None:
    manifest = folder / "manifest.json"
    whole = manifest.read_bytes()
    for place in range(len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << (place % 8)
        manifest.write_bytes(flipped)
        with pytest.raises(DamagedCheckpoint):
            load_checkpoint(folder)


def test_a_half_deleted_checkpoint_is_passed_over(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for file in sorted(folder.iterdir()):
        copy = file.read_bytes()
        file.unlink()
        assert load_checkpoint(folder.parents[1]).step == 1
        assert str(file) in capfd.readouterr().err
        file.write_bytes(copy)
    shutil.rmtree(folder)
    assert load_checkpoint(folder.parents[1]).step == 1
