"""scripts/export.py and scripts/predict.py: a run as a file that computes the same, and what both say of images."""

import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save
from timm.data import create_transform

from acmix.config import Config
from acmix.data.datasets import statistics_of
from acmix.data.transforms import build_val_transform
from acmix.export.preprocessing import Preprocessing

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
model: {{name: {name}, kwargs: {kwargs}}}
data: {{dataset: digits, image_size: {size}, batch_size: 16, num_workers: 0}}
augment: {{crop: pad, pad: 2}}
optimizer: {{lr: 0.02}}
schedule: {{epochs: 1, steps: 2}}
ema: {{decay: 0.5}}
"""
SWIN = "{img_size: 32, patch_size: 4, window_size: 4, embed_dim: 8, depths: [2], heads: [2]}"
RESNET = "{stem: cifar, base_width: 8, layers: [1, 1, 1, 1], kernel_att: 3}"


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


Call = Callable[..., Outcome]


def train(folder: Path, name: str, kwargs: str) -> Path:
    (folder / "tiny.yaml").write_text(CONFIG.format(name=name, kwargs=kwargs, size=32))
    main = runpy.run_path(str(ROOT / "train.py"))["main"]
    assert main(["--config", str(folder / "tiny.yaml"), f"run.dir={folder / 'run'}"]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two updates of a small ACmix-Swin."""
    return train(tmp_path_factory.mktemp("trained"), "acmix_swin_tiny", SWIN)


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Call:
    def run(script: str, *arguments: object) -> Outcome:
        main = runpy.run_path(str(ROOT / "scripts" / script))["main"]
        status = main([str(argument) for argument in arguments])
        return Outcome(status, *capfd.readouterr())

    return run


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three pictures of other sizes, one of them in a folder of its own, and a file that is none."""
    random = np.random.default_rng(0)
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for name, shape in (("a.png", (40, 50, 3)), ("b.jpg", (33, 32, 3)), ("more/c.png", (9, 30, 3))):
        Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)).save(folder / name)
    return folder


def test_an_onnx_file_and_its_run_say_the_same_of_images(call: Call, run_dir: Path, pictures: Path, tmp_path: Path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    out = tmp_path / "new" / "net.onnx"
    result = call("export.py", "--checkpoint", run_dir, "--format", "onnx", "--out", out).result
    assert result["largest_difference"] <= 1e-4
    assert result["checked_on"] == "validation images"
    assert result["dynamic"] == ["batch"]
    assert result["nodes"] < result["unfolded"]["nodes"]
    assert list(out.parent.iterdir()) == [out]

    import onnx

    model = onnx.load(out)
    assert {node.domain for node in model.graph.node} == {""}
    assert [value.name for value in (*model.graph.input, *model.graph.output)] == ["images", "logits"]
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(metadata["classes"]) == [str(digit) for digit in range(10)]
    assert json.loads(metadata["size"]) == [32, 32]
    assert json.loads(metadata["mean"]) == [0.309] * 3
    assert json.loads(metadata["crop_pct"]) == 1.0  # validation crops nothing from images as small as these

    found = {}
    for checkpoint in (run_dir, out):
        file = tmp_path / "found.json"
        assert call("predict.py", "--checkpoint", checkpoint, pictures, "--top", 3, "--json", file).status == 0
        found[checkpoint] = json.loads(file.read_text())
    for ours, theirs in zip(found[run_dir], found[out], strict=True):
        assert ours["path"] == theirs["path"]
        assert [p["class"] for p in ours["predictions"]] == [p["class"] for p in theirs["predictions"]]
        got, want = ([p["probability"] for p in found["predictions"]] for found in (ours, theirs))
        assert got == pytest.approx(want, abs=1e-5)
    assert [Path(row["path"]).name for row in found[out]] == ["a.png", "b.jpg", "c.png"]
    assert call("predict.py", "--checkpoint", out, pictures, "--draw", tmp_path / "drawn").status == 2


@pytest.mark.parametrize("size", [32, 96])
def test_whoever_prepares_an_image_by_the_metadata_gets_what_validation_gives(size: int):
    text = CONFIG.format(name="acmix_resnet26", kwargs=RESNET, size=size)
    config = Config.model_validate(yaml.safe_load(text))
    metadata = Preprocessing.of(config).metadata()
    keys = ("mean", "std", "interpolation", "crop_pct")
    theirs = create_transform((3, *json.loads(metadata["size"])), **{key: json.loads(metadata[key]) for key in keys})
    ours = build_val_transform(config, statistics_of(config.data, 3))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (150, 150, 3), dtype=np.uint8))
    torch.testing.assert_close(theirs(image), ours(image), rtol=1e-5, atol=1e-6)


def test_a_bad_image_is_named_and_the_others_are_done_and_drawn(
    call: Call, run_dir: Path, pictures: Path, tmp_path: Path
):
    (pictures / "bad.png").write_bytes(b"no image")
    file, drawn = tmp_path / "found.json", tmp_path / "drawn"
    missing = tmp_path / "missing.png"
    outcome = call(
        "predict.py", "--checkpoint", run_dir, pictures, missing, "--json", file, "--draw", drawn, "data.crop_pct=1.0"
    )
    assert outcome.status == 2
    assert f"{pictures / 'bad.png'}: not an image" in outcome.err
    assert f"{missing}: No such file" in outcome.err
    rows = json.loads(file.read_text())
    assert [Path(row["path"]).name for row in rows] == ["a.png", "b.jpg", "c.png"]
    assert all(len(row["predictions"]) == 5 for row in rows)
    assert sorted(path.name for path in drawn.iterdir()) == ["a.png", "b.png", "c.png"]
    for path in drawn.iterdir():
        width, height = Image.open(path).size
        assert width > 500
        assert height > 500


def test_a_picture_named_twice_gets_its_own_prediction_each_time(
    call: Call, run_dir: Path, pictures: Path, tmp_path: Path
):
    file, one, other = tmp_path / "found.json", pictures / "a.png", pictures / "b.jpg"
    (pictures / "bad.png").write_bytes(b"no image")
    given = (one, other, one, pictures / "bad.png", pictures / "bad.png", pictures)
    outcome = call("predict.py", "--checkpoint", run_dir, *given, "--json", file)
    assert (outcome.status, outcome.err.count("bad.png: not an image")) == (2, 3)
    rows = json.loads(file.read_text())
    assert [Path(row["path"]).name for row in rows] == ["a.png", "b.jpg", "a.png", "a.png", "b.jpg", "c.png"]
    assert rows[2] == rows[3] == rows[0] != {**rows[1], "path": str(one)}
    assert rows[4] == rows[1]


def test_pictures_of_files_whose_names_are_formulas_or_no_text_are_drawn(call: Call, run_dir: Path, tmp_path: Path):
    names = [b"$^$.png", b"caf\xe9.png"]
    images = [tmp_path / name.decode("utf-8", "surrogateescape") for name in names]
    for image in images:
        with open(image, "wb") as file:
            Image.new("RGB", (8, 8)).save(file, "PNG")
    outcome = call("predict.py", "--checkpoint", run_dir, *images, "--draw", tmp_path / "drawn")
    assert outcome.status == 0, outcome.err
    assert {image.name for image in (tmp_path / "drawn").iterdir()} == {image.name for image in images}


def test_predictions_never_replace_an_image(call: Call, run_dir: Path, pictures: Path):
    before = {file: file.read_bytes() for file in pictures.glob("*.*")}
    for option, place in (("--draw", pictures), ("--json", pictures / "b.jpg")):
        outcome = call("predict.py", "--checkpoint", run_dir, pictures, option, place)
        assert outcome.status == 2
        assert f"{option}: would replace {pictures}" in outcome.err
    assert {file: file.read_bytes() for file in pictures.glob("*.*")} == before


@pytest.mark.parametrize("ignored", [("--config", "no.yaml"), ("--weights", "raw"), ("data.image_size=64",)])
def test_what_an_onnx_file_would_ignore_is_refused(call: Call, pictures: Path, tmp_path: Path, ignored):
    outcome = call("predict.py", "--checkpoint", tmp_path / "net.onnx", pictures, *ignored)
    assert outcome.status == 2
    assert f"error: {ignored[0]}: an ONNX file" in outcome.err


def test_an_exported_program_loads_without_our_package(call: Call, run_dir: Path, tmp_path: Path):
    out = tmp_path / "net.pt2"
    outcome = call("export.py", "--checkpoint", run_dir, "--format", "pt2", "--out", out, "--weights", "raw")
    result, before = outcome.result, outcome.result["unfolded"]
    assert f"\nWithout folding: {before['nodes']} nodes, {before['megabytes']:.2f} MB, " in outcome.out
    assert result["nodes"] < result["unfolded"]["nodes"]
    program = f"import torch; print(torch.export.load({str(out)!r}).module()(torch.zeros(5, 3, 32, 32)).shape)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, env={})
    assert done.stdout.strip() == "torch.Size([5, 10])", done.stderr


@pytest.mark.parametrize("inside", [True, False])
def test_predict_refuses_an_exported_program_in_one_message_that_leads_on(
    call: Call, run_dir: Path, pictures: Path, tmp_path: Path, inside: bool
):
    file = (run_dir if inside else tmp_path) / "net.pt2"
    outcome = call("predict.py", "--checkpoint", file, pictures)
    assert outcome.status == 2
    assert f"--checkpoint {file}: predict.py does not run .pt2 files; give the run or checkpoint" in outcome.err
    assert "--config" not in outcome.err


def test_a_network_that_has_diverged_is_not_exported(call: Call, run_dir: Path, tmp_path: Path):
    weights = load_file(run_dir / "checkpoints" / "last" / "model.safetensors")
    spoilt, out = tmp_path / "spoilt.safetensors", tmp_path / "net.pt2"
    spoilt.write_bytes(save({name: tensor * float("nan") for name, tensor in weights.items()}))
    own = ("--config", run_dir / "config.yaml", "model.num_classes=10")
    outcome = call("export.py", "--checkpoint", spoilt, *own, "--format", "pt2", "--out", out)
    assert outcome.status == 2
    assert f"{spoilt}: its logits are not finite: it has diverged" in outcome.err
    assert not out.exists()


def test_validation_images_that_cannot_be_read_leave_noise_to_check_on(call: Call, run_dir: Path, tmp_path: Path):
    for digit in range(10):
        folder = tmp_path / "data" / "val" / str(digit)
        folder.mkdir(parents=True)
        (folder / "bad.png").write_bytes(b"no image")
    data = ("data.dataset=folder", f"data.root={tmp_path / 'data'}")
    outcome = call("export.py", "--checkpoint", run_dir, "--format", "pt2", "--out", tmp_path / "net.pt2", *data)
    assert outcome.result["checked_on"] == "noise"
    assert "bad.png (class 0): not an image" in outcome.err


def test_a_file_that_computes_something_else_is_not_left(call: Call, run_dir: Path, tmp_path: Path, monkeypatch):
    from acmix.export import check, write

    monkeypatch.setattr(write, "LIMIT", -1.0)
    assert check.LIMIT == 1e-4
    outcome = call("export.py", "--checkpoint", run_dir, "--format", "pt2", "--out", tmp_path / "net.pt2")
    assert outcome.status == 1
    assert "not written" in outcome.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("export.py", "--format", "onnx", "--out", "net.pt2"), "must end in .onnx"),
        (("export.py", "--format", "pt2", "--out", "net.pt2", "data.crop=1"), "data.crop"),
        (("predict.py", "empty"), "no images inside"),
        (("predict.py", "x.png", "--top", "0"), "--top"),
    ],
)
def test_bad_usage_is_one_message(call: Call, run_dir: Path, tmp_path: Path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    script, *rest = arguments
    outcome = call(script, "--checkpoint", run_dir, *rest)
    assert outcome.status == 2
    assert outcome.err.startswith("error: ")
    assert message in outcome.err
    assert "Traceback" not in outcome.err


def test_without_the_extra_one_message_names_it(call: Call, run_dir: Path, tmp_path: Path, monkeypatch):
    from acmix.export import onnx

    monkeypatch.setattr(onnx, "PACKAGES", ("onnx", "a_package_that_is_not_there"))
    outcome = call("export.py", "--checkpoint", run_dir, "--format", "onnx", "--out", tmp_path / "net.onnx")
    assert outcome.status == 2
    assert 'a_package_that_is_not_there not installed; ONNX files need pip install "acmix[export]"' in outcome.err


@pytest.mark.slow
def test_an_onnx_file_of_a_resnet_takes_images_of_any_size(call: Call, tmp_path: Path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    run = train(tmp_path, "acmix_resnet26", RESNET)
    for extra in ((), ("--fixed-size",)):
        out = tmp_path / "net.onnx"
        result = call("export.py", "--checkpoint", run, "--format", "onnx", "--out", out, *extra).result
        assert result["dynamic"] == (["batch"] if extra else ["batch", "height", "width"])
        assert result["largest_difference"] <= 1e-4
