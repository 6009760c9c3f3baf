"""The run lock: one live run per folder, never stuck."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from acmix.engine.lock import RunLock
from acmix.errors import UserError

HOLD = """
import sys, time
from pathlib import Path
from acmix.engine.lock import RunLock
RunLock(Path(sys.argv[1])).acquire()
print("held", flush=True)
time.sleep(120)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of tmp_path."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_run_is_refused_while_the_first_lives(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(UserError, match=rf"another run is live .* held by process {holder.pid} on .*run\.dir"):
        RunLock(tmp_path).acquire()


def test_a_killed_run_leaves_no_lock_behind(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with RunLock(tmp_path), pytest.raises(UserError, match="another run is live"):
        RunLock(tmp_path).acquire()


def test_a_forked_child_neither_holds_nor_drops_the_lock(tmp_path: Path) -> None:
    """As a loader worker does: it is forked while the lock is held, may end first, and may outlive the run."""
    lock = RunLock(tmp_path)
    lock.acquire()
    first = os.fork()
    if first == 0:
        os._exit(0)
    os.waitpid(first, 0)
    check = (
        f"from pathlib import Path; from acmix.engine.lock import RunLock; RunLock(Path({str(tmp_path)!r})).acquire()"
    )
    refused = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert f"held by process {os.getpid()}" in refused.stderr
    read_end, write_end = os.pipe()
    second = os.fork()
    if second == 0:
        os.close(write_end)
        os.read(read_end, 1)
        os._exit(0)
    lock.release()
    assert subprocess.run([sys.executable, "-c", check], capture_output=True, check=False).returncode == 0
    os.close(write_end)
    os.waitpid(second, 0)


def test_a_released_lock_can_be_taken_again(tmp_path: Path) -> None:
    for _ in range(2):
        with RunLock(tmp_path):
            assert (tmp_path / ".lock").exists()
        assert (tmp_path / ".lock").read_text() == ""


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to the run folder .*file/run.*choose another run\.dir"):
        RunLock(tmp_path / "file" / "run").acquire()


def test_a_folder_on_a_full_disk_is_locked_without_the_name_of_its_holder(tmp_path: Path) -> None:
    program = (
        "import resource, sys; from pathlib import Path; from acmix.engine.lock import RunLock\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
        "with RunLock(Path(sys.argv[1])): print('held', Path(sys.argv[1], '.lock').stat().st_size)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.stdout == "held 0\n", done.stderr
