"""Pixels become the images that torchvision and timm make, on every device."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.random_erasing import RandomErasing
from torchvision import transforms

from acmix.config import Config
from acmix.data.batch import Normaliser
from acmix.data.datasets import Statistics
from acmix.data.loader import build_data
from acmix.data.seeding import preserved_generators, seed_generators
from acmix.data.transforms import build_train_transform
from acmix.engine.ahead import on_device

MakeConfig = Callable[..., Config]
SETTINGS = {"augment__crop": "pad", "augment__pad": 2, "augment__erase_prob": 0.5, "data__batch_size": 64}


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_become_what_torchvision_and_timm_make_of_the_image(channels: int, make_config: MakeConfig) -> None:
    statistics = Statistics((0.4914, 0.4822, 0.4465)[:channels], (0.247, 0.2435, 0.2616)[:channels])
    config = make_config(**SETTINGS, model__kwargs={"in_chans": channels}, augment__color_jitter=0.4)
    mine = build_train_transform(config, statistics)
    reference = transforms.Compose(
        [
            transforms.RandomCrop(16, padding=2),
            transforms.RandomHorizontalFlip(),
            transforms.ColorJitter(0.4, 0.4, 0.4),
            *[transforms.Grayscale()] * (channels == 1),
            transforms.ToTensor(),
            transforms.Normalize(statistics.mean, statistics.std),
            RandomErasing(0.5, mode="pixel", device="cpu"),
        ]
    )
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    with preserved_generators():
        for seed in range(40):
            seed_generators(seed)
            expected = reference(image)
            seed_generators(seed)
            assert torch.equal(mine(image), expected)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(3, 190, 211, 3), (30, 40, 50, 3), (2, 400, 300, 1), (0, 8, 8, 3)], ids=str)
def test_images_of_any_size_are_normalised_as_torchvision_does(threads: int, shape: tuple[int, ...]) -> None:
    statistics = Statistics((0.4914, 0.4822, 0.4465)[: shape[3]], (0.247, 0.2435, 0.2616)[: shape[3]])
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    expected = transforms.functional.normalize(pixels.permute(0, 3, 1, 2) / 255, statistics.mean, statistics.std)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for channels_last in (False, True):
            assert torch.equal(Normaliser(statistics)(pixels, channels_last=channels_last), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("loader", ["workers", "resident"])
def test_the_memory_format_changes_no_value(loader: str, make_config: MakeConfig) -> None:
    (batch,) = next(build_data(make_config(**SETTINGS, data__loader=loader)).train.epoch(0))
    for channels_last in (False, True):
        moved = batch.to(torch.device("cpu"), channels_last=channels_last)
        assert torch.equal(moved.images, batch.images)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        assert moved.images.is_contiguous(memory_format=layout)
    assert batch.images.is_contiguous()


@pytest.mark.gpu
@pytest.mark.parametrize("loader", ["workers", "resident"])
def test_batches_ahead_on_a_gpu_are_those_of_the_cpu(loader: str, make_config: MakeConfig) -> None:
    device = torch.device("cuda")
    config = make_config(**SETTINGS, data__loader=loader, data__num_workers=1)
    train, again = build_data(config).train, build_data(config).train
    for channels_last in (False, True):
        ahead = on_device(train.epoch(0), device, channels_last=channels_last)
        for (mine,), (theirs,) in zip(ahead, again.epoch(0), strict=True):
            assert mine.images.device.type == mine.targets.device.type == "cuda"
            assert torch.equal(mine.images.cpu(), theirs.images)
            assert torch.equal(mine.targets.cpu(), theirs.targets)
