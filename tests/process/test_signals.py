"""Stop requests inside one process; the drills send them to real runs."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from acmix.process import launcher as launcher_module
from acmix.process.signals import ECHO_SECONDS, HANDLED, StopSignals

ROOT = Path(__file__).resolve().parents[2]
LEFT_BEHIND = """
import os, signal
reader, writer = os.pipe()
if os.fork():
    os.read(reader, 1)
    os.kill(os.getpid(), signal.SIGKILL)
from acmix.process import program
from acmix.config import RunConfig
from acmix.process.distributed import Distributed
os.write(writer, b".")
Distributed.start(RunConfig(device="cpu", timeout=60))
"""


@pytest.fixture
def signals(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    before = {number: signal.signal(number, signal.SIG_DFL) for number in HANDLED}  # nohup or & may ignore some
    with StopSignals() as watching:
        watching.begin()
        yield watching
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", HANDLED)
def test_signal_only_sets_a_flag(signals: StopSignals, number: signal.Signals) -> None:
    assert not signals.requested
    os.kill(os.getpid(), number)
    assert signals.requested
    assert signals.reason == number.name


def test_echo_of_the_launcher_is_no_second_request(signals: StopSignals) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    assert signals.requested


def test_signals_after_the_work_is_saved_are_ignored(signals: StopSignals) -> None:
    signals.seal()
    os.kill(os.getpid(), signal.SIGTERM)
    assert not signals.requested


@pytest.mark.parametrize(
    ("begin", "wait", "status"), [("", 0, 75), ("signals.begin();", 0.7, -15)], ids=["before the start", "second"]
)
@pytest.mark.parametrize(
    "busy",
    ["time.sleep(60)", "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"],
    ids=["in Python", "inside a library"],
)
def test_signal_that_ends_the_process(begin: str, wait: float, status: int, busy: str) -> None:
    program = (
        "import time; from acmix.process.signals import StopSignals;"
        f"signals = StopSignals().__enter__(); {begin} print('ready', flush=True); {busy}"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        if wait:
            time.sleep(wait)
            assert process.poll() is None
            process.send_signal(signal.SIGTERM)
        assert process.wait(10) == status


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_signal_ignored_at_the_start_stays_ignored(number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with StopSignals() as watching:
            watching.begin()
            os.kill(os.getpid(), number)
            assert not watching.requested
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_a_terminal_that_closes_is_no_second_request(signals: StopSignals) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(ECHO_SECONDS + 0.2)
    os.kill(os.getpid(), signal.SIGHUP)
    time.sleep(0.2)  # time for the thread that would end this process
    assert signals.reason == "SIGINT"


def test_loss_of_the_launcher_asks_for_a_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    watching = StopSignals()
    assert not watching.requested
    monkeypatch.setattr(launcher_module, "_parent", os.getppid() + 1)
    assert watching.requested
    assert watching.reason == "the end of the launcher"


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_process_that_waits_for_the_others_ends_with_its_launcher(rank: str, tmp_path: Path, launcher: Any) -> None:
    """Nobody else is in the group: rank 0 waits for a rank to arrive, rank 1 for an answer of rank 0's port."""
    (tmp_path / "left_behind.py").write_text(LEFT_BEHIND)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    group |= {"TORCHELASTIC_RUN_ID": "none", "ACMIX_STATUS_FOLDER": str(tmp_path)}
    parent = launcher.start(tmp_path / "left_behind.py", env=group, fresh=True)
    assert parent.wait(30) == -signal.SIGKILL, parent.errors
    left = tmp_path / "0-0-75"
    deadline = time.monotonic() + 10
    while not left.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left.exists(), parent.errors


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM"])
def test_a_launcher_that_waits_for_other_machines_asks_for_a_requeue(name: str, tmp_path: Path, launcher: Any) -> None:
    """Also where it was started with these signals ignored, as a program leaves them that has trained itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    master = ["--nnodes", 2, "--node-rank", 1, "--master-addr", "127.0.0.1", "--master-port", port]
    number = getattr(signal, name)
    start = tmp_path / "start.py"
    ignoring = f"signal.signal({number:d}, signal.SIG_IGN); runpy.run_module('acmix.launch', run_name='__main__')"
    start.write_text(f"import runpy, signal; {ignoring}")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    program = launcher.start(start, *master, ROOT / "train.py", env={"TMPDIR": str(temporary)})
    caught = re.compile(r"SigCgt:\t(\w+)")

    def listens() -> bool:
        [mask] = caught.findall(Path(f"/proc/{program.pid}/status").read_text())
        return bool(int(mask, 16) >> (number - 1) & 1)

    assert program.wait_for(listens), program.errors
    os.kill(program.pid, number)
    assert program.wait(20) == 75, program.errors
    assert not list(temporary.iterdir())
