"""scripts/find_lr.py: what it sees in a curve, that it trains as the run would, and what it leaves."""

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
from PIL import Image
from safetensors.torch import save_file

from acmix.engine.range_test import RangeTest, growing_rates

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
model: {name: test_resnet}
data: {dataset: digits, image_size: 24, batch_size: 16, num_workers: 0}
augment: {crop: pad, pad: 2}
optimizer: {name: momentum, layer_decay: 0.5}
schedule: {epochs: 1}
run: {threads: 1}
"""
Find = Callable[..., tuple[int, str, str]]


@pytest.fixture
def find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Find:
    """The script's main in this process, in an empty folder that holds tiny.yaml."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    main = runpy.run_path(str(ROOT / "scripts" / "find_lr.py"))["main"]

    def run(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        return main(["--config", "tiny.yaml", *arguments]), *capfd.readouterr()

    return run


def curve(noise: float = 0.0) -> RangeTest:
    """A loss that falls from 2.3, fastest at 1e-3, and rises from 1e-1 on."""
    rates = np.array(growing_rates(1e-6, 1.0, 121))
    place = np.log10(rates)
    losses = 2.3 - 1.5 / (1 + np.exp(-4 * (place + 3))) + 2 * np.clip(place + 1, 0, None)
    return RangeTest(rates, losses + noise * np.random.default_rng(0).standard_normal(121), diverged=False)


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_the_steepest_descent_and_the_minimum_of_a_known_curve_are_found(noise: float) -> None:
    found = curve(noise)
    assert found.steepest is not None
    assert np.log10(found.rates[found.steepest]) == pytest.approx(-3, abs=0.25)
    assert -2 < np.log10(found.rates[found.minimum]) < -0.9


def test_a_loss_that_only_rises_suggests_nothing() -> None:
    assert RangeTest(np.geomspace(1e-3, 1, 20), np.linspace(2, 9, 20), diverged=True).steepest is None


def test_it_trains_through_epochs_until_the_loss_diverges_and_leaves_only_its_files(find: Find, tmp_path: Path) -> None:
    files = ["--out", "out/curve.png", "--json", "out/curve.json"]
    status, out, errors = find(*files, "--to", "1e6", "--steps", "24", "data.batch_size=100")  # 14 steps an epoch
    assert status == 0, errors
    answer, whole = json.loads(out.splitlines()[-1]), json.loads((tmp_path / "out" / "curve.json").read_text())
    assert answer["diverged"]
    assert 14 < answer["steps"] < 24
    assert f"Suggestion: optimizer.lr={answer['suggestion']:.2g}" in out
    assert answer["suggestion"] == pytest.approx(answer["lowest"] / 10)
    assert {key: whole[key] for key in answer} == answer
    assert len(whole["lr"]) == len(whole["loss"]) == len(whole["smoothed"]) == answer["steps"]
    assert Image.open(tmp_path / "out" / "curve.png").width > 500
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tiny.yaml"]


def test_rates_are_those_of_optimizer_lr_also_where_it_is_scaled(find: Find) -> None:
    def result(*arguments: str) -> dict[str, Any]:
        assert find("--json", "out.json", "--steps", "10", *arguments)[0] == 0
        return json.loads(Path("out.json").read_text())

    plain = result("--from", "1e-3", "--to", "1")
    scaled = result("--from", "2e-3", "--to", "2", "optimizer.lr_batch=32")
    assert scaled["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert scaled["lr"] == pytest.approx([2 * rate for rate in plain["lr"]])
    assert scaled["steepest"] == pytest.approx(2 * plain["steepest"])


def test_weights_that_give_no_finite_loss_are_told_as_such(find: Find) -> None:
    weights = timm.create_model("test_resnet", num_classes=10).state_dict()
    save_file({name: value * float("nan") for name, value in weights.items()}, "spoilt.safetensors")
    status, out, errors = find("--out", "curve.png", "model.checkpoint=spoilt.safetensors")
    assert (status, out) == (2, "")
    assert "the first loss is not finite" in errors
    assert not Path("curve.png").exists()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--from", "1", "--to", "0.1"], "--from, --to: must be 0 < FROM < TO, got 1 and 0.1"),
        (["--steps", "5"], "--steps: 5 are too few"),
        (["--out", "curve.txt"], "--out curve.txt: the name must end in .png"),
        (["--out", "a.svg", "--json", "./a.svg"], "--out, --json: both are a.svg; give each a file of its own"),
        (["optimizer.name=sdg"], "optimizer.name"),
        (["lr=1"], "optimizer.lr"),
    ],
)
def test_bad_usage_is_refused(arguments: list[str], part: str, find: Find) -> None:
    status, _, errors = find(*arguments)
    assert status == 2
    assert part in errors
    assert "Traceback" not in errors
