"""Block masks: which patches the student sees, and which it must predict (I-JEPA, section 3 and appendix A.1).

    targets   M rectangles of one random shape, placed anywhere on the grid
    context   one large rectangle, minus every target, thinned out at random to a fixed number of patches

These things differ from the published sampler, each on purpose (notebook 02, section 7): every position of a block is allowed, so
that each patch can be a target and each can be context; the context's size is a constant of the config, so that it depends neither on
the batch's size nor on where the targets fall; what is dropped to reach that size is dropped at random, not from the end of the raster;
a target block that would leave too few patches is replaced by a copy of the first, not shown to the student; area and aspect ratio of a
block are drawn separately; and no block has to have more than ten patches.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from wejepa.config import MaskConfig

__all__ = ["Masks", "sample_block_masks"]


class Masks(NamedTuple):
    """Patch indices in raster order, int64, ascending within each row."""

    context: Tensor  # (B, Nc)
    targets: Tensor  # (B, M, Nt)

    def to(self, device: torch.device | str) -> Masks:
        """The same masks on another device."""
        return Masks(self.context.to(device), self.targets.to(device))

    def part(self, number: int, parts: int) -> Masks:
        """The masks of one of several equal parts of the batch."""
        return Masks(self.context.chunk(parts)[number], self.targets.chunk(parts)[number])


def sample_block_masks(batch_size: int, grid_size: tuple[int, int], cfg: MaskConfig, generator: torch.Generator | None = None) -> Masks:
    """Sample the masks of a batch in one vectorised call.

    The blocks' shape is drawn once a call, since a batch is one tensor; their places are drawn for every image and block.
    Blocks may overlap one another, as in the paper. Where their union would leave the context too little room, a block
    repeats the image's first one, so the call needs no rejection loop and always ends.

    Args:
        batch_size: number of images B.
        grid_size: patches down and across, (H, W).
        cfg: the mask settings.
        generator: source of randomness; torch's default one when None.

    Returns:
        Masks: context (B, Nc) and targets (B, M, Nt), disjoint within each image.

    Raises:
        ConfigError: the grid cannot hold the blocks beside the context.
    """
    cfg.check_grid(grid_size)
    cols, patches, blocks = grid_size[1], grid_size[0] * grid_size[1], cfg.num_target_blocks
    context_size = cfg.num_context_patches(grid_size)
    room = patches - context_size

    # Targets: one shape, then a free choice of the top left corner, the last row and column included.
    height, width = _block_shape(grid_size, cfg.target_scale, cfg.target_aspect_ratio, generator, room)
    top, left = _corners((batch_size, blocks), grid_size, (height, width), generator)
    down, across = torch.arange(height), torch.arange(width)
    offsets = (down[:, None] * cols + across).flatten()  # (Nt,)
    targets = (top * cols + left)[..., None] + offsets  # (B, M, Nt)

    # Count each image's covered patches block by block; a block that would overdraw the room repeats the first.
    covered = torch.zeros(batch_size, patches)
    fit = min(room // len(offsets), blocks)  # so many blocks leave room enough wherever they are
    covered.scatter_(1, targets[:, :fit].flatten(1), 1)
    for m in range(fit, blocks):
        block = targets[:, m]  # (B, Nt)
        new = (1 - covered.gather(1, block)).sum(1)
        targets[:, m] = torch.where((covered.sum(1) + new > room)[:, None], targets[:, 0], block)
        covered.scatter_(1, targets[:, m], 1)

    # Context: a random order of the free patches, those inside the context block first; the first Nc are kept.
    high, wide = _block_shape(grid_size, cfg.context_scale, cfg.context_aspect_ratio, generator, patches)
    top, left = _corners((batch_size, 1), grid_size, (high, wide), generator)
    row, col = torch.arange(grid_size[0]), torch.arange(cols)
    rows, columns = (row >= top) & (row < top + high), (col >= left) & (col < left + wide)  # (B, H) and (B, W)
    inside = (rows.float()[:, :, None] * columns.float()[:, None]).flatten(1)  # (B, N), in float32 as the rest: types that mix are slow
    rank = torch.rand(batch_size, patches, generator=generator).add_(inside).sub_(covered, alpha=3)  # covered ones below zero
    return Masks(_largest(rank, context_size), targets)


def _largest(values: Tensor, count: int) -> Tensor:
    """Where the largest `count` of each row (B, N) are: indices (B, count), ascending."""
    array = values.numpy()
    least = np.partition(array, -count, axis=1)[:, -count, None]  # numpy takes a third of the time of topk and sort
    kept = np.flatnonzero(array >= least)
    if len(kept) > count * len(array):  # some row has another number equal to its least
        return values.topk(count, dim=1, sorted=False).indices.sort(dim=1).values
    return torch.from_numpy(kept.reshape(-1, count) - array.shape[1] * np.arange(len(array))[:, None])


def _block_shape(grid_size, scale, aspect_ratio, generator, room: int) -> tuple[int, int]:
    """Height and width in patches for an area and an aspect ratio drawn independently of each other."""
    u, v = torch.rand(2, generator=generator).tolist()
    area = scale[0] + u * (scale[1] - scale[0])
    aspect = aspect_ratio[0] + v * (aspect_ratio[1] - aspect_ratio[0])
    height = min(max(1, round(math.sqrt(area * aspect) * grid_size[0])), grid_size[0])
    width = min(max(1, round(math.sqrt(area / aspect) * grid_size[1])), grid_size[1])
    while height * width > room:  # rounding up by half a patch can overshoot on a small grid
        height, width = (height - 1, width) if height >= width else (height, width - 1)
    return height, width


def _corners(shape, grid_size, block, generator) -> tuple[Tensor, Tensor]:
    """The top rows and left columns of blocks placed uniformly wherever they fit."""
    top = torch.randint(0, grid_size[0] - block[0] + 1, shape, generator=generator)
    left = torch.randint(0, grid_size[1] - block[1] + 1, shape, generator=generator)
    return top, left
