"""An image becomes tokens: the patch embedding, and positions that follow the grid's size (I-JEPA, section 3; ViT, section 3.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wejepa.errors import ConfigError

__all__ = ["POOLINGS", "PatchEmbed", "add_positions", "pool_tokens", "resize_positions", "sincos_positions"]

POOLINGS = ("mean", "grid")


class PatchEmbed(nn.Module):
    """Cut an image into square patches and project each to one token: a convolution whose stride is its kernel.

    Args:
        patch_size: height and width of a patch, in pixels.
        in_chans: channels of the image.
        embed_dim: width D of a token.
    """

    def __init__(self, patch_size: int = 4, in_chans: int = 3, embed_dim: int = 128):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def grid_size(self, images: Tensor) -> tuple[int, int]:
        """Patches down and across for images (B, C, height, width).

        Raises:
            ConfigError: the patch does not divide the image, or the channels are not the embedding's.
        """
        return token_grid(images, self.patch_size, self.proj.in_channels)

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """(B, C, height, width) -> (B, N, D), patches in raster order; with `keep` (B, K) those patches alone: (B, K, D)."""
        (rows, cols), p = self.grid_size(images), self.patch_size
        if keep is None:
            return self.proj(images).flatten(2).transpose(1, 2).contiguous()  # or every later layer would read across memory
        patches = images.view(-1, images.shape[1], rows, p, cols, p).permute(0, 2, 4, 1, 3, 5)  # (B, rows, cols, C, p, p)
        return F.linear(take(patches.reshape(len(images), rows * cols, -1), keep), self.proj.weight.flatten(1), self.proj.bias)


def token_grid(images: Tensor, patch_size: int, in_chans: int) -> tuple[int, int]:
    """Patches down and across for images (B, C, height, width).

    Raises:
        ConfigError: the patch does not divide the image, or the channels are not those asked for.
    """
    channels, height, width = images.shape[-3:]
    if channels != in_chans:
        raise ConfigError(f"the images have {channels} channels, model.in_chans is {in_chans}: set it to {channels}")
    if height % patch_size or width % patch_size:
        raise ConfigError(
            f"model.patch_size = {patch_size} does not divide an image of {height} x {width}: "
            f"resize it to {height // patch_size * patch_size} x {width // patch_size * patch_size}"
        )
    return height // patch_size, width // patch_size


def add_positions(module: nn.Module, kind: str, grid_size: tuple[int, int], dim: int) -> None:
    """Give a module its positional embeddings, `pos_embed` (1, N, D): a parameter for "learnt", a buffer for "sincos"."""
    if kind == "sincos":
        module.register_buffer("pos_embed", sincos_positions(grid_size, dim))
    else:
        module.pos_embed = nn.Parameter(torch.zeros(1, grid_size[0] * grid_size[1], dim))


def sincos_positions(grid_size: tuple[int, int], dim: int) -> Tensor:
    """Fixed positional embeddings (1, N, D): sines and cosines of the row, then of the column, at D / 4 frequencies from 1 down to 1e-4."""
    frequency = 10_000 ** -(torch.arange(dim // 4) / (dim // 4))
    row, col = torch.meshgrid(*(torch.arange(n).float() for n in grid_size), indexing="ij")
    angles = [place.flatten()[:, None] * frequency for place in (row, col)]  # (N, D / 4) each
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)[None]


def resize_positions(positions: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Resample positional embeddings (1, N, D) from one token grid to another, bicubically; the same grid returns them as they are.

    Returns:
        (1, N', D) for a new grid of N' patches.
    """
    if tuple(old_grid) == tuple(new_grid):
        return positions
    dim = positions.shape[-1]
    plane = positions.float().reshape(1, *old_grid, dim).permute(0, 3, 1, 2)  # (1, D, H, W)
    plane = F.interpolate(plane, size=tuple(new_grid), mode="bicubic", align_corners=False)
    return plane.permute(0, 2, 3, 1).reshape(1, -1, dim).to(positions.dtype)


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """Pick tokens by patch index: (B, N, D) and (B, K) -> (B, K, D)."""
    return torch.gather(tokens, 1, index[..., None].expand(-1, -1, tokens.shape[-1]))


def pool_tokens(tokens: Tensor, grid_size: tuple[int, int], pooling: str, cells: int = 4) -> Tensor:
    """One vector an image from its tokens (B, N, D).

    Args:
        grid_size: patches down and across, (H, W).
        pooling: "mean" over all tokens, (B, D); or "grid", the mean over each cell of a coarse grid, (B, cells * cells * D),
            which keeps where things are.
        cells: cells down and across the coarse grid.
    """
    if pooling == "mean":
        return tokens.mean(1)
    if pooling == "grid":
        plane = tokens.transpose(1, 2).unflatten(2, grid_size)  # (B, D, H, W)
        return F.adaptive_avg_pool2d(plane, cells).flatten(1)
    raise ConfigError(f"pooling = {pooling!r}: give one of {', '.join(POOLINGS)}")
