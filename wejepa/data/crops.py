"""Random crops, and pixels in the numbers that the encoder takes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from wejepa.config import IJepaConfig

__all__ = ["normalise", "random_crops", "with_channels"]


def random_crops(batch_size: int, cfg: IJepaConfig, generator: torch.Generator) -> Tensor:
    """Crops as shares of an image: (B, 5) of left, top, width, height and mirror (0 or 1); aspect ratios from 3:4 to 4:3."""
    u = torch.rand(5, batch_size, generator=generator)
    area = cfg.data.crop_scale[0] + u[0] * (cfg.data.crop_scale[1] - cfg.data.crop_scale[0])
    aspect = torch.exp((2 * u[1] - 1) * math.log(4 / 3))
    wide, high = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    mirror = (u[4] < 0.5).float() * cfg.data.horizontal_flip
    return torch.stack([u[2] * (1 - wide), u[3] * (1 - high), wide, high, mirror], dim=1)


def normalise(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Bytes (B, C, H, W) as float32 with the set's mean and deviation taken out."""
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (mean, std))
    return pixels.float().div_(255).sub_(mean).div_(std)


def with_channels(x: Tensor, channels: int) -> Tensor:
    """Grey to colour by repetition, colour to grey by the mean."""
    if x.shape[1] == channels:
        return x
    return (x if x.shape[1] == 1 else x.mean(1, keepdim=True)).expand(-1, channels, -1, -1)
