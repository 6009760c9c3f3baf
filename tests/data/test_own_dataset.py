"""A dataset of the user's own, from a file of the user's own, is known everywhere after one call."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from acmix.config import Config, Dataset, datasets, find_dataset, register_dataset
from acmix.data.arrays import ArraySource
from acmix.data.datasets import build_sources
from acmix.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
OWN_FILE = """
import numpy as np
import train
from acmix.config import Dataset, register_dataset
from acmix.data.arrays import ArraySource

def stripes(data, split):
    random = np.random.default_rng(split == data.train_split)
    images = random.integers(0, 200, (80, 16, 16, 3), dtype=np.uint8)
    images[::2, ::4] = images[1::2, :, ::4] = 255
    return ArraySource(f"stripes/{split}", images, np.arange(80) % 2, ["across", "down"])

register_dataset(Dataset("stripes", stripes, needs_root=False, mean=(0.5, 0.5, 0.5), std=(0.3, 0.3, 0.3)))

if __name__ == "__main__":
    raise SystemExit(train.main())
"""
CONFIG = """
model: {name: test_resnet}
data: {dataset: stripes, image_size: 16, batch_size: 16, num_workers: 1}
schedule: {epochs: 1}
run: {dir: run, log_every: 1}
"""
TRAIN_AND_EVALUATE = """
import eval, stripes, train
raise SystemExit(train.main(["--config", "tiny.yaml"]) or eval.main(["--checkpoint", "run"]))
"""


def test_a_file_of_ones_own_trains_and_evaluates_on_a_dataset_of_ones_own(tmp_path: Path, launcher: Any) -> None:
    (tmp_path / "stripes.py").write_text(OWN_FILE)
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    (tmp_path / "both.py").write_text(TRAIN_AND_EVALUATE)
    command = [tmp_path / "stripes.py", "--config", "tiny.yaml", "data.dataset=stripe"]
    refused = launcher.start(*command, folder=tmp_path, fresh=True)
    assert (refused.wait(), refused.output) == (2, "")
    assert "data.dataset: unknown dataset 'stripe'; nearest: stripes" in refused.errors
    done = launcher.start(tmp_path / "both.py", folder=tmp_path, fresh=True)
    assert done.wait() == 0, done.errors
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["event"] == "train"] == [1, 2, 3, 4, 5]
    [logged] = [row for row in rows if row["event"] == "eval"]
    result = json.loads(done.output.splitlines()[-1])
    assert (result["top1"], result["loss"], result["count"]) == (logged["top1"], logged["loss"], 80)


@pytest.fixture
def _own_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "_TABLE", dict(datasets._TABLE))


def grey(name: str, count: int = 4) -> ArraySource:
    images = np.full((count, 8, 8, 3), 128, dtype=np.uint8)
    return ArraySource(name, images, np.arange(count) % 2, ["a", "b"])


@pytest.mark.usefixtures("_own_table")
def test_a_registered_dataset_answers_to_its_names_with_its_statistics(make_config: Callable[..., Config]) -> None:
    own = Dataset("Grey/", lambda data, split: grey(f"{data.dataset}/{split}"), ("plain",), mean=(0.1, 0.2, 0.3))
    register_dataset(own)
    for name in ("grey/any", "Grey/other", "plain"):
        assert find_dataset(name) is own
        train, val, statistics = build_sources(make_config(data__dataset=name))
        assert (len(train), val.describe(1)) == (4, f"{name}/val image 1 (class b)")
        assert statistics.mean == (0.1, 0.2, 0.3)


@pytest.mark.parametrize("name", ["digits", "imagefolder", "wds/", "WDS/mine", "tfds/"])
def test_a_name_that_is_taken_cannot_be_registered_again(name: str) -> None:
    before = dict(datasets._TABLE)
    with pytest.raises(UserError, match=r"the dataset name '[a-z/]+' is taken; register 'fresh' under another name"):
        register_dataset(Dataset("fresh", lambda data, split: grey(split), aliases=(name,)))
    assert before == datasets._TABLE


def test_an_array_source_refuses_arrays_it_cannot_serve() -> None:
    images, targets = np.zeros((3, 8, 8, 3), dtype=np.uint8), np.array([0, 1, 1])
    for wrong in (images[..., 0], images.astype(np.float32), images.transpose(0, 3, 1, 2)):
        with pytest.raises(UserError, match=r"own: images must be \(N, H, W, 3\) uint8, got"):
            ArraySource("own", wrong, targets, ["a", "b"])
    for labels in (targets[:2], targets + 1, targets - 1, targets + 0.5):
        with pytest.raises(UserError, match="own: targets must be 3 integers from 0 to 1"):
            ArraySource("own", images, labels, ["a", "b"])


def test_opening_arrays_and_folders_does_not_import_torch() -> None:
    program = "import sys, acmix.data.arrays; sys.exit(any(name in sys.modules for name in ('torch', 'timm')))"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0
