import json
import os
import resource
import signal
import subprocess
import sys
import termios
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

from acmix.errors import UserError
from acmix.telemetry.run_log import RunLog

LAYERS: list[Any] = [
    {"layer": "layer1.0.conv2", "stage": 1, "depth": 1, "alpha": 0.25, "beta": 0.5},
    {"layer": "layer2.0.conv2", "stage": 2, "depth": 2, "alpha": 1.0, "beta": 0.0},
    {"layer": "layer2.1.conv2", "stage": 2, "depth": 3, "alpha": 0.5, "beta": 1.0},
]


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def points_on_board(run: Path) -> Counter[tuple[str, int]]:
    """How often each (tag, step) stands in the event files, read raw: nothing is purged or sampled."""
    return Counter(
        (value.tag, event.step)
        for file in (run / "tensorboard").iterdir()
        for event in LegacyEventFileLoader(str(file)).Load()
        for value in event.summary.value
    )


def train(log: RunLog, steps: range) -> None:
    for step in steps:
        log.train({"step": step, "epoch": 1, "loss": 1 / step, "lr": 0.1, "images_per_second": 100.0})
        log.probe("paths", step, LAYERS)


def test_rows_follow_the_contract(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.start({"device": "cpu", "config": {"model": {"name": "m"}}})
    train(log, range(1, 3))
    log.eval({"step": 2, "epoch": 1, "loss": 0.5, "top1": 90.0, "top5": 99.0, "count": 360})
    log.end({"step": 2, "status": "done"})
    log.close()
    rows = rows_of(tmp_path)
    assert [row["event"] for row in rows] == ["start", "train", "paths", "train", "paths", "eval", "end"]
    assert rows[0]["config"] == {"model": {"name": "m"}}
    assert rows[3]["step"] == 2
    assert rows[3]["loss"] == 0.5
    assert rows[4]["layers"] == LAYERS
    assert rows[5]["count"] == 360


def test_tensorboard_has_the_tags_and_stage_means(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    train(log, range(1, 2))
    log.eval({"step": 1, "epoch": 1, "loss": 0.5, "top1": 90.0, "top5": 99.0, "count": 360})
    log.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    expected = {"train/loss", "train/lr", "train/images_per_second", "eval/loss", "eval/top1", "eval/top5"}
    for path in ("alpha", "beta"):
        expected |= {f"paths/{path}/{row['stage']}/{row['layer']}" for row in LAYERS}
        expected |= {f"paths/{path}/1/mean", f"paths/{path}/2/mean"}
    assert set(board.Tags()["scalars"]) == expected
    assert board.Scalars("paths/alpha/2/mean")[0].value == 0.75


def test_any_probe_gets_tags_and_stage_means_of_the_numbers_it_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = RunLog(tmp_path)
    rows = [
        {"layer": "a", "stage": 1, "kind": "conv", "rms": torch.tensor(0.5), "dead": 3},
        {"layer": "b", "stage": 1, "rms": 1.0},
        {"layer": "c", "stage": 2, "rms": float("inf"), "fused": True},
    ]
    log.probe("weights", 4, rows, echo=True)
    log.probe("nothing", 4, [])
    log.close()
    (row,) = rows_of(tmp_path)
    assert (row["event"], row["step"], row["layers"][0]) == ("weights", 4, {**rows[0], "rms": 0.5})
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    shown = {tag: [(point.step, point.value) for point in board.Scalars(tag)] for tag in board.Tags()["scalars"]}
    assert shown == {
        "weights/rms/1/a": [(4, 0.5)],
        "weights/rms/1/b": [(4, 1.0)],
        "weights/rms/2/c": [(4, float("inf"))],
        "weights/rms/1/mean": [(4, 0.75)],
        "weights/rms/2/mean": [(4, float("inf"))],
        "weights/dead/1/a": [(4, 3.0)],
        "weights/dead/1/mean": [(4, 3.0)],
    }
    assert capsys.readouterr().out == "step 4  rms/dead: stage 1 0.750/3.000  stage 2 inf/nan\n"


def test_resume_drops_later_rows_and_keeps_one_value_for_each_tag_and_step(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.start({})
    train(log, range(1, 11))
    log.end({"step": 10, "status": "stopped"})
    log.close()
    for resume_step, last in ((6, 8), (7, 12)):
        log = RunLog(tmp_path, resume_step=resume_step)
        log.start({})
        log.probe("paths", resume_step, LAYERS)  # logged at every start: the record has this step already
        train(log, range(resume_step + 1, last + 1))
        log.close()
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows if row["event"] == "train"] == list(range(1, 13))
    assert [row["step"] for row in rows if row["event"] == "paths"] == list(range(1, 13))
    assert [row["resumed_from"] for row in rows if row["event"] == "start"] == [None, 6, 7]
    assert not [row for row in rows if row["event"] == "end"]
    points = points_on_board(tmp_path)
    assert set(points.values()) == {1}
    assert {step for tag, step in points if tag == "train/loss"} == set(range(1, 13))


def test_a_step_has_one_row_of_each_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(tmp_path)
    log.start({})
    train(log, range(1, 3))
    log.probe("paths", 2, LAYERS, echo=True)  # the end of an epoch, right after its last update was logged
    log.close()
    assert [row["step"] for row in rows_of(tmp_path) if row["event"] == "paths"] == [1, 2]
    assert "alpha/beta" in capsys.readouterr().out
    assert set(points_on_board(tmp_path).values()) == {1}


def test_a_torn_line_is_repaired_and_what_a_kill_took_from_tensorboard_comes_back(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    train(log, range(1, 6))
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"event": "train", "step": 6, "lo')
    (event_file,) = (tmp_path / "tensorboard").iterdir()
    os.truncate(event_file, event_file.stat().st_size // 2)
    RunLog(tmp_path, resume_step=5).close()
    assert [row["step"] for row in rows_of(tmp_path) if row["event"] == "train"] == [1, 2, 3, 4, 5]
    assert {step for tag, step in points_on_board(tmp_path) if tag == "train/loss"} == {1, 2, 3, 4, 5}


def test_a_new_start_leaves_nothing_of_an_attempt_without_checkpoint(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    train(log, range(1, 4))
    log.close()
    log = RunLog(tmp_path)
    train(log, range(1, 2))
    log.close()
    assert [row["event"] for row in rows_of(tmp_path)] == ["train", "paths"]
    assert set(points_on_board(tmp_path).values()) == {1}


def test_a_killed_process_leaves_every_row_it_logged(tmp_path: Path) -> None:
    code = f"""
import os, signal
from acmix.telemetry.run_log import RunLog
log = RunLog({str(tmp_path)!r})
for step in range(1, 51):
    log.train({{"step": step, "epoch": 1, "loss": 0.1}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert [row["step"] for row in rows_of(tmp_path)] == list(range(1, 51))
    assert len(killed.stdout.splitlines()) == 50


def test_floats_that_are_not_finite_and_tensors_are_valid_json(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.train({"step": 1, "epoch": 1, "loss": float("nan"), "grad_norm": torch.tensor(float("inf")), "path": tmp_path})
    log.close()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    row = json.loads(line, parse_constant=refuse)
    assert (row["loss"], row["grad_norm"], row["path"]) == ("nan", "inf", str(tmp_path))
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert board.Scalars("train/grad_norm")[0].value == float("inf")


def test_other_ranks_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(tmp_path / "run", enabled=False)
    log.start({})
    train(log, range(1, 3))
    with log.progress_bar(total=2) as bar:
        bar.advance()
    log.sync()
    log.end({"step": 2})
    log.close()
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("enabled", [True, False])
def test_the_bar_of_the_first_rank_moves_on_a_terminal(
    enabled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside, terminal = os.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    with open(terminal, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        log = RunLog(tmp_path, enabled=enabled)
        with log.progress_bar(total=5, initial=2, description="epoch 1/2") as bar:
            bar.advance()
            log.line("above the bar")
        log.close()
    shown = read_all(outside)
    assert ("epoch 1/2" in shown, "2/5" in shown, "3/5" in shown, "above the bar" in shown) == (enabled,) * 4


def read_all(terminal: int) -> str:
    """What was written to the other end of a terminal that is closed by now."""
    parts = []
    with suppress(OSError):  # how Linux says that there is no more
        while part := os.read(terminal, 1 << 12):
            parts.append(part)
    os.close(terminal)
    return b"".join(parts).decode()


def test_lines_name_what_a_reader_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(tmp_path)
    log.start({})
    row = {"step": 3, "steps": 40, "epoch": 1, "epochs": 2, "loss": 0.51234, "lr": 0.02, "images_per_second": 1234.5}
    log.train({**row, "data_wait": 0.031, "memory_gib": 1.5, "eta_seconds": 3723.4})
    log.probe("paths", 3, LAYERS, echo=True)
    log.end({"step": 3, "status": "done"})
    log.close()
    first, progress, paths, last = capsys.readouterr().out.splitlines()
    assert str(tmp_path) in first
    assert str(tmp_path) in last
    assert progress == (
        "epoch 1/2  step 3/40  loss 0.5123  lr 0.02  1,234 images/s  waits for data 3%  1.50 GiB  ETA 1:02:03"
    )
    assert paths == "step 3  alpha/beta: stage 1 0.250/0.500  stage 2 0.750/0.500"


def test_a_folder_that_cannot_be_written_is_a_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        RunLog(tmp_path / "file" / "run")


def test_rows_wait_while_the_disk_is_full_and_none_is_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(tmp_path)
    log.train({"step": 1, "epoch": 1, "loss": 1.0})
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (tmp_path / "metrics.jsonl").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limit[1]))  # room for a part of the next line
    try:
        log.train({"step": 2, "epoch": 1, "loss": 1.0})
        log.train({"step": 3, "epoch": 1, "loss": 1.0})
        with pytest.raises(UserError, match=r"metrics\.jsonl"):
            log.sync()
        assert [row["step"] for row in rows_of(tmp_path)] == [1]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    log.train({"step": 4, "epoch": 1, "loss": 1.0})
    log.close()
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3, 4]
    assert capsys.readouterr().err.count("metrics.jsonl: ") == 1


def test_a_probe_without_a_number_says_nothing_on_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = RunLog(tmp_path)
    log.probe("shares", 1, [{"layer": "a", "stage": 1, "share": None}], echo=True)
    log.close()
    assert capsys.readouterr().out == ""
    assert rows_of(tmp_path)[-1]["event"] == "shares"
