"""Weights & Biases and MLflow: a run's scalars and config sent on, under the names that they have in TensorBoard.

Both are set up by environment variables of their own (WANDB_PROJECT, WANDB_MODE, MLFLOW_TRACKING_URI,
MLFLOW_EXPERIMENT_NAME, ...). Neither lets a logged value be replaced: the steps that a resumed run takes again are
logged again.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from acmix.checkpoint.atomic import write_atomically
from acmix.errors import UserError, one_line
from acmix.telemetry.record import Row, key_paths
from acmix.telemetry.scalars import scalars

_PROJECT = "acmix"
_MOST_METRICS, _MOST_PARAMS, _LONGEST_PARAM = 1000, 100, 500  # what an MLflow server takes at once


class Service(Protocol):
    """A run at a service. failures: what its methods raise when it cannot be reached or refuses."""

    id: str
    failures: tuple[type[Exception], ...]

    def configure(self, config: Mapping[str, Any]) -> None: ...

    def log(self, step: int, time: float, values: Mapping[str, float]) -> None: ...

    def finish(self, status: str | None) -> None: ...


class ServiceLogger:
    """Sends the rows of a run to a service. A failure stops the logger with one warning, never the run.

    `loggers.json` in the run folder keeps the run's id, so that a resumed run goes on there under the same id.

    Args:
        name: wandb or mlflow.
        run_dir: the run folder.
        resumed: whether the run goes on from a checkpoint.

    Raises UserError when the service refuses the run at the start.
    """

    def __init__(self, name: str, run_dir: Path, *, resumed: bool) -> None:
        self._name = name
        self._status: str | None = None
        file = run_dir / "loggers.json"
        ids = _read_ids(file)
        title = f"{run_dir.resolve().parent.name}/{run_dir.resolve().name}"
        service: Service = _SERVICES[name](run_dir, title, ids.get(name) if resumed else None)
        write_atomically(file, json.dumps({**ids, name: service.id}) + "\n")
        self._service: Service | None = service

    def show(self, row: Row) -> None:
        """Send what there is to see of a row."""
        if self._service is None:
            return
        try:
            if row["event"] == "start" and isinstance(row.get("config"), dict):
                self._service.configure(row["config"])
            if row["event"] == "end":
                self._status = row.get("status")
            if values := dict(scalars(row)):
                self._service.log(row["step"], row["time"], values)
        except self._service.failures as error:
            self._give_up(error)

    def close(self) -> None:
        """Send what is waiting, and say how the run ended."""
        if self._service is not None:
            try:
                self._service.finish(self._status)
            except self._service.failures as error:
                self._give_up(error)
            self._service = None

    def _give_up(self, error: Exception) -> None:
        self._service = None
        message = f"{self._name} stops here: {one_line(error)}; metrics.jsonl goes on"
        print(f"warning: {message}", file=sys.stderr, flush=True)


class Wandb:
    """A run at Weights & Biases, or in `RUN/wandb` with WANDB_MODE=offline; charts are over `step`."""

    def __init__(self, run_dir: Path, title: str, run_id: str | None) -> None:
        import wandb

        self.failures: tuple[type[Exception], ...] = (wandb.Error, OSError)
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", _PROJECT),
                name=title,
                id=run_id,
                resume=None if run_id is None else "allow",
                dir=run_dir,
                settings=wandb.Settings(console="off"),
            )
        except self.failures as error:
            raise UserError(
                f"run.loggers: wandb: {one_line(error)}; log in with `wandb login`, or set WANDB_MODE=offline"
            ) from None
        self._run.define_metric("*", step_metric="step")
        self.id = str(self._run.id)

    def configure(self, config: Mapping[str, Any]) -> None:
        """Show the config."""
        self._run.config.update(dict(config), allow_val_change=True)

    def log(self, step: int, time: float, values: Mapping[str, float]) -> None:
        """Log values of a step; W&B has a clock of its own."""
        self._run.log({"step": step, **values})

    def finish(self, status: str | None) -> None:
        """End the run, as failed unless it is done."""
        self._run.finish(exit_code=0 if status == "done" else 1)


class Mlflow:
    """A run of MLflow, in the experiment `acmix` unless MLFLOW_EXPERIMENT_NAME names another."""

    def __init__(self, run_dir: Path, title: str, run_id: str | None) -> None:
        import mlflow

        self.failures: tuple[type[Exception], ...] = (mlflow.exceptions.MlflowException, OSError)
        self._new = run_id is None
        try:
            self._client = mlflow.MlflowClient()
            if run_id is None:
                experiment = mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT))
                run_id = self._client.create_run(experiment.experiment_id, run_name=title).info.run_id
            else:
                self._client.update_run(run_id, status="RUNNING")
        except self.failures as error:
            raise UserError(f"run.loggers: mlflow: {one_line(error)}; set MLFLOW_TRACKING_URI") from None
        self.id = str(run_id)

    def configure(self, config: Mapping[str, Any]) -> None:
        """Log the config of a new run: MLflow does not let a parameter change."""
        from mlflow.entities import Param

        params = [Param(key, str(value)[:_LONGEST_PARAM]) for key, value in key_paths(config)] if self._new else []
        for start in range(0, len(params), _MOST_PARAMS):
            self._client.log_batch(self.id, params=params[start : start + _MOST_PARAMS])

    def log(self, step: int, time: float, values: Mapping[str, float]) -> None:
        """Log values of a step."""
        from mlflow.entities import Metric

        metrics = [Metric(name, value, round(1000 * time), step) for name, value in values.items()]
        for start in range(0, len(metrics), _MOST_METRICS):
            self._client.log_batch(self.id, metrics=metrics[start : start + _MOST_METRICS])

    def finish(self, status: str | None) -> None:
        """End the run: finished, killed where a signal stopped it, else failed."""
        ended = {"done": "FINISHED", "requeue": "KILLED"}.get(status or "", "FAILED")
        self._client.set_terminated(self.id, status=ended)


_SERVICES: dict[str, Callable[[Path, str, str | None], Service]] = {"wandb": Wandb, "mlflow": Mlflow}


def _read_ids(file: Path) -> dict[str, str]:
    try:
        ids = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(name): str(run) for name, run in ids.items()} if isinstance(ids, dict) else {}
