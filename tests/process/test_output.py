"""No state of stdout or stderr stops, changes or loses what a program does."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from acmix.launch import _status_of_workers
from acmix.process.output import unfailing_output
from acmix.process.program import leave_status, run_program

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
model: {name: test_resnet}
data: {dataset: digits, image_size: 24, batch_size: 16, val_batch_size: 120, num_workers: 0}
augment: {crop: pad, pad: 2}
schedule: {epochs: 90, steps: 900}
run: {log_every: 1, threads: 1}
"""
PROGRAM = """
import sys
from acmix.errors import UserError
from acmix.process.program import run_program

def work():
    print("µ × – 猫 \\udcff", "line\\n" * 100_000)
    file = open(WITNESS, "w")
    assert file.fileno() > 2
    print("more", file=sys.stderr, flush=True)
    print("work done", file=file)
    END
sys.exit(run_program(work))
"""


@pytest.mark.parametrize(("end", "status"), [("return 0", 0), ("return 75", 75), ("raise UserError('no')", 2)])
@pytest.mark.parametrize(
    "redirection",
    [">&-", "2>&-", "<&- >&- 2>&-", ">/dev/full 2>/dev/full", "1</dev/null 2</dev/null", "2>&1 | true", ">/dev/null"],
)
def test_output_that_cannot_be_written_does_not_change_the_work(
    redirection: str, end: str, status: int, tmp_path: Path
) -> None:
    program = PROGRAM.replace("WITNESS", repr(str(tmp_path / "witness"))).replace("END", end)
    (tmp_path / "program.py").write_text(program)
    command = f'"{sys.executable}" "{tmp_path / "program.py"}" {redirection}; exit ${{PIPESTATUS[0]}}'
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "witness").read_text() == "work done\n"


COMMANDS = {
    0: ["-m acmix.config configs/quickstart.yaml", "-m acmix.config --help", "train.py --help", "eval.py --help",
        "scripts/check_data.py --help"],
    2: ["-m acmix.config nowhere.yaml", "train.py --config nowhere.yaml", "eval.py"],
}  # fmt: skip


@pytest.mark.parametrize(("command", "status"), [(each, status) for status in COMMANDS for each in COMMANDS[status]])
def test_programs_end_as_they_would_on_a_full_disk(command: str, status: int) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, stdout=full, stderr=full, check=False)
    assert done.returncode == status


def test_a_pipe_that_nobody_reads_is_given_up_after_a_while() -> None:
    """A descriptor set to non-blocking, as programs that share a terminal leave it; and any descriptor of a run."""
    started = []
    for blocking, wait in ((False, True), (True, False)):
        reader, writer = os.pipe()
        os.set_blocking(writer, blocking)
        program = (
            "import sys; from acmix.process.output import unfailing_output\n"
            f"with unfailing_output(wait={wait}):\n    for _ in range(3000): print('x' * 99, flush=True)"
        )
        started.append((reader, subprocess.Popen([sys.executable, "-c", program], stdout=writer)))
        os.close(writer)
    for reader, process in started:
        assert process.wait(60) == 0
        with open(reader) as pipe:
            assert set(pipe.read().splitlines()[:-1]) == {"x" * 99}


