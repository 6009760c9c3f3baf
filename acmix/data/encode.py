"""How an image is stored in prepared shards: smaller if it is large, and encoded unless it may stay as it is."""

import io
from typing import Literal

from PIL import Image

from acmix.data.datasets import Source, as_files
from acmix.data.images import BadImage, decode_image, open_image

Format = Literal["jpeg", "webp"]

_LONGEST_SIDE: dict[Format, int] = {"jpeg": 65500, "webp": 16383}  # of what libjpeg and libwebp write
_QUALITY = 90


def encoded(
    source: Source, number: int, format: Format, short_side: int | None, quality: int | None
) -> tuple[bytes, int]:
    """Bytes and class of an image of a source. A JPEG file that is small enough stays as it is, if it can be decoded.

    short_side: larger images are made smaller, to this; None: no image is
    quality: None: 90 where an image must be encoded, and JPEG files that fit are taken as they are

    Raises BadImage, also for an image that the format has no room for.
    """
    files = as_files(source)
    if files is None:
        image, target = source.load(number)
    else:
        data, target = files.read(number)
        image = decode_image(data)
        plain = open_image(data)
        fits = short_side is None or min(image.size) <= short_side
        if fits and quality is None and format == "jpeg" and _is_plain_jpeg(plain):
            return data, target
    stored = _shrunk(image, short_side)
    if max(stored.size) > (most := _LONGEST_SIDE[format]):
        size = f"{stored.width} × {stored.height} pixels"
        others = [f"--format {name}" for name, side in _LONGEST_SIDE.items() if max(stored.size) <= side]
        ways = " or ".join(["a smaller --short-side", *others])
        raise BadImage("bomb", f"{size} are more than {format} can store, {most} a side; crop it, or use {ways}")
    buffer = io.BytesIO()
    stored.save(buffer, format, quality=quality or _QUALITY)
    return buffer.getvalue(), target


def _is_plain_jpeg(image: Image.Image) -> bool:
    return image.format == "JPEG" and image.mode in ("RGB", "L")


def _shrunk(image: Image.Image, short_side: int | None) -> Image.Image:
    """The image with its short side as asked, its shape kept; smaller images as they are."""
    if short_side is None or min(image.size) <= short_side:
        return image
    width, height = (max(1, round(side * short_side / min(image.size))) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)
