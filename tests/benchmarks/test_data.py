"""`benchmark.py --data`: the loader of a run, its model, both, and timm's loader on the same images."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from acmix.config import load_config
from acmix.data.loader import build_data
from benchmarks import command
from benchmarks.rates import our_epoch, timm_epoch

CONFIG = """
model: {name: resnet10t}
data: {dataset: folder, root: ROOT, image_size: 32, batch_size: 4, num_workers: 0}
augment: {scale: [1.0, 1.0], ratio: [1.0, 1.0], hflip: 0}
schedule: {epochs: 1}
run: {device: cpu}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(4):
                pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((80, 80)).save(tmp_path / split / name / f"{number}.jpg")
    (tmp_path / "run.yaml").write_text(CONFIG.replace("ROOT", str(tmp_path)))
    return tmp_path / "run.yaml"


def test_every_side_is_timed_and_written_down(config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    arguments = ["--data", str(config), "--against", "timm", "--updates", "2", "--rounds", "2", "--json", str(out)]
    assert command.run("what it does", tmp_path, arguments) == 0
    rates = {rate["name"]: rate for rate in json.loads(out.read_text())["rates"]}
    assert {"timm", "model", "both"} < set(rates)
    assert all(rate["n"] == 2 and rate["images_per_second"] > 0 for rate in rates.values())
    assert 0 <= rates["both"]["waiting"] <= 1
    assert "× timm" in capfd.readouterr().out


def test_both_loaders_make_the_same_images(config: Path) -> None:
    """Without chance in the transforms, the images of an epoch are the same ones but for the rounding of the resize."""
    run = load_config(config, ["data.loader=workers"])
    ours = [batch for update in our_epoch(run, build_data(run), torch.device("cpu"))(0) for batch in update]
    theirs = [batch for update in timm_epoch(run, torch.device("cpu"))(0) for batch in update]
    means = [sorted(torch.cat(images).mean((1, 2, 3)).tolist()) for images in
             ([batch.images for batch in ours], [images for images, _ in theirs])]  # fmt: skip
    assert means[0] == pytest.approx(means[1], abs=0.01)
    assert sorted(torch.cat([batch.targets for batch in ours]).tolist()) == sorted(
        torch.cat([targets for _, targets in theirs]).tolist()
    )


def test_bad_usage_is_refused(config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--data", str(tmp_path / "no.yaml")], "no such config file"),
        (["--data", str(config), "--rounds", "0"], "must be at least 1"),
        (["--data", str(config), "--against", "ffcv"], "invalid choice"),
    ):
        assert command.run("what it does", tmp_path, arguments) == 2
        assert message in capfd.readouterr().err
