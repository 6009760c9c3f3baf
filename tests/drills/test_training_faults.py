"""Damaged checkpoints, failed saves, a second run in the folder, another number of processes: what the trainer does."""

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from acmix.checkpoint.read import load_checkpoint

ENDLESS = ["run.checkpoint_every=2", "run.keep=9", "ema.decay=0.9", "augment.mixup=0.4"]
SMALL = [*ENDLESS, "schedule.steps=6"]
SHORT = [*ENDLESS, "schedule.steps=2"]


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 16
    file.write_bytes(data)


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def train_losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["event"] == "train"]


def test_a_damaged_newest_checkpoint_is_warned_of_and_passed_over(
    tmp_path: Path, run_training: Any, assert_same_run: Callable[[Path, Path], None], report: Callable[..., None]
) -> None:
    run_training(tmp_path / "whole", *SMALL)
    damaged = tmp_path / "damaged"
    run_training(damaged, *SMALL, env={"ACMIX_CRASH_AT": "before_write:3"}, status=-9)
    flip_a_bit(damaged / "checkpoints" / "step_00000004" / "model.safetensors")
    (ended,) = run_training(damaged, *SMALL, "--resume", "auto")
    assert "warning: checkpoint left out: " in ended.errors
    assert "step_00000004/model.safetensors: checksum mismatch" in ended.errors
    assert_same_run(tmp_path / "whole", damaged)
    assert (damaged / "checkpoints" / "abandoned" / "step_00000004").is_dir()
    report("Damaged newest checkpoint", "--resume auto warns and takes the newest sound one; bit-identical end", 1, 1)


@pytest.mark.parametrize(
    "file", ["model.safetensors", "ema.safetensors", "training.pt", "progress.json", "manifest.json"]
)
def test_a_damaged_checkpoint_asked_for_by_name_changes_nothing(
    file: str, tmp_path: Path, run_training: Any, report: Callable[..., None]
) -> None:
    run_training(tmp_path, *SHORT)
    folder = tmp_path / "checkpoints" / "step_00000002"
    flip_a_bit(folder / file)
    before = contents(tmp_path)
    (ended,) = run_training(tmp_path, *SMALL, "--resume", folder, status=2)
    assert ended.errors.startswith(f"error: {folder / file}: ")
    assert "Traceback" not in ended.errors
    before[".lock"] = b""
    assert contents(tmp_path) == before
    report("Damaged checkpoint given to --resume", "Refused naming file and damage; the run folder is unchanged", 1, 1)


def test_going_back_to_an_earlier_checkpoint_sets_the_later_course_aside(
    tmp_path: Path, run_training: Any, assert_same_run: Callable[[Path, Path], None]
) -> None:
    run_training(tmp_path / "whole", *SMALL)
    back = tmp_path / "back"
    run_training(back, *SMALL)
    again = ["--resume", back / "checkpoints" / "step_00000002"]
    run_training(back, *SMALL, *again, env={"ACMIX_CRASH_AT": "before_write:1"}, status=-9)
    assert sorted(path.name for path in (back / "checkpoints" / "abandoned").iterdir()) == [
        "step_00000004",
        "step_00000006",
    ]
    (ended,) = run_training(back, *SMALL, "--resume", "auto")
    assert ended.errors == ""
    assert_same_run(tmp_path / "whole", back)


