"""The seam of probes: a measure of one's own, registered, reaches the record, TensorBoard, plots and a resumed run."""

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from acmix.errors import UserError
from acmix.telemetry.history import read_probe
from acmix.telemetry.probes import Probe, find_probes, register_probe

ROOT = Path(__file__).resolve().parents[3]
CONFIG = """
model: {name: acmix_resnet26, kwargs: {stem: cifar, base_width: 8}}
data: {dataset: digits, image_size: 24, batch_size: 8, val_batch_size: 120, num_workers: 0}
schedule: {epochs: 1, steps: 9}
run: {log_every: 2, threads: 1}
"""
BUILT_IN = ("paths", "path_balance", "path_shares")
OWN_TRAIN = """
import sys

import train
from acmix import ACmix
from acmix.telemetry.probes import Probe, register_probe


def weight_rms(model):
    return [
        {"layer": name, "stage": block.mix.stage, "rms": block.qkv.weight.square().mean().sqrt()}
        for name, block in model.named_modules()
        if isinstance(block, ACmix)
    ]


register_probe(Probe("weights", weight_rms, every=3))

if __name__ == "__main__":
    sys.exit(train.main())
"""


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the test's probes afterwards."""
    monkeypatch.setattr("acmix.telemetry.probes.probe._PROBES", {probe.name: probe for probe in find_probes(BUILT_IN)})


def rows_of(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "time"} for row in rows]


def probe_rows(run: Path) -> list[dict[str, Any]]:
    return sorted((row for row in rows_of(run) if "layers" in row), key=lambda row: (row["event"], row["step"]))


def curves_of(run: Path) -> dict[str, list[tuple[int, float]]]:
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    tags = [tag for tag in board.Tags()["scalars"] if tag.startswith(("paths/", "weights/"))]
    return {tag: [(point.step, point.value) for point in board.Scalars(tag)] for tag in tags}


