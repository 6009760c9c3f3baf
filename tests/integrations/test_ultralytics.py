"""`ACmix` in ultralytics' model files, with the real package: pip install ultralytics (AGPL) to run these tests."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn

os.environ.setdefault("YOLO_AUTOINSTALL", "false")
os.environ.setdefault("YOLO_OFFLINE", "true")
ultralytics = pytest.importorskip("ultralytics")

from ultralytics.cfg import get_cfg  # noqa: E402
from ultralytics.nn import tasks  # noqa: E402

from acmix import ACmix  # noqa: E402
from acmix.errors import UserError  # noqa: E402
from acmix.integrations import ultralytics as integration  # noqa: E402

SIZE = 128  # pixels, a map of 4×4 at the coarsest


@pytest.fixture(autouse=True)
def _registered() -> None:
    integration.register()


def with_acmix(name: str, *rows: list[Any]) -> dict[str, Any]:
    """One of the package's own model files, the first stages of its backbone replaced by rows of ours."""
    files = list((Path(ultralytics.__file__).parent / "cfg" / "models").rglob(name))
    if not files:
        pytest.skip(f"this version of the package has no {name}")
    model = yaml.safe_load(files[0].read_text())
    stages = [row for row in model["backbone"] if row[2] in ("C2f", "C3k2")]
    for stage, row in zip(stages, rows, strict=False):
        stage[:] = row
    return {**model, "scale": "n", "nc": 3}


def blocks_of(model: nn.Module) -> list[ACmix]:
    return [module for module in model.modules() if isinstance(module, ACmix)]


SPELLINGS = (
    [-1, 1, "ACmix", []],
    [-1, 1, "ACmix", [256]],
    [-1, 6, "ACmix", [512, 512]],
    [-1, 1, "ACmix", [1024, 3, 24]],
)


@pytest.fixture(scope="module", params=["yolov8.yaml", "yolo11.yaml"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    """A network of every spelling, with two blocks in a row."""
    integration.register()
    torch.manual_seed(0)
    model = tasks.DetectionModel(with_acmix(request.param, *SPELLINGS), verbose=False)
    model.args = get_cfg()
    return model


def test_every_spelling_gets_the_channels_that_the_model_s_width_makes(model: nn.Module) -> None:
    found = [(block.in_channels, block.out_channels, block.heads) for block in blocks_of(model)]
    repeated = [(128, 128, 4)] * 3  # the model's depth halves the six, or takes a third of them
    assert found in ([(32, 32, 4), (64, 64, 4), *repeated[:n], (256, 256, 16)] for n in (2, 3))
    assert blocks_of(model)[-1].attention.kernel_size == 3


def test_one_training_step_reaches_every_parameter_of_the_blocks(model: nn.Module) -> None:
    model.train().zero_grad()
    batch = {
        "img": torch.rand(2, 3, SIZE, SIZE),
        "cls": torch.tensor([[0.0], [2.0]]),
        "bboxes": torch.tensor([[0.5, 0.5, 0.4, 0.3], [0.3, 0.6, 0.2, 0.2]]),
        "batch_idx": torch.tensor([0.0, 1.0]),
    }
    loss, _ = model(batch)
    loss.sum().backward()
    for block in blocks_of(model):
        for name, parameter in block.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_half_precision_predicts_what_single_precision_predicts(model: nn.Module, device: str) -> None:
    model.eval().to(device)
    images = torch.rand(1, 3, SIZE, SIZE, device=device)
    with torch.no_grad():
        single = model(images)[0]
        half = model.half()(images.half())[0]
    model.float().cpu()
    assert half.dtype == torch.float16
    boxes, scores = single[:, :4], single[:, 4:]
    assert (half[:, :4].float() - boxes).abs().max() < 0.05 * SIZE
    assert (half[:, 4:].float() - scores).abs().max() < 0.05


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], (32, 32, 7, 4, 3, 1)),
        ([64], (32, 16, 7, 4, 3, 1)),
        ([128, 64], (32, 16, 7, 4, 3, 1)),
        ([64, 5], (32, 16, 5, 4, 3, 1)),
        ([64, 5, 2], (32, 16, 5, 2, 3, 1)),
        ([64, 5, 2, 5, 2], (32, 16, 5, 2, 5, 2)),
        ([128, 64, 5, 2, 5, 2], (32, 16, 5, 2, 5, 2)),
    ],
)
def test_what_a_row_says(arguments: list[int], expected: tuple[int, ...]) -> None:
    rows = [[-1, 1, "Conv", [128, 3, 2]], [-1, 1, "ACmix", arguments]]
    layers, _ = tasks.parse_model({"nc": 1, "width_multiple": 0.25, "backbone": rows, "head": []}, 3, verbose=False)
    block = layers[1]
    assert isinstance(block, ACmix)
    sizes = (block.attention.kernel_size, block.heads, block.convolution.kernel_size, block.stride)
    assert (block.in_channels, block.out_channels, *sizes) == expected


