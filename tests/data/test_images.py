"""Image files of every mode and in every state of decay."""

import io
import os
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from acmix.data.images import BadImage, decode_image, is_sixteen_bit, open_image, read_image_file

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")


def picture(width: int = 40, height: int = 30) -> Image.Image:
    """Smooth colours, so that lossy formats keep them."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 255 // (width - 1), y * 255 // (height - 1), 255 - x * 255 // (width - 1)], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def farthest(decoded: Image.Image, source: Image.Image) -> int:
    """The largest difference of a channel from the image that was encoded."""
    assert (decoded.mode, decoded.size) == ("RGB", source.size)
    return int(np.abs(np.asarray(decoded).astype(int) - np.asarray(source.convert("RGB")).astype(int)).max())


def forged_png(width: int, height: int) -> bytes:
    """A tiny PNG whose header claims another size."""
    data = bytearray(encoded(picture(), "PNG"))
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def refusal(data: bytes) -> BadImage:
    with pytest.raises(BadImage) as caught:
        decode_image(data)
    return caught.value


@pytest.fixture(autouse=True)
def _no_warnings() -> object:
    """Any warning that gets out of decoding fails the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


JPEG_ERROR = 4
"""Quality 100 rounds coefficients to integers: 0.29 RMS in Y and Cb, 0.6 in blue (Y + 1.772 Cb); over 6 times that."""


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_decodes_to_rgb(kind: str) -> None:
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(kind, {})
    source = picture().convert("P") if kind == "GIF" else picture()
    assert farthest(decode_image(encoded(source, kind, **options)), source) <= (JPEG_ERROR if kind == "JPEG" else 0)


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        *[("1", "PNG"), ("L", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("RGBA", "PNG"), ("PA", "TIFF"), ("LA", "TIFF")],
        *[("CMYK", "TIFF"), ("CMYK", "JPEG"), ("YCbCr", "JPEG"), ("L", "JPEG"), ("RGBA", "WEBP"), ("L", "PPM")],
    ],
)
def test_every_mode_decodes_to_rgb(mode: str, kind: str) -> None:
    source = picture().convert("P").convert("PA") if mode == "PA" else picture().convert(mode)
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(kind, {})
    assert farthest(decode_image(encoded(source, kind, **options)), source) <= (JPEG_ERROR if kind == "JPEG" else 0)


def test_a_palette_with_transparency_given_as_bytes_decodes_without_a_warning() -> None:
    data = encoded(picture().convert("P"), "PNG", transparency=bytes(range(256)))
    assert decode_image(data).mode == "RGB"


def test_sixteen_bit_grey_is_scaled_and_not_clipped() -> None:
    values = np.array([[0, 127, 257, 32768, 65535]], dtype=np.uint16)
    for kind in ("PNG", "TIFF"):
        data = encoded(Image.fromarray(values), kind)
        assert is_sixteen_bit(open_image(data))
        decoded = np.asarray(decode_image(data))
        assert decoded.tolist() == [[[level] * 3 for level in (0, 0, 1, 128, 255)]]
    assert not is_sixteen_bit(open_image(encoded(picture(), "PNG")))


def test_pixels_without_a_defined_white_are_refused() -> None:
    for pixels in (np.ones((4, 4), dtype=np.float32), np.ones((4, 4), dtype=np.int32)):
        assert "no defined white" in refusal(encoded(Image.fromarray(pixels), "TIFF")).reason


def test_broken_exif_is_ignored_without_a_warning() -> None:
    exif = b"Exif\x00\x00II*\x00\x08\x00\x00\x00\xff\xff\x0f\x01\x02\x00\xff\xff\xff\x7f\xff\xff\xff\x7f"
    assert decode_image(encoded(picture(), "JPEG", exif=exif)).size == (40, 30)


def test_trailing_bytes_do_no_harm() -> None:
    for kind in ("JPEG", "PNG", "WEBP", "BMP", "GIF"):
        assert decode_image(encoded(picture(), kind) + b"\x00" * 100).size == (40, 30)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_cut_anywhere_is_an_error_that_names_the_kind(kind: str, report: Callable[..., None]) -> None:
    data = encoded(picture(), kind)
    last = len(data) - (2 if kind == "GIF" else 1)  # some programs write GIFs without the last byte
    kinds = {cut: refusal(data[:cut]).kind for cut in (*range(0, last, 7), last)}
    assert kinds[0] == "empty"
    assert kinds[last] == "truncated"
    assert set(kinds.values()) <= {"empty", "truncated", "corrupt", "not_image"}
    report("images cut short", "an error, never a picture filled up with grey", len(kinds), len(kinds))


def test_an_animation_cut_anywhere_after_its_first_frame_is_truncated() -> None:
    frames = [picture().resize((12, 9)).rotate(angle) for angle in (0, 40, 80)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], loop=0)
    assert decode_image(data).size == (12, 9)
    assert {refusal(data[:cut]).kind for cut in range(len(data) // 3, len(data))} == {"truncated"}
    assert decode_image(encoded(frames[0], "GIF")[:-1]).size == (12, 9), "some programs write no trailer"


@pytest.mark.parametrize("kind", FORMATS)
def test_random_damage_is_either_decoded_or_refused_and_never_another_exception(kind: str) -> None:
    random = np.random.default_rng(0)
    sound = encoded(picture(), kind)
    refused = 0
    for trial in range(200):
        data = bytearray(sound)
        reach = 60 if trial % 2 else len(data)  # headers break in more interesting ways
        for _ in range(random.integers(1, 8)):
            data[random.integers(reach)] = random.integers(256)
        try:
            decode_image(bytes(data))
        except BadImage:
            refused += 1
    assert refused > 0


def test_what_is_no_image_is_called_so() -> None:
    assert refusal(b"").kind == "empty"
    for data in (
        b"just text\n",
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        bytes(100),
    ):
        assert refusal(data).kind == "not_image"


def test_a_forged_size_is_refused_within_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(forged_png(60_000, 60_000))
    program = (
        "import resource, sys\n"
        "from acmix.data.images import BadImage, decode_image, read_image_file\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n    decode_image(read_image_file(sys.argv[1]))\n"
        "except BadImage as error:\n    print(error.kind)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    kind, kilobytes = done.stdout.split()
    assert kind == "bomb"
    assert int(kilobytes) < 20_000, "60,000 × 60,000 pixels would be 10,800,000 kB"
    assert done.stderr == ""


@pytest.mark.parametrize("size", [(13_378, 13_378), (1 << 31, 1), (0, 10)])
def test_sizes_out_of_bounds_are_refused(size: tuple[int, int]) -> None:
    assert refusal(forged_png(*size)).kind in ("bomb", "corrupt", "not_image")


def test_things_that_are_no_regular_file_are_unreadable_and_do_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    for path in (tmp_path / "pipe.jpg", tmp_path / "loop.jpg", tmp_path / "missing.jpg", tmp_path, Path("/dev/zero")):
        with pytest.raises(BadImage) as caught:
            read_image_file(path)
        assert caught.value.kind == "unreadable"


def test_truncated_images_are_never_filled_up() -> None:
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False
