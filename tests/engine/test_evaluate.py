"""Evaluation counts every image once, whatever the number of processes, images and batches."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from acmix.config import PrecisionConfig, RunConfig
from acmix.data.loader import Batch
from acmix.engine.confusion import Confusion, class_report, write_report
from acmix.engine.evaluate import batch_sums, evaluate
from acmix.process.distributed import Distributed

COUNTS = [1, 2, 3, 5, 8, 13, 64]
BATCH_SIZES = [1, 3, 8, 100]


def expected(count: int) -> dict[str, float]:
    """Straight from the definition, all images in one batch; the same draws as in evaluate_parts.py."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 7))
    generator = torch.Generator().manual_seed(count)
    images = torch.randn(count, 3, 4, 4, generator=generator)
    targets = torch.randint(7, (count,), generator=generator)
    with torch.no_grad():
        logits = model(images)
    ranks = (logits > logits.gather(1, targets[:, None])).sum(1)  # how many classes score higher than the true one
    hits1, hits5 = (ranks < 1).sum().item(), (ranks < 5).sum().item()
    loss = F.cross_entropy(logits.double(), targets).item()
    return {"loss": loss, "top1": 100 * hits1 / count, "top5": 100 * hits5 / count, "count": count}


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_image_counts_once_over_any_number_of_processes(world_size: int, launcher: Any) -> None:
    script = Path(__file__).with_name("evaluate_parts.py")
    members = launcher.start_ranks(world_size, script, json.dumps(COUNTS), json.dumps(BATCH_SIZES))
    assert [member.wait() for member in members] == [0] * world_size
    lines = [json.loads(line) for line in members[0].output.splitlines() if line.startswith("{")]
    assert lines.pop() == {"stopped": True}, "a stop asked for on the last rank ends the evaluation on all"
    assert len(lines) == len(COUNTS) * len(BATCH_SIZES)
    for line in lines:
        wanted = expected(line["count"])
        for key in ("top1", "top5", "count"):
            assert line["metrics"][key] == wanted[key], line
        # Losses are float32 per image, summed in float64.
        assert line["metrics"]["loss"] == pytest.approx(wanted["loss"], rel=2 * torch.finfo(torch.float32).eps)


class Loader:
    """A ValLoader of given batches."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        self._batches = batches

    @property
    def batches(self) -> int:
        return len(self._batches)

    def __iter__(self):
        for images, targets in self._batches:
            ids = torch.arange(len(images))
            yield Batch(images, targets, ids, torch.ones(len(images), dtype=torch.bool), [])


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Distributed:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return Distributed.start(RunConfig(device="cpu"))


def test_top5_of_three_classes_is_over_all_of_them(alone: Distributed) -> None:
    loader = Loader([(torch.randn(4, 3, 2, 2), torch.tensor([0, 1, 2, 0]))])
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    metrics = evaluate(model, loader, alone, PrecisionConfig())  # type: ignore[arg-type]
    assert metrics is not None
    assert metrics["top5"] == 100.0


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_runs_in_eval_mode_and_keeps_the_models_mode(training: bool, alone: Distributed) -> None:
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.Linear(12, 3)).train(training)
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm1d)
    evaluate(model, Loader([(torch.randn(4, 3, 2, 2), torch.zeros(4, dtype=torch.long))]), alone, PrecisionConfig())  # type: ignore[arg-type]
    assert norm.running_mean is not None
    assert norm.running_mean.eq(0).all()
    assert model.training is training


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_evaluation_under_autocast_agrees_with_float32(amp: str, alone: Distributed) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 4))
    loader = Loader([(torch.randn(16, 3, 8, 8), torch.randint(4, (16,))) for _ in range(3)])
    precise = evaluate(model, loader, alone, PrecisionConfig())  # type: ignore[arg-type]
    reduced = evaluate(model, loader, alone, PrecisionConfig(amp=amp, channels_last=True))  # type: ignore[arg-type]
    assert precise is not None
    assert reduced is not None
    assert reduced["count"] == precise["count"] == 48
    resolution = torch.finfo(torch.bfloat16 if amp == "bf16" else torch.float16).eps
    assert reduced["loss"] == pytest.approx(precise["loss"], rel=4 * resolution)


def test_confusion_matrix_counts_each_pair_and_gives_recall(alone: Distributed) -> None:
    confusion = Confusion(3, torch.device("cpu"))
    logits = torch.eye(3)[[0, 0, 1, 2, 2]]
    confusion.add(logits, torch.tensor([0, 1, 1, 2, 0]))
    matrix = confusion.matrix(alone)
    assert matrix.tolist() == [[1, 0, 1], [1, 1, 0], [0, 0, 1]]
    report = class_report(matrix, ["ant", "bee", "cow"])
    assert [report[name]["recall"] for name in ("ant", "bee", "cow")] == [0.5, 0.5, 1.0]
    assert report["ant"]["support"] == 2


def test_the_report_has_a_row_for_a_class_that_is_called_as_a_mean_is(tmp_path: Path) -> None:
    write_report(tmp_path, np.array([[1, 0], [1, 2]]), ["accuracy", "$^$"])
    assert (tmp_path / "classes.csv").read_text().splitlines()[1] == '"accuracy",0.5000,1.0000,0.6667,1'
    report = json.loads((tmp_path / "classes.json").read_text())
    assert (report["accuracy"], report["accuracy (class)"]["recall"]) == (0.75, 1.0)


def test_equal_logits_are_the_same_hits_in_the_matrix_as_in_top1(alone: Distributed) -> None:
    logits = torch.randn(5000, 10, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = logits.argmax(dim=1)
    confusion = Confusion(10, torch.device("cpu"))
    confusion.add(logits, targets)
    hits = int(batch_sums(logits.float(), targets)[1])
    assert hits < len(targets), "some of the highest logits are equal"
    assert int(confusion.matrix(alone).trace()) == hits
