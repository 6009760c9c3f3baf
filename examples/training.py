"""The loop that both examples train by."""

from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from typing import Any

import timm.optim
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

WARMUP = 10  # updates over which the learning rate rises
SPAN = 5  # losses that are averaged to say where the loss stands


def add_training_arguments(parser: ArgumentParser) -> None:
    """--steps, --until, --batch, --lr, --workers and --seed."""
    add = parser.add_argument
    add("--steps", type=int, default=300, metavar="N", help="updates at most (300)")
    add(
        "--until",
        type=float,
        default=0.5,
        metavar="X",
        help="stop when the loss is X of its first value (0.5); 0: never",
    )
    add("--batch", type=int, default=4, metavar="N", help="images in a batch (4)")
    add("--lr", type=float, default=1e-3, metavar="X", help="learning rate (0.001)")
    add("--workers", type=int, default=0, metavar="N", help="processes that read images (0)")
    add("--seed", type=int, default=0, metavar="N", help="of weights, order and made images (0)")


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
    """
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


def _forever(batches: DataLoader[Any]) -> Iterator[Any]:
    while True:
        yield from batches
