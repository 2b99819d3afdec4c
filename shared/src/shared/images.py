"""The one meaning of an image: encoded bytes -> RGB uint8 at a dataset's size, for preprocessing and serving alike.

An image is stretched to size x size: every pixel of the picture takes part, and no client need know a crop. This is
what Keras' `image_dataset_from_directory` does by default, too.

JPEG goes through libjpeg-turbo (simplejpeg), which decodes large pictures at a half, a quarter or an eighth of their
size; every other format through Pillow. cykooz_resizer, which is Rust's fast_image_resize, does the rest of the way.
All compute with integers: the same bytes give the same pixels on every machine, whatever SIMD its processor has.
"""

import io
import warnings

import numpy as np
import simplejpeg
from cykooz_resizer import FilterType, ImageData, PixelType, ResizeAlg, ResizeOptions, Resizer
from PIL import Image, UnidentifiedImageError

from shared.errors import Refused

FORMATS = ("JPEG", "PNG", "WEBP")
OTHERS = ((b"GIF8", "GIF"), (b"BM", "BMP"), (b"II*\0", "TIFF"), (b"MM\0*", "TIFF"), (b"<svg", "SVG"))
MAX_PIXELS = 25_000_000  # 75 MB as RGB; a camera's largest common photograph has 24 million
ORIENTATION = 0x0112  # the EXIF tag
HEADER = 256 << 10  # bytes of a JPEG that are searched for EXIF: it is the first segment, or behind a thumbnail
MOST_SCANS = 100  # of a JPEG: encoders make about ten, and each costs as much as the picture has pixels
FEW = 250_000  # pixels of which any number of scans in SHORT bytes takes a few hundredths of a second
SHRINK = 1.5  # from this factor on what a quicker decoder leaves out is not seen
SHORT = 4096  # bytes of a JPEG that are searched sooner than its segments are gone through
BILINEAR = ResizeOptions(ResizeAlg.convolution(FilterType.bilinear), use_alpha=False)

Image.MAX_IMAGE_PIXELS = MAX_PIXELS
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


def decode(data: bytes, size: int) -> np.ndarray:
    """A JPEG, PNG or WebP file's bytes -> uint8 [size, size, 3], RGB.

    EXIF orientation is applied, grey and palette images become RGB, transparency is laid on white, CMYK is converted,
    and of an animation the first frame is taken. Shrinking is antialiased.

    Raises:
        Refused: (bad_image) another format, broken or truncated bytes, or more than MAX_PIXELS.
    """
    return decode_sized(data, size)[0]


def decode_into(data: bytes, row: np.ndarray, most: int = MAX_PIXELS) -> None:
    """`decode` into a row of a batch, uint8 [size, size, 3]: a JPEG of that size without a copy. Raises as that; for
    more pixels than `most` before they are decoded.
    """
    pixels = decode_sized(data, len(row), row, most)[0]
    if pixels is not row:
        row[:] = pixels


def decode_sized(data: bytes, size: int, row: np.ndarray | None = None,
                 most: int = MAX_PIXELS) -> tuple[np.ndarray, int, int]:
    """`decode`, and the width and height that the image has on a screen, in pixels.

    most: pixels. row: uint8 [size, size, 3], which is returned where the pixels could be written into it at once.
    """
    if not data:
        raise Refused("the image is empty, it has 0 bytes: expected a whole JPEG, PNG or WebP file", "bad_image")
    try:
        decoded = _decode_jpeg(data, size, row, most) if data.startswith(b"\xff\xd8\xff") else None
        pixels, width, height, orientation = decoded or _decode_any(data, size, most)
    except Refused:
        raise
    except UnidentifiedImageError:  # its own message names an address in memory: another one each time
        known = next((name for start, name in OTHERS if data.startswith(start)), "")
        raise Refused(f"the image is a {known}: expected a JPEG, PNG or WebP file" if known else
                      "the image's format is not recognised: expected a whole JPEG, PNG or WebP file",
                      "bad_image") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):  # before its size can be asked for
        raise Refused(f"the image has over {MAX_PIXELS:,} pixels, which is the most that is accepted: make it smaller",
                      "bad_image") from None
    except Exception as e:  # the boundary to parsers of hostile bytes, which raise whatever they come upon
        raise Refused(f"the image can't be decoded ({e or type(e).__name__}): expected a whole JPEG, PNG or WebP file",
                      "bad_image") from None
    if orientation > 4:
        width, height = height, width
    return pixels if orientation == 1 else _orient(pixels, orientation), width, height


