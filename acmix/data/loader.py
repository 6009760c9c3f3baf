"""Batches for training and validation: `build_data(config)`."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from acmix.config import Config
from acmix.data.classes import present_classes
from acmix.data.datasets import Source, build_sources, build_val_source, statistics_of
from acmix.data.images import BadImage
from acmix.data.pictures import Picture, choose_decoder, with_decoder
from acmix.data.sampler import BatchPlan, TrainOrder, val_plans
from acmix.data.seeding import preserved_generators, seed_generators, stream_seed
from acmix.data.transforms import Transform, build_train_transform, build_val_transform
from acmix.data.workers import WorkerPool, in_worker, share_memory
from acmix.errors import UserError


@dataclass(frozen=True)
class Batch:
    """Images of one forward pass on one process.

    Where an image cannot be read, `valid` is False and the loss leaves it out; its place holds a copy of another
    image of the batch with that image's target, so that shapes stay and batch norm and mixup see a real image.
    `ids` are indices into the dataset, also of the unreadable images.
    """

    images: torch.Tensor  # (B, C, H, W) float32, normalised; C is 3, or 1 for grey
    targets: torch.Tensor  # (B,) int64
    ids: torch.Tensor  # (B,) int64
    valid: torch.Tensor  # (B,) bool
    errors: list[str]  # one message for each image left out


class _Read(NamedTuple):
    """A batch as a worker returns it. Only the images are a tensor, because each tensor costs a file descriptor."""

    images: torch.Tensor
    targets: np.ndarray
    ids: np.ndarray
    valid: np.ndarray
    errors: list[str]
    fatal: str | None


class BatchReader(Dataset):
    """BatchPlan → decoded, augmented images.

    The augmentation of an image is seeded from (seed, epoch, index, repeat); with seed None nothing is seeded.
    """

    def __init__(self, source: Source, transform: Transform, config: Config, seed: int | None) -> None:
        self._source = with_decoder(source, choose_decoder(config.data.decoder))
        self._transform = transform
        self._shape = (config.model.in_chans, *config.data.size)
        self._seed = seed

    def __getitem__(self, plan: BatchPlan) -> _Read:
        count = len(plan.indices)
        read = _Read(
            images=torch.zeros(count, *self._shape),
            targets=np.zeros(count, dtype=np.int64),
            ids=plan.indices,
            valid=np.zeros(count, dtype=bool),
            errors=[],
            fatal=None,
        )
        try:
            if in_worker():
                # here, because an error when the batch is sent would be lost in a background thread
                share_memory(read.images)
            with nullcontext() if in_worker() else preserved_generators():
                self._fill(read, plan)
        except UserError as error:  # an exception that crosses processes would arrive wrapped in a traceback
            return read._replace(images=torch.empty(0), fatal=str(error))
        if not read.valid.all() and read.valid.any():
            donor = int(read.valid.argmax())
            missing = np.flatnonzero(~read.valid)
            read.images[torch.from_numpy(missing)] = read.images[donor].clone()
            read.targets[missing] = read.targets[donor]
        return read

    def _fill(self, read: _Read, plan: BatchPlan) -> None:
        image: Image.Image | Picture | None = None
        target, loaded = 0, -1
        for i, (index, repeat) in enumerate(zip(plan.indices.tolist(), plan.repeats.tolist(), strict=True)):
            try:
                if index != loaded:  # the copies of repeated augmentation follow one another
                    image, target = self._source.load(index)
                    loaded = index
                assert image is not None
                if self._seed is not None:
                    seed_generators(stream_seed("augment", self._seed, plan.epoch, index, repeat))
                read.images[i] = self._transform(image)
            except BadImage as error:
                loaded = -1
                read.errors.append(f"{self._source.describe(index)}: {error.reason}")
                continue
            read.targets[i] = target
            read.valid[i] = True


class TrainLoader:
    """The training epochs of one process of several."""

    def __init__(self, source: Source, transform: Transform, config: Config, rank: int, world_size: int) -> None:
        self.order = TrainOrder(
            length=len(source),
            batch_size=config.data.batch_size,
            world_size=world_size,
            accumulate=config.optimizer.accumulate,
            repeated_aug=config.data.repeated_aug,
            seed=config.run.seed,
        )
        self._source = source
        self._rank = rank
        self._raises = config.data.on_error == "raise"
        reader = BatchReader(source, transform, config, config.run.seed)
        self._pool = WorkerPool(reader, config)

    def __len__(self) -> int:
        return len(self._source)

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
        for read in self._pool.run(self.order.plans(epoch, self._rank, start_update)):
            if read.errors and self._raises and not read.fatal:
                raise UserError(f"{_unreadable(read)}, or train without it by data.on_error=skip")
            update.append(_batch(read))
            if len(update) == self.order.accumulate:
                yield update
                update = []


class ValLoader:
    """One process's share of the validation images; over all processes each image comes once."""

    def __init__(self, source: Source, transform: Transform, config: Config, rank: int, world_size: int) -> None:
        self.classes = source.classes
        self.present = present_classes(source)
        """Indices of the classes that may have images here, ascending."""
        self._source = source
        batch_size = config.data.val_batch_size or config.data.batch_size
        self._plans = val_plans(len(source), batch_size, rank, world_size)
        reader = BatchReader(source, transform, config, None)
        self._pool = WorkerPool(reader, config, most=len(self._plans))

    def __len__(self) -> int:
        """Images over all processes."""
        return len(self._source)

    @property
    def batches(self) -> int:
        """Batches of this process."""
        return len(self._plans)

    def __iter__(self) -> Iterator[Batch]:
        for read in self._pool.run(iter(self._plans)):
            if read.errors and not read.fatal:
                raise UserError(f"{_unreadable(read)}; validation counts every image")
            yield _batch(read)


@dataclass(frozen=True)
class Data:
    """Both loaders and the classes they agree on.

    Their processes start at the first epoch and end when the loaders are dropped or the program exits.
    """

    classes: list[str]
    train: TrainLoader
    val: ValLoader

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
        train=TrainLoader(train, build_train_transform(config, statistics), config, rank, world_size),
        val=ValLoader(val, build_val_transform(config, statistics), config, rank, world_size),
    )


def build_val(config: Config, *, rank: int = 0, world_size: int = 1, classes: Sequence[str] | None = None) -> ValLoader:
    """Open only the validation split, for evaluation.

    `classes`, the list a run was trained with, numbers those of the data, which may be a part of it. Raises UserError.
    """
    source = build_val_source(config, classes, rank)
    statistics = statistics_of(config.data, config.model.in_chans)
    return ValLoader(source, build_val_transform(config, statistics), config, rank, world_size)


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


def _batch(read: _Read) -> Batch:
    if read.fatal:
        raise UserError(read.fatal)
    return Batch(
        images=read.images,
        targets=torch.from_numpy(read.targets),
        ids=torch.from_numpy(read.ids),
        valid=torch.from_numpy(read.valid),
        errors=read.errors,
    )


def _unreadable(read: _Read) -> str:
    return f"unreadable image: {read.errors[0]}; repair or remove it (scripts/check_data.py lists all)"
