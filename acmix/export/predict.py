"""The most likely classes of image files, by a trained network or an exported file."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from acmix.data.images import BadImage
from acmix.engine.forward import autocast, in_memory_format
from acmix.errors import UserError
from acmix.export.images import read_image
from acmix.export.load import Trained
from acmix.export.onnx import OnnxNetwork
from acmix.export.preprocessing import Preprocessing

BATCH = 16


@dataclass(frozen=True)
class Predictor:
    """Images (B, C, H, W), prepared as `preprocessing` says, to logits (B, classes)."""

    run: Callable[[Tensor], Tensor]
    preprocessing: Preprocessing
    classes: list[str]


@dataclass(frozen=True)
class Prediction:
    """The most likely classes of one image, best first, as (class, probability); image: what the network saw."""

    path: Path
    image: Tensor
    top: list[tuple[str, float]]

    def to_json(self) -> dict[str, Any]:
        """{path, predictions: [{class, probability}]}."""
        predictions = [{"class": name, "probability": probability} for name, probability in self.top]
        return {"path": str(self.path), "predictions": predictions}


def network_predictor(trained: Trained) -> Predictor:
    """By the network itself, on its device and in its precision, as in validation."""
    precision, device = trained.config.precision, trained.dist.device

    def run(images: Tensor) -> Tensor:
        images = in_memory_format(images.to(device), precision)
        with torch.inference_mode(), autocast(precision, device):
            logits: Tensor = trained.model(images)
        return logits.float().cpu()

    return Predictor(run, Preprocessing.of(trained.config), trained.classes)


def onnx_predictor(path: Path) -> Predictor:
    """By an ONNX file of `scripts/export.py`, which says how images are prepared. Raises UserError."""
    network = OnnxNetwork(path)
    try:
        preprocessing = Preprocessing.from_metadata(network.metadata)
        classes = json.loads(network.metadata["classes"])
    except (KeyError, ValueError, TypeError):
        raise UserError(f"{path}: does not say its classes and size; give a file of scripts/export.py") from None
    return Predictor(lambda images: torch.from_numpy(network(images.numpy())), preprocessing, classes)


def predict(predictor: Predictor, files: Sequence[Path], top: int) -> Iterator[Prediction | tuple[Path, BadImage]]:
    """The prediction for each file in order, or why it cannot be read."""
    transform = predictor.preprocessing.transform()
    for start in range(0, len(files), BATCH):
        read: list[tuple[Path, Tensor | BadImage]] = []
        for path in files[start : start + BATCH]:
            try:
                read.append((path, read_image(path, transform)))
            except BadImage as error:
                read.append((path, error))
        images = [image for _, image in read if isinstance(image, Tensor)]
        rows = iter(predictor.run(torch.stack(images)).softmax(1) if images else ())
        for path, image in read:
            if isinstance(image, BadImage):
                yield path, image
            else:
                best = next(rows).topk(min(top, len(predictor.classes)))
                pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
                yield Prediction(path, image, [(predictor.classes[index], value) for index, value in pairs])