def measure(data: bytes) -> tuple[int, int]:
    """Width and height of an image on a screen, in pixels, from its header alone. Raises Refused as `decode` does."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            return (height, width) if _orientation(image) > 4 else (width, height)
    except Exception as e:
        raise Refused(f"the image has no readable header ({e or type(e).__name__}): expected a JPEG, PNG or WebP file",
                      "bad_image") from None


def _decode_jpeg(data: bytes, size: int, row: np.ndarray | None, most: int) -> tuple[np.ndarray, int, int, int] | None:
    """Pixels, stored width and height, orientation; None for what libjpeg-turbo can't or won't turn into RGB."""
    try:
        height, width, colour, _ = simplejpeg.decode_jpeg_header(data)
        _check_pixels(width, height, most)
        _check_scans(data, width * height)
        if colour == "CMYK":
            return None
        if row is not None and height == width == size:
            simplejpeg.decode_jpeg(data, "RGB", buffer=row)
            pixels = row
        else:
            pixels = _decode_shrunk(data, height, width, size)
    except ValueError:
        return None  # Pillow has the last word: it forgives stray bytes between segments, not missing ones
    orientation = 1
    if data.find(b"Exif\0\0", 0, _scan_at(data)) >= 0:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            orientation = _orientation(image)
    return resize(pixels, size), width, height, orientation


def _decode_shrunk(data: bytes, height: int, width: int, size: int) -> np.ndarray:
    """A JPEG at the fraction of its height and width that is enough for `size`."""
    side = min(height, width)
    divisor = _divisor(side, size)
    # Colour, which has a pixel for each four of light, without a gradient between: a sixth faster at 500 x 375,
    # and within 48 dB once it is shrunk.
    pixels: np.ndarray = simplejpeg.decode_jpeg(data, "RGB", fastupsample=side >= SHRINK * size,
                                                min_height=-(-height // divisor), min_width=-(-width // divisor))
    return pixels


def _check_scans(data: bytes, pixels: int) -> None:
    """Refuse a JPEG that is made to take hours: each scan costs as much as the picture has pixels, and few bytes."""
    if (len(data) <= SHORT and pixels <= FEW) or _has_one_scan(data):
        return
    seen = np.frombuffer(data, np.uint8)
    scans = np.count_nonzero((seen[:-1] == 0xFF) & (seen[1:] == 0xDA))
    if scans > MOST_SCANS:
        raise Refused(f"the JPEG has {scans} scans: expected at most {MOST_SCANS}, save it anew", "bad_image")


def _has_one_scan(data: bytes) -> bool:
    """Whether a JPEG is surely read to its first scan's end alone: it is sequential, and has all colours in that."""
    at, components = 2, 256
    while data[at:at + 1] == b"\xff" and len(data) > at + 9:
        marker = data[at + 1]
        if marker == 0xDA:
            return data[at + 4] >= components
        if marker in (0xC0, 0xC1) and components == 256:  # sequential by Huffman's code
            components = data[at + 9]
        elif marker in (0xFF, 0x00, 0x01) or 0xC0 <= marker <= 0xDA and marker not in (0xC4, 0xCC):
            return False  # a byte to fill, a marker without a length, another frame: it may be read otherwise than here
        at += 2 + int.from_bytes(data[at + 2:at + 4], "big")
    return False


def _scan_at(data: bytes) -> int:
    """Where a JPEG's scan begins, or HEADER if that is less: to search a photograph's takes 2 % of its time."""
    at = 2 if len(data) > SHORT else HEADER
    while at < HEADER and data[at:at + 1] == b"\xff" and data[at + 1:at + 2] != b"\xda":
        at += 2 + int.from_bytes(data[at + 2:at + 4], "big")
    return at if data[at:at + 2] == b"\xff\xda" else HEADER


def _divisor(side: int, size: int) -> int:
    """By how much libjpeg-turbo shall shrink a picture whose shorter side is `side`: what is left is at least SHRINK.

    Only powers of two: on photographs of 640 x 427 these stay within 33 to 45 dB of a whole decode, its other eighths
    fall to 30, and are no faster. Without the margin, a quarter left at 1.0 times the size has 35 where a half has 38.
    """
    if side < 2 * SHRINK * size:
        return 1
    return next(d for d in (8, 4, 2) if side >= d * SHRINK * size)


def _decode_any(data: bytes, size: int, most: int) -> tuple[np.ndarray, int, int, int]:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        width, height = image.size
        _check_pixels(width, height, most)
        if data.startswith(b"\xff\xd8"):  # whatever kind of JPEG it is called
            _check_scans(data, width * height)
        orientation = _orientation(image)
        rgb = _to_rgb(image)
    return resize(np.asarray(rgb), size), width, height, orientation


def _check_pixels(width: int, height: int, most: int) -> None:
    if width * height > most:
        raise Refused(f"the image has {width} x {height} pixels: expected at most {most:,}, make it smaller",
                      "bad_image")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion cuts it off at 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def resize(pixels: np.ndarray, size: int) -> np.ndarray:
    """uint8 [H, W, 3] stretched to uint8 [size, size, 3], bilinear and antialiased; unchanged if it has that size."""
    height, width = pixels.shape[:2]
    if (height, width) == (size, size):
        return pixels
    result = ImageData(size, size, PixelType.U8x3)
    # A Resizer of its own: it costs a microsecond, and one for all would let threads wait for each other.
    Resizer().resize(ImageData(width, height, PixelType.U8x3, pixels.tobytes()), result, BILINEAR)
    return np.frombuffer(result.get_buffer(), np.uint8).reshape(size, size, 3)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 where there is none or it can't be read."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except Exception:  # broken metadata does not make the picture unusable
        return 1
    return value if value in range(1, 9) else 1


def _orient(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn a square picture upright; `orientation` says how it lies. After the resize, where it is cheapest."""
    match orientation:
        case 2:
            pixels = pixels[:, ::-1]
        case 3:
            pixels = pixels[::-1, ::-1]
        case 4:
            pixels = pixels[::-1]
        case 5:
            pixels = pixels.transpose(1, 0, 2)
        case 6:
            pixels = np.rot90(pixels, -1)
        case 7:
            pixels = pixels[::-1, ::-1].transpose(1, 0, 2)
        case 8:
            pixels = np.rot90(pixels)
    return np.ascontiguousarray(pixels)
