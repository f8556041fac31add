"""Where an encoder looks, what its tokens have in common, what its predictor expects and finds hard. Tensors only; figures elsewhere.

Images may be on any device; what comes back is on the CPU, ready for a figure.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from wejepa.config import MaskConfig
from wejepa.errors import ConfigError
from wejepa.masking import Masks, sample_block_masks
from wejepa.model import IJEPA_base

__all__ = [
    "Hidden",
    "attention_rollout",
    "imagine",
    "mutual_matches",
    "nearest_tokens",
    "predict_hidden",
    "prediction_errors",
    "record_attention",
    "token_colours",
    "token_errors",
    "token_similarity",
]


AT_ONCE = 2**24  # similarities that are held at a time: 64 MiB


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


def token_similarity(tokens: Tensor, others: Tensor) -> Tensor:
    """Cosine similarity, (N, M), of tokens (N, D) and others (M, D), once their common mean is taken out.

    All tokens of an encoder point more or less the same way. What they share says nothing about any of them, so it goes first.

    Raises:
        ConfigError: they are not equally wide.
    """
    if tokens.dim() != 2 or others.dim() != 2 or tokens.shape[1] != others.shape[1]:
        raise ConfigError(f"tokens: give (N, D) and (M, D) of the same D, not {tuple(tokens.shape)} and {tuple(others.shape)}")
    tokens, others = tokens.float(), others.float()
    mean = (tokens.sum(0) + others.sum(0)) / (len(tokens) + len(others))
    return (F.normalize(tokens - mean, dim=1) @ F.normalize(others - mean, dim=1).T).cpu()


def mutual_matches(similarity: Tensor) -> Tensor:
    """Pairs (K, 2) of a row and a column of similarities (N, M) that are each other's most similar one, the most similar pair first."""
    columns, rows = similarity.argmax(1), similarity.argmax(0)
    mine = torch.arange(len(similarity), device=similarity.device)
    mine = mine[rows[columns] == mine]
    order = similarity[mine, columns[mine]].argsort(descending=True)
    return torch.stack([mine, columns[mine]], dim=1)[order].cpu()


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
        error = token_errors(predictions, targets).flatten(1).cpu()  # (B, M * Nt)
        where = masks.targets.flatten(1).cpu()
        total.scatter_add_(1, where, error)
        asked.scatter_add_(1, where, torch.ones_like(error))
    return (total / asked).view(len(images), *grid_size)


def token_errors(predictions: Tensor, targets: Tensor) -> Tensor:
    """The loss of each token: smooth-L1 between predictions and targets (..., D), averaged over the features: (...,)."""
    return F.smooth_l1_loss(predictions.float(), targets.float(), reduction="none").mean(-1)


class Hidden(NamedTuple):
    """What the predictor makes of the patches that the student does not see, on the CPU."""

    places: Tensor  # (Nt,) indices in raster order
    predictions: Tensor  # (Nt, D)
    targets: Tensor  # (Nt, D) the teacher's tokens, layer-normalised
    errors: Tensor  # (Nt,) smooth-L1


@torch.no_grad()
def predict_hidden(model: IJEPA_base, image: Tensor, context: Tensor) -> Hidden:
    """Show the student some patches of an image, and predict all others as one target block.

    Args:
        model: the model.
        image: (1, C, H, W), normalised, on any device.
        context: (Nc,) indices of the patches that the student sees, none or more.

    Raises:
        ConfigError: an index is not on the grid or comes twice, or nothing is left to predict.
    """
    rows, cols = model.student_encoder.token_grid(image)
    seen = torch.zeros(rows * cols, dtype=torch.bool)
    context = context.cpu().long().sort().values
    if len(context) and not 0 <= int(context[0]) <= int(context[-1]) < len(seen):
        raise ConfigError(f"context: give indices of a grid of {rows} x {cols} patches, 0 to {len(seen) - 1}")
    seen[context] = True
    if int(seen.sum()) != len(context) or bool(seen.all()):
        raise ConfigError("context: give each patch once, and leave one or more to be predicted")
    places = (~seen).nonzero()[:, 0]
    predictions, targets = (x[0, 0].float().cpu() for x in model(image, Masks(context[None], places[None, None])))
    return Hidden(places, predictions, targets, token_errors(predictions, targets))


def nearest_tokens(queries: Tensor, tokens: Tensor) -> Tensor:
    """For each of the queries (Q, D) the nearest of many tokens (M, D), by Euclidean distance: their indices (Q,), on the CPU.

    Computed where `tokens` are, as matrix products over some of the queries at a time, so that memory does not grow with Q.
    """
    tokens = tokens.float()
    half = tokens.square().sum(1) / 2
    parts = queries.to(tokens.device).float().split(max(1, AT_ONCE // len(tokens)))
    return torch.cat([(part @ tokens.T - half).argmax(1).cpu() for part in parts])


@torch.no_grad()
def imagine(model: IJEPA_base, images: Tensor, masks: Masks, gallery: Tensor, *, batch_size: int = 256) -> Tensor:
    """What the predictor expects at the targets, in pixels: there stands the patch of a real image whose token is nearest to the predicted.

    The predictor gives tokens, and nothing turns a token back into pixels. So the teacher's tokens of a gallery's patches are looked
    through, at all places, for the one that is nearest.

    Args:
        model: the model.
        images: (B, C, S, S), normalised, on any device.
        masks: their masks; where several blocks ask for one place, the mean of the predictions is taken.
        gallery: (M, C, S, S), normalised as the images; they should not be among them.
        batch_size: images of the gallery that are encoded at a time.

    Returns:
        (B, C, S, S): the context as it is, patches of the gallery at the targets, not a number elsewhere.
    """
    rows, cols = model.student_encoder.token_grid(images)
    patch = images.shape[-2] // rows
    predictions, _ = model(images, masks)
    where = masks.targets.flatten(1).cpu()[..., None]  # (B, M * Nt, 1)
    found = predictions.float().flatten(1, 2).cpu()  # (B, M * Nt, D)
    total = torch.zeros(len(images), rows * cols, found.shape[-1]).scatter_add_(1, where.expand_as(found), found)
    asked = torch.zeros(len(images), rows * cols, 1).scatter_add_(1, where, torch.ones_like(found[..., :1]))
    expected = total / asked.clamp(min=1)  # (B, N, D)

    tokens = torch.cat([model.encode(part).float().cpu() for part in gallery.split(batch_size)])  # (M, N, D)
    nearest = nearest_tokens(expected.flatten(0, 1), F.layer_norm(tokens, tokens.shape[-1:]).flatten(0, 1)).view(len(images), -1)

    own, others = (F.unfold(x.float().cpu(), patch, stride=patch).transpose(1, 2) for x in (images, gallery))  # (B, N, C * P * P)
    result = torch.where(asked > 0, others.flatten(0, 1)[nearest], torch.nan)
    context = masks.context.cpu()[..., None].expand(-1, -1, own.shape[-1])
    result.scatter_(1, context, own.gather(1, context))
    return F.fold(result.transpose(1, 2), images.shape[-2:], patch, stride=patch)
