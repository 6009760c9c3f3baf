"""The loop that both examples train by."""

import math
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import timm.optim
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from acmix.errors import UserError
from acmix.process.program import whole_number

WARMUP = 10  # updates over which the learning rate rises
SMALLEST = 32  # pixels of the shortest side of an image
SPAN = 5  # losses that are averaged to say where the loss stands


def add_training_arguments(parser: ArgumentParser) -> None:
    """--steps, --until, --batch, --lr, --workers and --seed."""
    add = parser.add_argument
    add("--steps", type=whole_number, default=300, metavar="N", help="updates at most (300)")
    add(
        "--until",
        type=_at_least_0,
        default=0.5,
        metavar="X",
        help="stop when the loss is X of its first value (0.5); 0: never",
    )
    add("--batch", type=whole_number, default=4, metavar="N", help="images in a batch (4)")
    add("--lr", type=_rate, default=1e-3, metavar="X", help="learning rate (0.001)")
    add("--workers", type=_count, default=0, metavar="N", help="processes that read images (0)")
    add("--seed", type=_count, default=0, metavar="N", help="of weights, order and made images (0)")


def train(
    model: nn.Module,
    batches: DataLoader[Any],
    loss_of: Callable[[Any], Tensor],
    *,
    steps: int,
    until: float,
    lr: float,
) -> list[float]:
    """Train by AdamW for `steps` updates, or until the loss has come down to `until` of where it began.

    Both ends of that comparison are means over 5 updates. Returns the loss of every update.

    Args:
        model: The network; one-dimensional parameters and the path weights get no weight decay.
        batches: Its epochs follow one another.
        loss_of: From a batch to the loss.

    Raises:
        UserError: where there is no batch at all.
    """
    if not len(batches):
        raise UserError(f"--batch {batches.batch_size}: there are fewer images to train on; give a smaller batch")
    model.train()
    optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=lr, weight_decay=0.05)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / WARMUP, total_iters=WARMUP)
    losses: list[float] = []
    for batch in _forever(batches):
        loss = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        warmup.step()
        losses.append(loss.item())
        if len(losses) % 10 == 0:
            print(f"step {len(losses)}: loss {mean(losses[-SPAN:]):.3f}", flush=True)
        if len(losses) >= steps or mean(losses[-SPAN:]) <= until * mean(losses[:SPAN]):
            return losses
    raise AssertionError("a loader has batches")


def mean(losses: list[float]) -> float:
    """Their mean."""
    return sum(losses) / len(losses)


def size_of_images(text: str) -> int:
    """An argument: the shortest side of an image, long enough for the strides of a backbone and to draw shapes."""
    if (size := whole_number(text)) >= SMALLEST:
        return size
    raise ArgumentTypeError(f"{size} is less than {SMALLEST} pixels")


def _count(text: str) -> int:
    return 0 if text == "0" else whole_number(text)


def _at_least_0(text: str) -> float:
    with suppress(ValueError):
        if 0 <= (value := float(text)) < math.inf:
            return value
    raise ArgumentTypeError(f"{text!r} is not a number of at least 0")


def _rate(text: str) -> float:
    if (value := _at_least_0(text)) > 0:
        return value
    raise ArgumentTypeError(f"{text!r} is not a number above 0")


def _forever(batches: DataLoader[Any]) -> Iterator[Any]:
    while True:
        yield from batches
