"""Runs as processes: the programs here are real ones that leave what a run leaves."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from acmix.process.signals import StopSignals
from acmix.studies.commands import command
from acmix.studies.plan import Run, plan_study
from acmix.studies.progress import Forecast, last_row
from acmix.studies.runner import Runner
from acmix.studies.schema import load_study

FINISH = "import shutil, sys; print('working'); shutil.copytree(sys.argv[1], sys.argv[2])"
FAIL = "import sys; print('a hint'); sys.exit('error: no data')"
SAVE = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
print("ready", flush=True)
time.sleep(60)
"""


@pytest.fixture
def runs(study_file: Path) -> list[Run]:
    return plan_study(load_study(study_file), study_file.parent / "out", [], {"learned": {}, "sum": {}})[:4]


@pytest.fixture
def finished(runs: list[Run], tmp_path: Path, write_run: Callable[..., None]) -> Path:
    """The folder of a finished run, to be copied."""
    run = Run("any", 0, tmp_path / "template", (), runs[0].config)
    write_run(run, 61.25)
    return run.folder


def program(code: str, *arguments: object) -> list[str]:
    return [sys.executable, "-S", "-c", code, *map(str, arguments)]


def test_a_run_that_fails_is_told_with_the_end_of_its_log_and_the_others_go_on(
    runs: list[Run], finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def start(run: Run) -> list[str]:
        return program(FAIL) if run.label == "sum seed 0" else program(FINISH, finished, run.folder)

    runner = Runner(start, StopSignals(), 1, Forecast(1), total=6, done=2)
    runner.run(runs)
    (failure,) = runner.failures
    assert (failure.run.label, failure.status, failure.last_lines) == ("sum seed 0", 1, ("a hint", "error: no data"))
    assert not runner.stopped
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "[3/6] learned seed 0 begins, ETA unknown"
    assert lines[1].startswith("[3/6] learned seed 0: top-1 61.25 % in 0:00:0")
    assert f"sum seed 0 ended with status 1; the last lines of {runs[1].log}:" in lines
    assert lines[-1].startswith("[5/6] sum seed 1: top-1 61.25 %")
    assert runs[0].log.read_text() == "working\n"


def test_several_run_at_a_time(runs: list[Run], finished: Path, tmp_path: Path) -> None:
    meet = """
import os, shutil, sys, time
open(sys.argv[3] + "/" + str(os.getpid()), "w").close()
while len(os.listdir(sys.argv[3])) < 2:
    time.sleep(0.01)
shutil.copytree(sys.argv[1], sys.argv[2])
"""
    (tmp_path / "here").mkdir()
    runner = Runner(
        lambda run: program(meet, finished, run.folder, tmp_path / "here"), StopSignals(), 2, Forecast(2), total=2
    )
    runner.run(runs[:2])
    assert runner.done == 2


def test_a_stop_signal_lets_the_runs_save_and_starts_no_more(runs: list[Run]) -> None:
    def interrupt() -> None:
        while not (runs[0].log.is_file() and runs[0].log.read_text()):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    with StopSignals() as signals:
        signals.begin()
        runner = Runner(lambda run: program(SAVE), signals, 1, Forecast(1), total=4)
        threading.Thread(target=interrupt, daemon=True).start()
        runner.run(runs)
    assert runner.stopped
    assert not runner.failures
    assert not runs[1].log.exists()


def test_a_run_that_says_it_is_done_without_a_result_has_failed(runs: list[Run]) -> None:
    runner = Runner(lambda run: program("print('nothing to do')"), StopSignals(), 1, Forecast(1), total=1)
    runner.run(runs[:1])
    assert [failure.status for failure in runner.failures] == [0]


def test_threads_are_shared_unless_the_study_says_how_many(study_file: Path) -> None:
    study = load_study(study_file)
    (free, *_), (fixed, *_) = (
        plan_study(study, Path("out"), overrides, {"learned": {}, "sum": {}}) for overrides in ([], ["run.threads=5"])
    )
    assert command(free, Path("train.py"), 3)[-1] == "run.threads=3"
    assert command(free, Path("train.py"))[2:] == list(free.arguments)
    assert command(fixed, Path("train.py"), 3)[2:] == list(fixed.arguments)


def test_the_forecast_takes_the_arm_s_own_time_else_that_of_the_others(
    runs: list[Run], write_run: Callable[..., None]
) -> None:
    forecast = Forecast(1)
    assert forecast.eta(runs[:2], {}) is None
    forecast.add("learned", 100.0)
    forecast.add("learned", 120.0)
    assert forecast.eta(runs[:2], {}) == pytest.approx(220.0)
    forecast.add("sum", 10.0)
    assert forecast.eta(runs[:2], {}) == pytest.approx(120.0)
    write_run(runs[0], finished=False)
    assert last_row(runs[0].folder, "train")["step"] == 2
    assert forecast.eta(runs[1:2], {runs[0]: time.monotonic()}) == pytest.approx(10.0, abs=1)


def test_the_first_run_forecasts_the_others_by_what_it_has_left(
    runs: list[Run], write_run: Callable[..., None]
) -> None:
    write_run(runs[0], finished=False)
    record = runs[0].folder / "metrics.jsonl"
    record.write_text(record.read_text().replace('"eta_seconds": 0.0', '"eta_seconds": 50.0'))
    assert Forecast(2).eta(runs[1:4], {runs[0]: time.monotonic() - 30}) == pytest.approx((50 + 3 * 80) / 2, abs=1)
