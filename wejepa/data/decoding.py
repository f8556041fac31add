"""One image file as pixels: any kind that Pillow knows, upright, in colour, the part that a crop asks for."""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["IMAGE_ENDINGS", "read_image", "reason_unreadable"]

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")


def read_image(path: Path | io.BytesIO, size: int, crop: list[float] | None = None) -> Tensor:
    """Bytes (3, size, size) of an image file: the first frame, upright, in colour, on white where it is transparent.

    Args:
        path: a file of any kind that Pillow knows, or its content.
        size: height and width of the result, in pixels.
        crop: which part, as shares of the image (left, top, width, height, mirror); the largest square in the centre for None.

    Raises:
        Exception: of many types, as Pillow has it, for a file that is absent, damaged, no image or too large; ValueError where the range
            of the numbers is not known.
    """
    from PIL import Image, ImageOps

    left, top, wide, high, mirror = crop or (0, 0, 1, 1, 0)
    need = math.ceil(2 * size / min(wide, high))  # of both sides: which one is the height is known only once the image is upright
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow remarks on large images and on odd metadata, and reads them all the same
        with Image.open(path) as image:
            image.draft(None, (need, need))  # a large JPEG costs a fraction of the time at a half, a quarter or an eighth of its size
            image.load()
            with contextlib.suppress(Exception):  # where the metadata are damaged, the pixels are not
                ImageOps.exif_transpose(image, in_place=True)
            image = _in_colour(image)
    width, height = image.size
    if crop is None:
        side = min(width, height)
        box = ((width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2)
    else:  # shares are rounded numbers, and may add up to a little more than the whole
        box = (left * width, top * height, min((left + wide) * width, width), min((top + high) * height, height))
    image = image.resize((size, size), Image.Resampling.BILINEAR, box=box, reducing_gap=2.0)
    pixels = np.array(ImageOps.mirror(image) if mirror else image)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _in_colour(image):
    """A Pillow image of any mode as RGB."""
    from PIL import Image

    if image.mode == "F" or (image.mode == "I" and (np.asarray(image) >> 16).any()):  # not 0 in negative numbers either
        raise ValueError(f"pixels of Pillow's mode {image.mode}, whose range is not known: save them with 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):  # sixteen bits: convert() would cut them off at 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        layer, image = image.convert("RGBA"), Image.new("RGB", image.size, "white")
        image.paste(layer, mask=layer)
    return image.convert("RGB")


def reason_unreadable(error: Exception) -> str:
    """What is wrong with a file, in one line that leaves out its name."""
    from PIL import Image, UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "its content is no image of a known kind"
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels: scale it down"
    return " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())
