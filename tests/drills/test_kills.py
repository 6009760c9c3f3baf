"""A live trainer, killed with SIGKILL at random instants and at each crash point of a save, resumed, ends the same."""

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from acmix.checkpoint.atomic import CRASH_POINTS
from acmix.data.prepare import Options, prepare
from scripts.prepare_data import open_splits

PROMISE = "Resumed with --resume auto, the run ends bit-identical to one that was never killed, every step logged once"
EVERYTHING = [
    "precision.amp=bf16", "optimizer.accumulate=2", "ema.decay=0.9", "ema.warmup=true", "augment.mixup=0.4",
    "augment.auto_augment=rand-m5-n1", "model.kwargs.drop_path_rate=0.3", "run.checkpoint_every=2", "run.keep=1",
    "schedule.steps=8", "data.train_split=train",
]  # fmt: skip

_LONG = [pytest.mark.drill, pytest.mark.timeout(3000)]


@pytest.mark.parametrize(
    ("kills", "ranks", "workers", "loader"),
    [
        pytest.param(3, 1, 0, "resident", id="one process"),
        *(
            pytest.param(kills, ranks, workers, loader, id=f"{name}, {loader}", marks=_LONG)
            for loader in ("workers", "resident", "workers, from shards")
            for kills, ranks, workers, name in ((35, 1, 0, "one process, often"), (20, 2, 2, "two processes"))
        ),
    ],
)
def test_trainers_killed_at_random_instants(
    kills: int, ranks: int, workers: int, loader: str, tmp_path: Path, start_training: Any, run_training: Any,
    assert_same_run: Callable[[Path, Path], None], report: Callable[..., None],
) -> None:  # fmt: skip
    options = [*EVERYTHING, f"data.num_workers={workers}", f"data.loader={loader.partition(',')[0]}"]
    if "shards" in loader:
        prepare(open_splits(Path("digits"), ["data.dataset=digits"]), tmp_path / "shards", Options(shards=3))
        options += ["data.dataset=wds/digits", f"data.root={tmp_path / 'shards'}"]
    began = time.monotonic()
    run_training(tmp_path / "whole", *options, ranks=ranks)
    whole_run = time.monotonic() - began
    chance = random.Random(kills)
    done, course = 0, 0
    while done < kills:
        folder = tmp_path / f"killed-{course}"
        course += 1
        finished = False
        while not finished and done < kills:
            programs = start_training(folder, *options, "--resume", "auto", ranks=ranks)
            time.sleep(chance.uniform(0.05, 0.9) * whole_run)
            finished = all(program.is_over() for program in programs)
            for program in programs:
                program.kill_all()
            statuses = [program.wait() for program in programs]
            assert set(statuses) <= {0, -9}, [program.errors for program in programs]
            done += not finished
        run_training(folder, *options, "--resume", "auto", ranks=ranks)
        assert_same_run(tmp_path / "whole", folder)
    report(
        f"SIGKILL of a training run at a random instant ({ranks} process(es), loader {loader})", PROMISE, done, kills
    )


@pytest.mark.parametrize(
    ("rounds", "background"),
    [
        pytest.param(1, True, id="once"),
        pytest.param(4, True, id="in the background", marks=[pytest.mark.drill, pytest.mark.timeout(3000)]),
        pytest.param(5, False, id="in the foreground", marks=[pytest.mark.drill, pytest.mark.timeout(3000)]),
    ],
)
def test_trainers_killed_at_each_crash_point_of_a_save(
    rounds: int, background: bool, tmp_path: Path, run_training: Any, assert_same_run: Callable[[Path, Path], None],
    report: Callable[..., None],
) -> None:  # fmt: skip
    """`before_write` is the kill between log and save: the step's rows are on disk, its checkpoint is not."""
    options = [*EVERYTHING, f"run.background_save={str(background).lower()}"]
    if rounds > 1:  # each kill at a second save leaves the run one save further
        options[options.index("schedule.steps=8")] = "schedule.steps=16"
    run_training(tmp_path / "whole", *options)
    points = [point for point in CRASH_POINTS if point != "mid_replace"]  # needs a step that is saved twice, see below
    for turn in range(rounds):
        folder = tmp_path / f"killed-{turn}"
        for point in points:
            # One run is killed at every point in turn; for `pruning` at its second save, as the first prunes nothing.
            crash = {"ACMIX_CRASH_AT": f"{point}:{2 if point == 'pruning' else 1 + turn % 2}"}
            run_training(folder, *options, "--resume", "auto", env=crash, status=-9)
            if point in ("after_rename", "pruning"):
                run_training(folder, *options, "--resume", "auto")
                assert_same_run(tmp_path / "whole", folder)
                folder = tmp_path / f"killed-{turn}-{point}"
    report(
        "SIGKILL of a training run at each crash point of a save", PROMISE, rounds * len(points), rounds * len(points)
    )


def test_a_trainer_killed_while_it_replaces_a_checkpoint(
    tmp_path: Path, run_training: Any, assert_same_run: Callable[[Path, Path], None], report: Callable[..., None]
) -> None:
    """A run stopped during its evaluation saves that step; resumed, it evaluates and saves the step again."""
    run_training(tmp_path / "whole", *EVERYTHING)
    folder = tmp_path / "killed"
    stop = ["model.kwargs.fault=SIGTERM", "model.kwargs.at=2", "model.kwargs.during=eval"]
    run_training(folder, *EVERYTHING, *stop, status=75)
    run_training(folder, *EVERYTHING, "--resume", "auto", env={"ACMIX_CRASH_AT": "mid_replace"}, status=-9)
    assert not (folder / "checkpoints" / "last").exists()
    run_training(folder, *EVERYTHING, "--resume", "auto")
    assert_same_run(tmp_path / "whole", folder)
    report("SIGKILL of a training run at each crash point of a save", PROMISE, 1, 1)
