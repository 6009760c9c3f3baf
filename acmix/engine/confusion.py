"""Per-class results of an evaluation: confusion matrix, precision, recall, as JSON, table and picture."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from acmix.checkpoint.atomic import replacing, write_atomically
from acmix.errors import UserError
from acmix.process.distributed import Distributed

_MOST_LABELS = 40


class Confusion:
    """Counts pairs of true and predicted class while an evaluation runs; pass `add` as its `observe`."""

    def __init__(self, classes: int, device: torch.device) -> None:
        self._counts = torch.zeros(classes * classes, dtype=torch.int64, device=device)
        self._classes = classes

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """Count a batch: logits (B, C), targets (B,)."""
        pairs = targets * self._classes + logits.argmax(dim=1)
        self._counts += torch.bincount(pairs, minlength=self._classes**2)

    def matrix(self, dist: Distributed) -> np.ndarray:
        """Counts over all ranks, (C, C) int64; rows are the true classes."""
        return dist.all_reduce(self._counts.cpu()).view(self._classes, self._classes).numpy()


def class_report(matrix: np.ndarray, classes: list[str]) -> dict[str, Any]:
    """scikit-learn's classification report (precision, recall, F1 and support of each class, and means) as a dict."""
    from sklearn.metrics import classification_report

    true, predicted = np.nonzero(matrix)
    weights = matrix[true, predicted]
    labels = range(len(classes))
    report: dict[str, Any] = classification_report(
        true, predicted, sample_weight=weights, labels=labels, target_names=classes, output_dict=True, zero_division=0
    )
    return report


def write_report(folder: Path, matrix: np.ndarray, classes: list[str]) -> None:
    """Write `classes.json`, `classes.csv`, `confusion.csv` and `confusion.png`; UserError if one cannot be written."""
    report = class_report(matrix, classes)
    rows = ["class,precision,recall,f1,images"]
    for name in classes:
        row = report[name]
        values = f"{row['precision']:.4f},{row['recall']:.4f},{row['f1-score']:.4f},{int(row['support'])}"
        rows.append(f"{_quoted(name)},{values}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--report {folder}: cannot be written: {error.strerror}") from None
    write_atomically(folder / "classes.json", json.dumps(report, indent=2) + "\n")
    write_atomically(folder / "classes.csv", "\n".join(rows) + "\n")
    with replacing(folder / "confusion.csv") as temporary:
        np.savetxt(temporary, matrix, fmt="%d", delimiter=",")
    with replacing(folder / "confusion.png") as temporary:
        _draw(temporary, matrix, classes)


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _draw(path: Path, matrix: np.ndarray, classes: list[str]) -> None:
    """The confusion matrix with rows in percent of the true class; numbers in the cells where they can be read."""
    from matplotlib.figure import Figure
    from sklearn.metrics import ConfusionMatrixDisplay

    shares = 100 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    many = len(classes) > _MOST_LABELS
    side = 8.0 if many else max(4.0, 0.45 * len(classes) + 2.0)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    display = ConfusionMatrixDisplay(shares, display_labels=None if many else classes)
    display.plot(
        ax=axes, cmap="Blues", include_values=len(classes) <= 20, values_format=".0f", xticks_rotation="vertical",
        colorbar=False, im_kw={"vmin": 0, "vmax": 100},
    )  # fmt: skip
    figure.colorbar(display.im_, ax=axes, fraction=0.046, label="percent of the true class")
    if many:
        axes.set_xticks([])
        axes.set_yticks([])
    axes.set(xlabel=f"predicted class ({len(classes)})", ylabel="true class")
    figure.savefig(path, dpi=150)
