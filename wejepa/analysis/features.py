"""What an encoder has learnt, in numbers: features, nearest neighbours, effective rank, and a picture of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wejepa.config import IJepaConfig
from wejepa.devices import autocast
from wejepa.errors import ConfigError
from wejepa.memory import freed_memory_kept
from wejepa.model import Encoder, IJEPA_base
from wejepa.patches import POOLINGS, pool_tokens

__all__ = [
    "POOLINGS",
    "READINGS",
    "encode_images",
    "extract_backbone_features",
    "extract_tokens",
    "knn_accuracy",
    "knn_predictions",
    "pool_tokens",
    "pooled_features",
    "rankme",
    "run_tsne_projection",
    "teacher_variance",
]

# How frozen features are judged, and what tables and figures call it; the first is the standard protocol.
READINGS = {"mean": "mean-pooled tokens", "layers": "mean-pooled, all layers", "grid": "tokens on a 4 x 4 grid", "knn": "k-NN on the grid"}


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


@torch.no_grad()
def pooled_features(
    encoder: nn.Module,
    source,
    index: Tensor,
    poolings: Iterable[str] = POOLINGS,
    *,
    batch_size: int = 500,
    mixed_precision: bool = False,
) -> dict[str, Tensor]:
    """One vector an image for each pooling, (N, F): pooled where the encoder is, float32 on the CPU.

    Images are decoded and encoded once for all poolings, and no more of a batch is kept than its vectors. Always in evaluation mode.

    Args:
        encoder: `model.encoder("teacher")` or a classifier's.
        source: from `wejepa.data.load_images`.
        index: which images.
        poolings: see `pool_tokens`; or "layers", the mean over all tokens of each layer, side by side, of a transformer.
        batch_size: images per forward pass.
        mixed_precision: as `hardware.mixed_precision`.

    Raises:
        ConfigError: a pooling that is not known; "layers" of an encoder that has no such layers.
    """
    found: dict[str, list[Tensor]] = {pooling: [] for pooling in poolings}
    device, training = next(encoder.parameters()).device, encoder.training
    try:
        encoder.eval()
        with freed_memory_kept(), layer_means(encoder) if "layers" in found else contextlib.nullcontext([]) as means:
            for images in source.batches(index, batch_size, device):
                means.clear()
                with autocast(device, mixed_precision):
                    tokens = encoder(images.to(device)).float()
                for pooling, parts in found.items():
                    vectors = torch.cat(means, 1) if pooling == "layers" else pool_tokens(tokens, encoder.token_grid(images), pooling)
                    parts.append(vectors.cpu())
    finally:
        encoder.train(training)
    return {pooling: torch.cat(parts) for pooling, parts in found.items()}


@contextlib.contextmanager
def layer_means(encoder: Encoder) -> Iterator[list[Tensor]]:
    """A list to which each block of a transformer adds the mean of its tokens, (B, D) in float32, as often as it is computed."""
    if not isinstance(encoder, Encoder):
        raise ConfigError("pooling = 'layers' needs a vision transformer, whose layers have the same tokens: take 'mean' or 'grid'")
    means: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda _, __, tokens: means.append(tokens.float().mean(1))) for block in encoder.blocks]
    try:
        yield means
    finally:
        for hook in hooks:
            hook.remove()


def extract_backbone_features(
    model: IJEPA_base, source, index: Tensor | None = None, *, encoder: str = "teacher", pooling: str = "mean", batch_size: int = 500
) -> Tensor:
    """Pooled features (N, F), float32 on the CPU, of images under a model's encoder.

    Args:
        model: an `IJEPA_base`.
        source: from `wejepa.data.load_images`.
        index: which images, all by default.
        encoder: "teacher" (as the paper evaluates) or "student".
        pooling: "mean", "grid" or "layers", see `pooled_features`.
        batch_size: images per forward pass.
    """
    index = torch.arange(len(source)) if index is None else index
    return pooled_features(model.encoder(encoder), source, index, (pooling,), batch_size=batch_size)[pooling]


def knn_predictions(train_x: Tensor, train_y: Tensor, test_x: Tensor, k: int = 20) -> Tensor:
    """The class that the k nearest training vectors vote for, of each test vector: (N,), on the CPU.

    Nearness is the cosine, and a vote weighs exp(cosine / 0.07), as in Wu et al. (2018).

    Args:
        train_x, test_x: vectors (N, F); computed where `train_x` is.
        train_y: the classes (N,) of the first.
    """
    train_y, test_x = train_y.to(train_x.device), test_x.to(train_x.device)
    train_x, test_x = F.normalize(train_x.float(), dim=1), F.normalize(test_x.float(), dim=1)
    classes, found = int(train_y.max()) + 1, []
    for x in test_x.split(1000):
        cosine, index = (x @ train_x.T).topk(min(k, len(train_x)), dim=1)
        votes = torch.zeros(len(x), classes, device=x.device).scatter_add_(1, train_y[index], (cosine / 0.07).exp())
        found.append(votes.argmax(1).cpu())
    return torch.cat(found)


def knn_accuracy(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, k: int = 20) -> float:
    """Share of test vectors (N, F) whose class, of `test_y` (N,), is that of `knn_predictions`."""
    return float((knn_predictions(train_x, train_y, test_x, k) == test_y.cpu()).double().mean())


def rankme(features: Tensor) -> float:
    """Effective rank of features (N, F): the exponential of the entropy of the normalised singular values (Garrido et al., 2023)."""
    s = torch.linalg.svdvals(features.float())
    p = s / s.sum().clamp(min=1e-12) + 1e-7
    return float(torch.exp(-(p * p.log()).sum()))


def teacher_variance(tokens: Tensor) -> float:
    """Variance over the batch at a fixed position of layer-normalised tokens (B, N, D), averaged over positions and features.

    Near 0 every image gives the same representation: collapse. At 1 the mean token over the images is zero at every place.
    """
    return float(F.layer_norm(tokens.float(), tokens.shape[-1:]).var(0).mean())


def run_tsne_projection(features: Tensor, *, perplexity: float = 30.0, seed: int = 0) -> Tensor:
    """Features (N, F) on a plane, (N, 2), by t-SNE after a principal-component start (needs scikit-learn)."""
    from sklearn.manifold import TSNE

    perplexity = min(perplexity, (len(features) - 1) / 3)
    plane = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(features.float().cpu().numpy())
    return torch.from_numpy(plane)
