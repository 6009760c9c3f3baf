"""scripts/grow.py: from a run, a file or timm to a file that starts a run."""

import json
import runpy
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from acmix import models
from acmix.checkpoint.grown import new_parameters
from acmix.errors import UserError
from scripts import grow

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
model: {name: acmix_resnet26, kwargs: {stem: cifar, base_width: 8, layers: [1, 1, 1, 1]}}
data: {dataset: digits, image_size: 16, batch_size: 16, val_batch_size: 360, num_workers: 0}
augment: {crop: none, hflip: 0.0}
optimizer: {name: adamw, lr: 2e-3}
schedule: {epochs: 1, steps: 2}
run: {dir: run, log_every: 1, threads: 1, device: cpu}
"""
Program = Callable[..., tuple[int, str, str]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    return tmp_path


@pytest.fixture
def program(folder: Path, capfd: pytest.CaptureFixture[str]) -> Program:
    """Run scripts/grow.py in this process: exit status, stdout, stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        return grow.main(arguments), *capfd.readouterr()

    return run


@pytest.fixture
def train(folder: Path) -> Callable[..., int]:
    main = runpy.run_path(str(ROOT / "train.py"))["main"]
    return lambda *arguments: main(["--config", "tiny.yaml", *arguments])


def test_a_plain_run_grows_into_a_file_that_starts_a_run_and_resumes_exactly(
    program: Program, train: Callable[..., int]
) -> None:
    assert train("model.kwargs.block=plain", "run.dir=plain", "schedule.steps=1") == 0
    status, output, errors = program(
        *("--from", "plain", "--model", "acmix_resnet26", "--out", "grown.safetensors"),
        *("--calibrate", "tiny.yaml", "--images", "24"),
    )
    assert status == 0, errors
    assert output.count("approximated") == 4
    assert "energy kept" in output
    assert "top-1 before any training" in output
    new = new_parameters("grown.safetensors")
    assert {"layer1.0.acmix.mix.alpha", "layer4.0.acmix.attention.position_weight"} <= set(new)

    start = ["model.checkpoint=grown.safetensors", "optimizer.new_lr_factor=10"]
    assert train(*start, "run.dir=whole") == 0
    assert train(*start, "run.dir=parts", "schedule.steps=1") == 0
    Path("grown.safetensors").unlink()
    assert train(*start, "run.dir=parts", "--resume", "auto") == 0
    whole, parts = (load_file(f"{run}/checkpoints/last/model.safetensors") for run in ("whole", "parts"))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    assert new_parameters("parts") == new_parameters("whole/checkpoints/last") == new


def test_the_metadata_say_what_is_new_and_the_file_loads_with_plain_timm(program: Program) -> None:
    source = models.create_model("acmix_resnet26", 3, mix="attention", stem="cifar", base_width=8)
    save_file(source.state_dict(), "attention.safetensors")
    shape = ["model.kwargs.stem=cifar", "model.kwargs.base_width=8"]
    arguments = ["--from", "attention.safetensors", "--model", "acmix_resnet26", "--out", "deep/grown.safetensors"]
    status, output, errors = program(*arguments, *shape, "--share", "0.25")
    assert status == 0, errors
    assert "alpha 0.75, beta 0.25" in output
    with safe_open("deep/grown.safetensors", framework="pt") as opened:
        assert opened.metadata()["format"] == "pt"
        assert json.loads(opened.metadata()["acmix.new"]) == new_parameters("deep/grown.safetensors")
    network = models.create_model("acmix_resnet26", 3, stem="cifar", base_width=8)
    network.load_state_dict(load_file("deep/grown.safetensors"))
    assert mode_of("deep/grown.safetensors") == mode_of("tiny.yaml")
    assert program(*arguments, *shape)[0] == 2  # it exists


def mode_of(file: str) -> int:
    """Who may read and write a file."""
    return Path(file).stat().st_mode


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--from", "nowhere", "--out", "a.safetensors"], "nowhere"),
        (["--from", "tiny.yaml", "--out", "a.safetensors"], "unknown kind of weights file"),
        (["--from", "nowhere", "--out", "a.pth"], "must end in .safetensors"),
        (["--from", "nowhere", "--out", "/proc/no/a.safetensors"], "cannot write there"),
        (["--from", "nowhere", "--out", "a.safetensors", "--share", "1"], "--share"),
        (["--from", "nowhere", "--out", "a.safetensors", "data.root=x"], "--calibrate"),
        (["--from", "nowhere", "--out", "a.safetensors", "--images", "9"], "--images: are those of --calibrate"),
        (["--from", "timm:resnet5000", "--out", "a.safetensors"], "no pretrained weights of that name"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_message(program: Program, arguments: list[str], told: str) -> None:
    status, _, errors = program("--model", "acmix_resnet26", *arguments)
    assert status == 2
    assert told in errors
    assert errors.count("error: ") == 1
    assert "Traceback" not in errors


def test_timms_weights_without_a_connection_are_a_clear_message(
    program: Program, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    status, _, errors = program(
        "--from", "timm:resnet50.a1_in1k", "--model", "acmix_resnet50", "--out", "a.safetensors"
    )
    assert status == 2
    assert "--from timm:resnet50.a1_in1k" in errors
    assert "--from FILE" in errors
    assert "Traceback" not in errors


def test_timms_resnet_is_ours_and_one_that_computes_something_else_is_refused() -> None:
    shape = {"layers": (1, 1, 1, 1)}
    same = timm.create_model("resnet26", **shape)
    grow._prove_same(same, same.state_dict(), "acmix_resnet26", shape)
    other = timm.create_model("resnet26", act_layer="gelu", **shape)
    with pytest.raises(UserError, match="computes something else"):
        grow._prove_same(other, other.state_dict(), "acmix_resnet26", shape)
