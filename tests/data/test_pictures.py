"""JPEG files decoded at the scale that a crop needs: the same crop and, in a stated bound, the same pixels."""

import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from acmix.config import Config
from acmix.data import pictures
from acmix.data.datasets import Statistics
from acmix.data.images import BadImage, decode_image
from acmix.data.loader import build_data
from acmix.data.pictures import Decoder, Picture, choose_decoder
from acmix.data.transforms import build_train_transform, build_val_transform
from acmix.errors import UserError

MakeConfig = Callable[..., Config]
STATISTICS = Statistics((0.5,) * 3, (0.25,) * 3)
FAST: tuple[Decoder, ...] = ("draft", "simplejpeg")


def photograph(mode: str = "RGB", format: str = "JPEG", **options: Any) -> bytes:
    """A photograph of 640 × 427 pixels."""
    buffer = io.BytesIO()
    Image.fromarray(load_sample_image("china.jpg")).convert(mode).save(buffer, format, **options)
    return buffer.getvalue()


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(np.int16)


@pytest.fixture(autouse=True)
def _needs_simplejpeg() -> None:
    pytest.importorskip("simplejpeg")


@pytest.mark.parametrize("decoder", FAST)
@pytest.mark.parametrize(
    "options", [{"quality": 90}, {"progressive": True}, {"subsampling": 0}, {"mode": "L"}], ids=str
)
def test_a_whole_picture_has_the_pixels_of_pillow(decoder: Decoder, options: dict[str, Any]) -> None:
    data = photograph(**options)
    assert np.array_equal(pixels(Picture(data, decoder).whole()), pixels(decode_image(data)))


@pytest.mark.parametrize(("side", "scale"), [(300, 1), (150, 2), (100, 4), (50, 8)])
def test_both_decoders_give_the_same_pixels_at_the_smallest_scale_that_covers_the_crop(side: int, scale: int) -> None:
    data, box = photograph(), (13, 7, 13 + 405, 7 + 401)
    found = {decoder: Picture(data, decoder) for decoder in FAST}
    crops = [pixels(picture.crop(box, (side, side), "bicubic")) for picture in found.values()]
    assert np.array_equal(*crops)
    assert [list(picture._decoded) for picture in found.values()] == [[scale], [scale]]
    exact = pixels(decode_image(data).crop(box).resize((side, side), Image.Resampling.BICUBIC))
    difference = np.abs(crops[0] - exact)
    if scale == 1:  # two passes of the filter, each rounded to whole levels on both sides
        assert difference.max() <= 2
    else:  # the inverse DCT is another low-pass filter than the bicubic one
        assert difference.mean() <= 8


@pytest.mark.parametrize("decoder", FAST)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest", "lanczos"])
def test_a_crop_smaller_than_its_result_is_enlarged_as_pillow_does(decoder: Decoder, interpolation: str) -> None:
    data, box = photograph(), (100, 50, 190, 130)
    found = pixels(Picture(data, decoder).crop(box, (224, 200), interpolation))
    exact = decode_image(data).crop(box).resize((200, 224), getattr(Image.Resampling, interpolation.upper()))
    assert found.shape == (224, 200, 3)
    assert np.abs(found - pixels(exact)).max() <= 2


@pytest.mark.parametrize("crop", ["random_resized", "pad", "none"])
def test_the_crop_and_the_flip_are_the_same_whatever_the_decoder(crop: str, make_config: MakeConfig) -> None:
    data = photograph()
    transform = build_train_transform(make_config(augment__crop=crop, data__image_size=200), STATISTICS)
    results = []
    for image in (decode_image(data), Picture(data, "draft"), Picture(data, "simplejpeg")):
        random.seed(5)
        torch.manual_seed(5)
        results.append(transform(image))
    bound = 2 / 255 / 0.25 if crop == "random_resized" else 0.0
    assert (results[0] - results[1]).abs().max() <= bound + 1e-6
    assert torch.equal(results[1], results[2])


