"""The views of a run's record that `run.loggers` asks for: TensorBoard, CSV, Weights & Biases, MLflow."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from acmix.errors import UserError
from acmix.telemetry.record import Record, Row

_PACKAGES = ("wandb", "mlflow")  # named as the loggers
_PLACES = {"tensorboard": "tensorboard/", "csv": "train.csv, eval.csv", "wandb": "Weights & Biases", "mlflow": "MLflow"}


class Logger(Protocol):
    """Shows rows of the record somewhere. What fails there is warned of once, and never stops the run."""

    def show(self, row: Row) -> None: ...

    def close(self) -> None: ...


def need_packages(names: Sequence[str]) -> None:
    """Raise UserError for a logger whose package is not installed."""
    for name in names:
        if name in _PACKAGES and find_spec(name) is None:
            raise UserError(f"run.loggers: {name} is not installed; pip install {name}, or leave {name} out")


def places(names: Sequence[str]) -> list[str]:
    """Where the loggers write, for people."""
    return [_PLACES[name] for name in dict.fromkeys(names)]


def open_loggers(names: Sequence[str], run_dir: Path, record: Record) -> list[Logger]:
    """The loggers of these names, with all that the record holds. Raises UserError for a service that refuses."""
    return [_open(name, run_dir, record) for name in dict.fromkeys(names)]


def _open(name: str, run_dir: Path, record: Record) -> Logger:
    """Packages are imported only where they are asked for: they are slow, and some are not installed."""
    if name == "tensorboard":
        from acmix.telemetry.board import Board

        return Board(run_dir / "tensorboard", record)
    if name == "csv":
        from acmix.telemetry.csv_files import CsvFiles

        return CsvFiles(run_dir, record)
    from acmix.telemetry.services import ServiceLogger

    return ServiceLogger(name, run_dir, resumed=record.keep_step > 0)