def test_a_slow_reader_gets_every_line() -> None:
    program = (
        "from acmix.process.output import unfailing_output\n"
        "with unfailing_output():\n    for number in range(20_000): print(number)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        time.sleep(2.5)  # longer than a run would wait
        assert process.stdout.read().split() == [str(number) for number in range(20_000)]
    assert process.returncode == 0


class Broken:
    """A stream of which only writing is there, and fails."""

    def write(self, text: str) -> int:
        raise OSError("no")


@pytest.mark.parametrize("make", [lambda: None, Broken, io.StringIO])
def test_streams_of_a_notebook_are_used_and_given_back(
    make: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = make()
    monkeypatch.setattr(sys, "stdout", stream)

    def work() -> int:
        print("a line", flush=True)
        return 0 if not sys.stdout.isatty() else 1

    assert run_program(work) == 0
    assert sys.stdout is stream
    if isinstance(stream, io.StringIO):
        assert stream.getvalue() == "a line\n"


def test_what_the_encoding_lacks_is_written_as_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", narrow)
    with unfailing_output():
        print("3 µs")
    assert narrow.buffer.getvalue() == b"3 \\xb5s\n"  # type: ignore[attr-defined]


def hang_up_after(step: int, pid: int, folder: Path) -> None:
    """Send SIGHUP to a run in `folder`/run once it has logged `step`."""
    metrics, deadline = folder / "run" / "metrics.jsonl", time.monotonic() + 120
    while not metrics.exists() or metrics.read_text().count('"train"') < step:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(pid, signal.SIGHUP)


def logged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def assert_whole_until(step: int, folder: Path) -> None:
    """Every step is logged once and the last is saved."""
    assert [row["step"] for row in logged(folder) if row["event"] == "train"] == list(range(1, step + 1))
    assert os.readlink(folder / "run" / "checkpoints" / "last") == f"step_{step:08d}"


def test_a_run_whose_terminal_hangs_up_saves_and_asks_for_a_requeue(
    tmp_path: Path, launcher: Any, report: Callable[..., None]
) -> None:
    """Its reader ends first (a pipe into tee), it goes on; then SIGHUP stops it like any stop signal."""
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    os.mkfifo(tmp_path / "pipe")
    command = [ROOT / "train.py", "--config", "tiny.yaml", "run.dir=run"]
    run = launcher.start(*command, folder=tmp_path, output=tmp_path / "pipe")
    with open(tmp_path / "pipe") as reader:
        assert reader.readline().startswith("Results go to run")
    hang_up_after(3, run.pid, tmp_path)
    assert run.wait(60) == 75
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "requeue"
    assert_whole_until(summary["step"], tmp_path)
    report("The reader of stdout ends, the terminal hangs up", "The run goes on; SIGHUP saves, exit status 75", 1, 1)


UNDER_NOHUP = f"""
import os, runpy, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_IGN)
os.closerange(0, 3)
sys.stdin = sys.stdout = sys.stderr = sys.__stdin__ = sys.__stdout__ = sys.__stderr__ = None  # as Python starts then
runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")
"""


def test_a_run_under_nohup_without_any_standard_stream_goes_on_and_writes_to_none_of_its_files(
    tmp_path: Path, launcher: Any
) -> None:
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    (tmp_path / "under_nohup.py").write_text(UNDER_NOHUP)
    command = [tmp_path / "under_nohup.py", "--config", "tiny.yaml", "run.dir=run", "schedule.steps=40"]
    run = launcher.start(*command, folder=tmp_path)
    hang_up_after(1, run.pid, tmp_path)
    assert run.wait() == 0
    assert logged(tmp_path)[-1]["event"] == "end"
    assert_whole_until(40, tmp_path)
    printed = re.compile(rb"Results go to|step 40/40")
    assert not [file for file in (tmp_path / "run").rglob("*") if file.is_file() and printed.search(file.read_bytes())]


def test_a_run_on_a_full_disk_for_its_output_goes_on(tmp_path: Path, launcher: Any) -> None:
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    command = [ROOT / "train.py", "--config", "tiny.yaml", "run.dir=run", "schedule.steps=3"]
    run = launcher.start(*command, folder=tmp_path, output=Path("/dev/full"))
    assert (run.wait(), run.errors) == (0, "")
    assert_whole_until(3, tmp_path)


def test_the_launcher_of_several_processes_ends_as_it_would_on_a_full_disk(launcher: Any) -> None:
    program = launcher.start(ROOT / "acmix" / "launch.py", "--help", output=Path("/dev/full"))
    assert (program.wait(), program.errors) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--nproc-per-node", "two", "train.py"], "torchrun's options: Unsupported nproc_per_node value: two"),
        (["--nproc-per-node", "0", "train.py"], "--nproc-per-node must be at least 1"),
        (["--nnodes", "x", "train.py"], "torchrun's options: invalid literal for int()"),
        (["--nproc-per-node", "2", "tarin.py"], "tarin.py: no such program; nearest: train.py"),
    ],
)
def test_the_launcher_refuses_what_torchrun_answers_with_a_traceback(
    arguments: list[str], part: str, launcher: Any
) -> None:
    program = launcher.start(ROOT / "acmix" / "launch.py", *arguments)
    assert (program.wait(), len(program.errors.splitlines())) == (2, 1), program.errors
    assert program.errors.startswith("error: ")
    assert part in program.errors


@pytest.mark.parametrize(
    ("left", "status"),
    [
        ([("0", "0", 1), ("1", "0", 2), ("1", "0", 75), ("1", "1", 75)], 75),
        ([("0", "0", 2), ("0", "1", 75)], 2),
        ([("0", "0", 2), ("0", "1", 0)], 2),
        ([("0", "0", 1), ("0", "1", 2)], 1),
        ([("0", "0", 75), ("0", "1", 0)], 1),
        ([], 1),
    ],
)
def test_the_launcher_ends_with_what_its_workers_leave_also_on_a_full_disk(
    left: list[tuple[str, str, int]], status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACMIX_STATUS_FOLDER", str(tmp_path))
    for attempt, rank, worker_status in left:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        monkeypatch.setenv("LOCAL_RANK", rank)
        leave_status(worker_status)
    assert all(file.stat().st_size == 0 for file in tmp_path.iterdir()), "what a full disk has room for"
    assert _status_of_workers(tmp_path) == status