@pytest.mark.parametrize("changes", [{"augment__color_jitter": 0.4}, {"model__kwargs": {"in_chans": 1}}], ids=str)
def test_colours_are_changed_alike_whatever_the_decoder(changes: dict[str, Any], make_config: MakeConfig) -> None:
    config = make_config(augment__crop="random_resized", data__image_size=200, **changes)
    transform = build_train_transform(
        config, Statistics((0.5,) * config.model.in_chans, (0.25,) * config.model.in_chans)
    )
    results = []
    for image in (decode_image(photograph()), Picture(photograph(), "simplejpeg")):
        random.seed(5)
        torch.manual_seed(5)
        results.append(transform(image))
    assert results[0].shape == results[1].shape
    # brightness, contrast and saturation each enlarge a difference of 2 levels by at most 1.4
    assert (results[0] - results[1]).abs().max() <= (1 + 2 * 1.4**3) / 255 / 0.25


def test_validation_sees_the_same_pixels_whatever_the_decoder(make_config: MakeConfig) -> None:
    data = photograph()
    transform = build_val_transform(make_config(data__image_size=100), STATISTICS)
    assert torch.equal(transform(decode_image(data)), transform(Picture(data, "simplejpeg")))


@pytest.mark.parametrize("decoder", FAST)
@pytest.mark.parametrize(
    "data",
    [
        photograph()[:9000],
        photograph()[:-2],
        photograph()[:300],
        photograph()[:2000] + b"\x00" * 3000 + photograph()[5000:],
        photograph(progressive=True)[:30000],
        b"",
        b"no image",
    ],
    ids=["cut", "no end", "header only", "holed", "progressive cut", "empty", "text"],
)
def test_what_pillow_refuses_is_refused_with_the_same_words(decoder: Decoder, data: bytes) -> None:
    try:
        expected: str | np.ndarray = pixels(decode_image(data).crop((0, 0, 400, 400)).resize((100, 100)))
    except BadImage as error:
        expected = f"{error.kind}: {error.reason}"
    try:
        found: str | np.ndarray = pixels(Picture(data, decoder).crop((0, 0, 400, 400), (100, 100), "bicubic"))
    except BadImage as error:
        found = f"{error.kind}: {error.reason}"
    assert type(found) is type(expected)
    if isinstance(expected, str):
        assert found == expected


@pytest.mark.parametrize("decoder", FAST)
@pytest.mark.parametrize(
    ("mode", "format"), [("CMYK", "JPEG"), ("RGB", "PNG"), ("P", "GIF"), ("RGBA", "WEBP"), ("L", "PPM")]
)
def test_what_is_no_plain_jpeg_is_read_as_pillow_reads_it(decoder: Decoder, mode: str, format: str) -> None:
    data, box = photograph(mode, format), (10, 20, 410, 420)
    exact = decode_image(data).crop(box).resize((100, 100), Image.Resampling.BICUBIC)
    assert np.array_equal(pixels(Picture(data, decoder).crop(box, (100, 100), "bicubic")), pixels(exact))


def test_auto_takes_what_is_installed_and_a_missing_decoder_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_decoder("auto") == "simplejpeg"
    monkeypatch.setattr(pictures, "_simplejpeg", lambda: None)
    assert choose_decoder("auto") == "draft"
    assert choose_decoder("pillow") == "pillow"
    with pytest.raises(UserError, match=r"data.decoder=simplejpeg: the package simplejpeg is not installed"):
        choose_decoder("simplejpeg")


@pytest.mark.parametrize("decoder", ["pillow", "draft", "simplejpeg"])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_jpeg_is_left_out_or_stops_as_configured(
    decoder: str, workers: int, tmp_path: Path, make_config: MakeConfig
) -> None:
    for split in ("train", "val"):
        (tmp_path / split / "cat").mkdir(parents=True)
        for number in range(4):
            (tmp_path / split / "cat" / f"{number}.jpg").write_bytes(photograph())
    bad = tmp_path / "train" / "cat" / "2.jpg"
    bad.write_bytes(photograph()[:-500])
    settings = {"data__dataset": "folder", "data__root": tmp_path, "data__num_workers": workers}
    skip = make_config(**settings, data__decoder=decoder, data__on_error="skip")
    [[batch]] = build_data(skip).train.epoch(0)
    assert batch.valid.tolist() == [index != 2 for index in batch.ids.tolist()]
    assert batch.errors[0].startswith(f"{bad} (class cat): cannot be decoded: ")
    with pytest.raises(UserError, match=r"2.jpg .*truncated"):
        list(build_data(make_config(**settings, data__decoder=decoder)).train.epoch(0))
