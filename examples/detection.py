"""Detect objects with one of our backbones: RetinaNet, or Mask R-CNN with masks, both torchvision's.

    python examples/detection.py [--head retinanet|maskrcnn] [--model NAME] [KEY=VALUE ...] [--out FOLDER]
    python examples/detection.py --coco /data/coco --head maskrcnn --weights FILE.safetensors --until 0 --steps 90000 \
        --size 800 --batch 8 --lr 1e-4 --workers 8

Without --coco it trains on shapes drawn on the spot until the loss has halved. It evaluates as COCO does, draws a few
results into FOLDER/detections.png, and ends with one line of JSON. /data/coco holds train2017/, val2017/ and
annotations/instances_{train,val}2017.json.
"""

import argparse
import io
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.models.detection import MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, make_grid, save_image

import shapes
from acmix.checkpoint.atomic import prove_writable, replacing
from acmix.json_text import json_text
from acmix.process.program import Arguments, run_program, whole_number
from average_precision import decode_mask, encode_mask, evaluate, ground_truth
from backbone import FeatureMaps, add_backbone_arguments, build_features, pick_device, pyramid
from folders import coco
from training import SPAN, add_training_arguments, mean, size_of_images, train

LEVELS = {"retinanet": 3, "maskrcnn": 4}
DRAWN = 4  # images in the picture
SURE = 0.5  # score from which a detection is drawn


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status, 2 for bad usage or input."""
    return run_program(lambda: run(arguments))


def run(arguments: Sequence[str] | None) -> int:
    """Train, evaluate, draw. Raises UserError."""
    options = _options(arguments)
    picture = options.out / "detections.png"
    prove_writable("--out", picture)
    torch.manual_seed(options.seed)
    train_set, val_set, truth, names = _data(options)
    features = build_features(options.model, LEVELS[options.head], options.weights, options.kwargs)
    model = build_detector(options.head, features, len(names), options.size, options.width).to(pick_device())
    batches = DataLoader(
        train_set, options.batch, shuffle=True, num_workers=options.workers, collate_fn=_collate, drop_last=True
    )
    losses = train(
        model, batches, lambda batch: loss_of(model, batch), steps=options.steps, until=options.until, lr=options.lr
    )
    found = detect(model, val_set, options.workers)
    with replacing(picture, make_parents=True) as temporary:
        draw(val_set, found[:DRAWN], names, temporary)
    result = {
        "model": options.model,
        "head": options.head,
        "steps": len(losses),
        "loss": [round(mean(losses[:SPAN]), 4), round(mean(losses[-SPAN:]), 4)],
        **evaluate(truth, found),
        "images": len(found),
    }
    print(f"Wrote {picture}")
    print(json_text(result))
    return 0


def build_detector(head: str, features: FeatureMaps, classes: int, size: int, width: int = 256) -> nn.Module:
    """torchvision's RetinaNet or Mask R-CNN over a feature pyramid of these maps.

    Args:
        head: `retinanet` or `maskrcnn`.
        features: Maps of the backbone.
        classes: Number of classes, the background included.
        size: Shortest side that images are resized to; the longest may have 5/3 of it, as in COCO's recipes.
        width: Channels of the pyramid and of the heads; 256 makes them torchvision's own.
    """
    ratios = (0.5, 1.0, 2.0)
    images = {"min_size": size, "max_size": size * 5 // 3, "image_mean": features.mean, "image_std": features.std}
    last = features.strides[-1]
    if head == "retinanet":
        strides = [*features.strides, 2 * last, 4 * last]
        scales = tuple(tuple(round(4 * stride * 2 ** (octave / 3)) for octave in range(3)) for stride in strides)
        anchors = AnchorGenerator(scales, (ratios,) * len(strides))
        return RetinaNet(
            pyramid(features, width, LastLevelP6P7(width, width)), classes, anchor_generator=anchors, **images
        )
    strides = [*features.strides, 2 * last]
    return MaskRCNN(
        pyramid(features, width),
        rpn_anchor_generator=AnchorGenerator(tuple((8 * stride,) for stride in strides), (ratios,) * len(strides)),
        box_head=TwoMLPHead(width * 7**2, 4 * width),
        box_predictor=FastRCNNPredictor(4 * width, classes),
        mask_head=MaskRCNNHeads(width, (width,) * 4, 1),
        mask_predictor=MaskRCNNPredictor(width, width, classes),
        **images,
    )


def loss_of(model: nn.Module, batch: tuple[list[Tensor], list[dict[str, Tensor]]]) -> Tensor:
    """The sum of the detector's losses."""
    device = next(model.parameters()).device
    images, targets = batch
    keys = ("boxes", "labels", "masks")
    losses = model(
        [image.to(device) for image in images],
        [{key: target[key].as_subclass(Tensor).to(device) for key in keys} for target in targets],
    )
    return sum(losses.values(), torch.zeros((), device=device))


