"""Where an encoder looks, what its tokens have in common, and which patches its predictor finds hard. Tensors only; figures elsewhere.

Images may be on any device; what comes back is on the CPU, ready for a figure.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from wejepa.config import MaskConfig
from wejepa.errors import ConfigError
from wejepa.masking import sample_block_masks
from wejepa.model import IJEPA_base

__all__ = ["attention_rollout", "prediction_errors", "record_attention", "token_colours"]


@torch.no_grad()
def record_attention(model: IJEPA_base, images: Tensor, encoder: str = "teacher") -> list[Tensor]:
    """The attention weights of one forward pass over images (B, C, S, S): one (B, heads, N, N) a layer, rows being the queries."""
    model.enable_attention_recording(True)
    try:
        model.encode(images, encoder)
        return [weights.float().cpu() for weights in model.get_recorded_attentions(encoder)]
    finally:
        model.enable_attention_recording(False)


def attention_rollout(attentions: list[Tensor]) -> Tensor:
    """How much of each input token is in each output token, (B, N, N), by Abnar and Zuidema's rollout (2020).

    Each layer is taken for half its attention, averaged over the heads, and half the residual connection; layers multiply. Rows sum to one.

    Args:
        attentions: one (B, heads, N, N) a layer, the first layer first.

    Raises:
        ConfigError: there are no layers.
    """
    if not attentions:
        raise ConfigError("attentions: give the weights of one layer or more, from record_attention")
    identity = torch.eye(attentions[0].shape[-1], device=attentions[0].device)
    total = identity
    for weights in attentions:
        total = (0.5 * weights.mean(1) + 0.5 * identity) @ total
    return total.cpu()


def token_colours(tokens: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Tokens (B, N, D) as colours (B, H, W, 3) from 0 to 1: their first three principal components over all images and places.

    Like colours are like tokens. Which component is red, and its sign, mean nothing; the sign is fixed so that a picture repeats.

    Raises:
        ConfigError: the tokens are fewer than three wide, or not as many as the grid has places.
    """
    if tokens.shape[-1] < 3 or tokens.shape[1] != grid_size[0] * grid_size[1]:
        raise ConfigError(f"tokens: give (B, {grid_size[0] * grid_size[1]}, D) with D of 3 or more, not {tuple(tokens.shape)}")
    flat = tokens.flatten(0, 1).float()
    flat = flat - flat.mean(0)
    _, directions = torch.linalg.eigh(flat.T @ flat)  # ascending
    parts = flat @ directions[:, -3:].flip(1)
    parts = parts * torch.sign(parts.gather(0, parts.abs().argmax(0, keepdim=True)))
    ends = torch.tensor([0.02, 0.98]).to(parts.device)  # outliers would grey the rest
    low, high = torch.quantile(parts[:: max(1, len(parts) // 100_000)], ends, dim=0)
    return ((parts - low) / (high - low).clamp(min=1e-6)).clamp(0, 1).view(len(tokens), *grid_size, 3).cpu()


@torch.no_grad()
def prediction_errors(
    model: IJEPA_base, images: Tensor, cfg: MaskConfig, *, samples: int = 64, generator: torch.Generator | None = None
) -> Tensor:
    """How far, on average over many masks, the predictor is from each patch's target: smooth-L1, (B, H, W).

    Args:
        model: the model.
        images: (B, C, S, S).
        cfg: how masks are drawn.
        samples: masks for each image.
        generator: source of randomness; torch's default one when None.

    Returns:
        The errors; not a number where a patch never was a target.
    """
    grid_size = model.student_encoder.token_grid(images)
    total = torch.zeros(len(images), grid_size[0] * grid_size[1])
    asked = torch.zeros_like(total)
    for _ in range(samples):
        masks = sample_block_masks(len(images), grid_size, cfg, generator)
        predictions, targets = model(images, masks)
        error = F.smooth_l1_loss(predictions.float(), targets.float(), reduction="none").mean(-1).flatten(1).cpu()  # (B, M * Nt)
        where = masks.targets.flatten(1).cpu()
        total.scatter_add_(1, where, error)
        asked.scatter_add_(1, where, torch.ones_like(error))
    return (total / asked).view(len(images), *grid_size)
