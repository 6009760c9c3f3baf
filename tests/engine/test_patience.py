"""Early stopping: when patience is over, that all ranks end together, and what a resume makes of it."""

import json
import math
import runpy
from collections.abc import Callable
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from acmix.config import RunConfig
from acmix.engine.progress import Progress, out_of_patience
from acmix.json_text import json_text

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
model: {name: test_resnet}
data: {dataset: folder, root: data, image_size: 24, batch_size: 4, num_workers: 0}
augment: {crop: none}
schedule: {epochs: 6}
run: {dir: run, threads: 1, min_delta: 100} # no evaluation beats the first by so much
"""
Train = Callable[..., tuple[int, str]]


def prepare(folder: Path) -> None:
    """Eight images to train and to validate on, and the config."""
    (folder / "tiny.yaml").write_text(CONFIG)
    for split, name, index in product(("train", "val"), ("ant", "bee"), range(4)):
        file = folder / "data" / split / name / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (24, 24), (60 * index, 255 * (name == "ant"), 0)).save(file)


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Train:
    """train.py's main in this process: two updates an epoch."""
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path)
    main = runpy.run_path(str(ROOT / "train.py"))["main"]

    def run(*arguments: str) -> tuple[int, str]:
        capfd.readouterr()
        status = main(["--config", "tiny.yaml", *arguments])
        return status, capfd.readouterr().out

    return run


def summary(run: Path = Path("run")) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


@pytest.mark.parametrize(
    ("scores", "patience", "min_delta", "over"),
    [
        ([50, 50, 50], 2, 0.0, True),
        ([50, 50, 51], 2, 0.0, False),
        ([50, 51, 50, 51], 2, 0.0, True),
        ([50, 50.3, 50.6, 50.9], 3, 1.0, True),
        ([50, 50.3, 50.6, 51.2], 3, 1.0, False),
        ([50, 40, 30], 0, 0.0, False),
        ([0.0], 1, 0.0, False),
        ([], 1, 0.0, False),
    ],
)
def test_patience_counts_the_evaluations_that_do_not_beat_the_best_by_enough(
    scores: list[float], patience: int, min_delta: float, over: bool
) -> None:
    history = [{"top1": score} for score in scores]
    assert out_of_patience(RunConfig(patience=patience, min_delta=min_delta), history) == over


def test_progress_comes_back_from_json_as_it_was_also_where_a_loss_is_not_finite() -> None:
    rows = [{"epoch": 1, "step": 2, "loss": 0.5, "top1": 10.0}, {"epoch": 2, "step": 4, "loss": math.inf, "top1": 9.0}]
    progress = Progress(step=4, epoch=2, best=rows[0], history=rows, skipped=1)
    assert Progress.restore(json.loads(json_text(asdict(progress)))) == progress


def test_an_evaluation_of_a_network_that_diverged_beats_none() -> None:
    history = [{"top1": 10.0, "loss": 1.0}, {"top1": 20.0, "loss": "nan"}, {"top1": 20.0, "loss": math.inf}]
    assert out_of_patience(RunConfig(patience=2), history)


def test_a_run_out_of_patience_is_done_and_goes_on_only_with_more(train: Train) -> None:
    status, out = train("run.patience=1", "run.checkpoint_every=1")
    assert status == 0
    assert "Ends here by run.patience: 1 evaluations without a better top-1" in out
    ended = summary()
    assert (ended["status"], ended["stopped"], ended["epoch"], ended["step"]) == ("done", "patience", 2, 4)
    status, out = train("--resume", "auto", "run.patience=1")
    assert (status, out) == (0, "run is finished at step 4 by run.patience, 1; raise it to go on\n")
    assert train("--resume", "run/checkpoints/step_00000003", "run.patience=2")[0] == 0
    assert (summary()["epoch"], summary()["stopped"]) == (3, "patience"), "evaluations before the resume count"
    assert train("--resume", "auto", "run.patience=0", "run.min_delta=0", "schedule.steps=7")[0] == 0
    assert (summary()["step"], "stopped" in summary()) == (7, False)


def test_all_ranks_run_out_of_patience_together(tmp_path: Path, launcher: Any) -> None:
    prepare(tmp_path)
    options = ["--config", "tiny.yaml", "data.batch_size=2", "run.patience=1"]
    members = launcher.start_ranks(2, ROOT / "train.py", *options, folder=tmp_path)
    assert [member.wait() for member in members] == [0, 0], members[0].errors
    assert (summary(tmp_path / "run")["epoch"], summary(tmp_path / "run")["stopped"]) == (2, "patience")
