"""Image files whose pixels are decoded only when a crop says how many are needed: fast training from JPEG files.

The crop is drawn from the size in the header. A JPEG is then decoded at the smallest scale that still covers the crop
(1/8, 1/4, 1/2 or 1, which the inverse DCT gives for less work), by simplejpeg where it is installed, else by Pillow in
its draft mode. Both give the same pixels, because both contain libjpeg-turbo. What simplejpeg refuses, Pillow judges.
"""

import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from timm.data.transforms import str_to_pil_interp
from torch.nn.functional import interpolate

from acmix.data.datasets import FileBacked, Source, as_files, is_verified
from acmix.data.images import decode_draft, decode_image, open_image
from acmix.errors import UserError

Decoder = Literal["pillow", "draft", "simplejpeg"]

SCALES = (8, 4, 2, 1)
"""By which a JPEG can be made smaller while it is decoded: those that libjpeg-turbo does faster than full size."""

_IN_TORCH = ("bilinear", "bicubic")  # the antialiased filters that torch has for uint8


def choose_decoder(wanted: str) -> Decoder:
    """The decoder that a value of `data.decoder` stands for here. Raises UserError for one that is not installed."""
    if wanted == "auto":
        return "draft" if _simplejpeg() is None else "simplejpeg"
    if wanted == "simplejpeg" and _simplejpeg() is None:
        raise UserError("data.decoder=simplejpeg: the package simplejpeg is not installed; use auto or install it")
    assert wanted in ("pillow", "draft", "simplejpeg")
    return wanted  # type: ignore[return-value]


class Picture:
    """An image file in memory. Raises BadImage for one whose header is damaged or promises too much.

    verified: whether these very bytes went through Pillow before, so that it need not look at the header again
    """

    def __init__(self, data: bytes, decoder: Decoder, *, verified: bool = False) -> None:
        self.size, self._plain_jpeg = _read_header(data, decoder, verified)
        """Width and height in pixels."""
        self._data = data
        self._decoder = decoder
        self._decoded: dict[int, np.ndarray] = {}

    def whole(self) -> Image.Image:
        """All pixels at full size, RGB, the same whatever the decoder. Raises BadImage."""
        if self._decoder == "simplejpeg" and self._plain_jpeg:
            return Image.fromarray(self._pixels(1))
        return decode_image(self._data)

    def crop(self, box: tuple[int, int, int, int], size: Sequence[int], interpolation: str) -> np.ndarray:
        """A part of the image, resized: (height, width, 3) uint8.

        box: left, top, right, bottom in pixels of the full size
        size: height and width of the result
        interpolation: bicubic, bilinear, nearest or lanczos

        Raises BadImage.
        """
        height, width = size
        filter = str_to_pil_interp(interpolation)
        if not self._plain_jpeg:
            return np.array(decode_image(self._data).crop(box).resize((width, height), filter))
        left, top, right, bottom = box
        scale = next(s for s in SCALES if s == 1 or (right - left >= s * width and bottom - top >= s * height))
        pixels = self._pixels(scale)
        if scale == 1 and interpolation in _IN_TORCH:
            return _resized(pixels[top:bottom, left:right], size, interpolation)
        # outwards to whole pixels of the decoded image; the exact box is then relative to that
        x, y = left // scale, top // scale
        part = Image.fromarray(np.ascontiguousarray(pixels[y : -(-bottom // scale), x : -(-right // scale)]))
        exact = (left / scale - x, top / scale - y, right / scale - x, bottom / scale - y)
        return np.array(part.resize((width, height), filter, box=exact))

    def _pixels(self, scale: int) -> np.ndarray:
        """(H, W, 3) uint8 at 1/scale of the full size, rounded up."""
        if scale not in self._decoded:  # the copies of repeated augmentation share it
            found = _by_simplejpeg(self._data, self.size, scale) if self._decoder == "simplejpeg" else None
            self._decoded[scale] = np.array(decode_draft(self._data, scale)) if found is None else found
        return self._decoded[scale]


class Pictures:
    """A source of files whose images come as Picture, to be decoded by the transform."""

    def __init__(self, source: FileBacked, decoder: Decoder) -> None:
        self.classes = source.classes
        self._verified = is_verified(source)
        self._source = source
        self._decoder: Decoder = decoder

    def __len__(self) -> int:
        return len(self._source)

    def load(self, index: int) -> tuple[Picture, int]:
        """The image, of which the header was read, and its class index. Raises BadImage."""
        data, target = self._source.read(index)
        return Picture(data, self._decoder, verified=self._verified), target

    def describe(self, index: int) -> str:
        """Where the image is and its class, for messages."""
        return self._source.describe(index)


def with_decoder(source: Source, decoder: Decoder) -> "Source | Pictures":
    """The source as it is to be read by that decoder; with pillow, or where it holds no files, the source itself."""
    files = None if decoder == "pillow" else as_files(source)
    return source if files is None else Pictures(files, decoder)


def _read_header(data: bytes, decoder: Decoder, verified: bool) -> tuple[tuple[int, int], bool]:
    """Width and height, and whether it is a JPEG that is not for Pillow alone, as one in CMYK is."""
    if verified and decoder == "simplejpeg":
        try:
            height, width, colors, _ = _simplejpeg().decode_jpeg_header(data)
            return (width, height), colors in ("YCbCr", "RGB", "Gray")
        except ValueError:  # another format
            pass
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # thousands of files have harmless ones
        header = open_image(data)
    return header.size, header.format == "JPEG" and header.mode in ("RGB", "L")


def _resized(part: np.ndarray, size: Sequence[int], interpolation: str) -> np.ndarray:
    """(h, w, 3) → (height, width, 3) of that size, antialiased as Pillow does up to rounding."""
    # in this order torch sees that the channels come last, and spares two changes of layout
    pixels = torch.from_numpy(part[None]).permute(0, 3, 1, 2)
    return interpolate(pixels, tuple(size), mode=interpolation, antialias=True)[0].permute(1, 2, 0).numpy()


def _by_simplejpeg(data: bytes, size: tuple[int, int], scale: int) -> np.ndarray | None:
    """The pixels, or None where it refuses the file: then Pillow says what is wrong, or reads it."""
    decoder = _simplejpeg()
    width, height = (-(-side // scale) for side in size)
    try:
        found: np.ndarray = decoder.decode_jpeg(
            data, "RGB", min_height=height, min_width=width, min_factor=scale, strict=True
        )
    except (ValueError, MemoryError):
        return None
    return found if found.shape == (height, width, 3) else None


@cache
def _simplejpeg() -> Any:
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg
