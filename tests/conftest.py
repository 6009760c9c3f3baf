"""Fixtures for every test: a launcher of real programs; where a drill writes down what it tried and what survived."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from acmix.process.compiled import keep_compiled

HERE = Path(__file__).parent
ROOT = HERE.parent


keep_compiled(Path(tempfile.gettempdir()) / "acmix-tests-compiled")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Write down a drill's count: `report(drill, promise, survived, tried)`.

    Appended as a JSON line to the file in ACMIX_DRILL_REPORT, if set; scripts/run_drills.py makes a table of it.
    """
    test = request.node.nodeid.partition("[")[0]

    def write(drill: str, promise: str, survived: int, tried: int) -> None:
        file = os.environ.get("ACMIX_DRILL_REPORT")
        if file:
            row = {"drill": drill, "promise": promise, "test": test, "survived": survived, "tried": tried}
            with open(file, "a") as report_file:
                report_file.write(json.dumps(row) + "\n")

    return write


class Program:
    """A program started by the launcher, in its own process group."""

    def __init__(self, ask: Callable[[dict[str, Any]], dict[str, Any]], request: dict[str, Any]) -> None:
        self._ask = ask
        self._fresh = request["fresh"]
        self.pid = ask(request)["pid"]
        self.output_file = Path(request["output"])
        self.errors_file = Path(request["errors"])
        self.status: int | None = None

    @property
    def output(self) -> str:
        return self.output_file.read_text() if self.output_file.exists() else ""

    @property
    def errors(self) -> str:
        return self.errors_file.read_text() if self.errors_file.exists() else ""

    def is_over(self) -> bool:
        if self.status is None:
            self.status = self._ask({"wait": self.pid, "fresh": self._fresh})["status"]
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
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "launcher.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment,
        )  # fmt: skip
        assert self._process.stdout is not None
        assert json.loads(self._process.stdout.readline()) == {"ready": True}

    def start(
        self,
        program: Path,
        *arguments: object,
        env: dict[str, str] | None = None,
        folder: Path = ROOT,
        fresh: bool = False,
        output: Path | None = None,
    ) -> Program:
        """Start a Python file in `folder`; `fresh` without any module of acmix loaded; its stdout goes to `output`."""
        self._count += 1
        stem = self._folder / str(self._count)
        request = {
            "start": str(program), "arguments": [str(argument) for argument in arguments], "env": env or {},
            "folder": str(folder), "output": str(output or f"{stem}.out"), "errors": f"{stem}.err", "fresh": fresh,
        }  # fmt: skip
        started = Program(self._ask, request)
        self._programs.append(started)
        return started

    def start_ranks(
        self, count: int, *command: Any, env: dict[str, str] | None = None, folder: Path = ROOT
    ) -> list[Program]:
        """Start a program `count` times, as torchrun starts the processes of one group."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            group = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        members = [{**group, "RANK": str(rank), "LOCAL_RANK": str(rank), **(env or {})} for rank in range(count)]
        return [self.start(*command, env=member, folder=folder) for member in members]

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
