"""Name the class of every pixel with one of our backbones and the head of a semantic FPN.

    python examples/segmentation.py [--model NAME] [KEY=VALUE ...] [--out FOLDER]
    python examples/segmentation.py --ade20k /data/ADEChallengeData2016 --weights FILE.safetensors --until 0 \
        --steps 80000 --size 512 --batch 16 --lr 1e-4 --workers 8

Without --ade20k it trains on shapes drawn on the spot until the loss has halved. It evaluates the mean intersection
over union, draws a few results into FOLDER/segmentation.png, and ends with one line of JSON. The folder of ADE20K holds
images/{training,validation}/*.jpg and annotations/{training,validation}/*.png.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.utils import make_grid, save_image

import shapes
from acmix.checkpoint.atomic import prove_writable, replacing
from acmix.json_text import json_text
from acmix.process.program import Arguments, run_program, whole_number
from backbone import FeatureMaps, add_backbone_arguments, build_features, pick_device, pyramid
from folders import ADE20K
from training import SPAN, add_training_arguments, mean, size_of_images, train

UNLABELLED = 255
ADE20K_CLASSES = 150
DRAWN = 4  # images in the picture


class SemanticFPN(nn.Module):
    """Classes of pixels from a feature pyramid (Kirillov et al. 2019, https://arxiv.org/abs/1901.02446).

    Every level climbs to the finest one, a 3×3 convolution at each size on the way; their sum is classified.

    Args:
        features: Maps of the backbone.
        classes: Number of classes.
        width: Channels of the pyramid.
        head_width: Channels of the head, a multiple of 4.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, features: FeatureMaps, classes: int, width: int = 256, head_width: int = 128) -> None:
        super().__init__()
        self.pyramid = pyramid(features, width)
        self.climbs = nn.ModuleList()
        for level in range(len(features.channels)):
            inputs = [width] + [head_width] * level
            self.climbs.append(nn.ModuleList(_conv(channels, head_width) for channels in inputs[: max(level, 1)]))
        self.classifier = nn.Conv2d(head_width, classes, 1)
        self.register_buffer("mean", torch.tensor(features.mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(features.std)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] to logits (B, classes, H, W)."""
        maps = self.pyramid((images - self.mean) / self.std)
        sizes = [maps[str(level)].shape[-2:] for level in range(len(self.climbs))]
        total = torch.zeros((), device=images.device)
        for level, climb in enumerate(self.climbs):
            x = maps[str(level)]
            for step, conv in enumerate(climb.children(), start=1):
                x = conv(x)
                if level > 0:
                    x = F.interpolate(x, sizes[level - step], mode="bilinear")
            total = total + x
        return F.interpolate(self.classifier(total), images.shape[-2:], mode="bilinear")


def _conv(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.GroupNorm(outputs // 4, outputs), nn.ReLU()
    )


class SemanticShapes(Dataset[tuple[Tensor, Tensor]]):
    """`Shapes` with the class of each pixel for a target; arguments as there."""

    def __init__(self, count: int, size: int, seed: int) -> None:
        self.shapes = shapes.Shapes(count, size, seed)

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, target = self.shapes[index]
        return image, shapes.semantic_map(target)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status, 2 for bad usage or input."""
    return run_program(lambda: run(arguments))


def run(arguments: Sequence[str] | None) -> int:
    """Train, evaluate, draw. Raises UserError."""
    options = _options(arguments)
    picture = options.out / "segmentation.png"
    prove_writable("--out", picture)
    torch.manual_seed(options.seed)
    train_set, val_set, classes = _data(options)
    features = build_features(options.model, 4, options.weights, options.kwargs)
    model = SemanticFPN(features, classes, options.width, options.head_width).to(pick_device())
    batches = DataLoader(
        train_set, options.batch, shuffle=True, num_workers=options.workers, collate_fn=collate, drop_last=True
    )
    losses = train(
        model, batches, lambda batch: loss_of(model, batch), steps=options.steps, until=options.until, lr=options.lr
    )
    confusion = confusion_of(model, val_set, classes, options.workers)
    with replacing(picture, make_parents=True) as temporary:
        draw(model, val_set, temporary)
    result = {
        "model": options.model,
        "steps": len(losses),
        "loss": [round(mean(losses[:SPAN]), 4), round(mean(losses[-SPAN:]), 4)],
        "miou": round(100 * mean_intersection_over_union(confusion), 2),
        "pixel_accuracy": round(100 * float(confusion.diagonal().sum() / confusion.sum()), 2),
        "images": len(val_set),  # type: ignore[arg-type]
    }
    print(f"Wrote {picture}")
    print(json_text(result))
    return 0


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy of the labelled pixels."""
    device = next(model.parameters()).device
    images, classes = batch
    return F.cross_entropy(model(images.to(device)), classes.to(device), ignore_index=UNLABELLED)


@torch.no_grad()
def confusion_of(model: nn.Module, images: Dataset[Any], classes: int, workers: int = 0) -> Tensor:
    """How many pixels of each class (row) were given each class (column), (classes, classes)."""
    model.eval()
    confusion = torch.zeros(classes * classes, dtype=torch.long)
    for image, truth in DataLoader(images, 1, num_workers=workers):
        pairs = truth * classes + predict(model, image)
        confusion += pairs[truth != UNLABELLED].bincount(minlength=classes * classes)
    return confusion.view(classes, classes)


def mean_intersection_over_union(confusion: Tensor) -> float:
    """The mean over the classes that occur, in the truth or the predictions."""
    both = confusion.diagonal()
    either = confusion.sum(0) + confusion.sum(1) - both
    return float((both / either)[either > 0].mean())


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """The class of every pixel (B, H, W), on the CPU."""
    return model(images.to(next(model.parameters()).device)).argmax(1).cpu()


def collate(samples: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """A batch of images of different sizes: padded below and right with black, unlabelled pixels."""
    height, width = (max(classes.shape[side] for _, classes in samples) for side in (0, 1))
    images, truths = [], []
    for image, classes in samples:
        padding = (0, width - classes.shape[1], 0, height - classes.shape[0])
        images.append(F.pad(image, padding))
        truths.append(F.pad(classes, padding, value=UNLABELLED))
    return torch.stack(images), torch.stack(truths)


def draw(model: nn.Module, images: Dataset[Any], file: Path) -> None:
    """Write a picture of the first images: as they are, with their true classes, with the predicted ones."""
    model.eval()
    colours = torch.rand(UNLABELLED + 1, 3, generator=torch.Generator().manual_seed(0))
    colours[0] = colours[UNLABELLED] = 0.0
    first = [images[index] for index in range(min(DRAWN, len(images)))]  # type: ignore[arg-type]
    rows: list[list[Tensor]] = [[], [], []]
    for image, truth in first:
        predicted = predict(model, image[None])[0]
        for row, panel in zip(
            rows, (image, colours[truth].movedim(2, 0), colours[predicted].movedim(2, 0)), strict=True
        ):
            row.append(panel)
    height, width = (max(image.shape[side] for image, _ in first) for side in (1, 2))
    panels = [F.pad(panel, (0, width - panel.shape[2], 0, height - panel.shape[1])) for row in rows for panel in row]
    save_image(make_grid(panels, nrow=len(first)), file, format="png")


def _data(options: argparse.Namespace) -> tuple[Dataset[Any], Dataset[Any], int]:
    """Images to train and to evaluate on, and the number of classes."""
    if options.ade20k is None:
        drawn = SemanticShapes(max(options.batch, 1000), options.size, options.seed)
        return drawn, SemanticShapes(options.images, options.size, options.seed + 1), len(shapes.CLASSES)
    training = ADE20K(options.ade20k, "training", options.size, crop=True)
    return training, ADE20K(options.ade20k, "validation", options.size, crop=False), ADE20K_CLASSES


def _head_width(text: str) -> int:
    if (width := whole_number(text)) % 4 == 0:
        return width
    raise argparse.ArgumentTypeError(f"{width} is not a multiple of 4")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Arguments(
        prog="segmentation.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--ade20k", type=Path, metavar="FOLDER", help="ADE20K's images and annotations; else shapes are drawn")
    add("--size", type=size_of_images, default=128, metavar="N", help="shortest side of an image, in pixels (128)")
    add("--images", type=whole_number, default=32, metavar="N", help="shapes: images to evaluate on (32)")
    add("--head-width", type=_head_width, default=128, metavar="N", help="channels of the head, a multiple of 4 (128)")
    add("--out", type=Path, default=Path("runs/segmentation"), metavar="FOLDER", help="(runs/segmentation)")
    add_backbone_arguments(parser)
    add_training_arguments(parser)
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
