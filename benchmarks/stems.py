"""A patch embedding of more than one convolution, as a part of one's own for `launch_pretraining(cfg, model=WithStem(cfg))`.

Early convolutions help a small vision transformer (Xiao et al., 2021), but they mix neighbouring patches: in a student, what is hidden
must be blank before and after each, or the context's tokens would tell what is beside them.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wejepa.config import IJepaConfig
from wejepa.model import IJEPA_base
from wejepa.patches import PatchEmbed, take


class Stem(PatchEmbed):
    """Convolutions in place of the one whose stride is its kernel; GELU between them; patches of 4 x 4 pixels.

    Args:
        layers: whose strides multiply to 4.
    """

    def __init__(self, *layers: nn.Conv2d):
        super().__init__(4, layers[0].in_channels, layers[-1].out_channels)
        self.proj.weight = self.proj.bias = None  # of the layer that these replace; its number of channels is still asked for
        self.layers = nn.ModuleList(layers)
        for layer in layers:
            nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)
            nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """(B, C, height, width) -> (B, N, D); with `keep` (B, K) all other patches are blank, and the kept places are given: (B, K, D)."""
        rows, cols = self.grid_size(images)
        seen, x = None, images
        if keep is not None:
            seen = torch.zeros(len(images), rows * cols).scatter_(1, keep, 1).view(-1, 1, rows, cols)
        for i, layer in enumerate(self.layers):
            if seen is not None:
                x = x * F.interpolate(seen, size=x.shape[-2:])
            x = layer(F.gelu(x) if i else x)
        tokens = x.flatten(2).mT
        return tokens.contiguous() if keep is None else take(tokens, keep)


def two_convolutions(channels: int, dim: int) -> Stem:
    return Stem(nn.Conv2d(channels, dim // 2, 3, 2, 1), nn.Conv2d(dim // 2, dim, 3, 2, 1))


class WithStem(IJEPA_base):
    """An I-JEPA with a patch embedding of two convolutions, 3 x 3 with stride 2, in student and teacher."""

    def __init__(self, cfg: IJepaConfig):
        super().__init__(cfg)
        self.student_encoder.patch_embed = two_convolutions(cfg.model.in_chans, cfg.model.embed_dim)
        self.teacher_encoder.patch_embed = copy.deepcopy(self.student_encoder.patch_embed).requires_grad_(False)
