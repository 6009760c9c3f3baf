"""No state of stdout or stderr stops, changes or loses a run, and no result is lost because it cannot be written."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
STEPS = 3
TINY = [
    "train.py", "--config", "configs/quickstart.yaml", "data.batch_size=16", "model.kwargs.base_width=8",
    "run.threads=1", "run.log_every=1", f"schedule.steps={STEPS}",
]  # fmt: skip
CHECK = ["-m", "acmix.config", "configs/quickstart.yaml"]


def start(*arguments: str, shell: str = "", **options: Any) -> subprocess.Popen:
    """Start one of the programs, its output as a shell would redirect it: `shell` follows the command."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    command = " ".join(["exec", '"$0"', '"$@"', shell])
    return subprocess.Popen(
        ["bash", "-c", command, sys.executable, *arguments], cwd=ROOT, env=environment, text=True, **options
    )


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_reader_that_goes_away_does_not_end_a_run(tmp_path: Path) -> None:
    program = start(*TINY, f"run.dir={tmp_path}/run", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert program.stdout is not None
    program.stdout.readline()
    program.stdout.close()
    assert program.wait(120) == 0
    assert [row["step"] for row in rows(tmp_path / "run") if row["event"] == "train"] == [1, 2, 3]
    assert (tmp_path / "run" / "checkpoints" / "last" / "manifest.json").exists()


def test_a_run_without_any_standard_stream_writes_to_none_of_its_files(tmp_path: Path) -> None:
    program = start(*TINY, f"run.dir={tmp_path}/run", shell="<&- >&- 2>&-")
    assert program.wait(120) == 0
    assert rows(tmp_path / "run")[-1]["event"] == "end"
    assert "alpha/beta" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_a_run_on_a_full_disk_for_its_output_goes_on(tmp_path: Path) -> None:
    assert start(*TINY, f"run.dir={tmp_path}/run", shell=">/dev/full 2>/dev/full").wait(120) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "done"


@pytest.mark.parametrize(
    ("shell", "env"),
    [
        (">&-", {}),
        ("2>&-", {}),
        ("<&- >&- 2>&-", {}),
        (">/dev/full", {}),
        ("| head -c 10 >/dev/null; exit ${PIPESTATUS[0]}", {}),
        (">/dev/null", {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}),
    ],
)
def test_the_exit_status_of_a_program_does_not_depend_on_its_output(shell: str, env: dict[str, str]) -> None:
    if shell.startswith("|"):
        done = subprocess.run(
            ["bash", "-c", f'"$0" "$@" {shell}', sys.executable, *CHECK], cwd=ROOT, env={**os.environ, **env}
        )
        assert done.returncode == 0
    else:
        assert start(*CHECK, shell=shell, env=env).wait(60) == 0
    assert start(*CHECK, "run.kepe=1", shell=shell if not shell.startswith("|") else "", env=env).wait(60) == 2


def test_characters_that_a_stream_cannot_hold_are_escaped(tmp_path: Path) -> None:
    (tmp_path / "数据.yaml").write_text("model: {name: 数据}\ndata: {dataset: digits}\nschedule: {epochs: 1}\n")
    ascii_only = {"PYTHONIOENCODING": "ascii"}
    program = start(CHECK[0], CHECK[1], str(tmp_path / "数据.yaml"), stdout=subprocess.PIPE, env=ascii_only)
    assert "\\u6570" in program.communicate()[0]
    assert program.returncode == 0


@pytest.mark.parametrize("nohup", [False, True])
def test_a_closed_terminal_stops_a_run_like_any_signal_unless_it_is_ignored(nohup: bool, tmp_path: Path) -> None:
    def start_in_a_terminal() -> (
        None
    ):  # whatever started the tests may itself ignore the signal, and we would inherit that
        signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)

    options = {"stdout": subprocess.DEVNULL, "preexec_fn": start_in_a_terminal}
    steps = 40 if nohup else 700  # the signal must find a run that has not ended
    program = start(*TINY[:-1], f"schedule.steps={steps}", f"run.dir={tmp_path}/run", **options)
    for _ in range(1200):
        time.sleep(0.05)
        record = tmp_path / "run" / "metrics.jsonl"
        if record.exists() and any(row["event"] == "train" for row in rows(tmp_path / "run")):
            break
    program.send_signal(signal.SIGHUP)
    assert program.wait(120) == (0 if nohup else 75)
    status = json.loads((tmp_path / "run" / "summary.json").read_text())["status"]
    assert status == ("done" if nohup else "requeue")


@pytest.mark.parametrize(
    "arguments",
    [
        ("eval.py", "--checkpoint", "RUN", "--json", "/proc/nowhere/x.json"),
        ("eval.py", "--checkpoint", "RUN", "--report", "/proc/x"),
        ("scripts/check_data.py", "/", "--json", "/proc/x.json"),
        ("scripts/plot_paths.py", "/", "--out", "/proc/x.png"),
        ("scripts/convert_official.py", "/none.pth", "/proc/x.safetensors", "--model", "acmix_resnet26"),
        ("scripts/benchmark.py", "block:8x8", "--json", "/proc/x.json"),
        ("scripts/draw_block.py", "/proc/x.svg"),
    ],
    ids=lambda arguments: " ".join(arguments[:1] + arguments[-2:]),
)
def test_an_output_that_cannot_be_written_is_refused_before_the_work(arguments: tuple[str, ...]) -> None:
    run = str(ROOT / "tests" / "data")  # no run: what is refused first is the output
    if "RUN" in arguments:
        config = ("--config", "configs/quickstart.yaml")
        arguments = (*(run if part == "RUN" else part for part in arguments), *config)
    program = start(*arguments, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    _, errors = program.communicate(timeout=120)
    assert program.returncode == 2, errors
    assert "/proc/" in errors
    assert "Traceback" not in errors
