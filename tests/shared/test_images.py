"""The one meaning of an image."""

import io
import struct
import time
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shared.errors import Refused
from shared.images import ORIENTATION, SHORT, decode, decode_into, decode_sized, measure

CORNERS = np.zeros((48, 64, 3), np.uint8)  # red, green; blue, white
CORNERS[:24, :32], CORNERS[:24, 32:], CORNERS[24:, :32], CORNERS[24:, 32:] = (255, 0, 0), (0, 255, 0), (0, 0, 255), 255


def encode(image: Image.Image, format: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def names(pixels: np.ndarray) -> list[str]:
    """The colours at the four corners, row by row."""
    known = {(1, 0, 0): "red", (0, 1, 0): "green", (0, 0, 1): "blue", (1, 1, 1): "white", (0, 0, 0): "black"}
    return [known[tuple(int(v > 127) for v in pixels[y, x])] for y in (4, -5) for x in (4, -5)]


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("size", [16, 32, 40, 64, 256])
def test_every_format_comes_out_as_rgb_uint8_at_the_size(format: str, size: int) -> None:
    pixels = decode(encode(Image.fromarray(CORNERS), format), size)
    assert pixels.shape == (size, size, 3)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert names(pixels) == ["red", "green", "blue", "white"]


def test_an_image_of_the_size_keeps_its_pixels() -> None:
    exact = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert np.array_equal(decode(encode(Image.fromarray(exact), "PNG"), 32), exact)


def test_grey_becomes_rgb() -> None:
    grey = Image.fromarray(np.full((40, 40), 90, np.uint8))
    for format in ("JPEG", "PNG"):
        assert np.array_equal(decode(encode(grey, format), 32), np.full((32, 32, 3), 90, np.uint8))


def test_16_bit_grey_keeps_its_upper_8_bits() -> None:
    deep = Image.fromarray(np.full((40, 40), 90 * 256 + 17, np.uint16))
    assert np.array_equal(decode(encode(deep, "PNG"), 32), np.full((32, 32, 3), 90, np.uint8))


def test_a_palette_becomes_rgb() -> None:
    assert names(decode(encode(Image.fromarray(CORNERS).quantize(4), "PNG"), 32)) == ["red", "green", "blue", "white"]


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_transparency_is_laid_on_white(format: str) -> None:
    rgba = Image.fromarray(CORNERS).convert("RGBA")
    rgba.putalpha(Image.fromarray(np.where(np.arange(64) < 32, 0, 255).astype(np.uint8)[None].repeat(48, 0)))
    assert names(decode(encode(rgba, format), 32)) == ["white", "green", "white", "white"]


def test_a_transparent_palette_is_laid_on_white() -> None:
    palette = Image.fromarray(CORNERS).quantize(4)
    red = palette.getpixel((2, 2))
    assert names(decode(encode(palette, "PNG", transparency=red), 32)) == ["white", "green", "blue", "white"]


def test_cmyk_becomes_rgb() -> None:
    data = encode(Image.fromarray(CORNERS).convert("CMYK"), "JPEG")
    assert names(decode(data, 32)) == ["red", "green", "blue", "white"]


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(("orientation", "upright"), [
    (1, ["red", "green", "blue", "white"]), (2, ["green", "red", "white", "blue"]),
    (3, ["white", "blue", "green", "red"]), (4, ["blue", "white", "red", "green"]),
    (5, ["red", "blue", "green", "white"]), (6, ["blue", "red", "white", "green"]),
    (7, ["white", "green", "blue", "red"]), (8, ["green", "white", "red", "blue"])])
def test_exif_orientation_is_applied(format: str, orientation: int, upright: list[str]) -> None:
    data = encode(Image.fromarray(CORNERS), format, exif=turned(orientation))
    pixels, width, height = decode_sized(data, 32)
    assert names(pixels) == upright
    assert (width, height) == ((48, 64) if orientation > 4 else (64, 48))
    assert measure(data) == (width, height)


def many_scans(data: bytes, more: int) -> bytes:
    """A progressive JPEG whose last scan comes that many times more."""
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * more + data[-2:]


def mpf() -> bytes:
    """The segment by which Pillow takes a JPEG for one of several pictures, an MPO."""
    both = encode(Image.new("L", (40, 40)), "MPO", save_all=True, append_images=[Image.new("L", (40, 40))])
    at = both.index(b"MPF\0") - 4
    return both[at:at + 2 + int.from_bytes(both[at + 2:at + 4], "big")]


@pytest.mark.parametrize("odd", [b"", b"\0", mpf(), b"\0" + mpf(), b"\xff", b"\xff\x01"],
                         ids=["plain", "stray", "MPO", "stray MPO", "fill", "TEM"])
def test_a_jpeg_of_very_many_scans_is_refused_before_it_is_decoded(odd: bytes) -> None:
    data = encode(Image.new("L", (2000, 2000), 90), "JPEG", progressive=True)
    assert decode(many_scans(data, 20), 32).mean() == pytest.approx(90, abs=2)
    hostile = many_scans(data, 5000)
    second = 4 + int.from_bytes(hostile[4:6], "big")
    hostile = hostile[:second] + odd + hostile[second:]
    began = time.process_time()
    with pytest.raises(Refused, match=r"the JPEG has 50\d\d scans: expected at most 100"):
        decode(hostile, 32)
    assert time.process_time() - began < 5  # it would take a minute


def test_what_only_looks_like_scans_is_none() -> None:
    plain = encode(Image.fromarray(CORNERS), "JPEG")
    assert np.array_equal(decode(plain + b"\xff\xda" * 9000, 32), decode(plain, 32))


def _noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (200, 300, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [64, 256])
def test_exif_is_found_in_a_large_file_and_behind_another_segment(size: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    data = encode(_noise(0), "JPEG", quality=95, exif=exif)
    plain = encode(_noise(0), "JPEG", quality=95)
    assert len(plain) > 2 * SHORT
    # What looks like the start of a scan, in a profile that stands before.
    profile = b"\xff\xe2" + struct.pack(">H", 2 + 3000) + b"ICC_PROFILE\0\1\1" + b"\xff\xda" * 1493
    upside_down = decode(plain, size)[::-1, ::-1]
    for whole in (data, data[:2] + profile + data[2:]):
        assert np.array_equal(decode(whole, size), upside_down)


def test_a_broken_segment_or_one_that_lies_hides_no_image() -> None:
    data = encode(_noise(1), "JPEG", quality=95)
    comment = b"\xff\xfe" + struct.pack(">H", 40) + b"Exif\0\0" + b"x" * 32
    for whole in (data, data[:2] + comment + data[2:], data[:2] + b"\xff\xff" + data[2:]):
        assert np.array_equal(decode(whole, 64), decode(data, 64))


@pytest.mark.parametrize(("width", "height", "size", "decibels"), [
    (500, 375, 224, 45), (375, 500, 64, 36), (336, 336, 224, 45), (300, 240, 224, 50), (40, 30, 64, 50)])
def test_a_photograph_is_near_pillow_s_bilinear_of_its_whole(width: int, height: int, size: int,
                                                             decibels: float) -> None:
    shapes = np.random.default_rng(5).integers(0, 256, (height // 12, width // 12, 3), dtype=np.uint8)
    photo = Image.fromarray(shapes).resize((width, height), Image.Resampling.BICUBIC)
    data = encode(photo, "JPEG", quality=92)
    with Image.open(io.BytesIO(data)) as whole:
        expected = np.asarray(whole.resize((size, size), Image.Resampling.BILINEAR))
    error = np.mean((decode(data, size).astype(float) - expected) ** 2)
    assert 10 * np.log10(255**2 / error) > decibels


def test_shrinking_is_antialiased() -> None:
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    for format in ("PNG", "JPEG"):
        pixels = decode(encode(Image.fromarray(stripes), format, **({"quality": 95} if format == "JPEG" else {})), 32)
        assert abs(pixels[2:-2, 2:-2].astype(int) - 127).max() <= 6


def test_a_jpeg_decoded_small_agrees_with_one_decoded_whole() -> None:
    small = np.random.default_rng(3).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    photo = Image.fromarray(small).resize((1600, 1200), Image.Resampling.BICUBIC)
    jpeg, png = decode(encode(photo, "JPEG", quality=95), 64), decode(encode(photo, "PNG"), 64)
    assert abs(jpeg.astype(int) - png.astype(int)).mean() < 2


@pytest.mark.parametrize("image", [
    encode(Image.fromarray(CORNERS[:, 8:56]), "JPEG"), encode(Image.fromarray(CORNERS[:, 8:56]), "PNG"),
    encode(Image.fromarray(CORNERS), "JPEG"), encode(Image.fromarray(CORNERS[:, 8:56, 0]), "JPEG"),
    encode(Image.fromarray(CORNERS[:, 8:56]), "JPEG", exif=turned(6)),
    encode(Image.fromarray(CORNERS[:, 8:56]).convert("CMYK"), "JPEG")],
    ids=["JPEG", "PNG", "another size", "grey", "turned", "CMYK"])
def test_a_row_of_a_batch_gets_what_decode_gives_and_its_neighbours_nothing(image: bytes) -> None:
    batch = np.full((3, 48, 48, 3), 77, np.uint8)
    decode_into(image, batch[1])
    assert np.array_equal(batch[1], decode(image, 48))
    assert (batch[[0, 2]] == 77).all()


def test_the_same_bytes_give_the_same_pixels() -> None:
    data = encode(Image.fromarray(CORNERS), "JPEG")
    assert np.array_equal(decode(data, 40), decode(bytes(data), 40))


def _png_claiming(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + chunk(
        b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def _jpeg_claiming(width: int, height: int) -> bytes:
    data = bytearray(encode(Image.fromarray(CORNERS), "JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5:at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize("claim", [_png_claiming, _jpeg_claiming])
@pytest.mark.parametrize("side", [5001, 8000, 60000])
def test_too_many_pixels_are_refused_before_decoding(claim: Callable[[int, int], bytes], side: int) -> None:
    with pytest.raises(Refused, match="pixels") as e:
        decode(claim(side, side), 32)
    assert e.value.code == "bad_image"


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("kept", [0.02, 0.5, 0.9])
def test_cut_off_images_are_refused(format: str, kept: float) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encode(noise, format)
    with pytest.raises(Refused) as e:
        decode(data[:int(len(data) * kept)], 32)
    assert e.value.code == "bad_image"


@pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF", "PPM"])
def test_other_formats_are_refused(format: str) -> None:
    with pytest.raises(Refused, match="JPEG, PNG or WebP"):
        decode(encode(Image.fromarray(CORNERS), format), 32)


@pytest.mark.parametrize("data", [b"", b"hello", b"\xff\xd8\xff", b"\xff\xd8\xff\xe0" + b"\0" * 100, b"\0" * 4096])
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(Refused):
        decode(data, 32)
    with pytest.raises(Refused):
        measure(data)


def test_broken_metadata_does_not_spoil_the_picture() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(Image.fromarray(CORNERS), "JPEG", exif=exif)
    at = data.index(b"Exif\0\0") + 6
    assert names(decode(data[:at] + b"\xff" * 12 + data[at + 12:], 32)) == ["red", "green", "blue", "white"]
