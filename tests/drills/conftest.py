"""Drills start real programs, hurt them with real signals and faults, and count what survived."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from acmix.checkpoint.read import load_checkpoint

HERE = Path(__file__).parent


@pytest.fixture
def start_training(launcher: Any) -> Callable[..., list[Any]]:
    """Start the smallest run (faulty_train.py on digits.yaml) in `folder`: alone, or as the `ranks` of one group."""

    def start(folder: Path, *arguments: object, ranks: int = 1, env: dict[str, str] | None = None) -> list[Any]:
        command = [HERE / "faulty_train.py", "--config", HERE / "digits.yaml", f"run.dir={folder}", *arguments]
        return launcher.start_ranks(ranks, *command, env=env) if ranks > 1 else [launcher.start(*command, env=env)]

    return start


@pytest.fixture
def run_training(start_training: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """As start_training, to the end: every process must end with `status`."""

    def run(folder: Path, *arguments: object, status: int = 0, **options: Any) -> list[Any]:
        programs = start_training(folder, *arguments, **options)
        ended = [program.wait() for program in programs]
        assert ended == [status] * len(programs), [program.errors for program in programs]
        return programs

    return run


MEASURED = {"time", "images_per_second", "data_wait", "memory_gib", "eta_seconds"}


def logged_rows(folder: Path) -> list[dict[str, Any]]:
    """What a run logged, without the values that differ from run to run."""
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [row for row in read if row["event"] in ("train", "eval", "paths", "skip")]
    return [{key: value for key, value in row.items() if key not in MEASURED} for row in kept]


def logged_curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """TensorBoard's scalars: tag → (step, value) in the order of the event files."""
    board = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    tags = [tag for tag in board.Tags()["scalars"] if tag.rpartition("/")[2] not in MEASURED]
    return {tag: [(point.step, point.value) for point in board.Scalars(tag)] for tag in tags}


def assert_identical(first: Any, second: Any, place: str = "") -> None:
    """Bit for bit: tensors, numbers and containers of them."""
    assert type(first) is type(second), place
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), place
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), place
        for key in first:
            assert_identical(first[key], second[key], f"{place}.{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), place
        for index, (one, other) in enumerate(zip(first, second, strict=True)):
            assert_identical(one, other, f"{place}[{index}]")
    else:
        assert first == second, place


@pytest.fixture(scope="session")
def assert_same_end() -> Callable[[Path, Path], None]:
    """Check that two runs ended alike, bit for bit: weights, EMA and counter, optimizer, scaler, best."""

    def check(whole: Path, resumed: Path) -> None:
        first, second = load_checkpoint(whole), load_checkpoint(resumed)
        assert_identical(first.model, second.model)
        assert_identical(first.ema, second.ema)
        assert_identical(first.training, second.training)
        for progress in (first.progress, second.progress):
            del progress["config"]
        assert first.progress == second.progress

    return check


@pytest.fixture(scope="session")
def assert_same_run(assert_same_end: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
    """Check that two runs ended alike, bit for bit, and logged alike: their last checkpoints, rows and curves."""

    def check(whole: Path, resumed: Path) -> None:
        assert_same_end(whole, resumed)
        assert logged_rows(whole) == logged_rows(resumed)
        steps = [row["step"] for row in logged_rows(resumed) if row["event"] == "train"]
        assert steps == list(range(1, len(steps) + 1))
        assert logged_curves(whole) == logged_curves(resumed)

    return check
