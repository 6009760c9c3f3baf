"""Processes that raise, hang, die or lose their launcher: one message, no orphans, resumable."""

import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.run
from PIL import Image

from acmix.models import create_model
from acmix.telemetry.record import read_rows

HERE = Path(__file__).parent
TORCHRUN = Path(torch.distributed.run.__file__)
LAUNCH = HERE.parents[1] / "acmix" / "launch.py"
SMALL = ["data.batch_size=16", "run.log_every=1"]
Training = Callable[..., Any]
Report = Callable[..., None]
Compare = Callable[[Path, Path], None]


def plant(fault: str, at: int, **more: object) -> list[str]:
    return [f"model.kwargs.{key}={value}" for key, value in {"fault": fault, "at": at, **more}.items()]


def logged_steps(folder: Path) -> list[int]:
    """The steps of a run that may be writing its record at this moment."""
    return [row["step"] for row in read_rows(folder / "metrics.jsonl") if row["event"] == "train"]


def processes_of(run: Path) -> list[int]:
    """Live processes that have the run's folder in their command line: launcher, ranks and loader workers."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if str(run).encode() in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def assert_nobody_is_left(run: Path, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while processes_of(run):
        assert time.monotonic() < deadline, processes_of(run)
        time.sleep(0.05)


@pytest.fixture
def start_launcher(launcher: Any) -> Callable[..., Any]:
    """Start faulty_train.py as two processes under torchrun (or acmix.launch)."""

    def start(folder: Path, *arguments: object, options: tuple[object, ...] = (), program: Path = TORCHRUN) -> Any:
        command = ["--nproc-per-node", 2, *options, HERE / "faulty_train.py", "--config", HERE / "digits.yaml"]
        return launcher.start(program, *command, f"run.dir={folder}", *SMALL, *arguments)

    return start


def test_rank_that_raises_shows_its_traceback_once_and_ends_all(
    tmp_path: Path, start_training: Training, report: Report
) -> None:
    began = time.time()
    programs = start_training(tmp_path, *SMALL, *plant("raise", 3, rank=1), ranks=2)
    statuses = [program.wait(30) for program in programs]
    assert statuses == [1, 1]
    assert time.time() - began < 30
    errors = "".join(program.errors for program in programs)
    assert errors.count("Traceback") == 1
    assert errors.count("ArithmeticError: planted fault") == 1
    report("A rank raises", "Its traceback once, all ranks end with an error within 30 s, no orphans", 1, 1)


def test_all_ranks_end_with_the_status_of_the_one_whose_data_is_bad(tmp_path: Path, start_training: Training) -> None:
    for number in range(16):
        for split in ("train", "val"):
            folder = tmp_path / "data" / split / f"class{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (24, 24), (number, 0, 0)).save(folder / f"{number:02}.png")
    bad = tmp_path / "data" / "val" / "class1" / "03.png"
    bad.write_bytes(bad.read_bytes()[:40])  # the tenth image, of rank 1
    options = ["data.dataset=folder", f"data.root={tmp_path / 'data'}", "data.batch_size=4", "run.probes=[]"]
    programs = start_training(tmp_path / "run", *options, ranks=2)
    assert [program.wait(60) for program in programs] == [2, 2], [program.errors for program in programs]
    [error] = [line for program in programs for line in program.errors.splitlines() if line.startswith("error")]
    assert f"unreadable image: {bad}" in error
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "failed"
    assert str(bad) in summary["error"]


@pytest.mark.parametrize("fault", ["SIGSTOP", pytest.param("sleep", marks=pytest.mark.drill)])
def test_rank_that_hangs_is_named_with_its_step(
    fault: str, tmp_path: Path, start_training: Training, report: Report
) -> None:
    programs = start_training(tmp_path, *SMALL, "run.timeout=6", *plant(fault, 3, rank=1), ranks=2)
    assert programs[0].wait(60) == 1
    if fault == "SIGSTOP":
        programs[1].kill_all()
    programs[1].wait(30)
    [line] = [line for program in programs for line in program.errors.splitlines() if line.startswith("error")]
    assert "run.timeout" in line
    assert re.search(r"at step 3, waiting for rank 1 \(", line)
    assert "rank 0" not in line
    report("A rank hangs", "After run.timeout an error names rank and step", 1, 1)


def test_loss_that_is_not_finite_on_one_rank_stops_all_before_the_update(
    tmp_path: Path, start_training: Training, report: Report
) -> None:
    faults = [*plant("nan", 3, rank=1), "run.checkpoint_every=1"]
    programs = start_training(tmp_path, *SMALL, *faults, ranks=2)
    assert [program.wait() for program in programs] == [1, 1]
    [line] = [line for program in programs for line in program.errors.splitlines()]
    assert re.match(r"error: the loss is not finite at step 3 on rank 1, samples \[\d+, .*16 in all\]", line)
    assert str(tmp_path / "checkpoints" / "step_00000002") in line
    assert logged_steps(tmp_path) == [1, 2]
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "failed"
    report("A loss that is not finite on one rank", "No rank updates; rank, step, samples, last checkpoint named", 1, 1)


def test_updates_that_are_not_finite_are_skipped_on_all_ranks_alike(tmp_path: Path, run_training: Training) -> None:
    faults = [*plant("nan", 3, rank=1), "run.skip_nonfinite=1", "schedule.steps=5"]
    run_training(tmp_path, *SMALL, *faults, ranks=2)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    [skip] = [row for row in rows if row["event"] == "skip"]
    assert (skip["step"], skip["skipped"], [rank["rank"] for rank in skip["ranks"]]) == (3, 1, [1])
    assert logged_steps(tmp_path) == [1, 2, 4, 5]
    [evaluation] = [row for row in rows if row["event"] == "eval"]
    assert evaluation["loss"] < 100, "batch norm's statistics were spoilt"


@pytest.mark.parametrize(
    ("launch", "status"),
    [
        pytest.param(LAUNCH, 75, id="acmix.launch"),
        pytest.param(TORCHRUN, 1, id="torchrun", marks=pytest.mark.drill),
    ],
)
def test_killed_worker_restarts_by_itself_and_ends_bit_identical(
    launch: Path, status: int, tmp_path: Path, start_launcher: Training, run_training: Training,
    assert_same_run: Compare, report: Report,
) -> None:  # fmt: skip
    """Ends by SIGTERM to the launcher; compared with a run that was stopped at that step and never killed."""
    common = ["schedule.epochs=99", "run.checkpoint_every=3"]
    faults = plant("SIGKILL", 5, rank=1, once=tmp_path / "killed")
    folder = tmp_path / "restarted"
    program = start_launcher(folder, *common, *faults, options=("--max-restarts", 2), program=launch)
    assert program.wait_for(lambda: max(logged_steps(folder), default=0) > 5, 120), program.errors
    assert (tmp_path / "killed").exists()
    stopped_at = stop_the_launcher(program, signal.SIGTERM, folder, status)
    run_training(tmp_path / "whole", *SMALL, *common, *plant("SIGTERM", stopped_at), ranks=2, status=75)
    assert_same_run(tmp_path / "whole", folder)
    report("A worker killed under torchrun --max-restarts", "Restarts, resumes by itself, ends bit-identical", 1, 1)


def stop_the_launcher(program: Any, number: signal.Signals, folder: Path, status: int) -> int:
    """Send the signal to a launcher, which must end well and leave nobody; returns the step saved."""
    sent = time.time()
    os.kill(program.pid, number)
    assert program.wait(30) == status, program.errors
    assert_nobody_is_left(folder)
    assert time.time() - sent < 10
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "requeue"
    assert (folder / "checkpoints" / f"step_{summary['step']:08d}").is_dir()
    return int(summary["step"])


@pytest.mark.drill
@pytest.mark.parametrize(
    ("name", "launch", "status"),
    [
        pytest.param("SIGTERM", LAUNCH, 75, id="SIGTERM to acmix.launch"),
        pytest.param("SIGUSR1", LAUNCH, 75, id="SIGUSR1 to acmix.launch"),
        pytest.param("SIGHUP", LAUNCH, 75, id="SIGHUP to acmix.launch"),
        pytest.param("SIGTERM", TORCHRUN, 1, id="SIGTERM to torchrun"),
        pytest.param("SIGUSR1", TORCHRUN, -signal.SIGUSR1, id="SIGUSR1 to torchrun"),
        pytest.param("SIGKILL", TORCHRUN, -signal.SIGKILL, id="SIGKILL to torchrun"),
    ],
)
def test_signal_to_the_launcher_stops_and_saves(
    name: str, launch: Path, status: int, tmp_path: Path, start_launcher: Training, report: Report
) -> None:
    folder = tmp_path / "run"
    program = start_launcher(folder, "schedule.epochs=99", options=("--max-restarts", 1), program=launch)
    assert program.wait_for(lambda: len(logged_steps(folder)) > 1), program.errors
    stop_the_launcher(program, getattr(signal, name), folder, status)
    report(f"{name} to the launcher", "All ranks stop within 10 s after one checkpoint; nobody is left", 1, 1)


@pytest.mark.drill
@pytest.mark.parametrize("program", ["train.py", "eval.py"])
def test_processes_whose_launcher_is_killed_before_they_meet_end(
    program: str, tmp_path: Path, launcher: Any, report: Report
) -> None:
    checkpoint = tmp_path / "weights.pth"
    checkpoint.touch()
    more = ["--checkpoint", checkpoint] if program == "eval.py" else []
    root = HERE.parents[1]
    command = [root / program, "--config", root / "configs" / "quickstart.yaml", *more, f"run.dir={tmp_path / 'run'}"]
    torchrun = launcher.start(TORCHRUN, "--nproc-per-node", 2, *command)
    assert torchrun.wait_for(lambda: len(processes_of(tmp_path / "run")) == 2), torchrun.errors
    os.kill(torchrun.pid, signal.SIGKILL)
    torchrun.wait()
    assert_nobody_is_left(tmp_path / "run", 60)
    report("SIGKILL to the launcher before its processes have met", "They end by themselves; nobody is left", 1, 1)


@pytest.mark.drill
def test_an_evaluation_whose_launcher_is_killed_ends_without_a_result(
    tmp_path: Path, launcher: Any, report: Report
) -> None:
    weights = tmp_path / "weights.pth"
    torch.save(create_model("acmix_resnet26", 10, image_size=(96, 96), stem="cifar").state_dict(), weights)
    options = ["data.image_size=96", "data.val_batch_size=1", "data.num_workers=1", "model.kwargs={stem: cifar}"]
    config = HERE.parents[1] / "configs" / "quickstart.yaml"
    command = [HERE.parents[1] / "eval.py", "--config", config, "--checkpoint", weights, *options]
    torchrun = launcher.start(TORCHRUN, "--nproc-per-node", 2, *command)
    readers = 2  # one for each of the two ranks, started when these have met and evaluate
    assert torchrun.wait_for(lambda: len(processes_of(weights)) == 2 + readers), torchrun.errors
    os.kill(torchrun.pid, signal.SIGKILL)
    torchrun.wait()
    assert_nobody_is_left(weights)
    assert "top1" not in torchrun.output
    report("SIGKILL to the launcher of an evaluation", "Its processes end by themselves; nobody is left", 1, 1)


@pytest.mark.drill
def test_stopped_run_is_not_trained_on_by_the_launcher_that_restarts_it(
    tmp_path: Path, start_launcher: Training
) -> None:
    folder = tmp_path / "run"
    faults = plant("SIGTERM", 3, rank=1)
    program = start_launcher(folder, "schedule.epochs=99", *faults, options=("--max-restarts", 2), program=LAUNCH)
    assert program.wait(120) == 75, program.errors
    assert logged_steps(folder) == [1, 2, 3]
    assert_nobody_is_left(folder)


@pytest.mark.drill
def test_bad_config_under_torchrun_is_reported_once(tmp_path: Path, start_launcher: Training) -> None:
    program = start_launcher(tmp_path / "run", "optimizer.name=sdg", program=LAUNCH)
    assert program.wait(60) == 2
    assert len([line for line in program.errors.splitlines() if line.startswith("error:")]) == 1
    assert not (tmp_path / "run").exists()
