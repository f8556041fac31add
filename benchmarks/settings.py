"""Is the probe at its minimum, and do its penalties leave out better ones? Every row of notebook 04, by the package and by scikit-learn.

    python -m benchmarks.settings

Each row gets the 5,000 labelled images of the notebook. Beside the package's accuracy stand that of 300 steps of L-BFGS for each penalty
instead of 30, and that of scikit-learn's logistic regression, run to its own end with the penalty that the package chose.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from benchmarks.evidence import images_of
from wejepa import load_pretrained
from wejepa.config import default_config
from wejepa.errors import optional
from wejepa.train import finetune
from wejepa.train.finetune import FinetuneConfig, Judge, fit_probe, untrained


def rows(judge: Judge) -> dict[str, tuple[Tensor, Tensor]]:
    """Features of the labelled and of the test images by the name of the row, (N, F) each."""
    found = {}
    for name, model in (("teacher", load_pretrained("fashion")), ("random encoder", untrained(default_config()))):
        for pooling, features in judge.features(model.encoder(), ("mean", "layers", "grid")).items():
            found[f"{name}, {pooling}"] = features
    pixels, test_pixels = (x.flatten(1) for x in images_of(judge))
    axes = torch.linalg.eigh(torch.cov(pixels.T)).eigenvectors[:, -64:]  # (pixels, 64)
    return found | {"raw pixels": (pixels, test_pixels), "64 components of the pixels": (pixels @ axes, test_pixels @ axes)}


def main() -> int:
    regression = optional("sklearn.linear_model", "scikit-learn").LogisticRegression
    cfg, steps = FinetuneConfig(), finetune.STEPS
    judge = Judge(cfg, default_config())
    y, test_y = judge.train_y, judge.test_y
    print("| row | penalty | test | 300 steps | scikit-learn |\n|---|---:|---:|---:|---:|")
    for name, (x, test_x) in rows(judge).items():
        result = fit_probe(x, y, test_x, test_y, cfg)
        finetune.STEPS = 300
        longer = fit_probe(x, y, test_x, test_y, cfg).accuracy
        finetune.STEPS = steps
        train, test, _ = finetune._along_axes(x, test_x)  # what the probe reads: standardised, which scikit-learn leaves to its caller
        theirs = regression(C=1 / result.penalty / len(y), max_iter=3000).fit(train.double(), y).score(test.double(), test_y)
        print(f"| {name} | {result.penalty:.0e} | {100 * result.accuracy:.1f} | {100 * longer:.1f} | {100 * theirs:.1f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
