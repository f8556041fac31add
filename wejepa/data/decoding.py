"""One image file as pixels: any kind that Pillow knows, upright, in colour, the part that a crop asks for."""

from __future__ import annotations

import contextlib
import errno
import io
import math
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor

from wejepa.data.crops import centre_square, crop_box

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["IMAGE_ENDINGS", "framed", "no_fault_of_the_file", "persistently", "read_image", "reason_unreadable"]

T = TypeVar("T")

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
PAUSES = (0.1, 0.5, 2.0)  # seconds between the attempts to read a file
# What a disk, a file server or a busy system says when the same file may well be read a moment later.
PASSING = {
    getattr(errno, name)
    for name in (
        "EIO", "EAGAIN", "EBUSY", "EINTR", "EMFILE", "ENFILE", "ESTALE", "ETIMEDOUT", "ENETDOWN", "ENETUNREACH", "ENETRESET",
        "EHOSTDOWN", "EHOSTUNREACH", "ECONNABORTED", "ECONNREFUSED", "ECONNRESET", "ENOTCONN", "EREMOTEIO",
    )
    if hasattr(errno, name)
}  # fmt: skip


def read_image(path: Path | io.BytesIO, size: int, crop: list[float] | None = None) -> Tensor:
    """Bytes (3, size, size) of an image file: the first frame, upright, in colour, on white where it is transparent.

    Args:
        path: a file of any kind that Pillow knows, or its content.
        size: height and width of the result, in pixels.
        crop: one row of `random_crops`: area, aspect, x, y and mirror; the largest square in the centre for None.

    Raises:
        Exception: of many types, as Pillow has it, for a file that is absent, damaged, no image or too large; ValueError where the range
            of the numbers is not known.
    """
    from PIL import Image, ImageOps

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow remarks on large images and on odd metadata, and reads them all the same
        with Image.open(path) as image:
            *_, wide, high = _box(crop, *image.size, _on_its_side(image))
            # A large JPEG costs a fraction of the time at a half, a quarter or an eighth of its size: twice what is needed is enough.
            image.draft(None, tuple(math.ceil(2 * size * whole / part) for whole, part in zip(image.size, (wide, high), strict=True)))
            image.load()
            with damaged_metadata():
                ImageOps.exif_transpose(image, in_place=True)
            return framed(image, size, crop)


def framed(image: Image, size: int, crop: list[float] | None = None) -> Tensor:
    """Bytes (3, size, size) of a Pillow image that is upright; the rest as for `read_image`."""
    from PIL import Image, ImageOps

    image = _in_colour(image)
    left, top, wide, high = _box(crop, *image.size)
    box = (left, top, min(left + wide, image.width), min(top + high, image.height))  # rounding may push it over the edge
    image = image.resize((size, size), Image.Resampling.BILINEAR, box=box, reducing_gap=2.0)
    mirror = crop is not None and crop[4]
    pixels = np.array(ImageOps.mirror(image) if mirror else image)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _box(crop: list[float] | None, width: int, height: int, on_its_side: bool = False) -> list[float]:
    """Left, top, width and height of a crop in the pixels of an image that is stored upright or on its side."""
    if on_its_side:
        left, top, wide, high = _box(crop, height, width)
        return [top, left, high, wide]
    return list(centre_square(width, height)) if crop is None else crop_box(torch.tensor(crop), width, height).tolist()


def _on_its_side(image) -> bool:
    """Whether an image's metadata say that its stored width is its height."""
    with damaged_metadata():
        return image.getexif().get(0x0112) in (5, 6, 7, 8)
    return False


@contextlib.contextmanager
def damaged_metadata() -> Iterator[None]:
    """Let errors about an image's metadata pass: where they are damaged, the pixels are not. A want of memory is no damage."""
    try:
        yield
    except Exception as error:
        if no_fault_of_the_file(error):
            raise


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


def persistently(read: Callable[[], T]) -> T:
    """What `read` gives, tried anew after short pauses while the disk or the network has a fault that may pass."""
    for pause in PAUSES:
        try:
            return read()
        except OSError as error:
            if error.errno not in PASSING:
                raise
            time.sleep(pause)
    return read()


def no_fault_of_the_file(error: Exception) -> str | None:
    """What to say of an error that a good file can meet as well; None for an error that tells of the file."""
    if isinstance(error, OSError) and error.errno in PASSING:
        return f"cannot be read ({error.strerror}), not at {len(PAUSES) + 1} attempts either: check the disk or the network, and go on"
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM or "can't allocate memory" in str(error):
        return "finds no memory to be decoded in: lower data.num_workers or data.train_batch_size"
    return None


def reason_unreadable(error: Exception) -> str:
    """What is wrong with a file, in one line that leaves out its name."""
    from PIL import Image, UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "its content is no image of a known kind"
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels: scale it down"
    return " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())
