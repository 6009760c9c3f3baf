"""The loader for images that fit in memory: decoded once, then cropped, flipped and coloured a batch at a time."""

import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from acmix.config import Config
from acmix.data.batch import Batch, Normaliser
from acmix.data.batched import BatchedAugment
from acmix.data.datasets import Source, Statistics
from acmix.data.decoded import LIMIT, Decoded, Unsuitable, decode_all
from acmix.data.reader import Read, unreadable
from acmix.data.sampler import BatchPlan
from acmix.data.seeding import preserved_generators
from acmix.data.shared import hand_over, in_worker
from acmix.data.transforms import fixed_steps
from acmix.data.workers import WorkerPool, worker_count
from acmix.errors import UserError

Kind = Literal["workers", "resident"]


class ResidentReader(Dataset):
    """BatchPlan → its pixels, made from decoded images.

    Where an image cannot be read, its place in the batch holds a copy of another, as with `reader.BatchReader`.
    """

    def __init__(self, decoded: Decoded, augment: BatchedAugment) -> None:
        self._pixels = decoded.pixels
        self._targets = decoded.targets
        self._problems = decoded.problems
        self._unreadable = np.array(sorted(decoded.problems), dtype=np.int64)
        self._augment = augment

    def __getitem__(self, plan: BatchPlan) -> Read:
        valid = ~np.isin(plan.indices, self._unreadable)
        donors = np.where(valid, np.arange(len(valid)), valid.argmax())
        shown, repeats = plan.indices[donors], plan.repeats[donors]
        with preserved_generators() if self._augment.one_by_one and not in_worker() else nullcontext():
            pixels, erased = self._augment(self._pixels[shown], plan.epoch, shown, repeats)
        errors = [self._problems[index] for index in plan.indices[~valid].tolist()]
        values = torch.from_numpy(pixels)
        read = Read(values, self._targets[shown], plan.indices, valid, errors, erased)
        try:
            return read._replace(pixels=hand_over(values))
        except UserError as error:  # an exception that crosses processes would arrive wrapped in a traceback
            return read._replace(fatal=str(error))


class ResidentImages:
    """Training images held in memory; loader processes only where steps take the images one by one."""

    kind: Kind = "resident"

    def __init__(self, decoded: Decoded, augment: BatchedAugment, config: Config, statistics: Statistics) -> None:
        self._reader = ResidentReader(decoded, augment)
        self._normaliser = Normaliser(statistics)
        workers = worker_count(config) if augment.one_by_one else 0
        self.pool = WorkerPool(self._reader, config, workers) if workers else None

    def batches(self, plans: Iterator[BatchPlan]) -> Iterator[Batch]:
        """The batches of the plans, in order. Raises UserError when a worker dies."""
        reads = map(self._reader.__getitem__, plans) if self.pool is None else self.pool.run(plans)
        return (read.batch(self._normaliser) for read in reads)


def hold_resident(source: Source, config: Config, statistics: Statistics) -> ResidentImages | None:
    """The training images in memory, where `data.loader` asks for it; with `auto` None where they do not fit.

    What `auto` decides follows from the images and the config alone. ACMIX_DEBUG=1 prints the reason.

    Raises UserError for data.loader=resident where it cannot be, and for an image that cannot be read.
    """
    wanted = config.data.loader
    if wanted == "workers":
        return None
    data = config.data
    augment = BatchedAugment(config, statistics)
    steps = f"{config.augment.crop} {data.size} {data.interpolation}"
    try:
        decoded = decode_all(source, fixed_steps(config), steps, config, LIMIT if wanted == "auto" else None)
    except Unsuitable as error:
        if wanted == "resident":
            raise UserError(f"data.loader: resident cannot be: {error}; use data.loader=auto or workers") from None
        if os.environ.get("ACMIX_DEBUG") == "1":
            print(f"acmix: data.loader auto → workers: {error}", file=sys.stderr)
        return None
    if decoded.problems and data.on_error == "raise":
        first = decoded.problems[min(decoded.problems)]
        raise UserError(f"{unreadable(first, source)}, or train without it by data.on_error=skip")
    return ResidentImages(decoded, augment, config, statistics)
