"""Saving: what is written is what is read, links and pruning, background saves, errors."""

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from acmix.checkpoint.read import load_checkpoint
from acmix.checkpoint.snapshot import Snapshot
from acmix.checkpoint.store import CheckpointStore, SaveError


def make_snapshot(step: int, *, value: float | None = None) -> Snapshot:
    weights = {"weight": torch.full((4, 3), float(step) if value is None else value), "bias": torch.zeros(4)}
    training = {
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(4, 3) * step}}, "param_groups": [{"lr": 0.1}]}
    }
    return Snapshot(weights, None, training, {"step": step, "epoch": 0})


def make_store(run_dir: Path, keep: int = 3, **options: Any) -> CheckpointStore:
    return CheckpointStore(run_dir, keep, **{"background": False, "on_error": "stop", **options})


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_same_bits(left: Tensor, right: Tensor) -> None:
    assert left.dtype == right.dtype
    assert left.shape == right.shape
    assert left.contiguous().reshape(-1).view(torch.uint8).equal(right.contiguous().reshape(-1).view(torch.uint8))


@pytest.fixture
def blocked_sync(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Every fsync waits for this event: a disk as slow as a test needs it."""
    released = threading.Event()
    sync = os.fsync

    def slow_sync(descriptor: int) -> None:
        assert released.wait(60)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", slow_sync)
    return released


def test_every_kind_of_tensor_comes_back_bit_for_bit(tmp_path: Path) -> None:
    tied = torch.randn(3, 5)
    model = {
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "transposed": torch.randn(4, 6).t(),
        "expanded": torch.randn(1, 3).expand(4, 3),
        "tied.a": tied,
        "tied.b": tied,
        "half": torch.randn(7).half(),
        "bfloat16": torch.randn(7).bfloat16(),
        "double": torch.randn(3).double(),
        "counter": torch.tensor(7),
        "mask": torch.tensor([True, False, True]),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "empty": torch.zeros(0, 3),
        "not_finite": torch.tensor([float("nan"), float("inf"), -0.0]),
    }
    store = make_store(tmp_path)
    store.save(Snapshot(model, dict(model), {"nested": [model["tied.a"], (1, model)]}, {"step": 1}), best=False)
    loaded = load_checkpoint(tmp_path / "checkpoints" / "last")
    assert loaded.ema is not None
    for name, tensor in model.items():
        assert_same_bits(loaded.model[name], tensor)
        assert_same_bits(loaded.ema[name], tensor)
        assert_same_bits(loaded.training["nested"][1][1][name], tensor)


def test_weights_load_with_plain_safetensors_and_plain_timm(tmp_path: Path) -> None:
    network = timm.create_model("test_resnet", num_classes=5).to(memory_format=torch.channels_last)
    make_store(tmp_path).save(Snapshot(network.state_dict(), None, {}, {"step": 1}), best=True)
    file = tmp_path / "checkpoints" / "best" / "model.safetensors"
    again = timm.create_model("test_resnet", num_classes=5, checkpoint_path=str(file))
    plain = safetensors.torch.load_file(file)
    assert plain.keys() == network.state_dict().keys()
    for name, tensor in network.state_dict().items():
        assert_same_bits(plain[name], tensor)
        assert_same_bits(again.state_dict()[name], tensor)


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW])
def test_a_restored_optimiser_goes_on_bit_for_bit(tmp_path: Path, optimizer_class: type[torch.optim.Optimizer]) -> None:
    def start() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        network = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        options = {"momentum": 0.9} if optimizer_class is torch.optim.SGD else {}
        return network, optimizer_class(network.parameters(), lr=0.1, **options)

    def update(network: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        network(images).square().mean().backward()
        optimizer.step()

    straight, straight_optimizer = start()
    store = make_store(tmp_path)
    for step in range(6):
        update(straight, straight_optimizer, step)
        if step == 2:
            state = {"optimizer": straight_optimizer.state_dict()}
            store.save(Snapshot(straight.state_dict(), None, state, {"step": step}), best=False)
    resumed, resumed_optimizer = start()
    loaded = load_checkpoint(tmp_path)
    resumed.load_state_dict(loaded.model)
    resumed_optimizer.load_state_dict(loaded.training["optimizer"])
    for step in range(3, 6):
        update(resumed, resumed_optimizer, step)
    for name, tensor in straight.state_dict().items():
        assert_same_bits(resumed.state_dict()[name], tensor)


def test_training_state_is_readable_with_torch_load_alone(tmp_path: Path) -> None:
    make_store(tmp_path).save(make_snapshot(3), best=False)
    folder = tmp_path / "checkpoints" / "step_00000003"
    state = torch.load(folder / "training.pt", weights_only=True)
    assert state["optimizer"]["param_groups"] == [{"lr": 0.1}]
    assert json.loads((folder / "progress.json").read_text()) == {"step": 3, "epoch": 0}


def test_numpy_numbers_are_saved_as_plain_ones(tmp_path: Path) -> None:
    snapshot = make_snapshot(1)
    snapshot.training["lr"] = np.float64(0.25)
    make_store(tmp_path).save(snapshot, best=False)
    loaded = load_checkpoint(tmp_path).training["lr"]
    assert type(loaded) is float
    assert loaded == 0.25


def test_a_state_that_could_not_be_loaded_again_is_refused_by_place(tmp_path: Path) -> None:
    snapshot = make_snapshot(1)
    snapshot.training["optimizer"]["param_groups"][0]["hook"] = Path("x")
    with pytest.raises(TypeError, match=r"training\.optimizer\.param_groups\.0\.hook: cannot be saved: PosixPath"):
        make_store(tmp_path).save(snapshot, best=False)


def test_links_are_relative_and_follow_last_and_best(tmp_path: Path) -> None:
    store = make_store(tmp_path / "run")
    for step, best in ((1, False), (2, True), (3, False)):
        store.save(make_snapshot(step), best=best)
    moved = (tmp_path / "run").rename(tmp_path / "moved") / "checkpoints"
    assert os.readlink(moved / "last") == "step_00000003"
    assert os.readlink(moved / "best") == "step_00000002"
    assert load_checkpoint(moved / "best").step == 2


def test_pruning_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    store = make_store(tmp_path, keep=2)
    for step in range(1, 8):
        store.save(make_snapshot(step), best=step == 2)
    expected = ["best", "last", "step_00000002", "step_00000006", "step_00000007"]
    assert names_in(store.folder) == expected


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    store.save(make_snapshot(99_999_999), best=False)
    store.save(make_snapshot(100_000_000), best=False)
    assert store.newest() == store.folder / "step_100000000"


def test_the_same_step_can_be_saved_again(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    store.save(make_snapshot(5, value=1.0), best=True)
    store.save(make_snapshot(5, value=2.0), best=False)
    assert names_in(store.folder) == ["best", "last", "step_00000005"]
    assert load_checkpoint(store.folder / "best").model["weight"].eq(2.0).all()


def test_a_background_save_holds_what_training_changes_meanwhile(tmp_path: Path, blocked_sync: threading.Event) -> None:
    store = make_store(tmp_path, background=True)
    snapshot = make_snapshot(1)
    store.save(snapshot, best=False)
    snapshot.model["weight"].fill_(-1.0)
    snapshot.training["optimizer"]["state"][0]["momentum_buffer"].fill_(-1.0)
    snapshot.progress["step"] = 999
    assert store.newest() is None
    blocked_sync.set()
    store.wait()
    loaded = load_checkpoint(tmp_path)
    assert loaded.model["weight"].eq(1.0).all()
    assert loaded.training["optimizer"]["state"][0]["momentum_buffer"].eq(1.0).all()
    assert loaded.progress["step"] == 1


def test_a_second_background_save_waits_for_the_first(tmp_path: Path, blocked_sync: threading.Event) -> None:
    store = make_store(tmp_path, background=True)
    store.reserve(make_snapshot(0))
    store.save(make_snapshot(1), best=False)
    second = threading.Thread(target=lambda: store.save(make_snapshot(2), best=False))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    blocked_sync.set()
    second.join(60)
    store.wait()
    assert load_checkpoint(store.folder / "step_00000001").model["weight"].eq(1.0).all()
    assert load_checkpoint(store.folder / "step_00000002").model["weight"].eq(2.0).all()


def test_a_failed_save_raises_at_the_next_call(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    store = make_store(tmp_path, background=True)
    store.save(make_snapshot(1), best=False)
    with pytest.raises(SaveError, match=r"could not save .*step_00000001: .*bytes needed, [\d,]+ free"):
        store.wait()
    store.poll()


def test_a_failed_save_only_warns_where_training_is_to_go_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    blocker = tmp_path / "checkpoints"
    blocker.write_text("in the way")
    store = make_store(tmp_path, on_error="continue")
    store.save(make_snapshot(1), best=False)
    assert "warning: could not save" in capfd.readouterr().err
    with pytest.raises(SaveError, match="step_00000001"):  # where no other save follows
        store.settle()
    blocker.unlink()
    store.save(make_snapshot(2), best=False)
    store.settle()
    assert load_checkpoint(tmp_path).step == 2


def test_leftovers_of_dead_processes_are_cleaned_at_the_next_start(tmp_path: Path) -> None:
    make_store(tmp_path).save(make_snapshot(1), best=False)
    folder = tmp_path / "checkpoints"
    dead, alive = 2**22 + 1, os.getppid()
    for name in (f".tmp-step_00000002-{dead}", f".trash-step_00000000-{dead}", f".tmp-step_00000003-{alive}"):
        (folder / name).mkdir()
    os.symlink("step_00000001", folder / f".link-last-{dead}")
    make_store(tmp_path)
    assert names_in(folder) == [f".tmp-step_00000003-{alive}", "last", "step_00000001"]


def test_a_checkpoint_whose_replacement_was_killed_is_put_back(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    store.save(make_snapshot(1), best=False)
    old = store.folder / f".old-step_00000001-{2**22 + 1}"
    (store.folder / "step_00000001").rename(old)
    assert load_checkpoint(tmp_path).step == 1
    assert make_store(tmp_path).newest() == store.folder / "step_00000001"


def test_a_link_that_a_kill_left_behind_catches_up_when_the_run_goes_on(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    store.save(make_snapshot(1), best=False)
    store.save(make_snapshot(2), best=False)
    (store.folder / "last").unlink()
    (store.folder / "last").symlink_to("step_00000001")
    newest = store.newest()
    assert newest is not None
    store.rewind(load_checkpoint(newest).step)
    assert os.readlink(store.folder / "last") == "step_00000002"


def test_the_link_to_the_best_catches_up_too_and_is_of_the_course_that_goes_on(tmp_path: Path) -> None:
    store = make_store(tmp_path, keep=9)
    for step in (1, 2, 3):
        store.save(make_snapshot(step), best=step == 1)
    (store.folder / "best").unlink()
    store.rewind(3, best=1)
    assert os.readlink(store.folder / "best") == "step_00000001"
    store.save(make_snapshot(4), best=True)
    store.rewind(1, best=1)
    assert os.readlink(store.folder / "best") == "step_00000001"


def test_rewinding_sets_later_checkpoints_aside(tmp_path: Path) -> None:
    store = make_store(tmp_path, keep=9)
    for step in (1, 2, 3):
        store.save(make_snapshot(step), best=step == 3)
    store.rewind(1)
    assert names_in(store.folder) == ["abandoned", "last", "step_00000001"]
    assert store.newest() == store.folder / "step_00000001"
    assert load_checkpoint(store.folder / "abandoned" / "step_00000003").step == 3
    store.save(make_snapshot(2), best=True)
    store.rewind(1)
    assert names_in(store.folder / "abandoned") == ["step_00000002", "step_00000002-2", "step_00000003"]


def test_data_reach_the_disk_before_the_names_that_promise_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, report: Callable[..., None]
) -> None:
    calls: list[tuple[str, str]] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def record_sync(descriptor: int) -> None:
        calls.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def record_rename(source: Any, target: Any) -> None:
        calls.append(("rename", f"{source} {target}"))
        rename(source, target)

    def record_replace(source: Any, target: Any) -> None:
        calls.append(("link", Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "rename", record_rename)
    monkeypatch.setattr(os, "replace", record_replace)
    store = make_store(tmp_path)
    store.save(make_snapshot(1), best=True)

    temporary = store.folder / f".tmp-step_00000001-{os.getpid()}"
    renamed = calls.index(("rename", f"{temporary} {store.folder / 'step_00000001'}"))
    for name in ("model.safetensors", "training.pt", "progress.json", "manifest.json"):
        assert calls.index(("sync", str(temporary / name))) < renamed
    folder_synced = calls.index(("sync", str(temporary)))
    assert folder_synced == renamed - 1
    assert calls[renamed + 1] == ("sync", str(store.folder))
    assert calls[renamed + 2 :] == [("link", "last"), ("link", "best"), ("sync", str(store.folder))]
    assert calls[0] == ("sync", str(tmp_path))
    report("Power loss", "Every file and folder is synced before the rename that promises it, the rename after", 1, 1)
