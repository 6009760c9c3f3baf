"""The loggers behind the run log: CSV against the record, W&B and MLflow for real where they are installed."""

import csv
import json
import math
import struct
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from acmix.errors import UserError
from acmix.telemetry import services
from acmix.telemetry.loggers import need_packages
from acmix.telemetry.run_log import RunLog

LAYERS: list[Any] = [{"layer": "layer1.0.conv2", "stage": 1, "depth": 1, "alpha": 0.25, "beta": 0.5}]
CONFIG = {"model": {"name": "m", "kwargs": {}}, "optimizer": {"lr": 0.1, "betas": [0.9, 0.99]}}
EVALUATION = {"epoch": 1, "loss": 0.5, "top1": 90.0, "top5": 99.0, "count": 360}


def log_run(
    folder: Path, loggers: tuple[str, ...], steps: range, *, resume: int | None = None, end: str = "done"
) -> None:
    log = RunLog(folder, resume_step=resume, loggers=loggers)
    log.start({"config": CONFIG})
    for step in steps:
        log.train({"step": step, "epoch": 1, "loss": 1 / step, "lr": 0.1, "images_per_second": 100.0})
        log.probe("paths", step, LAYERS)
    log.eval({"step": steps[-1], **EVALUATION})
    log.end({"step": steps[-1], "status": end})
    log.close()


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_csv_files_hold_the_rows_of_the_record_also_after_a_resume(tmp_path: Path) -> None:
    log_run(tmp_path, ("csv",), range(1, 6), end="requeue")
    assert not (tmp_path / "tensorboard").exists()
    log_run(tmp_path, ("csv",), range(4, 8), resume=3)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for event, file in (("train", "train.csv"), ("eval", "eval.csv")):
        wanted = [row for row in rows if row["event"] == event]
        found = table(tmp_path / file)
        assert [{key: str(value) for key, value in row.items() if key != "event"} for row in wanted] == found
    assert [row["step"] for row in table(tmp_path / "train.csv")] == list("1234567")
    assert [row["step"] for row in table(tmp_path / "eval.csv")] == ["7"]


def test_a_column_that_comes_later_is_empty_before(tmp_path: Path) -> None:
    log = RunLog(tmp_path, loggers=("csv",))
    log.train({"step": 1, "epoch": 1, "loss": 1.0})
    log.train({"step": 2, "epoch": 1, "loss": math.nan, "note": 'a, "b"'})
    log.train({"step": 3, "epoch": 1, "loss": 0.5})
    log.close()
    rows = table(tmp_path / "train.csv")
    assert [(row["step"], row["loss"], row["note"]) for row in rows] == [
        ("1", "1.0", ""),
        ("2", "nan", 'a, "b"'),
        ("3", "0.5", ""),
    ]


def test_csv_that_cannot_be_written_stops_with_one_warning_and_the_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = RunLog(tmp_path, loggers=("csv",))
    log.train({"step": 1, "epoch": 1, "loss": 1.0})
    (tmp_path / "train.csv").unlink()
    (tmp_path / "train.csv").mkdir()
    for step in (2, 3):
        log.train({"step": step, "epoch": 1, "loss": 1.0})
    log.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    assert capsys.readouterr().err.count("warning: CSV stops here: ") == 1


def test_without_loggers_there_is_the_record_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log_run(tmp_path, (), range(1, 2))
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert "(metrics.jsonl, checkpoints/)" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_logger_that_is_not_installed_is_refused_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("acmix.telemetry.loggers.find_spec", lambda package: None)
    with pytest.raises(UserError, match=f"run.loggers: {name} is not installed; pip install {name}"):
        need_packages(["tensorboard", name])


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mlflow") is None or find_spec("sqlalchemy") is None, reason="mlflow is not installed")
def test_mlflow_has_every_scalar_and_a_resume_goes_on_in_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "test")
    run = tmp_path / "runs" / "try-1"
    log_run(run, ("mlflow",), range(1, 4), end="requeue")
    from mlflow import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name("test")
    [found] = client.search_runs([experiment.experiment_id])
    assert (found.info.run_name, found.info.status) == ("runs/try-1", "KILLED")
    assert found.data.params["optimizer.lr"] == "0.1"
    log_run(run, ("mlflow",), range(3, 6), resume=2)
    [found] = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    assert {"train/loss", "eval/top1", "paths/alpha/1/layer1.0.conv2", "paths/beta/1/mean"} <= found.data.metrics.keys()
    points = client.get_metric_history(found.info.run_id, "train/loss")
    assert {(point.step, point.value) for point in points} == {(step, 1 / step) for step in range(1, 6)}
    log_run(run, ("mlflow",), range(1, 2))
    assert len(client.search_runs([experiment.experiment_id])) == 2, "a run that begins again is a new one"


@pytest.mark.slow
@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_has_every_scalar_and_a_resume_goes_on_in_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "runs" / "try-1"
    run.mkdir(parents=True)
    log_run(run, ("wandb",), range(1, 4), end="requeue")
    first = json.loads((run / "loggers.json").read_text())["wandb"]
    log_run(run, ("wandb",), range(3, 6), resume=2)
    assert json.loads((run / "loggers.json").read_text())["wandb"] == first
    files = sorted((run / "wandb").glob(f"offline-run-*/run-{first}.wandb"))
    assert len(files) == 2
    assert [row["step"] for row in wandb_rows(files[0]) if "train/loss" in row] == [1, 2, 3]
    rows = wandb_rows(files[1])
    assert [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row] == [
        (3, 1 / 3),
        (4, 0.25),
        (5, 0.2),
    ]
    assert [row["eval/top1"] for row in rows if "eval/top1" in row] == [90.0]
    assert all("paths/alpha/1/layer1.0.conv2" in row for row in rows if "paths/beta/1/mean" in row)


def wandb_rows(file: Path) -> list[dict[str, Any]]:
    """The rows that an offline run holds: protocol buffers in LevelDB's log format, after a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, part, rows = file.read_bytes(), 7, b"", []
    while place + 7 <= len(content):
        if (rest := -place % 32768) < 7 and rest:  # no header fits at the end of a block
            place += rest
        size, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        part += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = Record.FromString(part)
            part = b""
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({item.key or item.nested_key[0]: json.loads(item.value_json) for item in items})
    return rows


def test_a_service_that_fails_stops_with_one_warning_and_the_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        """A service that takes the run, and then nothing."""

        id = "7"
        failures = (OSError,)

        def __init__(self, *place: object) -> None:
            pass

        def configure(self, config: object) -> None:
            raise ConnectionError("the server is gone")

    monkeypatch.setitem(services._SERVICES, "wandb", Full)
    log_run(tmp_path, ("wandb",), range(1, 3))
    assert capsys.readouterr().err == "warning: wandb stops here: the server is gone; metrics.jsonl goes on\n"
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 7
