"""COCO's average precision, by COCO's own code (pycocotools)."""

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from acmix.errors import UserError

try:
    from pycocotools import mask as run_lengths
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
except ModuleNotFoundError as error:
    raise UserError('pycocotools is not installed; the examples need pip install "acmix[examples]"') from error


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """A mask (H, W) of 0 and 1, uint8, as COCO's run lengths."""
    return run_lengths.encode(np.asfortranarray(mask))


def decode_mask(runs: dict[str, Any]) -> np.ndarray:
    """The mask (H, W) of these run lengths."""
    return run_lengths.decode(runs)


def ground_truth(images: Dataset[Any], names: Sequence[str]) -> COCO:
    """The targets of a dataset as COCO's ground truth."""
    truth = {"images": [], "annotations": [], "categories": [{"id": i, "name": name} for i, name in enumerate(names)]}
    for index in range(len(images)):  # type: ignore[arg-type]
        image, target = images[index]
        image_id = int(target["image_id"])
        truth["images"].append({"id": image_id, "height": image.shape[1], "width": image.shape[2]})
        for box, label, mask in zip(target["boxes"].tolist(), target["labels"], target["masks"], strict=True):
            truth["annotations"].append(
                {
                    "id": len(truth["annotations"]) + 1,
                    "image_id": image_id,
                    "category_id": int(label),
                    "bbox": _corner_and_size(box),
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                    "segmentation": encode_mask(mask.numpy()),
                }
            )
    coco_truth = COCO()
    coco_truth.dataset = truth
    with redirect_stdout(io.StringIO()):
        coco_truth.createIndex()
    return coco_truth


def evaluate(truth: COCO, found: list[dict[str, Any]]) -> dict[str, float]:
    """Average precision in percent, over overlaps 0.50 to 0.95 and at 0.50, of boxes and, where given, of masks.

    Args:
        truth: Ground truth.
        found: For each image evaluated its `image_id`, and what was found in it: `boxes` (N, 4) as x1, y1, x2, y2,
            `labels` (N,), `scores` (N,), and `masks`, N run lengths, or none.
    """
    result = _average_precision(truth, found, "bbox", "box")
    if all("masks" in image for image in found):
        result |= _average_precision(truth, found, "segm", "mask")
    return result


def _average_precision(truth: COCO, found: list[dict[str, Any]], kind: str, name: str) -> dict[str, float]:
    entries = []
    for image in found:
        for index, (label, score) in enumerate(zip(image["labels"], image["scores"], strict=True)):
            shape: dict[str, Any] = {"bbox": _corner_and_size(image["boxes"][index].tolist())}
            if kind == "segm":
                shape = {"segmentation": image["masks"][index]}
            entries.append({"image_id": image["image_id"], "category_id": int(label), "score": float(score), **shape})
    if not entries:  # pycocotools cannot read an empty list
        return {f"{name}_map": 0.0, f"{name}_map50": 0.0}
    with redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, truth.loadRes(entries), kind)
        evaluation.params.imgIds = [image["image_id"] for image in found]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    overall, at_half = (round(100 * float(value), 2) for value in evaluation.stats[:2])
    return {f"{name}_map": overall, f"{name}_map50": at_half}


def _corner_and_size(box: Sequence[float]) -> list[float]:
    left, top, right, bottom = box
    return [left, top, right - left, bottom - top]
