"""Transforms say what the config says."""

import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

from acmix.config import Config
from acmix.data.datasets import Statistics, statistics_of
from acmix.data.pictures import Picture
from acmix.data.seeding import preserved_generators, seed_generators
from acmix.data.transforms import build_mixup, build_train_transform, build_val_transform
from acmix.errors import UserError

PLAIN = Statistics((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
MakeConfig = Callable[..., Config]


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def samples(config: Config, image: Image.Image | Picture, count: int = 24) -> list[torch.Tensor]:
    transform = build_train_transform(config, PLAIN)
    with preserved_generators():
        seed_generators(0)
        return [transform(image) for _ in range(count)]


@pytest.mark.parametrize("crop", ["random_resized", "pad", "none"])
@pytest.mark.parametrize("size", [(16, 16), (40, 23), (9, 31)])
def test_every_crop_gives_the_configured_size(crop: str, size: tuple[int, int], make_config: MakeConfig) -> None:
    config = make_config(augment__crop=crop, augment__color_jitter=0.4, augment__erase_prob=1.0)
    for image in samples(config, noise(*size), 4):
        assert (image.shape, image.dtype) == ((3, 16, 16), torch.float32)
        assert torch.isfinite(image).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (1, 8), (3, 2)])
def test_a_random_crop_of_a_few_pixels_holds_one_at_least(
    size: tuple[int, int], kind: str, make_config: MakeConfig
) -> None:
    file = io.BytesIO()
    Image.new("RGB", size, "white").save(file, kind)
    config = make_config(augment__crop="random_resized")
    for image in (Image.open(file).convert("RGB"), Picture(file.getvalue(), "draft")):
        assert all(torch.equal(sample, torch.ones(3, 16, 16)) for sample in samples(config, image, 200))


def test_without_augmentation_training_sees_the_plain_image(make_config: MakeConfig) -> None:
    config = make_config(augment__crop="none", augment__hflip=0.0)
    image = noise(16, 16)
    expected = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    assert all(torch.equal(sample, expected) for sample in samples(config, image, 3))


def test_flips_come_with_the_configured_probability(make_config: MakeConfig) -> None:
    image = noise(16, 16)
    plain = samples(make_config(augment__crop="none", augment__hflip=0.0), image, 1)[0]
    always = samples(make_config(augment__crop="none", augment__hflip=1.0), image)
    assert all(torch.equal(sample, plain.flip(2)) for sample in always)


def test_pad_and_crop_shifts_by_at_most_the_padding(make_config: MakeConfig) -> None:
    image = Image.new("RGB", (16, 16), "white")
    config = make_config(augment__crop="pad", augment__pad=3, augment__hflip=0.0)
    blacks = {int((sample[0] == 0).sum()) for sample in samples(config, image, 64)}
    assert min(blacks) < max(blacks) <= 16 * 16 - 13 * 13


@pytest.mark.parametrize(
    "policy", ["rand-m9-mstd0.5-inc1", "rand-m5-n1", "original", "v0r-mstd0.5", "3a", "augmix-m5-w2"]
)
def test_every_auto_augment_family_varies_the_image_reproducibly(policy: str, make_config: MakeConfig) -> None:
    config = make_config(augment__crop="none", augment__hflip=0.0, augment__auto_augment=policy)
    first, second = samples(config, noise(16, 16)), samples(config, noise(16, 16))
    assert len({sample.numpy().tobytes() for sample in first}) > 4
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("policy", ["rand-m10-inc1", "rand-m0", "rand-m15-mmax20", "v0", "augmix-m10"])
def test_policies_at_their_extremes_fail_for_no_image(policy: str, make_config: MakeConfig) -> None:
    config = make_config(augment__auto_augment=policy, augment__crop="none")
    for image in (noise(16, 16), noise(1, 1), noise(1, 40)):
        assert len(samples(config, image, 120)) == 120


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1)])
@pytest.mark.parametrize("crop", ["random_resized", "pad", "none"])
def test_a_strip_one_pixel_wide_does_not_explode_when_resized(
    size: tuple[int, int], crop: str, make_config: MakeConfig
) -> None:
    config = make_config(data__image_size=96, augment__crop=crop)
    image = noise(*size)
    assert build_val_transform(config, PLAIN)(image).shape == (3, 96, 96)
    assert samples(config, image, 1)[0].shape == (3, 96, 96)


@pytest.mark.parametrize("policy", ["rand-q9", "original-z3", "v0-m9", "augmix-n4"])
def test_a_policy_timm_does_not_understand_is_refused_by_name(policy: str, make_config: MakeConfig) -> None:
    with pytest.raises(UserError, match=f"augment.auto_augment: .*{policy}"):
        build_train_transform(make_config(augment__auto_augment=policy), PLAIN)


def test_erasing_replaces_a_part_of_the_image_by_noise(make_config: MakeConfig) -> None:
    config = make_config(augment__crop="none", augment__hflip=0.0, augment__erase_prob=1.0)
    image = Image.new("RGB", (16, 16))
    shares = [float((sample != 0).any(0).float().mean()) for sample in samples(config, image)]
    assert 0 < min(shares) <= max(shares) < 0.5


def test_validation_of_small_images_sees_all_of_them(make_config: MakeConfig) -> None:
    image = noise(32, 32)
    seen = build_val_transform(make_config(data__image_size=32), PLAIN)(image)
    assert torch.equal(seen, torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255)


