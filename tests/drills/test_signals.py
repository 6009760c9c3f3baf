"""Signals to a rank or to the launcher: one checkpoint, all ranks at the same step, status 75, resumable."""

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
REQUEUE = 75
SECONDS = 10.0
PROMISE = "Every rank stops at the same step within 10 s, one checkpoint, exit status 75, resumable"
SMALL = ["data.batch_size=16", "run.log_every=1", "ema.decay=0.9"]
Training = Callable[..., Any]
Report = Callable[..., None]
Compare = Callable[[Path, Path], None]


def summary(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return read


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("step_*"))


def logged_steps(folder: Path) -> list[int]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if row["event"] == "train"]


def assert_stopped_well(folder: Path, programs: list[Any], sent: float) -> None:
    """All ranks ended alike and in time, and the one checkpoint is that of the last logged step."""
    assert [program.wait() for program in programs] == [REQUEUE] * len(programs), [each.errors for each in programs]
    assert time.time() - sent < SECONDS
    assert all(program.errors == "" for program in programs)
    step = summary(folder)["step"]
    assert summary(folder)["status"] == "requeue"
    assert checkpoints(folder) == [f"step_{step:08d}"]
    assert logged_steps(folder) == list(range(1, step + 1))


MOMENTS = [
    ("SIGTERM", "train", 1),
    ("SIGUSR1", "train", 3),
    ("SIGINT", "train", 3),
    ("SIGHUP", "train", 2),
    ("SIGTERM", "eval", 2),
]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("name", "during", "at"), MOMENTS)
def test_signal_to_one_rank_stops_all_at_the_same_step(
    name: str, during: str, at: int, ranks: int, tmp_path: Path, start_training: Training, report: Report
) -> None:
    steps = 40 if during == "train" else 2
    plant = {"fault": name, "at": at, "during": during, "rank": ranks - 1}
    faults = [f"model.kwargs.{key}={value}" for key, value in plant.items()]
    programs = start_training(tmp_path, *SMALL, f"schedule.steps={steps}", *faults, ranks=ranks)
    assert programs[0].wait_for((tmp_path / "metrics.jsonl").exists), programs[0].errors
    assert_stopped_well(tmp_path, programs, time.time())
    report(f"{name} to a rank in {'evaluation' if during == 'eval' else 'training'}", PROMISE, 1, 1)


@pytest.mark.parametrize("drills", [4, pytest.param(60, marks=[pytest.mark.drill, pytest.mark.timeout(3600)])])
def test_signals_at_random_instants(
    drills: int,
    tmp_path: Path,
    start_training: Training,
    run_training: Training,
    assert_same_run: Compare,
    report: Report,
) -> None:
    """Any instant of a run: its start, its steps, a save under way, its evaluation, its end."""
    chance = random.Random(drills)
    common = [*SMALL, "schedule.steps=12", "run.checkpoint_every=3", "run.keep=9"]
    stopped = 0
    for ranks in (1, 2):
        began = time.time()
        run_training(tmp_path / f"whole-{ranks}", *common, ranks=ranks)
        duration = time.time() - began
        for drill in range(drills // 2):
            folder = tmp_path / f"stopped-{ranks}-{drill}"
            programs = start_training(folder, *common, ranks=ranks)
            time.sleep(chance.uniform(0.0, duration))
            # A launcher signals all ranks; a single rank can be signalled only once all have met.
            told = (
                chance.sample(programs, chance.randint(1, ranks)) if (folder / "metrics.jsonl").exists() else programs
            )
            name, sent = chance.choice([signal.SIGTERM, signal.SIGUSR1]), time.time()
            for program in told:
                if not program.is_over():
                    os.kill(program.pid, name)
            ended = {program.wait() for program in programs}
            assert time.time() - sent < SECONDS
            # Before the program's first lines have run, the signal does what it does to any process.
            unborn = ended == {-name} and not folder.exists()
            assert unborn or ended in ({REQUEUE}, {0}), [program.errors for program in programs]
            stopped += ended == {REQUEUE}
            run_training(folder, *common, "--resume", "auto", ranks=ranks)
            assert_same_run(tmp_path / f"whole-{ranks}", folder)
    assert stopped > 0
    report("SIGTERM or SIGUSR1 at a random instant", PROMISE, drills, drills)


def test_second_signal_ends_the_run_at_once(tmp_path: Path, start_training: Training) -> None:
    [program] = start_training(tmp_path, *SMALL, "schedule.steps=9", "model.kwargs.fault=sleep", "model.kwargs.at=2")
    assert program.wait_for(lambda: (tmp_path / "metrics.jsonl").exists() and logged_steps(tmp_path) == [1])
    os.kill(program.pid, signal.SIGTERM)
    time.sleep(1.0)
    assert not program.is_over()
    os.kill(program.pid, signal.SIGTERM)
    assert program.wait(5) == -signal.SIGTERM
