"""scripts/analyse.py on a small trained network: similarity of layers, receptive field, refusals."""

import json
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
model: {name: acmix_resnet26, kwargs: {stem: cifar, base_width: 8, layers: [1, 1, 1, 1]}}
data: {dataset: digits, image_size: 24, batch_size: 8, val_batch_size: 120, num_workers: 0}
schedule: {epochs: 1, steps: 1}
"""

Analyse = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An ACmix network and its plain twin."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.yaml").write_text(CONFIG)
    train = runpy.run_path(str(ROOT / "train.py"))["main"]
    for name, block in (("ours", "acmix"), ("twin", "plain")):
        arguments = ("--config", folder / "tiny.yaml", f"run.dir={folder / name}", f"model.kwargs.block={block}")
        assert train([str(argument) for argument in arguments]) == 0
    return folder / "ours", folder / "twin"


@pytest.fixture
def analyse(capfd: pytest.CaptureFixture[str]) -> Analyse:
    main = runpy.run_path(str(ROOT / "scripts" / "analyse.py"))["main"]

    def run(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        return (main([str(argument) for argument in arguments]), *capfd.readouterr())

    return run


def test_layers_are_compared_within_a_run_and_with_its_twin(
    runs: tuple[Path, Path], analyse: Analyse, tmp_path: Path
) -> None:
    def compare(*arguments: object) -> dict[str, Any]:
        status, out, errors = analyse(*arguments, "--cka", "--images", 20)
        assert status == 0, errors
        result: dict[str, Any] = json.loads(out.splitlines()[-1])
        return result

    own = compare(runs[0])
    assert own["rows"] == own["columns"] == [f"layer{stage}.0" for stage in (1, 2, 3, 4)]
    assert [own["cka"][i][i] for i in range(4)] == pytest.approx([1.0] * 4)
    assert all(0 <= value <= 1 for row in own["cka"] for value in row)
    both = compare(*runs, "--out", tmp_path / "cka.png", "--json", tmp_path / "cka.json")
    assert both["columns"][-1] == "layer4"
    assert all(0 <= value <= 1 for row in both["cka"] for value in row)
    assert json.loads((tmp_path / "cka.json").read_text()) == both
    assert (tmp_path / "cka.png").read_bytes().startswith(b"\x89PNG")


def test_receptive_fields_have_areas(runs: tuple[Path, Path], analyse: Analyse, tmp_path: Path) -> None:
    status, out, errors = analyse(*runs, "--receptive-field", "--images", 4, "--out", tmp_path / "field.svg")
    assert status == 0, errors
    for row, run in zip(json.loads(out.splitlines()[-1]), runs, strict=True):
        assert row["run"] == str(run)
        assert list(row["areas"]) == ["0.2", "0.5", "0.99"]
        assert 0 < row["areas"]["0.2"] <= row["areas"]["0.99"] <= 1
    assert "<svg" in (tmp_path / "field.svg").read_text()


def test_bad_usage_is_refused_before_the_work(runs: tuple[Path, Path], analyse: Analyse, tmp_path: Path) -> None:
    for arguments, part in (
        ((runs[0],), "--cka"),
        ((runs[0], "--cka", "--out", tmp_path / "a.gif"), ".png"),
        ((*runs, runs[0], "--cka"), "two runs"),
        ((tmp_path / "nowhere", "--cka"), "RUN"),
        ((tmp_path, "--cka"), "give a run, or a checkpoint in one"),
        ((runs[0], "--cka", "--images", 1), "two images at least"),
    ):
        status, _, errors = analyse(*arguments)
        assert status == 2
        assert errors.startswith("error: ")
        assert part in errors


def test_a_network_that_has_diverged_is_told_as_such(runs: tuple[Path, Path], analyse: Analyse, tmp_path: Path) -> None:
    run = tmp_path / "diverged"
    shutil.copytree(runs[0], run, symlinks=True)
    weights = load_file(run / "checkpoints" / "last" / "model.safetensors")
    (run / "weights.safetensors").write_bytes(save({name: tensor * float("nan") for name, tensor in weights.items()}))
    for what in ("--cka", "--receptive-field"):
        status, out, errors = analyse(run / "weights.safetensors", what, "--images", 4, "--out", tmp_path / "a.png")
        assert (status, out) == (2, "")
        assert "it has diverged" in errors
    assert not (tmp_path / "a.png").exists()
