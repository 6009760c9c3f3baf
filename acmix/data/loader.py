"""Batches for training and validation: `build_data(config)`."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from acmix.config import Config
from acmix.data.batch import Batch, Normaliser
from acmix.data.classes import class_counts, present_classes
from acmix.data.datasets import Source, Statistics, build_sources, build_val_source, statistics_of
from acmix.data.decoded import LIMIT
from acmix.data.reader import BatchReader, unreadable
from acmix.data.resident import Kind, hold_resident
from acmix.data.sampler import BatchPlan, TrainOrder, val_plans
from acmix.data.transforms import PixelTransform, build_train_pixels, build_val_pixels
from acmix.data.workers import WorkerPool, worker_count
from acmix.errors import UserError


class Images(Protocol):
    """Where a training loader has its batches from."""

    kind: Kind

    def batches(self, plans: Iterator[BatchPlan]) -> Iterator[Batch]: ...


class WorkerImages:
    """Images that loader processes read anew each time."""

    kind: Kind = "workers"

    def __init__(
        self,
        source: Source,
        transform: PixelTransform,
        config: Config,
        normaliser: Normaliser,
        seed: int | None,
        most: int | None = None,
    ) -> None:
        workers = worker_count(config)
        self._normaliser = normaliser
        self._reader = BatchReader(source, transform, config, seed)
        self.pool = WorkerPool(self._reader, config, workers if most is None else min(workers, most))

    def batches(self, plans: Iterator[BatchPlan]) -> Iterator[Batch]:
        """The batches of the plans, in order. Raises UserError when a worker dies."""
        for read in self.pool.run(plans):
            yield read.batch(self._normaliser)

    def read_here(self, plan: BatchPlan) -> Batch:
        """The batch of a plan, read in this process."""
        return self._reader[plan].batch(self._normaliser)


class TrainLoader:
    """The training epochs of one process of several."""

    def __init__(self, source: Source, config: Config, statistics: Statistics, rank: int, world_size: int) -> None:
        self.order = TrainOrder(
            length=len(source),
            batch_size=config.data.batch_size,
            world_size=world_size,
            accumulate=config.optimizer.accumulate,
            repeated_aug=config.data.repeated_aug,
            seed=config.run.seed,
        )
        self.classes = source.classes
        self.class_counts = class_counts(source)
        """Training images of each class, (C,); None where the dataset does not tell."""
        self._source = source
        self._rank = rank
        self._raises = config.data.on_error == "raise"
        self.images: Images = hold_resident(source, config, statistics) or WorkerImages(
            source, build_train_pixels(config, statistics), config, Normaliser(statistics), config.run.seed
        )

    def __len__(self) -> int:
        return self.order.length

    @property
    def updates_per_epoch(self) -> int:
        """Updates of the weights per epoch."""
        return self.order.updates_per_epoch

    @property
    def global_batch(self) -> int:
        """Images per update of the weights, over all processes."""
        return self.order.global_batch

    def epoch(self, epoch: int, start_update: int = 0) -> Iterator[list[Batch]]:
        """The updates of an epoch (both counted from 0), each a list of `optimizer.accumulate` batches.

        No image before `start_update` is read. Raises UserError for an image that cannot be read, unless
        `data.on_error` is skip, and when a worker dies.
        """
        update: list[Batch] = []
        for batch in self.images.batches(self.order.plans(epoch, self._rank, start_update)):
            if batch.errors and self._raises:
                message = unreadable(batch.errors[0], self._source)
                raise UserError(f"{message}, or train without it by data.on_error=skip")
            update.append(batch)
            if len(update) == self.order.accumulate:
                yield update
                update = []


class ValLoader:
    """One process's share of the validation images; over all processes each image comes once.

    With `keep`, images that take little memory are decoded in the first pass and kept for the next.
    """

    def __init__(
        self, source: Source, config: Config, statistics: Statistics, rank: int, world_size: int, *, keep: bool = False
    ) -> None:
        self.classes = source.classes
        self.present = present_classes(source)
        """Indices of the classes that may have images here, ascending."""
        self._source = source
        self.batch_size = config.data.val_batch_size or config.data.batch_size
        self._plans = val_plans(len(source), self.batch_size, rank, world_size)
        self.images = WorkerImages(
            source, build_val_pixels(config), config, Normaliser(statistics), None, most=len(self._plans)
        )
        self._keep = keep and len(source) * config.model.in_chans * math.prod(config.data.size) <= LIMIT
        self._kept: list[Batch] = []

    def __len__(self) -> int:
        """Images over all processes."""
        return len(self._source)

    @property
    def batches(self) -> int:
        """Batches of this process."""
        return len(self._plans)

    def spread(self, count: int, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """About `count` images, evenly spaced over the whole set, whose classes may follow one another.

        They are read in this process; `rank` of `world_size` gets its share. Raises UserError as a whole pass does.
        """
        places = np.linspace(0, len(self._source) - 1, min(count, len(self._source))).round().astype(np.int64)
        for plan in val_plans(len(places), self.batch_size, rank, world_size):
            batch = self.images.read_here(replace(plan, indices=places[plan.indices]))
            if batch.errors:
                raise UserError(f"{unreadable(batch.errors[0], self._source)}; validation counts every image")
            yield batch

    def __iter__(self) -> Iterator[Batch]:
        if self._kept:
            yield from map(Batch.again, self._kept)
            return
        kept = []
        for batch in self.images.batches(iter(self._plans)):
            if batch.errors:
                raise UserError(f"{unreadable(batch.errors[0], self._source)}; validation counts every image")
            if self._keep:
                kept.append(batch.copy())
            yield batch
        if self._keep:
            self._kept = kept
            self.images.pool.close()


@dataclass(frozen=True)
class Data:
    """Both loaders and the classes they agree on.

    Their processes start at the first epoch and end when the loaders are dropped or the program exits.
    """

    classes: list[str]
    train: TrainLoader
    val: ValLoader

    @property
    def loader(self) -> Kind:
        """What `data.loader: auto` came to."""
        return self.train.images.kind

    @property
    def num_classes(self) -> int:
        """Number of classes in the data."""
        return len(self.classes)


def build_data(config: Config, *, rank: int = 0, world_size: int = 1, classes: Sequence[str] | None = None) -> Data:
    """Open the configured dataset for one process of several.

    `classes`, the list of the run or weights to go on from, keeps its order where the data has the same classes.
    Raises UserError: missing data, empty or hidden class folders, validation classes that training lacks, fewer
    training images than a global batch.
    """
    train, val, statistics = build_sources(config, classes, rank)
    return Data(
        classes=train.classes,
        train=TrainLoader(train, config, statistics, rank, world_size),
        val=ValLoader(val, config, statistics, rank, world_size, keep=True),
    )


def build_val(config: Config, *, rank: int = 0, world_size: int = 1, classes: Sequence[str] | None = None) -> ValLoader:
    """Open only the validation split, for evaluation.

    `classes`, the list a run was trained with, numbers those of the data, which may be a part of it. Raises UserError.
    """
    source = build_val_source(config, classes, rank)
    statistics = statistics_of(config.data, config.model.in_chans)
    return ValLoader(source, config, statistics, rank, world_size)


def resolve_num_classes(config: Config, data: Data | ValLoader) -> int:
    """`model.num_classes`, or the data's number where that is null. Raises UserError when they differ."""
    wanted, found = config.model.num_classes, len(data.classes)
    if wanted is not None and wanted != found:
        raise UserError(
            f"model.num_classes is {wanted}, but the data (data.dataset {config.data.dataset}) has {found} classes; "
            "make them equal or leave model.num_classes out; where the data holds a part of the classes, name all of "
            "them with data.classes=FILE"
        )
    return found
