"""Loading: damage is named before anything is returned; old formats load; every way to name weights works."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from acmix.checkpoint.manifest import DamagedCheckpoint, FileRecord, read_manifest, render_manifest
from acmix.checkpoint.read import load_checkpoint, resolve_weights
from acmix.checkpoint.snapshot import Snapshot
from acmix.checkpoint.store import CheckpointStore
from acmix.errors import UserError

SAMPLES = Path(__file__).parents[1] / "data" / "checkpoints"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run folder with checkpoints at steps 1 (best), 2 and 3 (last), all with EMA weights."""
    store = CheckpointStore(tmp_path, 9, background=False, on_error="stop")
    for step in (1, 2, 3):
        weights = {"weight": torch.full((64,), float(step))}
        ema = {"weight": torch.full((64,), step + 0.5)}
        store.save(Snapshot(weights, ema, {"scaler": {"scale": 2.0}}, {"step": step}), best=step == 1)
    return tmp_path


def rewrite_manifest(folder: Path, change: Callable[[dict[str, FileRecord]], None]) -> None:
    """A manifest whose own check sum is right again after a change: what a hostile hand would write."""
    records = read_manifest(folder)
    change(records)
    (folder / "manifest.json").write_bytes(render_manifest(3, records))


def delete_model(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def truncate_training(folder: Path) -> None:
    os.truncate(folder / "training.pt", 100)


def lengthen_progress(folder: Path) -> None:
    with (folder / "progress.json").open("a") as file:
        file.write(" ")


def flip_a_bit_of_ema(folder: Path) -> None:
    data = bytearray((folder / "ema.safetensors").read_bytes())
    data[-1] ^= 4
    (folder / "ema.safetensors").write_bytes(data)


def garble_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_bytes(b"\x00" * 300)


def edit_manifest(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"step": 3', '"step": 4'))


def delete_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def list_a_file_outside(folder: Path) -> None:
    rewrite_manifest(folder, lambda records: records.update({"../../secret": FileRecord("0" * 64, 1)}))


def list_no_model(folder: Path) -> None:
    rewrite_manifest(folder, lambda records: records.pop("model.safetensors") and None)


DAMAGES = [
    (delete_model, "missing", "model.safetensors"),
    (truncate_training, "truncated", "training.pt"),
    (lengthen_progress, "wrong size", "progress.json"),
    (flip_a_bit_of_ema, "checksum mismatch", "ema.safetensors"),
    (garble_manifest, "unreadable manifest", "manifest.json"),
    (edit_manifest, "unreadable manifest", "manifest.json"),
    (delete_manifest, "missing", "manifest.json"),
    (list_a_file_outside, "unreadable manifest", "manifest.json"),
    (list_no_model, "unreadable manifest", "manifest.json"),
]


@pytest.mark.parametrize(("damage", "kind", "file"), DAMAGES, ids=[damage.__name__ for damage, _, _ in DAMAGES])
def test_damage_is_named_by_file_and_kind(
    run_dir: Path, damage: Callable[[Path], None], kind: str, file: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = run_dir / "checkpoints" / "step_00000003"
    damage(folder)
    with pytest.raises(DamagedCheckpoint, match=kind) as caught:
        load_checkpoint(folder)
    assert caught.value.kind == kind
    assert str(folder / file) in str(caught.value)
    assert load_checkpoint(run_dir).step == 2
    warning = capfd.readouterr().err
    assert str(folder / file) in warning
    assert kind in warning


def test_a_newer_format_asks_for_an_upgrade(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run_dir / "checkpoints" / "step_00000003"
    records = read_manifest(folder)
    monkeypatch.setattr("acmix.checkpoint.manifest.FORMAT_VERSION", 2)
    newer = render_manifest(3, records)
    monkeypatch.undo()
    (folder / "manifest.json").write_bytes(newer)
    with pytest.raises(DamagedCheckpoint, match=r"newer version: .*format 2, this acmix reads up to 1; upgrade acmix"):
        load_checkpoint(folder)


def test_no_sound_checkpoint_at_all_is_said(run_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for step in (1, 2, 3):
        truncate_training(run_dir / "checkpoints" / f"step_{step:08d}")
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        load_checkpoint(run_dir)
    with pytest.raises(UserError, match=r"none of its checkpoints is sound .* another run\.dir"):
        CheckpointStore(run_dir, 9, background=False, on_error="stop").newest()
    assert capfd.readouterr().err.count("warning: checkpoint left out") == 6


def test_a_missing_checkpoint_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such checkpoint; give a run folder, a folder checkpoints/step_"):
        load_checkpoint(tmp_path / "nowhere")


def test_a_weights_file_is_no_checkpoint_to_resume(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    safetensors.torch.save_file({"weight": torch.zeros(1)}, file)
    with pytest.raises(UserError, match=r"a weights file, not a checkpoint to resume; .*model\.checkpoint="):
        load_checkpoint(file)


def test_weights_are_found_behind_every_kind_of_path(run_dir: Path) -> None:
    checkpoints = run_dir / "checkpoints"
    for path, step in ((run_dir, 1), (checkpoints, 1), (checkpoints / "last", 3), (checkpoints / "step_00000002", 2)):
        model, ema, progress = resolve_weights(path)
        assert model["weight"].eq(step).all()
        assert ema is not None
        assert ema["weight"].eq(step + 0.5).all()
        assert progress == {"step": step}
    model, ema, progress = resolve_weights(checkpoints / "last" / "ema.safetensors")
    assert model["weight"].eq(3.5).all()
    assert (ema, progress) == (None, None)


def test_a_flipped_weights_file_inside_a_checkpoint_is_noticed(run_dir: Path) -> None:
    folder = run_dir / "checkpoints" / "step_00000003"
    flip_a_bit_of_ema(folder)
    with pytest.raises(DamagedCheckpoint, match="checksum mismatch"):
        resolve_weights(folder / "ema.safetensors")
    assert resolve_weights(folder / "model.safetensors").model["weight"].eq(3).all()


@pytest.mark.parametrize("version", sorted(path.name for path in SAMPLES.iterdir()))
def test_a_stored_sample_of_each_format_version_loads(version: str) -> None:
    folder = SAMPLES / version
    loaded = load_checkpoint(folder)
    assert json.loads((folder / "manifest.json").read_text())["format_version"] == int(version.removeprefix("v"))
    assert loaded.model["conv.weight"].equal(torch.arange(18, dtype=torch.float32).reshape(2, 1, 3, 3))
    assert loaded.model["bn.num_batches_tracked"].item() == 3
    assert loaded.ema is not None
    assert loaded.ema["conv.weight"].eq(0.5).all()
    assert loaded.training["optimizer"]["state"][0]["momentum_buffer"].dtype == torch.bfloat16
    assert loaded.training["ema_updates"] == 3
    assert loaded.progress == {"step": 3, "epoch": 1, "update_in_epoch": 1, "best": 97.5, "classes": ["0", "1"]}
