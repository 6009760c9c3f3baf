"""A trained run looked at through its validation images: confusion, lesions, measures of the paths, bad mistakes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from acmix.data.datasets import statistics_of
from acmix.data.loader import ValLoader, build_val
from acmix.engine.confusion import Confusion, class_report
from acmix.engine.evaluate import batch_sums
from acmix.engine.forward import autocast, network_inputs
from acmix.engine.path_report import report_paths
from acmix.export.load import Trained, load_trained

MOST_MISTAKES = 12


@dataclass(frozen=True)
class Mistake:
    """A wrong answer: its probability, the predicted and the true class, the image as (H, W, 3) uint8."""

    probability: float
    predicted: str
    true: str
    pixels: np.ndarray


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Of one run on `images` of the `total` validation images, evenly spaced.

    top1: in percent; matrix: (C, C) counts, rows are the true classes; classes: its names; per_class: of
    `acmix.engine.confusion.class_report`; paths, lesions: as of `eval.py --paths`; mistakes: the most confident first.
    """

    images: int
    total: int
    top1: float
    matrix: np.ndarray
    classes: list[str]
    per_class: dict[str, Any]
    paths: list[dict[str, Any]] = field(default_factory=list)
    lesions: list[dict[str, Any]] = field(default_factory=list)
    mistakes: list[Mistake] = field(default_factory=list)


def evaluate_run(folder: Path, images: int) -> Evaluation:
    """Evaluate the weights that `eval.py` would, on about that many images. Raises UserError where that cannot be."""
    trained = load_trained(str(folder))
    data = build_val(trained.config, classes=trained.classes)
    confusion = Confusion(len(trained.classes), trained.dist.device)
    mistakes, sums = _look(trained, data, images, confusion)
    matrix = confusion.matrix(trained.dist)
    count = min(images, len(data))
    return Evaluation(
        images=count,
        total=len(data),
        top1=100 * float(sums[1]) / max(count, 1),
        matrix=matrix,
        classes=trained.classes,
        per_class=class_report(matrix, trained.classes, data.present),
        mistakes=mistakes,
        **report_paths(trained.model, data, trained.dist, trained.config.precision, images),
    )


def _look(trained: Trained, data: ValLoader, images: int, confusion: Confusion) -> tuple[list[Mistake], Tensor]:
    """One pass over the images; returns the worst mistakes and the sums of `batch_sums`."""
    precision, device = trained.config.precision, trained.dist.device
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    mistakes: list[Mistake] = []
    for batch in data.spread(images):
        inputs, targets = network_inputs(batch, precision, device)
        with torch.inference_mode(), autocast(precision, device):
            logits = trained.model(inputs)
        confusion.add(logits, targets)
        sums += batch_sums(logits.float(), targets)
        mistakes += _mistakes(trained, inputs, logits.float().softmax(1), targets)
        mistakes = sorted(mistakes, key=lambda mistake: -mistake.probability)[:MOST_MISTAKES]
    return mistakes, sums


def _mistakes(trained: Trained, images: Tensor, probabilities: Tensor, targets: Tensor) -> list[Mistake]:
    """The most confident mistakes of a batch: images (B, C, H, W), probabilities (B, C), targets (B,)."""
    best, predicted = probabilities.max(1)
    wrong = (predicted != targets).nonzero().flatten()
    worst = wrong[best[wrong].argsort(descending=True)[:MOST_MISTAKES]]
    statistics = statistics_of(trained.config.data, trained.config.model.in_chans)
    classes: Sequence[str] = trained.classes
    return [
        Mistake(
            float(best[i]),
            classes[int(predicted[i])],
            classes[int(targets[i])],
            _pixels(images[i].cpu(), statistics.mean, statistics.std),
        )
        for i in worst.tolist()
    ]


def _pixels(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """A normalised image (C, H, W) as (H, W, 3) uint8."""
    scale, offset = (torch.tensor(values)[:, None, None] for values in (std, mean))
    shown = ((image * scale + offset).clamp(0, 1) * 255).round().to(torch.uint8)
    pixels: np.ndarray = shown.expand(3, -1, -1).permute(1, 2, 0).numpy().copy()
    return pixels
