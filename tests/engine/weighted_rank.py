"""One rank of several that take a step with class weights; rank 0 prints its loss and gradient as JSON.

Started by test_loss.py with torchrun's environment variables. Argument: the images of each micro-batch of each rank.
"""

import json
import sys

import torch
from torch import Tensor, nn

from acmix.config import Config
from acmix.data.loader import Batch
from acmix.engine.learner import Learner
from acmix.process.distributed import Distributed

WEIGHTS = [0.2, 1.0, 5.0, 0.7]
SMOOTHING = 0.1


class Loader:
    """What the learner wants to know of a TrainLoader."""

    global_batch = 8
    updates_per_epoch = 10
    classes = ("ant", "bee", "cow", "dog")


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).double()


def draws(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, 2, 2, generator=generator, dtype=torch.float64)
    return images, torch.randint(4, (count,), generator=generator)


def config() -> Config:
    return Config.model_validate(
        {
            "model": {"name": "test"}, "data": {"dataset": "digits"}, "schedule": {"epochs": 3},
            "run": {"device": "cpu"}, "loss": {"class_weights": WEIGHTS, "label_smoothing": SMOOTHING},
        }
    )  # fmt: skip


def run(sizes: list[list[int]]) -> None:
    images, targets = draws(sum(map(sum, sizes)))
    with Distributed.start(config().run) as dist:
        learner = Learner(config(), network(), dist, Loader())  # type: ignore[arg-type]
        start, mine = sum(map(sum, sizes[: dist.rank])), []
        for size in sizes[dist.rank]:
            part = slice(start, start + size)
            mine.append(Batch(images[part], targets[part], torch.arange(size), torch.ones(size, dtype=torch.bool), []))
            start += size
        losses = [loss.read().item() for loss in learner.gradients(mine, 1)]
        mean = dist.agree(loss=sum(losses) / len(losses)).loss
        gradient = torch.cat([parameter.grad.flatten() for parameter in learner.model.parameters()])  # type: ignore[union-attr]
        if dist.is_main:
            print(json.dumps({"loss": mean, "gradient": gradient.tolist()}), flush=True)


if __name__ == "__main__":
    run(json.loads(sys.argv[1]))