def test_validation_of_large_images_crops_the_centre(make_config: MakeConfig) -> None:
    image = Image.new("RGB", (512, 256), "black")
    image.paste("white", (144, 16, 368, 240))  # the central 224 × 224 of the shorter side 256
    config = make_config(data__image_size=224, data__crop_pct=0.875)
    assert torch.equal(build_val_transform(config, PLAIN)(image), torch.ones(3, 224, 224))
    config = make_config(data__image_size=224, data__crop_pct=1.0)
    assert build_val_transform(config, PLAIN)(image).min() == 0


@pytest.mark.parametrize("crop", ["random_resized", "pad", "none"])
@pytest.mark.parametrize("size", [(16, 16), (60, 20), (9, 41)])
def test_images_may_be_higher_than_wide_or_wider_than_high(
    size: tuple[int, int], crop: str, make_config: MakeConfig
) -> None:
    for wanted in ((24, 10), (10, 24), (96, 128)):
        config = make_config(data__image_size=wanted, augment__crop=crop, augment__auto_augment="rand-m9-n2")
        assert samples(config, noise(*size), 1)[0].shape == (3, *wanted)
        assert build_val_transform(config, PLAIN)(noise(*size)).shape == (3, *wanted)


def test_an_image_is_resized_no_further_than_the_crop_needs(make_config: MakeConfig) -> None:
    image = noise(40, 20)
    seen = build_val_transform(make_config(data__image_size=[20, 10]), PLAIN)(image)  # the height is right already
    assert torch.equal(seen, torch.from_numpy(np.array(image)[:, 15:25]).permute(2, 0, 1) / 255)


def test_a_pair_of_equal_sides_is_the_side(make_config: MakeConfig) -> None:
    for crop in ("random_resized", "pad", "none"):
        side, pair = (
            make_config(data__image_size=size, augment__crop=crop, augment__auto_augment="rand-m9-mstd0.5")
            for size in (72, [72, 72])
        )
        assert all(map(torch.equal, samples(side, noise(90, 70), 4), samples(pair, noise(90, 70), 4)))
        transforms = [build_val_transform(config, PLAIN) for config in (side, pair)]
        assert torch.equal(*(transform(noise(90, 70)) for transform in transforms))


def test_grey_images_lose_their_colour_after_what_needs_it(make_config: MakeConfig) -> None:
    grey = {"model": {"name": "none", "kwargs": {"in_chans": 1}}}
    plain = make_config(augment__crop="none", augment__hflip=0.0)
    config = Config.model_validate(plain.model_dump() | grey)
    image = noise(16, 16)
    zero_one = Statistics((0.0,), (1.0,))
    expected = torch.from_numpy(np.array(image.convert("L")))[None] / 255
    assert torch.equal(build_val_transform(config, zero_one)(image), expected)
    assert torch.equal(build_train_transform(config, zero_one)(image), expected)
    strong = {"augment": {"crop": "pad", "auto_augment": "original", "color_jitter": 0.4, "erase_prob": 1.0}}
    transform = build_train_transform(Config.model_validate(config.model_dump() | strong), zero_one)
    with preserved_generators():
        seed_generators(0)
        assert all(transform(image).shape == (1, 16, 16) for _ in range(40))


def test_statistics_are_those_of_the_grey_image_unless_given_with_one_number(make_config: MakeConfig) -> None:
    own = {"data__mean": [0.5, 0.25, 0.75], "data__std": [0.2, 0.2, 0.2]}
    statistics = statistics_of(make_config(**own).data, 1)
    assert statistics.mean == pytest.approx([0.299 * 0.5 + 0.587 * 0.25 + 0.114 * 0.75])
    assert statistics.std == pytest.approx([0.2])
    one = make_config(data__mean=[0.3], data__std=0.4).data
    assert statistics_of(one, 1) == Statistics((0.3,), (0.4,))
    assert statistics_of(one) == Statistics((0.3,) * 3, (0.4,) * 3)


def test_validation_draws_no_random_number(make_config: MakeConfig) -> None:
    transform = build_val_transform(make_config(data__image_size=96), PLAIN)
    with preserved_generators():
        seed_generators(1)
        expected = torch.rand(1)
        seed_generators(1)
        transform(noise(120, 90))
        assert torch.equal(torch.rand(1), expected)


def test_images_are_normalised_by_the_dataset_the_config_or_imagenet(make_config: MakeConfig) -> None:
    assert statistics_of(make_config(data__dataset="cifar10", data__root="x").data).mean == (0.4914, 0.4822, 0.4465)
    assert statistics_of(make_config(data__dataset="folder", data__root="x").data).mean == (0.485, 0.456, 0.406)
    own = statistics_of(make_config(data__mean=[0.5, 0.5, 0.5], data__std=[0.25, 0.25, 0.25]).data)
    grey = Image.new("RGB", (16, 16), (255, 255, 255))
    assert torch.equal(build_val_transform(make_config(), own)(grey), torch.full((3, 16, 16), 2.0))


def test_mixing_is_off_by_default_and_contains_the_label_smoothing(make_config: MakeConfig) -> None:
    assert build_mixup(make_config(), 10) is None
    for name in ("mixup", "cutmix"):
        mix = build_mixup(make_config(**{f"augment__{name}": 1.0}, loss__label_smoothing=0.1), 10)
        assert mix is not None
        with preserved_generators():
            seed_generators(3)
            images, targets = mix(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 3]))
        assert targets.shape == (4, 10)
        torch.testing.assert_close(targets.sum(1), torch.ones(4))
        torch.testing.assert_close(targets.min(), torch.tensor(0.01))
        assert images.shape == (4, 3, 8, 8)
