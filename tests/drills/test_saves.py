"""Saves that are killed or meet a full disk, a size limit or a read-only folder: the last checkpoint stays whole."""

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from acmix.checkpoint.atomic import CRASH_POINTS
from acmix.checkpoint.layout import list_checkpoints
from acmix.checkpoint.read import load_checkpoint
from acmix.checkpoint.snapshot import Snapshot
from acmix.checkpoint.store import CheckpointStore

SAVE_LOOP = Path(__file__).parent / "save_loop.py"
KILLS = "A kill at any instant leaves the newest complete checkpoint, never a half one"


def saved_steps(output: str) -> list[int]:
    return [int(line.split()[1]) for line in output.splitlines() if line.startswith("saved")]


def assert_all_sound(run_dir: Path, at_least: int) -> int:
    """Every checkpoint in the folder is whole and of one save; the newest is no older than `at_least`."""
    steps = sorted(list_checkpoints(run_dir / "checkpoints"))
    for step, path in steps:
        loaded = load_checkpoint(path)
        assert loaded.ema is not None
        assert loaded.step == step
        for values in (loaded.model["w"], loaded.ema["w"], loaded.training["momentum"]):
            assert values.eq(step).all()
    newest = steps[-1][0] if steps else 0
    assert newest >= at_least
    last = run_dir / "checkpoints" / "last"
    if len(steps) > 1 or last.exists():
        assert load_checkpoint(last).step in (newest, newest - 1)  # killed before the link
    return newest


@pytest.mark.parametrize("kills", [12, pytest.param(200, marks=[pytest.mark.drill, pytest.mark.timeout(1800)])])
def test_saves_killed_at_random_instants(
    kills: int, tmp_path: Path, launcher: Any, report: Callable[..., None]
) -> None:
    chance = random.Random(kills)
    newest = 0
    for kill in range(kills):
        options = ["--size", 200_000, "--steps", 10**6, *(["--background"] if kill % 2 else [])]
        program = launcher.start(SAVE_LOOP, tmp_path, *options)
        assert program.wait_for(lambda program=program: "resumed" in program.output), program.errors
        time.sleep(chance.uniform(0, 0.2))
        program.kill_all()
        assert program.wait() == -9
        assert program.errors == ""
        assert f"resumed {newest}" in program.output
        newest = assert_all_sound(tmp_path, max(saved_steps(program.output), default=newest))
    assert newest > 0
    report("SIGKILL of a saving process, random instant", KILLS, kills, kills)


@pytest.mark.parametrize(
    "rounds", [1, pytest.param(8, marks=[pytest.mark.drill, pytest.mark.timeout(1800)])], ids=["once", "eight rounds"]
)
def test_saves_killed_at_each_crash_point(
    rounds: int, tmp_path: Path, launcher: Any, report: Callable[..., None]
) -> None:
    kills = 0
    for turn in range(rounds):
        for point in CRASH_POINTS:
            run_dir = tmp_path / f"{point}-{turn}"
            # Each step is saved twice: odd saves add a checkpoint (the fifth prunes first), even ones replace it.
            number = {"mid_replace": 6 + 2 * turn, "pruning": 5}.get(point, 5 + turn)
            crash = {"ACMIX_CRASH_AT": f"{point}:{number}"}
            options = ["--steps", 99, "--times", 2, *(["--background"] if turn % 2 else [])]
            program = launcher.start(SAVE_LOOP, run_dir, *options, env=crash)
            assert program.wait() == -9, program.output
            newest = assert_all_sound(run_dir, max(saved_steps(program.output), default=0))
            again = launcher.start(SAVE_LOOP, run_dir, "--steps", newest + 2)
            assert again.wait() == 0, again.errors
            assert f"resumed {newest}" in again.output
            assert not [name for name in os.listdir(run_dir / "checkpoints") if name.startswith(".")]
            kills += 1
    report("SIGKILL at each crash point of a save", KILLS, kills, kills)


@pytest.mark.parametrize("cycles", [30, pytest.param(1000, marks=[pytest.mark.drill, pytest.mark.timeout(1800)])])
def test_what_is_saved_is_what_is_loaded_again_and_again(
    cycles: int, tmp_path: Path, report: Callable[..., None]
) -> None:
    store = CheckpointStore(tmp_path, 2, background=True, on_error="stop")
    for step in range(1, cycles + 1):
        values = torch.full((500,), float(step))
        store.save(Snapshot({"w": values}, {"w": values}, {"momentum": values}, {"step": step}), best=step % 7 == 0)
        values.zero_()
        store.wait()
        assert assert_all_sound(tmp_path, at_least=step) == step
    report("Save and load", "What comes back is what was saved", cycles, cycles)


