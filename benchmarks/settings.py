"""Do the probe's six pairs of learning rate and weight decay leave out better ones? 35 pairs for every row of notebook 04.

    python -m benchmarks.settings

Each row gets the 5,000 labelled images of the notebook. A fifth of them is held out and chooses, as in the package; then the test images.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from benchmarks.evidence import images_of
from wejepa import load_pretrained
from wejepa.config import default_config
from wejepa.seeds import generator_for
from wejepa.train.finetune import LEARNING_RATES, WEIGHT_DECAYS, FinetuneConfig, Judge, _softmax_regressions, untrained

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 1.0)
DECAYS = (0.0, 1e-3, 1e-2, 3e-2, 1e-1)
PAIRS = [(rate, decay) for rate in RATES for decay in DECAYS]


def rows(judge: Judge) -> dict[str, tuple[Tensor, Tensor]]:
    """Features of the labelled and of the test images by the name of the row, (N, F) each."""
    found = {}
    for name, model in (("teacher", load_pretrained("fashion")), ("random encoder", untrained(default_config()))):
        for pooling, features in judge.features(model.encoder(), ("mean", "grid")).items():
            found[f"{name}, {pooling}"] = features
    pixels, test_pixels = (x.flatten(1) for x in images_of(judge))
    axes = torch.linalg.eigh(torch.cov(pixels.T)).eigenvectors[:, -64:]  # (pixels, 64)
    return found | {"raw pixels": (pixels, test_pixels), "64 components of the pixels": (pixels @ axes, test_pixels @ axes)}


def accuracies(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], classes: int, cfg: FinetuneConfig
) -> dict[tuple[float, float], float]:
    """For every pair the share of test images that its probe classifies rightly, in percent."""
    predicted = _softmax_regressions(*train, test[0], classes, PAIRS, cfg)  # (pairs, N_test)
    return dict(zip(PAIRS, (100 * (predicted == test[1]).double().mean(1)).tolist(), strict=True))


def main() -> int:
    cfg = FinetuneConfig()
    judge = Judge(cfg, default_config())
    y, classes = judge.train_y, len(judge.train.classes)
    order = torch.randperm(len(y), generator=generator_for(cfg.seed))
    held, kept = order[: len(y) // 5], order[len(y) // 5 :]
    own = [pair for pair in PAIRS if pair[0] in LEARNING_RATES and pair[1] in WEIGHT_DECAYS]
    print("| row | the package's pair | held out | test | best of all | held out | test |\n|---|---|---:|---:|---|---:|---:|")
    for name, (x, test_x) in rows(judge).items():
        chosen = accuracies((x[kept], y[kept]), (x[held], y[held]), classes, cfg)
        tested = accuracies((x, y), (test_x, judge.test_y), classes, cfg)
        cells = [name]
        for pairs in (own, PAIRS):
            best = max(pairs, key=chosen.get)
            cells += [f"{best[0]:g}, {best[1]:g}", f"{chosen[best]:.1f}", f"{tested[best]:.1f}"]
        print(f"| {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
