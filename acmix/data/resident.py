"""The loader for images that fit in memory: decoded once, then cropped, flipped and coloured a batch at a time."""

import os
import sys
from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch

from acmix.config import Config
from acmix.data.batch import Batch, Normaliser, Pixels
from acmix.data.batched import BatchedAugment, why_not_batched
from acmix.data.datasets import Source
from acmix.data.decoded import LIMIT, Decoded, Unsuitable, decode_all
from acmix.data.reader import unreadable
from acmix.data.sampler import BatchPlan
from acmix.data.transforms import fixed_steps
from acmix.errors import UserError

Kind = Literal["workers", "resident"]


class ResidentImages:
    """Decoded training images, of which batches are made in this process.

    Where an image cannot be read, its place in the batch holds a copy of another, as with loader processes.
    """

    kind: Kind = "resident"

    def __init__(self, decoded: Decoded, config: Config, normaliser: Normaliser) -> None:
        self._decoded = decoded
        self._augment = BatchedAugment(config)
        self._normaliser = normaliser
        self._unreadable = np.array(sorted(decoded.problems), dtype=np.int64)

    def batches(self, plans: Iterator[BatchPlan]) -> Iterator[Batch]:
        """The batches of the plans, in order."""
        return map(self._batch, plans)

    def _batch(self, plan: BatchPlan) -> Batch:
        valid = ~np.isin(plan.indices, self._unreadable)
        donors = np.where(valid, np.arange(len(valid)), valid.argmax())
        shown, repeats = plan.indices[donors], plan.repeats[donors]
        images = self._decoded.pixels[shown]
        pixels, erased = self._augment(images, plan.epoch, shown, repeats)
        return Batch(
            images=Pixels(torch.from_numpy(pixels), self._normaliser, erased, blank=not valid.any()),
            targets=torch.from_numpy(self._decoded.targets[shown]),
            ids=torch.from_numpy(plan.indices),
            valid=torch.from_numpy(valid),
            errors=[self._decoded.problems[index] for index in plan.indices[~valid].tolist()],
        )


def hold_resident(source: Source, config: Config, normaliser: Normaliser) -> ResidentImages | None:
    """The training images in memory, where `data.loader` asks for it; with `auto` None where they do not fit.

    What `auto` decides follows from the images and the config alone. ACMIX_DEBUG=1 prints the reason.

    Raises UserError for data.loader=resident where it cannot be, and for an image that cannot be read.
    """
    wanted = config.data.loader
    if wanted == "workers":
        return None
    data = config.data
    steps = f"{config.augment.crop} {data.size} {data.interpolation}"
    try:
        if (reason := why_not_batched(config)) is not None:
            raise Unsuitable(reason)
        decoded = decode_all(source, fixed_steps(config), steps, config, LIMIT if wanted == "auto" else None)
    except Unsuitable as error:
        if wanted == "resident":
            raise UserError(f"data.loader: resident cannot be: {error}; use data.loader=auto or workers") from None
        if os.environ.get("ACMIX_DEBUG") == "1":
            print(f"acmix: data.loader auto → workers: {error}", file=sys.stderr)
        return None
    if decoded.problems and data.on_error == "raise":
        first = decoded.problems[min(decoded.problems)]
        raise UserError(f"{unreadable(first)}, or train without it by data.on_error=skip")
    return ResidentImages(decoded, config, normaliser)