def test_a_program_that_ends_finishes_the_save_it_began(tmp_path: Path) -> None:
    """By an interpreter that ends as it does for everybody, not as the launcher's programs end."""
    options = ["--steps", "1", "--size", "500000", "--background", "--leave"]
    assert subprocess.run([sys.executable, SAVE_LOOP, tmp_path, *options], check=False).returncode == 0
    assert assert_all_sound(tmp_path, at_least=1) == 1


def assert_failed_save_left_things_whole(program: Any, run_dir: Path, last: int) -> None:
    assert program.wait() == 2
    message = program.errors
    assert message.startswith("error: could not save ")
    assert f"step_{last + 1:08d}" in message
    assert "bytes needed" in message
    assert f"step_{last:08d}, is intact" in message
    assert "Traceback" not in message
    assert assert_all_sound(run_dir, at_least=last) == last
    assert not [name for name in os.listdir(run_dir / "checkpoints") if name.startswith(".")]


@pytest.mark.parametrize("mode", [[], ["--background"]], ids=["foreground", "background"])
def test_a_file_size_limit_stops_the_run_with_the_last_checkpoint_intact(
    mode: list[str], tmp_path: Path, launcher: Any
) -> None:
    options = ["--steps", 5, "--big-step", 3, "--file-size-limit", 500_000, *mode]
    program = launcher.start(SAVE_LOOP, tmp_path, *options)
    assert_failed_save_left_things_whole(program, tmp_path, last=2)
    assert "File too large" in program.errors


def test_a_file_size_limit_leaves_the_next_save_its_chance(tmp_path: Path, launcher: Any) -> None:
    options = ["--steps", 5, "--big-step", 3, "--file-size-limit", 500_000, "--on-error", "continue"]
    program = launcher.start(SAVE_LOOP, tmp_path, *options)
    assert program.wait() == 0
    assert program.errors.count("warning: could not save") == 1
    assert saved_steps(program.output) == [1, 2, 4, 5]


@pytest.mark.skipif(os.getuid() != 0, reason="gives up root's rights to meet a folder it may not write")
def open_to_all(path: Path) -> bool:
    return all(folder.stat().st_mode & 0o001 for folder in (path, *path.parents))


def test_a_folder_that_became_read_only_stops_the_run(tmp_path: Path, launcher: Any) -> None:
    if not open_to_all(Path(torch.__file__).parent) or not open_to_all(Path(__file__).parent):
        pytest.skip("another user cannot read the installed packages or the tests, so cannot stand in for the owner")
    assert launcher.start(SAVE_LOOP, tmp_path, "--steps", 2).wait() == 0
    for folder in (tmp_path, *tmp_path.parents):
        if not folder.stat().st_mode & 0o001:  # pytest keeps its folders to their owner; how many there are varies
            folder.chmod(0o755)
    (tmp_path / ".lock").chmod(0o666)
    program = launcher.start(SAVE_LOOP, tmp_path, "--steps", 3, "--user", 65534)
    assert_failed_save_left_things_whole(program, tmp_path, last=2)
    assert "Permission denied" in program.errors


def can_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    attempt = ["unshare", "-Urm", "sh", "-c", "mount -t tmpfs tmpfs /mnt"]
    return subprocess.run(attempt, capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("on_error", [pytest.param("stop", marks=pytest.mark.drill), "continue"])
def test_a_full_disk_leaves_the_last_checkpoint_intact(on_error: str, tmp_path: Path) -> None:
    if not can_mount():
        pytest.skip("needs unshare with a mount namespace, to make a small disk")
    script = f"mount -t tmpfs -o size=4m tmpfs {tmp_path} && exec {sys.executable} {SAVE_LOOP} {tmp_path} {{}}"
    options = f"--steps 4 --big-step 3 --background --on-error {on_error}"
    ended = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", script.format(options)], capture_output=True, text=True, check=False
    )
    assert "could not save" in ended.stderr
    assert "No space left on device: 12,000,000 bytes needed" in ended.stderr
    assert "step_00000002, is intact" in ended.stderr
    assert "Traceback" not in ended.stderr
    if on_error == "stop":
        assert (ended.returncode, saved_steps(ended.stdout)) == (2, [1, 2])
    else:
        assert (ended.returncode, saved_steps(ended.stdout)) == (0, [1, 2, 4])
        assert "holds best last step" not in ended.stdout
        assert "holds last step_00000002 step_00000004 newest 4" in ended.stdout
