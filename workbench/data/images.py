"""Images of pairs: decoded from the bytes of any usual format, and fitted to a square."""

import io
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")  # Pillow starts other programs for some others
STRIP = 50  # longest image that is one, by its shorter edge


def drawn_share(images: Sequence[Image.Image]) -> float:
    """Where along their longer edges some images are cropped at random: a share of the room, 0 <= share < 1.

    Drawn from the images' own pixels, so that they are cropped alike whenever they are encoded, on whatever process.
    One for both images of a pair: what the denoiser is told of a crop is said once for a pair.
    """
    seed = 0
    for image in images:
        seed = zlib.crc32(image.tobytes(), seed)
    return float(np.random.default_rng(seed).random())


def fit(
    image: Image.Image, size: int, resize: str = "bicubic", share: float | None = None
) -> tuple[np.ndarray, tuple[int, int]]:
    """RGB, shorter edge resized to `size`, cropped to a square.

    Args:
        resize: Pillow's filter, "bicubic", "bilinear" or "lanczos".
        share: where along the longer edge it is cropped, as `drawn_share` returns it; None = in the middle.
    Returns:
        Pixels (size, size, 3), uint8, and where the crop began: top, left.
    Raises:
        ValueError: so long a strip that it would be huge before it is cropped.
    """
    image = image.convert("RGB")
    if image.size == (size, size):
        return np.asarray(image), (0, 0)
    if max(image.size) > STRIP * min(image.size):
        raise ValueError(f"a strip of {image.width} x {image.height} pixels")
    scale = size / min(image.size)
    # max: rounding must not make the shorter edge a pixel less than the square.
    edges = max(size, round(image.width * scale)), max(size, round(image.height * scale))
    image = image.resize(edges, Image.Resampling[resize.upper()])
    left, top = (image.width - size) // 2, (image.height - size) // 2
    if share is not None:
        # The shorter edge is the square's: only the longer one has room.
        left, top = (int(share * (edge - size + 1)) for edge in image.size)
    return np.asarray(image.crop((left, top, left + size, top + size))), (top, left)


def opened(data: bytes | Mapping[str, Any]) -> Image.Image:
    """An image from a file's bytes, or from what Hugging Face's datasets write, turned as its EXIF says.

    Raises:
        Exception: of many kinds, by Pillow: it is none, damaged, or of another format than FORMATS.
    """
    image = Image.open(io.BytesIO(data if isinstance(data, bytes) else data["bytes"]), formats=FORMATS)
    # Image.open reads only the header; damage in the pixels shows here.
    image.load()
    with suppress(Exception):  # Pillow raises many kinds for EXIF that is none; the picture can be whole
        ImageOps.exif_transpose(image, in_place=True)  # cameras store how they were held, and viewers turn pictures
    if image.mode.startswith("I;16"):  # Pillow would cut 16 bits off above 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("pixels without a known range")
    return image
