"""Per-class results of an evaluation: confusion matrix, precision, recall, as JSON, table and picture."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from acmix.checkpoint.atomic import replacing, write_atomically
from acmix.engine.evaluate import best_classes
from acmix.process.distributed import Distributed
from acmix.telemetry.figure_file import drawn_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_LABELS = 40
_MEANS = ("accuracy", "micro avg", "macro avg", "weighted avg", "samples avg")


class Confusion:
    """Counts pairs of true and predicted class while an evaluation runs; pass `add` as its `observe`."""

    def __init__(self, classes: int, device: torch.device) -> None:
        self._counts = torch.zeros(classes * classes, dtype=torch.int64, device=device)
        self._classes = classes

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """Count a batch: logits (B, C), targets (B,)."""
        pairs = targets * self._classes + best_classes(logits)[:, 0]
        self._counts += torch.bincount(pairs, minlength=self._classes**2)

    def matrix(self, dist: Distributed) -> np.ndarray:
        """Counts over all ranks, (C, C) int64; rows are the true classes."""
        return dist.all_reduce(self._counts.cpu()).view(self._classes, self._classes).numpy()


class PartOfClasses:
    """Counts hits where only the classes at hand may be predicted, for data with a part of the classes of training.

    Pass `add` as the `observe` of an evaluation.

    present: indices of the classes at hand; every target must be one of them
    trained: number of the model's classes
    """

    def __init__(self, present: Sequence[int], trained: int, dist: Distributed) -> None:
        self._present = torch.tensor(present, device=dist.device)
        self._trained = trained
        self._dist = dist
        self._counts = torch.zeros(3, dtype=torch.int64, device=dist.device)  # top-1, top-5, images

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """Count a batch: logits (B, C), targets (B,)."""
        if len(self._present) < self._trained:
            best = best_classes(logits[:, self._present])  # (B, ≤5)
            hits = self._present[best].eq(targets[:, None])
            self._counts += torch.stack([hits[:, 0].sum(), hits.sum(), torch.tensor(len(targets), device=hits.device)])

    def summary(self) -> dict[str, float]:
        """Number of classes `evaluated` and `trained`; of a part also its `top1` and `top5` in percent.

        On rank 0 one line on stderr then says that it is a part.
        """
        part, trained = len(self._present), self._trained
        if part == trained:
            return {"evaluated": part, "trained": trained}
        top1, top5, count = self._dist.all_reduce(self._counts.cpu()).tolist()
        shares = {"top1": 100 * top1 / max(count, 1), "top5": 100 * top5 / max(count, 1)}
        if self._dist.is_main:
            print(
                f"note: evaluated on images of {part} of the {trained} classes of training; with these as the only "
                f"answers top-1 is {shares['top1']:.2f} %",
                file=sys.stderr,
            )
        return {"evaluated": part, "trained": trained, **shares}


def row_name(name: str) -> str:
    """What the row of a class is called in `class_report`: its name, marked where one of the means has it."""
    return f"{name} (class)" if name in _MEANS else name


def class_report(matrix: np.ndarray, classes: list[str], present: Sequence[int] | None = None) -> dict[str, Any]:
    """scikit-learn's classification report (precision, recall, F1 and support of each class, and means) as a dict.

    `present` are the indices of the classes to report and to take the means over; None: all. See `row_name`.
    """
    from sklearn.metrics import classification_report

    true, predicted = np.nonzero(matrix)
    weights = matrix[true, predicted]
    labels = range(len(classes)) if present is None else present
    names = [row_name(classes[label]) for label in labels]
    report: dict[str, Any] = classification_report(
        true, predicted, sample_weight=weights, labels=labels, target_names=names, output_dict=True, zero_division=0
    )
    if len(names) < len(classes):  # sklearn then gives another mean in its place
        report.pop("micro avg", None)
        report["accuracy"] = float(np.trace(matrix) / max(matrix.sum(), 1))
    return report


def write_report(folder: Path, matrix: np.ndarray, classes: list[str], present: Sequence[int] | None = None) -> None:
    """Write `classes.json`, `classes.csv`, `confusion.csv` and `confusion.png`; UserError if one cannot be written.

    The first two are on the classes whose indices are `present`; None: all.
    """
    report = class_report(matrix, classes, present)
    rows = ["class,precision,recall,f1,images"]
    for name in classes if present is None else [classes[label] for label in present]:
        row = report[row_name(name)]
        values = f"{row['precision']:.4f},{row['recall']:.4f},{row['f1-score']:.4f},{int(row['support'])}"
        rows.append(f"{_quoted(name)},{values}")
    write_atomically(folder / "classes.json", json.dumps(report, indent=2) + "\n", make_parents=True)
    write_atomically(folder / "classes.csv", "\n".join(rows) + "\n")
    with replacing(folder / "confusion.csv") as temporary:
        np.savetxt(temporary, matrix, fmt="%d", delimiter=",")
    figure = draw_confusion(matrix, classes)
    with replacing(folder / "confusion.png") as temporary:
        figure.savefig(temporary, dpi=150)


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def draw_confusion(matrix: np.ndarray, classes: list[str]) -> "Figure":
    """The confusion matrix with rows in percent of the true class; numbers in the cells where they can be read."""
    from matplotlib.figure import Figure
    from sklearn.metrics import ConfusionMatrixDisplay

    shares = 100 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    many = len(classes) > _MOST_LABELS
    side = 8.0 if many else max(4.0, 0.45 * len(classes) + 2.0)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    display = ConfusionMatrixDisplay(shares, display_labels=None if many else [drawn_text(name) for name in classes])
    display.plot(
        ax=axes, cmap="Blues", include_values=len(classes) <= 20, values_format=".0f", xticks_rotation="vertical",
        colorbar=False, im_kw={"vmin": 0, "vmax": 100},
    )  # fmt: skip
    figure.colorbar(display.im_, ax=axes, fraction=0.046, label="percent of the true class")
    if many:
        axes.set_xticks([])
        axes.set_yticks([])
    axes.set(xlabel=f"predicted class ({len(classes)})", ylabel="true class")
    return figure