@torch.no_grad()
def detect(model: nn.Module, images: Dataset[Any], workers: int = 0) -> list[dict[str, Any]]:
    """What the detector finds in every image: image_id, boxes, labels, scores, and masks as COCO's run lengths."""
    model.eval()
    device = next(model.parameters()).device
    found = []
    for [image], [target] in DataLoader(images, 1, num_workers=workers, collate_fn=_collate):
        [output] = model([image.to(device)])
        result = {key: output[key].cpu().numpy() for key in ("boxes", "labels", "scores")}
        if "masks" in output:
            masks = (output["masks"][:, 0] > 0.5).cpu().numpy().astype(np.uint8)
            result["masks"] = [encode_mask(mask) for mask in masks]
        found.append({"image_id": int(target["image_id"]), **result})
    return found


def draw(images: Dataset[Any], found: list[dict[str, Any]], names: Sequence[str], file: Path) -> None:
    """Write a picture of the first images with what was found in them for sure."""
    panels = []
    for index, result in enumerate(found):
        image = (images[index][0].as_subclass(Tensor) * 255).byte()
        sure = result["scores"] >= SURE
        if sure.any() and "masks" in result:
            masks = np.stack([decode_mask(mask) for mask, keep in zip(result["masks"], sure, strict=True) if keep])
            image = draw_segmentation_masks(image, torch.from_numpy(masks).bool(), alpha=0.5)
        boxes, labels = torch.from_numpy(result["boxes"][sure]), [names[label] for label in result["labels"][sure]]
        panels.append(draw_bounding_boxes(image, boxes, labels) if sure.any() else image)
    save_image(make_grid(_padded(panels), nrow=len(panels)) / 255, file, format="png")


def _padded(images: Sequence[Tensor]) -> list[Tensor]:
    height, width = (max(image.shape[side] for image in images) for side in (1, 2))
    return [
        nn.functional.pad(image.float(), (0, width - image.shape[2], 0, height - image.shape[1])) for image in images
    ]


def _collate(samples: list[tuple[Any, Any]]) -> tuple[tuple[Any, ...], ...]:
    return tuple(zip(*samples, strict=True))


def _data(options: argparse.Namespace) -> tuple[Dataset[Any], Dataset[Any], Any, list[str]]:
    """Images to train and to evaluate on, the ground truth of the latter, and the names of the classes by label."""
    if options.coco is None:
        drawn = shapes.Shapes(max(options.batch, 1000), options.size, options.seed)
        val_set = shapes.Shapes(options.images, options.size, options.seed + 1)
        return drawn, val_set, ground_truth(val_set, shapes.CLASSES), list(shapes.CLASSES)
    with redirect_stdout(io.StringIO()):
        train_set, _ = coco(options.coco, "train2017", train=True)
        photographs, truth = coco(options.coco, "val2017", train=False)
    categories = {category["id"]: category["name"] for category in truth.dataset["categories"]}
    names = [categories.get(label, "") for label in range(max(categories) + 1)]
    return train_set, photographs, truth, names


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Arguments(prog="detection.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--head", choices=sorted(LEVELS), default="retinanet", help="detector (retinanet)")
    add("--coco", type=Path, metavar="FOLDER", help="COCO's images and annotations; else shapes are drawn")
    add("--size", type=size_of_images, default=128, metavar="N", help="shortest side of an image, in pixels (128)")
    add("--images", type=whole_number, default=32, metavar="N", help="shapes: images to evaluate on (32)")
    add("--out", type=Path, default=Path("runs/detection"), metavar="FOLDER", help="(runs/detection)")
    add_backbone_arguments(parser)
    add_training_arguments(parser)
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
