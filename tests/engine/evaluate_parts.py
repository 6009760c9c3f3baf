"""One process of several that evaluate the same images together; prints what each evaluation gave, as JSON lines.

Started by test_evaluate.py with torchrun's environment variables. Arguments: the numbers of images, the batch sizes.
"""

import json
import sys

import torch
from torch import Tensor, nn

from acmix.config import PrecisionConfig, RunConfig
from acmix.data.loader import Batch
from acmix.data.sampler import val_plans
from acmix.engine.evaluate import evaluate
from acmix.process.distributed import Distributed


class Share:
    """What a ValLoader is to the evaluation: the batches of one rank."""

    def __init__(self, images: Tensor, targets: Tensor, batch_size: int, dist: Distributed) -> None:
        self._parts = [plan.indices for plan in val_plans(len(images), batch_size, dist.rank, dist.world_size)]
        self._images, self._targets = images, targets

    @property
    def batches(self) -> int:
        return len(self._parts)

    def __iter__(self):
        for part in self._parts:
            ids = torch.from_numpy(part)
            valid = torch.ones(len(part), dtype=torch.bool)
            yield Batch(self._images[ids], self._targets[ids], ids, valid, [])


def run(counts: list[int], batch_sizes: list[int]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 7))
    with Distributed.start(RunConfig(device="cpu")) as dist:
        for count in counts:
            generator = torch.Generator().manual_seed(count)
            images = torch.randn(count, 3, 4, 4, generator=generator)
            targets = torch.randint(7, (count,), generator=generator)
            for batch_size in batch_sizes:
                share = Share(images, targets, batch_size, dist)
                metrics = evaluate(model, share, dist, PrecisionConfig())  # type: ignore[arg-type]
                if dist.is_main:
                    print(json.dumps({"count": count, "batch_size": batch_size, "metrics": metrics}), flush=True)
        polls = iter([False, dist.rank == dist.world_size - 1, False])
        share = Share(images, targets, 1, dist)
        stopped = evaluate(model, share, dist, PrecisionConfig(), poll=lambda: dist.agree(stop=next(polls)).stop)  # type: ignore[arg-type]
        if dist.is_main:
            print(json.dumps({"stopped": stopped is None}), flush=True)


if __name__ == "__main__":
    run(json.loads(sys.argv[1]), json.loads(sys.argv[2]))
