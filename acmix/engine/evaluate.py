"""Exact evaluation: every image counted once, whatever the number of processes and the size of their shares."""

import math
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from acmix.config import PrecisionConfig
from acmix.engine.forward import autocast, network_inputs
from acmix.process.distributed import Distributed

if TYPE_CHECKING:
    from acmix.data.loader import ValLoader


class Metrics(TypedDict):
    """Mean cross entropy (without smoothing), top-1 and top-5 in percent, number of images."""

    loss: float
    top1: float
    top5: float
    count: int


def evaluate(
    model: nn.Module,
    loader: "ValLoader",
    dist: Distributed,
    precision: PrecisionConfig,
    *,
    step: int = 0,
    poll: Callable[[], bool] = lambda: False,
    observe: Callable[[Tensor, Tensor], None] | None = None,
) -> Metrics | None:
    """Evaluate a bare (not DDP-wrapped) model on the loader's images, all ranks together.

    Ranks may hold unequal numbers of batches: each calls `poll` (which may be a collective) as often as the longest
    share has batches. When `poll` returns True, which it must do on all ranks alike, the evaluation ends early and
    returns None. `observe` gets the logits and targets of each batch. Sums are added in float64. With fewer than five
    classes top-5 is over all of them. A loss that is not finite is said on stderr. The model's train or eval mode is
    restored.
    """
    sums = torch.zeros(4, dtype=torch.float64, device=dist.device)  # loss, top-1, top-5, count
    rounds = max(dist.gather(loader.batches))
    batches = iter(loader)
    training = model.training
    model.eval()
    try:
        for _ in range(rounds):
            dist.watchdog.tick(step, "evaluation")
            batch = next(batches, None)
            if batch is not None:
                images, targets = network_inputs(batch, precision, dist.device)
                with torch.inference_mode(), autocast(precision, dist.device):
                    logits = model(images)
                sums += batch_sums(logits.float(), targets)
                if observe is not None:
                    observe(logits, targets)
            if poll():
                return None
    finally:
        model.train(training)
    loss, top1, top5, count = dist.all_reduce(sums.cpu()).tolist()
    images_seen = max(count, 1.0)
    if dist.is_main and not math.isfinite(loss):
        message = f"the loss of this evaluation is {loss}: the weights have diverged"
        print(f"warning: {message}; lower optimizer.lr or set optimizer.clip_grad", file=sys.stderr, flush=True)
    return Metrics(
        loss=loss / images_seen, top1=100 * top1 / images_seen, top5=100 * top5 / images_seen, count=int(count)
    )


def batch_sums(logits: Tensor, targets: Tensor) -> Tensor:
    """Sums over a batch, float64: cross entropy, hits among the best and the best five, images."""
    loss = F.cross_entropy(logits, targets, reduction="none").double().sum()
    hits = best_classes(logits).eq(targets[:, None])
    return torch.stack([loss, hits[:, 0].sum().double(), hits.sum().double(), loss.new_tensor(float(len(targets)))])


def best_classes(logits: Tensor) -> Tensor:
    """The classes with the five highest logits of each image, best first, (B, ≤5).

    All that counts hits asks here: of equal logits, which low precision makes, argmax takes another class than topk.
    """
    return logits.float().topk(min(5, logits.shape[1]), dim=1).indices
