"""Decoding untrusted bytes: an RGB image, or one exception that says what is wrong with them."""

import io
import logging
import os
import stat
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 178_956_970
"""Images with more pixels are refused before they are decoded (0.5 GB as RGB; Pillow's own limit for errors)."""

MAX_FILE_BYTES = 1 << 29
"""Files larger than this are refused before they are read."""

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""Decoders that are tried; not those that start other programs (EPS) or are rare in data sets."""

EXTENSIONS = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"))
"""Names that mark a file as an image, in lower case."""

_DECODER_ERRORS = (
    *(OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, AttributeError, ArithmeticError),
    *(RuntimeError, struct.error, zlib.error),
)
_SIGNATURES = {
    **{b"\xff\xd8\xff": "JPEG", b"\x89PNG\r\n\x1a\n": "PNG", b"GIF8": "GIF", b"BM": "BMP"},
    **{b"II*\0": "TIFF", b"MM\0*": "TIFF"},
}

_GIF_IMAGE, _GIF_EXTENSION, _GIF_TRAILER = b",!;"
_GIF_APPLICATION = b"\xff"  # label of the extension that says how often an animation plays

logging.getLogger("PIL").addHandler(logging.NullHandler())  # Pillow's logging of broken TIFFs would flood stderr
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")


class BadImage(Exception):
    """Bytes that are not a readable image.

    `kind` is one of empty, truncated, not_image, bomb, corrupt, unreadable; the message is for people.
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind
        self.reason = reason

    def __reduce__(self) -> tuple[type["BadImage"], tuple[str, str]]:
        return BadImage, (self.kind, self.reason)


def read_image_file(path: str | Path) -> bytes:
    """The bytes of a regular file of bounded size. Raises BadImage (unreadable, empty, bomb)."""
    try:
        # a pipe or a device named like an image would block the open or never end
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise BadImage("unreadable", "not a regular file")
            if status.st_size > MAX_FILE_BYTES:
                raise BadImage("bomb", f"{status.st_size} bytes, over the limit of {MAX_FILE_BYTES}")
            return file.read()
    except OSError as error:
        link = f" (a link to {os.readlink(path)})" if os.path.islink(path) else ""
        raise BadImage("unreadable", f"{error.strerror or error}{link}") from None


def open_image(data: bytes) -> Image.Image:
    """Read the header only and check format and size. Raises BadImage (empty, not_image, bomb, corrupt)."""
    if not data:
        raise BadImage("empty", "the file is empty")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise BadImage("bomb", str(error)) from None
    except UnidentifiedImageError:
        if _signature(data):
            raise _damage(data, "the header is damaged") from None
        raise BadImage("not_image", f"not an image in a supported format ({', '.join(FORMATS)})") from None
    except _DECODER_ERRORS as error:
        raise _damage(data, f"the header is damaged: {error}") from None
    if image.width * image.height > MAX_PIXELS:
        raise BadImage("bomb", f"{image.width} × {image.height} pixels, over the limit of {MAX_PIXELS}")
    if not image.width * image.height:
        raise BadImage("corrupt", f"{image.width} × {image.height} pixels")
    return image


def decode_image(data: bytes) -> Image.Image:
    """Decode the first frame to 8-bit RGB.

    Grey is repeated, palettes are looked up, CMYK is converted, alpha is dropped (as torchvision and timm
    do), 16-bit grey is scaled by 1/257. EXIF, orientation included, is not read. A file that ends early is an
    error. Warnings of the decoder are silenced: thousands of files have harmless ones.
    Raises BadImage.
    """
    return _decode(data, 1)


def decode_draft(data: bytes, scale: int) -> Image.Image:
    """A JPEG at 1/scale of its size, rounded up; scale is 1, 2, 4 or 8. Else as `decode_image`. Raises BadImage."""
    return _decode(data, scale)


def _decode(data: bytes, scale: int) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = open_image(data)
        try:
            if scale > 1:
                image.draft(None, (image.width // scale, image.height // scale))
            image.load()
            if image.format in ("PNG", "GIF") and _ends_early(data):  # the pixels may be whole, but the file is not
                raise BadImage("truncated", "the file ends before the end of the image")
            return _to_rgb(image)
        except Image.DecompressionBombError as error:
            raise BadImage("bomb", str(error)) from None
        except MemoryError:
            raise BadImage("bomb", f"{image.width} × {image.height} pixels do not fit in memory") from None
        except _DECODER_ERRORS as error:
            raise _damage(data, f"cannot be decoded: {error}") from None


def is_sixteen_bit(image: Image.Image) -> bool:
    """Whether an opened, not yet loaded image stores more than 8 bits a channel."""
    return image.mode in (*_SIXTEEN_BIT, "I", "F") or any(";16" in str(tile) for tile in getattr(image, "tile", ()))


def _signature(data: bytes) -> str | None:
    """The format that the first bytes announce, even if the rest is broken."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    for start, name in _SIGNATURES.items():
        if data.startswith(start):
            return name
    return None


def _ends_early(data: bytes) -> bool:
    """Whether the file is shorter than its header announces or lacks its end marker."""
    announced = {"WEBP": int.from_bytes(data[4:8], "little") + 8, "BMP": int.from_bytes(data[2:6], "little")}
    trailers = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
    name = _signature(data) or ""
    if name == "GIF":
        return not _is_whole_gif(data)
    return len(data) < announced.get(name, 0) or trailers.get(name, b"") not in data


def _is_whole_gif(data: bytes) -> bool:
    """Whether the blocks of a GIF lead to its trailer or, as some programs write none, from its only image to the end.

    To look for the trailer will not do: the byte may be anywhere in the blocks. An animation without it has been cut.
    """
    place, kind, images, plays = 13 + _gif_colours(data, 10), 0, 0, False
    while place < len(data):
        kind = data[place]
        if kind == _GIF_TRAILER:
            return True
        if kind not in (_GIF_IMAGE, _GIF_EXTENSION):  # decoders pass over what is no block
            place += 1
            continue
        images += kind == _GIF_IMAGE
        plays |= kind == _GIF_EXTENSION and data[place + 1 : place + 2] == _GIF_APPLICATION
        # an image's place, size, colours and the width of its codes; or the label of an extension
        place += 11 + _gif_colours(data, place + 9) if kind == _GIF_IMAGE else 2
        while place < len(data) and data[place]:  # pieces, each after its length
            place += 1 + data[place]
        place += 1
    return kind == _GIF_IMAGE and place == len(data) and images == 1 and not plays


def _gif_colours(data: bytes, place: int) -> int:
    """Bytes of the table of colours that the flags at that place announce."""
    flags = data[place] if place < len(data) else 0
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _damage(data: bytes, reason: str) -> BadImage:
    return BadImage("truncated" if "truncated" in reason.lower() or _ends_early(data) else "corrupt", reason)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode in _SIXTEEN_BIT or image.mode == "I":
        if image.mode == "I" and image.format == "TIFF":
            raise ValueError("32-bit integer pixels have no defined white; store 8 or 16 bits")
        image = _sixteen_bits_to_eight(image)
    elif image.mode == "F":
        raise ValueError("floating-point pixels have no defined white; store 8 or 16 bits")
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB, Pillow would warn about transparency given as bytes
    return image.convert("RGB")


def _sixteen_bits_to_eight(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 0xFFFF:
        raise ValueError(f"pixel values from {low} to {high} do not fit 16 bits")
    scaled = (values.astype(np.uint32) + 128) // 257  # 0xFFFF → 255, rounded; plain convert() clips at 255
    return Image.fromarray(scaled.astype(np.uint8))
