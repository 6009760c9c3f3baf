"""eval.py's command line: runs, checkpoints and weights files; bad input is refused with one message."""

import json
import os
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from acmix.models import create_model

ROOT = Path(__file__).resolve().parents[1]
CONFIG = """
model: {name: test_resnet}
data: {dataset: digits, image_size: 24, batch_size: 16, val_batch_size: 120, num_workers: 0}
augment: {crop: pad, pad: 2}
schedule: {epochs: 1, steps: 2}
ema: {decay: 0.5}
"""


class Outcome(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def result(self) -> dict[str, Any]:
        """The last line on stdout."""
        assert self.status == 0, self.err
        read: dict[str, Any] = json.loads(self.out.splitlines()[-1])
        return read


Evaluate = Callable[..., Outcome]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two updates, with averaged weights."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.yaml").write_text(CONFIG)
    main = runpy.run_path(str(ROOT / "train.py"))["main"]
    assert main(["--config", str(folder / "tiny.yaml"), f"run.dir={folder / 'run'}"]) == 0
    return folder / "run"


@pytest.fixture
def evaluate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Evaluate:
    monkeypatch.chdir(tmp_path)
    main = runpy.run_path(str(ROOT / "eval.py"))["main"]

    def run(*arguments: object) -> Outcome:
        capfd.readouterr()
        status = main([str(argument) for argument in arguments])
        return Outcome(status, *capfd.readouterr())

    return run


def assert_refused(outcome: Outcome, *parts: str) -> None:
    assert outcome.status == 2, outcome
    assert outcome.err.startswith("error: ")
    assert "Traceback" not in outcome.err
    for part in parts:
        assert part in outcome.err


def test_run_checkpoint_and_weights_give_what_training_logged(run_dir: Path, evaluate: Evaluate) -> None:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    [logged] = [row for row in rows if row["event"] == "eval"]
    for path in (run_dir, run_dir / "checkpoints" / "best", run_dir / "checkpoints" / "last" / "ema.safetensors"):
        result = evaluate("--checkpoint", path).result
        assert {key: result[key] for key in ("top1", "top5", "count", "loss")} == {
            key: logged[key] for key in ("top1", "top5", "count", "loss")
        }


def test_a_world_size_that_no_torchrun_gave_leaves_no_image_out(
    run_dir: Path, evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert evaluate("--checkpoint", run_dir).result["count"] == 360


def test_half_a_description_of_a_group_is_refused(run_dir: Path, launcher: Any) -> None:
    program = launcher.start(ROOT / "eval.py", "--checkpoint", run_dir, env={"RANK": "0", "WORLD_SIZE": "1"})
    assert program.wait(60) == 2
    assert program.errors.startswith("error: the environment has RANK, but not MASTER_ADDR, MASTER_PORT: start several")


def test_raw_weights_on_request_and_the_result_in_a_file(run_dir: Path, evaluate: Evaluate, tmp_path: Path) -> None:
    averaged = evaluate("--checkpoint", run_dir, "--weights", "ema").result
    raw = evaluate("--checkpoint", run_dir, "--weights", "raw", "--json", tmp_path / "raw.json").result
    assert raw["loss"] != averaged["loss"]
    assert json.loads((tmp_path / "raw.json").read_text()) == raw
    file = run_dir / "checkpoints" / "last" / "model.safetensors"
    assert evaluate("--checkpoint", file).result["loss"] == raw["loss"]


def test_a_loss_that_is_not_finite_is_told_and_written_as_a_string(
    run_dir: Path, evaluate: Evaluate, tmp_path: Path
) -> None:
    weights = load_file(run_dir / "checkpoints" / "last" / "model.safetensors")
    save_file({name: value * float("nan") for name, value in weights.items()}, tmp_path / "nan.safetensors")
    options = ["--config", run_dir / "config.yaml", "--json", "result.json"]
    outcome = evaluate("--checkpoint", "nan.safetensors", *options, "model.num_classes=10")
    assert "warning: the loss of this evaluation is nan" in outcome.err
    assert outcome.result["loss"] == json.loads(Path("result.json").read_text())["loss"] == "nan"


def test_report_holds_every_class_and_a_picture(run_dir: Path, evaluate: Evaluate, tmp_path: Path) -> None:
    result = evaluate("--checkpoint", run_dir, "--report", tmp_path / "report").result
    report = json.loads((tmp_path / "report" / "classes.json").read_text())
    assert sum(report[str(digit)]["support"] for digit in range(10)) == result["count"] == 360
    assert report["accuracy"] == pytest.approx(result["top1"] / 100)
    matrix = [
        list(map(int, line.split(","))) for line in (tmp_path / "report" / "confusion.csv").read_text().splitlines()
    ]
    assert sum(map(sum, matrix)) == 360
    with Image.open(tmp_path / "report" / "confusion.png") as picture:
        assert picture.width > 300


def test_paths_and_lesions_of_every_block(evaluate: Evaluate, tmp_path: Path) -> None:
    model = "{name: acmix_resnet26, kwargs: {stem: cifar, base_width: 8, layers: [1, 1, 1, 1]}}"
    (tmp_path / "acmix.yaml").write_text(CONFIG.replace("{name: test_resnet}", model))
    kwargs = {"stem": "cifar", "base_width": 8, "layers": (1, 1, 1, 1)}
    torch.manual_seed(0)
    save_file(create_model("acmix_resnet26", 10, **kwargs).state_dict(), tmp_path / "weights.safetensors")
    arguments = ("--checkpoint", "weights.safetensors", "--config", "acmix.yaml", "--json", "paths.json")
    result = evaluate(*arguments, "--paths-images", 30, "data.val_batch_size=20").result
    assert json.loads((tmp_path / "paths.json").read_text()) == result
    assert result["count"] == 360
    assert [row["depth"] for row in result["paths"]] == [1, 2, 3, 4]
    keys = {"layer", "stage", "depth", "alpha", "beta", "attention_rms", "convolution_rms", "attention_share",
            "cosine", "entropy_bits", "distance_px"}  # fmt: skip
    assert all(keys <= set(row) for row in result["paths"])
    assert len(result["lesions"]) == (4 + 4 + 1) * 2 * 2
    assert all({"path", "mode", "top1", "delta_top1", "loss", "delta_loss"} <= set(row) for row in result["lesions"])
    assert {round(3 * (row["top1"] - row["delta_top1"]), 6) % 10 for row in result["lesions"]} == {0.0}  # of 30 images
    assert any(row["delta_loss"] for row in result["lesions"])


def test_a_model_without_blocks_has_no_paths(run_dir: Path, evaluate: Evaluate) -> None:
    result = evaluate("--checkpoint", run_dir, "--paths").result
    assert result["paths"] == result["lesions"] == []
    assert_refused(evaluate("--checkpoint", run_dir, "--paths-images", "0"), "--paths-images")


def test_weights_file_needs_a_config_and_takes_any_prefix(run_dir: Path, evaluate: Evaluate, tmp_path: Path) -> None:
    weights = load_file(run_dir / "checkpoints" / "last" / "model.safetensors")
    torch.save({"state_dict": {f"module.{key}": value for key, value in weights.items()}}, tmp_path / "weights.pth")
    assert_refused(evaluate("--checkpoint", "weights.pth"), "weights.pth", "--config")
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    result = evaluate("--checkpoint", "weights.pth", "--config", "tiny.yaml").result
    assert result["loss"] == evaluate("--checkpoint", run_dir, "--weights", "raw").result["loss"]


def test_bad_input_is_refused(run_dir: Path, evaluate: Evaluate, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    config = ("--config", "tiny.yaml")
    assert_refused(evaluate(), "--checkpoint")
    assert_refused(evaluate("--checkpoint", "nowhere"), "nowhere")
    assert_refused(evaluate("--checkpoint", run_dir, "data.imagesize=32"), "data.imagesize", "data.image_size")
    assert_refused(evaluate("--checkpoint", run_dir, "model.name=test_resnett"), "test_resnet")
    assert_refused(
        evaluate("--checkpoint", run_dir, "model.name=test_vit", "model.kwargs={img_size: 24}"), "do not fit"
    )
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    assert_refused(evaluate("--checkpoint", "other.safetensors", *config), "other.safetensors", "do not fit")
    file = run_dir / "checkpoints" / "last" / "model.safetensors"
    assert_refused(evaluate("--checkpoint", file, "--weights", "ema"), "ema")


def test_a_result_goes_to_new_folders(run_dir: Path, evaluate: Evaluate, tmp_path: Path) -> None:
    outputs = ("--json", tmp_path / "a" / "b" / "x.json", "--report", tmp_path / "c" / "d")
    result = evaluate("--checkpoint", run_dir, *outputs).result
    assert json.loads((tmp_path / "a" / "b" / "x.json").read_text()) == result
    assert (tmp_path / "c" / "d" / "confusion.png").exists()


def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    run_dir: Path, evaluate: Evaluate, tmp_path: Path
) -> None:
    for option, place in (("--json", "/proc/x/y.json"), ("--report", "/proc/x"), ("--json", tmp_path)):
        outcome = evaluate("--checkpoint", run_dir, option, place)
        assert_refused(outcome, f"{option} {place}: cannot write there")
        assert outcome.out == ""
    assert_refused(evaluate("--checkpoint", run_dir, "--json", "new/x.json", "model.name=no_such"), "no_such")
    assert os.listdir(tmp_path) == []


def test_a_result_that_could_not_be_written_is_printed(run_dir: Path, evaluate: Evaluate, tmp_path: Path) -> None:
    outcome = evaluate("--checkpoint", run_dir, "--json", "/dev/full", "--report", tmp_path / "report")
    assert_refused(outcome, "cannot write /dev/full: No space left")
    assert json.loads(outcome.out.splitlines()[-1])["count"] == 360
    assert (tmp_path / "report" / "classes.json").exists()


def test_home_and_variables_in_paths_are_expanded(
    run_dir: Path, evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(run_dir.parent))
    monkeypatch.setenv("NEW", "written")
    outcome = evaluate("--checkpoint", "~/run", "--json", "$NEW.json", "--report", "${NEW}_report")
    assert json.loads(Path("written.json").read_text()) == outcome.result
    assert any(Path("written_report").iterdir())
    assert_refused(evaluate("--checkpoint", "$NOT_SET_HERE/run"), "--checkpoint", "NOT_SET_HERE")
    assert_refused(evaluate("--checkpoint", "~/rum"), f"nearest: {run_dir}")
    assert_refused(evaluate("--checkpoint", "hf-hub:timm/resnet18"), "download")


SWIN = """
model: {name: acmix_swin_tiny, kwargs: {embed_dim: 8, heads: [1, 2, 2, 4], patch_size: 2, in_chans: 1}}
data: {dataset: digits, image_size: [16, 24], batch_size: 16, val_batch_size: 120, num_workers: 0}
schedule: {epochs: 1, steps: 1}
"""


def test_a_swin_on_grey_images_is_evaluated_at_the_size_it_was_built_for(evaluate: Evaluate, tmp_path: Path) -> None:
    (tmp_path / "swin.yaml").write_text(SWIN)
    main = runpy.run_path(str(ROOT / "train.py"))["main"]
    assert main(["--config", "swin.yaml", "run.dir=run"]) == 0
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    [logged] = [row for row in rows if row["event"] == "eval"]
    assert evaluate("--checkpoint", "run").result["loss"] == logged["loss"]
    assert_refused(evaluate("--checkpoint", "run", "data.image_size=48"), "image size that it was made for")
    contradiction = evaluate("--checkpoint", "run", "data.image_size=48", "model.kwargs.img_size=[16,24]")
    assert_refused(contradiction, "model.kwargs.img_size", "data.image_size")


def test_images_that_the_model_cannot_take_are_refused(evaluate: Evaluate, tmp_path: Path) -> None:
    (tmp_path / "vit.yaml").write_text(CONFIG.replace("test_resnet", "test_vit, kwargs: {img_size: 32}"))
    save_file(create_model("test_vit", 10, img_size=32).state_dict(), tmp_path / "vit.safetensors")
    options = ("--checkpoint", "vit.safetensors", "--config", "vit.yaml", "--json", "result.json")
    assert_refused(evaluate(*options), "model.kwargs.img_size=24", "data.image_size=32", "Input height (24)")
    assert not Path("result.json").exists()
    assert evaluate(*options, "data.image_size=32").result["count"] == 360


@pytest.mark.parametrize("name", ["last", "best"])
def test_a_checkpoint_that_a_killed_save_was_replacing_is_evaluated(
    name: str, run_dir: Path, evaluate: Evaluate, tmp_path: Path
) -> None:
    copy = shutil.copytree(run_dir, tmp_path / "run", symlinks=True)
    saved = copy / "checkpoints"
    (saved / "step_00000002").rename(saved / f".old-step_00000002-{2**22 + 1}")
    assert evaluate("--checkpoint", saved / name).result["count"] == 360