def limit_file_size(programs: list[Any], size: int) -> None:
    """From now on no file of these programs may exceed `size` bytes: as if the disk were full for checkpoints only."""
    for program in programs:
        resource.prlimit(program.pid, resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize(
    ("on_error", "background"),
    [
        ("stop", "true"),
        ("continue", "false"),
        pytest.param("stop", "false", marks=pytest.mark.drill),
        pytest.param("continue", "true", marks=pytest.mark.drill),
    ],
)
def test_a_save_that_fails_stops_the_run_or_waits_for_the_next(
    on_error: str, background: str, tmp_path: Path, start_training: Any, run_training: Any, report: Callable[..., None]
) -> None:
    options = [*SMALL, f"run.on_save_error={on_error}", f"run.background_save={background}"]
    run_training(tmp_path, *SHORT)
    programs = start_training(tmp_path, *options, "--resume", tmp_path)
    limit_file_size(programs, 100_000)
    assert programs[0].wait() == 2, programs[0].errors
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "failed"
    errors = programs[0].errors
    assert "could not save" in errors
    assert "File too large" in errors
    assert "bytes needed" in errors
    assert "step_00000002, is intact" in errors
    assert "Traceback" not in errors
    assert errors.count("error: could not save") == 1
    assert errors.count("warning: could not save") == (0 if on_error == "stop" else 2)
    assert ("step_00000006" in errors) == (on_error == "continue"), "the last save, which none follows"
    assert load_checkpoint(tmp_path).step == 2
    assert not [path for path in (tmp_path / "checkpoints").iterdir() if path.name.startswith(".")]
    run_training(tmp_path, *options, "--resume", tmp_path)
    assert load_checkpoint(tmp_path).step == 6
    report("Save fails in training", "Error names path and bytes, last checkpoint intact, no temporary files", 1, 1)


def test_a_second_run_in_the_folder_is_refused_while_the_first_lives(
    tmp_path: Path, start_training: Any, run_training: Any, report: Callable[..., None]
) -> None:
    sleeper = ["model.kwargs.fault=sleep", "model.kwargs.at=4"]
    (first,) = start_training(tmp_path, *SMALL, *sleeper)
    assert first.wait_for(lambda: (tmp_path / "checkpoints" / "last").exists()), first.errors
    (second,) = run_training(tmp_path, *SMALL, "--resume", "auto", status=2)
    assert f"another run is live in this folder, held by process {first.pid}" in second.errors
    assert "run.dir" in second.errors
    first.kill_all()
    first.wait()
    run_training(tmp_path, *SMALL, "--resume", "auto")
    assert len(train_losses(tmp_path)) == 6
    report("Two runs in one folder", "The second is refused while the first lives, and only then", 1, 1)


@pytest.mark.parametrize("before", [1, pytest.param(2, marks=pytest.mark.drill)])
def test_the_course_does_not_depend_on_the_number_of_processes(
    before: int, tmp_path: Path, run_training: Any, report: Callable[..., None]
) -> None:
    """32 images per update as 2 micro-batches of 16 on one process, or one on each of two: the same images.

    The gradients are the same sums in another order, so losses agree to float32 rounding (6e-8), grown by six updates;
    with other images they differ in the second digit.
    """
    base = ["run.checkpoint_every=2", "schedule.steps=6", "optimizer.lr=0.01"]
    options = {1: [*base, "optimizer.accumulate=2"], 2: [*base, "optimizer.accumulate=1"]}
    run_training(tmp_path / "whole", *options[1])
    stop = ["model.kwargs.fault=SIGTERM", f"model.kwargs.at={6 // before}"]  # the third update
    run_training(tmp_path / "moved", *options[before], *stop, ranks=before, status=75)
    run_training(tmp_path / "moved", *options[3 - before], "--resume", "auto", ranks=3 - before)
    assert train_losses(tmp_path / "moved") == pytest.approx(train_losses(tmp_path / "whole"), rel=1e-4)
    report("Resumed with another number of processes", "The same order of images at the same global batch", 1, 1)


def test_another_global_batch_is_refused_with_the_way_to_keep_it(
    tmp_path: Path, run_training: Any, report: Callable[..., None]
) -> None:
    run_training(tmp_path, *SHORT)
    before = contents(tmp_path)
    for ended in run_training(tmp_path, *SMALL, "--resume", tmp_path, ranks=2, status=2)[:1]:
        assert "batch_size × accumulate × processes = 16" in ended.errors
        assert "Traceback" not in ended.errors
    assert load_checkpoint(tmp_path).step == 2
    assert contents(tmp_path).keys() == before.keys() | {".lock"}
    report("Resumed with another global batch", "Refused; the message says which settings keep it", 1, 1)
