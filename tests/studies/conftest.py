"""A small study, and finished runs of it written by the code that writes those of real ones."""

import io
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from acmix.checkpoint.atomic import write_atomically
from acmix.studies.plan import Run
from acmix.telemetry.run_log import RunLog

BASE = """
model: {name: acmix_resnet26, num_classes: 10, kwargs: {stem: cifar, base_width: 8}}
data: {dataset: digits, image_size: 16}
schedule: {epochs: 6, warmup_epochs: 1}
"""
STUDY = """
name: mixes
base: base.yaml
seeds: 3
reference: learned
arms:
  learned: {}
  sum: {model.kwargs.mix: sum}
"""


@pytest.fixture
def study_file(tmp_path: Path) -> Path:
    """`mixes.yaml` beside its `base.yaml`: arms learned and sum, three seeds."""
    (tmp_path / "base.yaml").write_text(BASE)
    file = tmp_path / "mixes.yaml"
    file.write_text(STUDY)
    return file


@pytest.fixture
def write_run() -> Callable[..., None]:
    """`write_run(run, top1=.., ...)`: leave in a run's folder what a run leaves, finished unless told otherwise."""

    def write(run: Run, top1: float = 50.0, **what: Any) -> None:
        with redirect_stdout(io.StringIO()):
            leave(run, top1, **what)

    def leave(
        run: Run,
        top1: float,
        *,
        best: float | None = None,
        finished: bool = True,
        rate: float = 100.0,
        alpha: float = 0.5,
        config: str | None = None,
    ) -> None:
        log = RunLog(run.folder)
        write_atomically(run.folder / "config.yaml", config or run.config.dump())
        log.start({"config": run.config.model_dump(mode="json")})
        for step, epoch, score in ((1, 1, best), (2, 2, top1)):
            log.train({"step": step, "epoch": epoch, "epochs": 2, "images_per_second": rate, "loss": 1.0, "lr": 0.1,
                       "eta_seconds": 60.0 * (2 - step)})  # fmt: skip
            layers = [{"layer": str(depth), "stage": stage, "depth": depth, "alpha": alpha + depth, "beta": 0.25}
                      for depth, stage in ((1, 1), (2, 2), (4, 2))]  # fmt: skip
            log.probe("paths", step, layers)
            log.eval({"step": step, "epoch": epoch, "loss": 1.0, "top1": score or 0.0, "top5": 90.0, "count": 360})
        if finished:
            log.end({"step": 2, "status": "done", "parameters": 123})
        log.close()

    return write
