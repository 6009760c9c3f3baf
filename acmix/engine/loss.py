"""What a step minimises: the loss of each image, and what each image counts for in the mean of the step."""

from collections.abc import Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING

import numpy as np
import torch
from timm.loss import BinaryCrossEntropy
from torch import Tensor
from torch.nn import functional as F

from acmix.config import Config
from acmix.data.classes import places_in
from acmix.errors import UserError

if TYPE_CHECKING:
    from acmix.data.loader import TrainLoader


class Loss:
    """Logits (B, C) and class indices (B,) or soft targets (B, C) → the loss of each image (B,), float32.

    With class weights the mean of a step is that of `torch.nn.functional.cross_entropy(weight=...)` on all its images
    at once: each class's term is multiplied by its weight; the sum is divided by the sum of the images' weights where
    targets are class indices, by the number of images where they are soft (mixup, CutMix). With `bce` the loss of an
    image is multiplied as a whole, by the weight of its class, for soft targets by the mean weight of its classes.

    Args:
        config: the run's config.
        weights: (C,) float32, the weight of each class; None for equal ones.
        mixed: whether mixing makes the targets, which it has then smoothed already.
    """

    def __init__(self, config: Config, weights: Tensor | None = None, *, mixed: bool = False) -> None:
        self._weights = weights
        self._smoothing = 0.0 if mixed else config.loss.label_smoothing
        self._binary = None
        if config.loss.name == "bce":
            self._binary = BinaryCrossEntropy(smoothing=self._smoothing, reduction="none")

    @property
    def weighted(self) -> bool:
        """Whether there are class weights."""
        return self._weights is not None

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of each image, (B,)."""
        logits = logits.float()
        if self._binary is None:
            return F.cross_entropy(
                logits, targets, weight=self._weights, label_smoothing=self._smoothing, reduction="none"
            )
        losses: Tensor = self._binary(logits, targets).mean(1)
        if self._weights is None:
            return losses
        return losses * (self._weights[targets] if targets.ndim == 1 else targets @ self._weights)

    def weights(self, targets: Tensor) -> Tensor | None:
        """What each image counts for in the mean, (B,); None where all count the same."""
        return None if self._weights is None or targets.ndim > 1 else self._weights[targets]


def class_weights(config: Config, loader: "TrainLoader") -> Tensor | None:
    """The weight of each class as `loss.class_weights` says, (C,) float32; None for none.

    balanced: the number of images / (the number of classes that have any × the images of the class), as scikit-learn
    has it; 1 for a class without images. A class that a mapping does not name has 1.

    Raises UserError for a class that the data does not have, a list of another length than the classes, and balanced
    where the dataset does not tell its images' classes.
    """
    wanted = config.loss.class_weights
    if wanted == "none":
        return None
    if wanted == "balanced":
        return torch.from_numpy(_balanced(config, loader.class_counts)).float()
    if isinstance(wanted, dict):
        return _by_name(wanted, loader.classes)
    if len(wanted) != len(loader.classes):
        raise UserError(
            f"loss.class_weights: {len(wanted)} weights for {len(loader.classes)} classes; give one for each, in the "
            "order of the classes, or a mapping of class names to weights"
        )
    return torch.tensor(wanted)


def _balanced(config: Config, counts: np.ndarray | None) -> np.ndarray:
    if counts is None:
        raise UserError(
            f"loss.class_weights: the dataset {config.data.dataset} does not tell the classes of its images without "
            "reading them all, so balanced cannot be; give a mapping of class names to weights"
        )
    present = counts > 0
    return np.where(present, counts.sum() / (present.sum() * np.maximum(counts, 1)), 1.0)


def _by_name(wanted: dict[str, float], classes: Sequence[str]) -> Tensor:
    places, unknown = places_in(list(wanted), classes)
    if unknown:
        nearest = get_close_matches(unknown[0], classes, n=1, cutoff=0.0)[0]
        raise UserError(f"loss.class_weights: the data has no class {unknown[0]!r}; nearest: {nearest!r}")
    weights = torch.ones(len(classes))
    weights[places] = torch.tensor(list(wanted.values()))
    return weights
