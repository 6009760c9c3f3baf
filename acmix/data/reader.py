"""What a loader process does: images read, decoded and augmented one by one, handed over as 8-bit pixels."""

from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from acmix.config import Config
from acmix.data.batch import Batch, Erased, Normaliser, Pixels
from acmix.data.datasets import Source, to_repair
from acmix.data.images import BadImage
from acmix.data.pictures import Picture, choose_decoder, with_decoder
from acmix.data.sampler import BatchPlan
from acmix.data.seeding import preserved_generators, seed_generators, stream_seed
from acmix.data.shared import in_worker, room_for, warn_of_little_shared_memory
from acmix.data.transforms import Patch, PixelTransform
from acmix.errors import UserError


class Read(NamedTuple):
    """A batch as a worker returns it. Only the pixels are a tensor, because each tensor costs a file descriptor."""

    pixels: torch.Tensor | np.ndarray  # (B, H, W, C) uint8; an array where there was no shared memory for them
    targets: np.ndarray
    ids: np.ndarray
    valid: np.ndarray
    errors: list[str]
    erased: Erased | None = None
    fatal: str | None = None

    def batch(self, normaliser: Normaliser) -> Batch:
        """The batch that this becomes. Raises UserError for what the worker could not go on from."""
        if self.fatal:
            raise UserError(self.fatal)
        values = self.pixels
        if isinstance(values, np.ndarray):
            warn_of_little_shared_memory()
            values = torch.from_numpy(values)
        return Batch(
            images=Pixels(values, normaliser, self.erased, blank=not self.valid.any()),
            targets=torch.from_numpy(self.targets),
            ids=torch.from_numpy(self.ids),
            valid=torch.from_numpy(self.valid),
            errors=self.errors,
        )


class BatchReader(Dataset):
    """BatchPlan → decoded, augmented pixels.

    The augmentation of an image is seeded from (seed, epoch, index, repeat); with seed None nothing is seeded.
    """

    def __init__(self, source: Source, transform: PixelTransform, config: Config, seed: int | None) -> None:
        self._source = with_decoder(source, choose_decoder(config.data.decoder))
        self._transform = transform
        self._shape = (*config.data.size, config.model.in_chans)
        self._seed = seed

    def __getitem__(self, plan: BatchPlan) -> Read:
        count = len(plan.indices)
        read = Read(
            pixels=np.zeros((0, *self._shape), dtype=np.uint8),
            targets=np.zeros(count, dtype=np.int64),
            ids=plan.indices,
            valid=np.zeros(count, dtype=bool),
            errors=[],
        )
        try:
            # shared here, because an error when the batch is sent would be lost in a background thread
            read = read._replace(pixels=room_for((count, *self._shape)))
            with nullcontext() if in_worker() else preserved_generators():
                patches = self._fill(read, plan)
        except UserError as error:  # an exception that crosses processes would arrive wrapped in a traceback
            return read._replace(fatal=str(error))
        if not read.valid.any():
            np.asarray(read.pixels)[:] = 0
        elif not read.valid.all():
            donor = int(read.valid.argmax())
            missing = np.flatnonzero(~read.valid)
            np.asarray(read.pixels)[missing] = np.asarray(read.pixels)[donor]
            read.targets[missing] = read.targets[donor]
            patches |= {place: patches[donor] for place in missing.tolist() if donor in patches}
        return read._replace(erased=_joined(patches)) if patches else read

    def _fill(self, read: Read, plan: BatchPlan) -> dict[int, Patch]:
        """Read the images of a plan; returns what is to be erased, by the place of the image."""
        image: Image.Image | Picture | None = None
        target, loaded = 0, -1
        pixels = np.asarray(read.pixels)
        patches: dict[int, Patch] = {}
        for i, (index, repeat) in enumerate(zip(plan.indices.tolist(), plan.repeats.tolist(), strict=True)):
            try:
                if index != loaded:  # the copies of repeated augmentation follow one another
                    image, target = self._source.load(index)
                    loaded = index
                assert image is not None
                if self._seed is not None:
                    seed_generators(stream_seed("augment", self._seed, plan.epoch, index, repeat))
                pixels[i], patch = self._transform(image)
            except BadImage as error:
                loaded = -1
                read.errors.append(f"{self._source.describe(index)}: {error.reason}")
                continue
            read.targets[i] = target
            read.valid[i] = True
            if patch is not None:
                patches[i] = patch
        return patches


def _joined(patches: dict[int, Patch]) -> Erased:
    boxes = [(place, *patch.box) for place, patch in patches.items()]
    return Erased(np.array(boxes, dtype=np.int64), np.concatenate([patch.noise.ravel() for patch in patches.values()]))


def unreadable(error: str, source: Source) -> str:
    """The message for an image of a source that cannot be read."""
    return f"unreadable image: {error}; {to_repair(source)}"
