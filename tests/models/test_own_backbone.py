"""A backbone that a user registers in a file of their own trains through train.py like ours."""

import json
from pathlib import Path
from typing import Any

import pytest

BACKBONE = '''
"""A backbone of my own: python my_backbone.py --config my.yaml"""

import sys

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

import train
from acmix import ACmix


class MyNet(nn.Module):
    def __init__(self, num_classes: int = 1000, in_chans: int = 3, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_chans, width, kernel_size=4, stride=4)
        self.acmix = ACmix(width, width, heads, kernel_att=3, stage=1)
        self.norm = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, num_classes)
        x = self.stem(x)
        x = x + self.norm(self.acmix(x)).relu()
        return self.fc(x.mean((2, 3)))


default_cfgs = generate_default_cfgs({"acmix_of_mine.untrained": {}})


@register_model
def acmix_of_mine(pretrained: bool = False, **kwargs) -> MyNet:
    return build_model_with_cfg(MyNet, "acmix_of_mine", pretrained, **kwargs)


if __name__ == "__main__":
    sys.exit(train.main(sys.argv[1:]))
'''
CONFIG = """
model: {name: acmix_of_mine, kwargs: {width: 8, heads: 2}}
data: {dataset: digits, image_size: 24, batch_size: 16, val_batch_size: 120, num_workers: 0}
augment: {crop: pad, pad: 2}
schedule: {epochs: 1, steps: 2}
run: {log_every: 1, dir: run}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "my_backbone.py").write_text(BACKBONE)
    (tmp_path / "my.yaml").write_text(CONFIG)
    return tmp_path


def start(launcher: Any, folder: Path, *overrides: str) -> Any:
    program = launcher.start(
        folder / "my_backbone.py", "--config", "my.yaml", *overrides,
        env={"ACMIX_COMPILE": "never"}, folder=folder, fresh=True,
    )  # fmt: skip
    program.wait()
    return program


def test_it_trains_by_its_name_in_a_config_and_its_paths_are_logged(folder: Path, launcher: Any) -> None:
    done = start(launcher, folder)
    assert (done.status, done.errors) == (0, "")
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["event"] == "train"] == [1, 2]
    assert [row["layers"][0]["layer"] for row in rows if row["event"] == "paths"][-1] == "acmix"


def test_its_arguments_are_checked_like_ours(folder: Path, launcher: Any) -> None:
    refused = start(launcher, folder, "model.kwargs.width=8.5")
    assert refused.status == 2
    assert refused.errors.startswith("error: model.kwargs.width: 8.5 does not fit acmix_of_mine: ")
    assert not (folder / "run").exists()
