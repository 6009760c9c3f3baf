"""Images per second of loaders: ours, and timm's on the same images by the same transforms."""

import io
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from PIL import Image
from timm.data import create_dataset, create_loader
from timm.data.transforms import ToNumpy
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms

from acmix.config import Config
from acmix.data.datasets import Source, as_files, build_sources, data_root, statistics_of
from acmix.data.loader import Data
from acmix.data.workers import worker_count
from acmix.engine.ahead import on_device
from acmix.errors import UserError
from benchmarks.timing import Samples

Epoch = Callable[[int], Iterable[Any]]
"""Number of an epoch → its updates."""


@dataclass(frozen=True)
class Rate:
    """Images per second in each round, and the share of the time that was spent waiting for data."""

    name: str
    images_per_second: Samples
    waiting: Samples | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        rate = self.images_per_second
        values: dict[str, Any] = {"name": self.name}
        values |= {"images_per_second": rate.median, "spread": rate.spread, "n": rate.n, "rounds": list(rate.values)}
        return values | ({} if self.waiting is None else {"waiting": self.waiting.median})


def loader_rates(sides: dict[str, Epoch], images: int, updates: int, rounds: int) -> list[Rate]:
    """Images per second of each loader alone, from the start of an epoch to its update number `updates`."""
    samples: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):  # in the first, processes start
        for name, epoch in sides.items():
            started = time.perf_counter()
            for _ in islice(epoch(number), updates):
                pass
            if number:
                samples[name].append(images / (time.perf_counter() - started))
    return [Rate(name, Samples(tuple(values))) for name, values in samples.items()]


def our_epoch(config: Config, data: Data, device: torch.device) -> Epoch:
    """Our loader, up to normalised images on the device."""
    channels_last = config.precision.channels_last
    return lambda epoch: on_device(data.train.epoch(epoch), device, channels_last=channels_last)


def timm_epoch(config: Config, device: torch.device, source: Source | None = None) -> Epoch:
    """timm's loader for the training images of a config, by the same transforms; a folder is read by timm itself."""
    data, augment = config.data, config.augment
    if config.model.in_chans != 3 or data.repeated_aug > 1:
        raise UserError("--against timm: only RGB images, each shown once, are compared")
    if data.dataset == "folder" and data.labels is None:
        dataset = create_dataset("", root=str(data_root(data) / data.train_split))
    else:
        dataset = _Images(source or build_sources(config)[0])
    statistics = statistics_of(data)
    loader = create_loader(
        dataset,
        (3, *data.size),
        data.batch_size,
        is_training=True,
        scale=augment.scale,
        ratio=augment.ratio,
        hflip=augment.hflip,
        color_jitter=augment.color_jitter,
        auto_augment=augment.auto_augment,
        interpolation=data.interpolation,
        re_prob=augment.erase_prob,
        re_mode="pixel",
        mean=statistics.mean,
        std=statistics.std,
        num_workers=worker_count(config),
        pin_memory=device.type == "cuda",
        device=device,
    )
    if augment.crop != "random_resized":  # timm has no other crop for training
        dataset.transform = transforms.Compose([*_other_crop(config), ToNumpy()])
    return lambda epoch: _grouped(iter(loader), config.optimizer.accumulate)


def _other_crop(config: Config) -> list[Any]:
    size, augment = config.data.size, config.augment
    resize = transforms.Resize(size, getattr(transforms.InterpolationMode, config.data.interpolation.upper()))
    crop = [transforms.RandomCrop(size, padding=augment.pad)] if augment.crop == "pad" else []
    jitter = [transforms.ColorJitter(*[augment.color_jitter] * 3)] if augment.color_jitter else []
    return [resize, *crop, transforms.RandomHorizontalFlip(augment.hflip), *jitter]


def _grouped(batches: Iterator[tuple[Tensor, Tensor]], size: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
    while group := list(islice(batches, size)):
        yield group


class _Images(Dataset):
    """The images of a source of ours, opened as timm opens files."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._files = as_files(source)
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if self._files is None:
            image, target = self._source.load(index)
        else:
            data, target = self._files.read(index)
            image = Image.open(io.BytesIO(data)).convert("RGB")
        return self.transform(image), target