def test_a_probe_of_ones_own_is_logged_shown_drawn_and_resumed(tmp_path: Path, launcher: Any) -> None:
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    (tmp_path / "my_train.py").write_text(OWN_TRAIN)
    command = [tmp_path / "my_train.py", "--config", "tiny.yaml", "run.checkpoint_every=6"]

    def train(*arguments: str) -> None:
        ended = launcher.start(*command, *arguments, folder=tmp_path, fresh=True)
        assert ended.wait() == 0, ended.errors

    run = tmp_path / "run"
    train("run.dir=run", "run.probes=[paths, weights]")
    rows, curves = probe_rows(run), curves_of(run)
    assert [row["step"] for row in rows if row["event"] == "paths"] == [0, 2, 4, 6, 8, 9]
    assert [row["step"] for row in rows if row["event"] == "weights"] == [0, 3, 6, 9]
    weights = read_probe(run, "weights")
    assert weights.layers == read_probe(run, "paths").layers
    assert weights.values["rms"].shape == (4, 8)
    assert (weights.values["rms"][0] != weights.values["rms"][3]).any()
    expected = {f"weights/rms/{stage}/{layer}" for layer, stage in zip(weights.layers, weights.stages, strict=True)}
    expected |= {f"weights/rms/{stage}/mean" for stage in weights.stages}
    assert {tag for tag in curves if tag.startswith("weights/")} == expected

    train("run.probes=[paths, weights]", "--resume", "run/checkpoints/step_00000006")
    assert probe_rows(run) == rows
    assert curves_of(run) == curves

    plot = runpy.run_path(str(ROOT / "scripts" / "plot_paths.py"))["main"]
    assert plot([str(run), "--probe", "weights", "--out", str(tmp_path / "weights.png")]) == 0
    assert (tmp_path / "weights.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run train.py's main in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    main = runpy.run_path(str(ROOT / "train.py"))["main"]
    return lambda *arguments: main(["--config", "tiny.yaml", "schedule.steps=3", "run.log_every=1", *arguments])


@pytest.mark.usefixtures("registry")
def test_probes_change_nothing_of_the_training(train: Callable[..., int]) -> None:
    def draws_numbers(model: nn.Module) -> list[dict[str, Any]]:
        return [{"layer": "head", "stage": 1, "noise": torch.rand(())}]

    register_probe(Probe("noise", draws_numbers))
    assert train("run.dir=off", "run.probes=[]") == 0
    assert train("run.dir=on", "run.probes=[noise, paths, path_balance, path_shares]", "paths.every=2") == 0
    assert not probe_rows(Path("off"))
    assert {row["event"] for row in probe_rows(Path("on"))} == {"noise", *BUILT_IN}
    off, on = (
        [(row["step"], row["loss"]) for row in rows_of(Path(run)) if row["event"] in ("train", "eval")]
        for run in ("off", "on")
    )
    assert off == on


def test_shares_are_measured_on_the_same_images_whatever_is_resumed(
    train: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ("run.checkpoint_every=2", "paths.every=2", "paths.images=4")
    assert train("run.dir=run", *arguments) == 0
    rows = probe_rows(Path("run"))
    assert [row["step"] for row in rows if row["event"] == "path_shares"] == [0, 2, 3]
    assert [row["step"] for row in rows if row["event"] == "path_balance"] == [0, 1, 2, 3]
    before, *after = [row["layers"] for row in rows if row["event"] == "path_balance"]
    assert {layer["alpha_gradient"] for layer in before} == {None}
    assert all(layer["alpha_gradient"] for layers in after for layer in layers)
    lines = [line.split(": ")[0] for line in capfd.readouterr().out.splitlines() if line.startswith("step ")]
    assert lines == [f"step {step}  {keys}" for step in (0, 3) for keys in ("alpha/beta", "attention_share")]
    assert train("--resume", "run/checkpoints/step_00000002", *arguments) == 0
    assert probe_rows(Path("run")) == rows


def test_images_are_needed_at_both_ends_and_every_so_often_not_at_each_epoch() -> None:
    (probe,) = find_probes(["path_shares"], images_every=100)
    assert [step for step in range(0, 301, 50) if probe.is_due(step, logged=True, end=250)] == [0, 100, 200, 250, 300]
    assert [step for step in range(0, 301, 50) if probe.is_due(step, logged=True)] == [0, 100, 200, 300]
    (paths,) = find_probes(["paths"], images_every=100)
    assert paths.is_due(50, logged=False, end=250)


@pytest.mark.usefixtures("registry")
def test_a_probe_that_fails_ends_the_run_with_its_traceback(
    train: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(model: nn.Module) -> list[dict[str, Any]]:
        raise ArithmeticError("a defect of the probe")

    register_probe(Probe("broken", broken))
    assert train("run.dir=run", "run.probes=[broken]") == 1
    assert "ArithmeticError: a defect of the probe" in capfd.readouterr().err
    assert json.loads(Path("run/summary.json").read_text())["status"] == "failed"


@pytest.mark.usefixtures("registry")
def test_names_that_are_taken_are_refused_at_registration() -> None:
    for name in (*BUILT_IN, "train", "eval", "start", "end", "skip", "unread"):
        with pytest.raises(ValueError, match=name):
            register_probe(Probe(name, lambda model: []))
    with pytest.raises(ValueError, match="every"):
        register_probe(Probe("mine", lambda model: [], every=0))
    register_probe(Probe("mine", lambda model: []))
    assert [probe.name for probe in find_probes(["mine", "paths", "mine"])] == ["mine", "paths"]
    with pytest.raises(
        UserError,
        match=r"run\.probes: unknown probe 'pats'; nearest: paths \(all: paths, path_balance, path_shares, mine\)",
    ):
        find_probes(["mine", "pats"])


def test_a_row_without_its_place_names_the_probe() -> None:
    with pytest.raises(ValueError, match=r"probe mine: .*stage"):
        Probe("mine", lambda model: [{"layer": "head", "rms": 1.0}]).rows(nn.Identity())


def test_gradients_are_off_while_a_probe_measures() -> None:
    layer = nn.Linear(2, 2)
    probe = Probe("mine", lambda model: [{"layer": "", "stage": 1, "graph": (layer.weight * 2).requires_grad}])
    assert probe.rows(layer)[0]["graph"] is False
