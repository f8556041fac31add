"""Random crops, resampling, and pixels in the numbers that the encoder takes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from wejepa.config import IJepaConfig
from wejepa.devices import to_device

__all__ = ["centre_square", "crop_box", "normalise", "random_crops", "resample", "with_channels"]

ASPECT = 4 / 3  # a crop's longer side over its shorter one, at most


def random_crops(batch_size: int, cfg: IJepaConfig, generator: torch.Generator) -> Tensor:
    """What each crop is to be like, whatever the size of its image; `crop_box` makes a box of it.

    Returns:
        (B, 5): share of the image's area; aspect, width over height in pixels, from 3:4 to 4:3; left and top as shares of the room that
        the crop leaves beside it; mirror, 0 or 1.
    """
    u = torch.rand(5, batch_size, generator=generator)
    area = cfg.data.crop_scale[0] + u[0] * (cfg.data.crop_scale[1] - cfg.data.crop_scale[0])
    aspect = torch.exp((2 * u[1] - 1) * math.log(ASPECT))
    mirror = (u[4] < 0.5).float() * cfg.data.horizontal_flip
    return torch.stack([area, aspect, u[2], u[3], mirror], dim=1)


def crop_box(crops: Tensor, width: int, height: int) -> Tensor:
    """The crops (..., 5) of `random_crops` on images of one size: (..., 4) of left, top, width and height in pixels.

    A side that would be longer than the image's is cut to it, and the other one stays, up to 4:3: so a crop of a panorama has less than
    the area that was drawn, but no crop is squeezed further than to that. A share of 1 is the whole image, whatever the aspect.
    """
    area, aspect, x, y, _ = crops.unbind(-1)
    wide = (area * aspect * (height / width)).sqrt().clamp(max=1).where(area < 1, 1.0) * width
    high = (area / aspect * (width / height)).sqrt().clamp(max=1).where(area < 1, 1.0) * height
    wide, high = wide.minimum(high * aspect.clamp(min=ASPECT)), high.minimum(wide * (1 / aspect).clamp(min=ASPECT))
    return torch.stack([x * (width - wide), y * (height - high), wide, high], dim=-1)


def centre_square(width: int, height: int) -> tuple[float, float, int, int]:
    """The largest square in the middle of an image: left, top, width and height in pixels."""
    side = min(width, height)
    return (width - side) / 2, (height - side) / 2, side, side


def resample(pixels: Tensor, boxes: Tensor, mirror: Tensor, size: int) -> Tensor:
    """The part of each image that its box frames, as a square: bilinear, with antialiasing where that makes it smaller.

    Every output pixel is the mean of those under a triangle that is as wide as the output's pixels, or the input's where they are wider:
    what Pillow's `resize(box=..., resample=BILINEAR)` and `F.interpolate(antialias=True)` compute, here with a box for each image.

    Args:
        pixels: images (B, C, H, W), of any type.
        boxes: left, top, width and height in pixels, inside the image, (B, 4).
        mirror: 1 to exchange left and right, else 0, (B,).
        size: S.

    Returns:
        float32 (B, C, S, S), on the device of the pixels, in their range.
    """
    left, top, wide, high = boxes.unbind(-1)
    at = torch.arange(size, device=boxes.device) + 0.5
    across = at + mirror[:, None] * (size - 2 * at)  # (B, S), from right to left under a mirror
    by_column = _triangles(left[:, None] + across * (wide / size)[:, None], wide / size, pixels.shape[-1])
    by_row = _triangles(top[:, None] + at * (high / size)[:, None], high / size, pixels.shape[-2])
    narrowed = torch.bmm(pixels.flatten(1, 2).float(), by_column.mT).unflatten(1, pixels.shape[1:3])  # (B, C, H, S)
    return by_row[:, None] @ narrowed


def _triangles(centres: Tensor, step: Tensor, length: int) -> Tensor:
    """The weight of each of `length` pixels in each output pixel, (B, S, length), given where the output pixels' centres (B, S) are."""
    support = step.clamp(min=1)[:, None, None]
    distance = (centres[..., None] - (torch.arange(length, device=centres.device) + 0.5)).abs_()
    weights = distance.div_(support).neg_().add_(1).clamp_(min=0)
    return weights.div_(weights.sum(-1, keepdim=True))  # beyond the image there is nothing to weigh


def normalise(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Pixels (B, C, H, W) from 0 to 255, as float32 with the set's mean and deviation taken out."""
    mean, std = (to_device(torch.tensor(v).view(1, -1, 1, 1), pixels.device) for v in (mean, std))
    return pixels.float().div(255).sub_(mean).div_(std)


def with_channels(x: Tensor, channels: int) -> Tensor:
    """Grey to colour by repetition, colour to grey by the mean."""
    if x.shape[1] == channels:
        return x
    return (x if x.shape[1] == 1 else x.mean(1, keepdim=True)).expand(-1, channels, -1, -1)
