"""Drills start real programs, hurt them with real signals and faults, and count what survived."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from acmix.checkpoint.read import load_checkpoint

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


class Program:
    """A program started by the launcher, in its own process group."""

    def __init__(self, ask: Callable[[dict[str, Any]], dict[str, Any]], pid: int, output: Path, errors: Path) -> None:
        self._ask = ask
        self.pid = pid
        self.output_file = output
        self.errors_file = errors
        self.status: int | None = None

    @property
    def output(self) -> str:
        return self.output_file.read_text() if self.output_file.exists() else ""

    @property
    def errors(self) -> str:
        return self.errors_file.read_text() if self.errors_file.exists() else ""

    def is_over(self) -> bool:
        if self.status is None:
            self.status = self._ask({"wait": self.pid})["status"]
        return self.status is not None

    def wait(self, seconds: float = 120.0) -> int:
        """Exit status (negative: ended by that signal); fails the test when the program takes longer."""
        deadline = time.monotonic() + seconds
        while not self.is_over():
            if time.monotonic() > deadline:
                self.kill_all()
                pytest.fail(f"still running after {seconds} s\n{self.output}\n{self.errors}")
            time.sleep(0.005)
        assert self.status is not None
        return self.status

    def wait_for(self, done: Callable[[], bool], seconds: float = 60.0) -> bool:
        """Wait until `done()`; False when the program ended before."""
        deadline = time.monotonic() + seconds
        while not done():
            if self.is_over():
                return done()
            if time.monotonic() > deadline:
                self.kill_all()
                pytest.fail(f"nothing happened for {seconds} s\n{self.output}\n{self.errors}")
            time.sleep(0.002)
        return True

    def kill_all(self) -> None:
        """SIGKILL the program and everything it started (its process group)."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            return


class Launcher:
    """Client of launcher.py: starts programs in milliseconds."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        self._programs: list[Program] = []
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "launcher.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment,
        )  # fmt: skip
        assert self._process.stdout is not None
        assert json.loads(self._process.stdout.readline()) == {"ready": True}

    def start(self, program: Path, *arguments: object, env: dict[str, str] | None = None) -> Program:
        self._count += 1
        output, errors = self._folder / f"{self._count}.out", self._folder / f"{self._count}.err"
        request = {
            "start": str(program), "arguments": [str(argument) for argument in arguments], "env": env or {},
            "folder": str(ROOT), "output": str(output), "errors": str(errors),
        }  # fmt: skip
        started = Program(self._ask, self._ask(request)["pid"], output, errors)
        self._programs.append(started)
        return started

    def close(self) -> None:
        for program in self._programs:
            if not program.is_over():
                program.kill_all()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        reply: dict[str, Any] = json.loads(self._process.stdout.readline())
        return reply


@pytest.fixture(scope="session")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    client = Launcher(tmp_path_factory.mktemp("programs"))
    yield client
    client.close()


@pytest.fixture
def start_training(launcher: Launcher) -> Callable[..., list[Program]]:
    """Start the smallest run (faulty_train.py on digits.yaml) in `folder`, as the `ranks` processes of one group."""

    def start(folder: Path, *arguments: object, ranks: int = 1, env: dict[str, str] | None = None) -> list[Program]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            group = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        command = ["--config", HERE / "digits.yaml", f"run.dir={folder}", *arguments]
        members = (
            [{**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)] if ranks > 1 else [{}]
        )
        return [launcher.start(HERE / "faulty_train.py", *command, env={**member, **(env or {})}) for member in members]

    return start


@pytest.fixture
def run_training(start_training: Callable[..., list[Program]]) -> Callable[..., list[Program]]:
    """As start_training, to the end: every process must end with `status`."""

    def run(folder: Path, *arguments: object, status: int = 0, **options: Any) -> list[Program]:
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
def assert_same_run() -> Callable[[Path, Path], None]:
    """Check that two runs ended alike, bit for bit: weights, EMA and counter, optimizer, scaler, best, rows, curves."""

    def check(whole: Path, resumed: Path) -> None:
        first, second = load_checkpoint(whole), load_checkpoint(resumed)
        assert_identical(first.model, second.model)
        assert_identical(first.ema, second.ema)
        assert_identical(first.training, second.training)
        for progress in (first.progress, second.progress):
            del progress["config"]
        assert first.progress == second.progress
        assert logged_rows(whole) == logged_rows(resumed)
        steps = [row["step"] for row in logged_rows(resumed) if row["event"] == "train"]
        assert steps == list(range(1, len(steps) + 1))
        assert logged_curves(whole) == logged_curves(resumed)

    return check