def test_heads_that_do_not_divide_the_channels_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    rows = [[-1, 1, "ACmix", [56, 7, 48]], [-1, 1, "ACmix", [56, 7, 48]]]
    with caplog.at_level("WARNING", "ultralytics"):
        tasks.LOGGER.addHandler(caplog.handler)
        layers, _ = tasks.parse_model({"nc": 1, "backbone": rows, "head": []}, 3, verbose=False)
        tasks.LOGGER.removeHandler(caplog.handler)
    assert [block.heads for block in layers] == [28, 28]
    said = {
        id(record) for record in caplog.records if "48 heads do not divide 56 channels, taking 28" in record.message
    }
    assert len(said) == 1


def test_other_modules_stay_what_they_are() -> None:
    plain = tasks.DetectionModel(with_acmix("yolov8.yaml"), verbose=False)
    assert sum(isinstance(module, tasks.C2f) for module in plain.modules()) == 8
    assert not blocks_of(plain)


def test_a_row_that_cannot_be_read_is_refused() -> None:
    with pytest.raises(UserError, match="seven whole numbers"):
        tasks.parse_model({"nc": 1, "backbone": [[-1, 1, "ACmix", [64, "wide"]]], "head": []}, 3, verbose=False)


def test_a_parser_that_counts_otherwise_is_refused_and_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(d: dict[str, Any], ch: int, verbose: bool = True) -> Any:
        return nn.Sequential(*(nn.Identity() for _ in d["backbone"])), []

    monkeypatch.setattr(tasks, "parse_model", other)
    monkeypatch.delattr(tasks, "ACmix")
    with pytest.raises(UserError, match=r"reads model files in a way that ACmix does not fit into"):
        integration.register()
    assert tasks.parse_model is other
    assert not hasattr(tasks, "ACmix")


def test_the_exported_graph_gives_what_the_model_gives(model: nn.Module, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    from ultralytics import YOLO

    (tmp_path / "acmix-yolo8.yaml").write_text(yaml.safe_dump(dict(model.yaml)))
    yolo = YOLO(tmp_path / "acmix-yolo8n.yaml", task="detect")  # the package takes the scale from the name
    yolo.model.load_state_dict(model.state_dict())
    exported = yolo.export(format="onnx", imgsz=SIZE, simplify=False, device="cpu")
    images = torch.rand(1, 3, SIZE, SIZE)
    with torch.no_grad():
        expected = model.eval()(images)[0]
    [found] = onnxruntime.InferenceSession(exported).run(None, {"images": images.numpy()})
    np.testing.assert_allclose(found, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.slow
def test_their_trainer_trains_validates_and_reloads(tmp_path: Path) -> None:
    from ultralytics import YOLO

    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (tmp_path / kind / split).mkdir(parents=True)
        for number in range(4):
            pixels = np.random.default_rng(number).integers(0, 255, (96, SIZE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / split / f"{number}.png")
            (tmp_path / "labels" / split / f"{number}.txt").write_text("1 0.5 0.5 0.3 0.4\n")
    data = {"path": str(tmp_path), "train": "images/train", "val": "images/val", "names": {0: "a", 1: "b", 2: "c"}}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(data))
    (tmp_path / "acmix-yolo11.yaml").write_text(yaml.safe_dump(with_acmix("yolo11.yaml", *SPELLINGS)))
    yolo = YOLO(tmp_path / "acmix-yolo11n.yaml")
    settings = {"imgsz": SIZE, "device": "cpu", "workers": 0, "plots": False, "project": str(tmp_path / "runs")}
    yolo.train(data=str(tmp_path / "data.yaml"), epochs=1, batch=2, **settings)
    [best] = (tmp_path / "runs").rglob("best.pt")
    reloaded = YOLO(best)
    assert len(blocks_of(reloaded.model)) == 6
    assert 0 <= reloaded.val(data=str(tmp_path / "data.yaml"), **settings).box.map <= 1
