"""What an encoder has learnt, in numbers: features, nearest neighbours, effective rank, and a picture of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from wejepa.config import IJepaConfig
from wejepa.devices import autocast
from wejepa.memory import freed_memory_kept
from wejepa.model import IJEPA_base
from wejepa.patches import POOLINGS, pool_tokens

__all__ = [
    "POOLINGS",
    "encode_images",
    "extract_backbone_features",
    "extract_tokens",
    "knn_accuracy",
    "pool_tokens",
    "rankme",
    "run_tsne_projection",
    "teacher_variance",
]


@torch.no_grad()
def extract_tokens(encode: Callable[[Tensor], Tensor], batches: Iterable[Tensor]) -> Tensor:
    """The tokens (N, P, D), float32 on the CPU, that `encode` gives for batches of images."""
    return torch.cat([encode(images).float().cpu() for images in batches])


def encode_images(model: IJEPA_base, source, index: Tensor, cfg: IJepaConfig, encoder: str = "teacher") -> Tensor:
    """Tokens (N, P, D) of images under the config's precision: computed on the model's device, float32 on the CPU."""

    def encode(images: Tensor) -> Tensor:
        with autocast(model.device, cfg.hardware.mixed_precision):
            return model.encode(images, encoder=encoder)

    with freed_memory_kept():
        return extract_tokens(encode, source.batches(index, cfg.data.eval_batch_size, model.device))


def extract_backbone_features(
    model, source, index: Tensor | None = None, *, encoder: str = "teacher", pooling: str = "mean", batch_size: int = 500
):
    """Pooled features (N, F), on the CPU, of images under a model's encoder.

    Args:
        model: an `IJEPA_base`.
        source: from `wejepa.data.load_images`.
        index: which images, all by default.
        encoder: "teacher" (as the paper evaluates) or "student".
        pooling: "mean" or "grid", see `pool_tokens`.
        batch_size: images per forward pass.
    """
    index = torch.arange(len(source)) if index is None else index
    grids = set()

    def encode(images: Tensor) -> Tensor:
        grids.add(model.encoder(encoder).token_grid(images))  # not the config's where the images are of another size
        return model.encode(images, encoder=encoder)

    tokens = extract_tokens(encode, source.batches(index, batch_size))
    return pool_tokens(tokens, grids.pop(), pooling)


def knn_accuracy(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, k: int = 20) -> float:
    """Share of test vectors whose k nearest training vectors vote for their class.

    Nearness is the cosine, and a vote weighs exp(cosine / 0.07), as in Wu et al. (2018).

    Args:
        train_x, test_x: vectors (N, F); computed where `train_x` is.
        train_y, test_y: their classes (N,).
    """
    train_y, test_x, test_y = (values.to(train_x.device) for values in (train_y, test_x, test_y))
    train_x, test_x = F.normalize(train_x.float(), dim=1), F.normalize(test_x.float(), dim=1)
    hits, classes = 0, int(train_y.max()) + 1
    for x, y in zip(test_x.split(1000), test_y.split(1000), strict=True):
        cosine, index = (x @ train_x.T).topk(min(k, len(train_x)), dim=1)
        votes = torch.zeros(len(x), classes, device=x.device).scatter_add_(1, train_y[index], (cosine / 0.07).exp())
        hits += int((votes.argmax(1) == y).sum())
    return hits / len(test_y)


def rankme(features: Tensor) -> float:
    """Effective rank of features (N, F): the exponential of the entropy of the normalised singular values (Garrido et al., 2023)."""
    s = torch.linalg.svdvals(features.float())
    p = s / s.sum().clamp(min=1e-12) + 1e-7
    return float(torch.exp(-(p * p.log()).sum()))


def teacher_variance(tokens: Tensor) -> float:
    """Variance over the batch at a fixed position of layer-normalised tokens (B, N, D), averaged over positions and features.

    Near 0 every image gives the same representation: collapse. At 1 what a token says is all content, no position.
    """
    return float(F.layer_norm(tokens.float(), tokens.shape[-1:]).var(0).mean())


def run_tsne_projection(features: Tensor, *, perplexity: float = 30.0, seed: int = 0) -> Tensor:
    """Features (N, F) on a plane, (N, 2), by t-SNE after a principal-component start (needs scikit-learn)."""
    from sklearn.manifold import TSNE

    perplexity = min(perplexity, (len(features) - 1) / 3)
    plane = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(features.float().cpu().numpy())
    return torch.from_numpy(plane)
