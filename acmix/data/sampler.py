"""The order of the images: a function of seed and epoch, for any number of processes and workers."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from acmix.data.seeding import stream_seed
from acmix.errors import UserError


@dataclass(frozen=True)
class BatchPlan:
    """Which images make up one micro-batch."""

    epoch: int
    indices: np.ndarray  # (B,) int64, places in the dataset
    repeats: np.ndarray  # (B,) int64, which augmented copy of the image


@dataclass(frozen=True)
class TrainOrder:
    """The order of training images.

    Epoch e is one permutation drawn from (seed, e). With repeated augmentation R, each image appears R times in
    a row; the epoch keeps its length, so it shows 1/R of the images. It is cut into global batches of
    `global_batch` images; an incomplete last one is dropped. Micro-batch m of rank r is the slice
    [(m * world_size + r) * batch_size : + batch_size] of a global batch, so a global batch holds the same images
    for any number of processes.
    """

    length: int
    batch_size: int
    world_size: int = 1
    accumulate: int = 1
    repeated_aug: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.length < self.global_batch:
            raise UserError(
                f"{self.length} training images are less than one global batch of {self.global_batch} "
                f"(data.batch_size {self.batch_size} × {self.world_size} processes × optimizer.accumulate "
                f"{self.accumulate}); lower data.batch_size"
            )

    @property
    def global_batch(self) -> int:
        """Images per update of the weights, over all processes."""
        return self.batch_size * self.world_size * self.accumulate

    @property
    def updates_per_epoch(self) -> int:
        """Updates of the weights per epoch."""
        return self.length // self.global_batch

    def epoch_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices and repeats (length,) of the whole epoch, the same on every rank."""
        # numpy promises that RandomState's streams never change; those of its newer generators may
        words = stream_seed("order", self.seed, epoch)
        random = np.random.RandomState([words & 0xFFFFFFFF, words >> 32])
        permutation = random.permutation(self.length)
        shown = permutation[: -(-self.length // self.repeated_aug)]
        indices = np.repeat(shown, self.repeated_aug)[: self.length].astype(np.int64)
        repeats = np.tile(np.arange(self.repeated_aug, dtype=np.int64), len(shown))[: self.length]
        return indices, repeats

    def plans(self, epoch: int, rank: int, start_update: int = 0) -> Iterator[BatchPlan]:
        """The micro-batches of one rank, `accumulate` per update, starting at `start_update`."""
        indices, repeats = self.epoch_order(epoch)
        for update in range(start_update, self.updates_per_epoch):
            for micro in range(self.accumulate):
                start = update * self.global_batch + (micro * self.world_size + rank) * self.batch_size
                part = slice(start, start + self.batch_size)
                yield BatchPlan(epoch, indices[part], repeats[part])


def val_plans(length: int, batch_size: int, rank: int, world_size: int) -> list[BatchPlan]:
    """A rank's share of the validation images, in batches; every image is on exactly one rank.

    Shares may differ by one image, and may be empty.
    """
    share = np.arange(rank, length, world_size, dtype=np.int64)
    starts = range(0, len(share), batch_size)
    return [BatchPlan(0, part, np.zeros_like(part)) for part in (share[start : start + batch_size] for start in starts)]
