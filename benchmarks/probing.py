"""What judging an encoder costs: the features of 10,000 images, extracted once, and the linear probe and nearest neighbours on them.

python -m benchmarks.probing
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.timing import Contender, asked, in_turn, milliseconds, parser, plain, tell
from wejepa.analysis.features import encode_images, knn_accuracy, pool_tokens
from wejepa.config import default_config
from wejepa.data import load_images
from wejepa.train.finetune import FinetuneConfig, fit_probe, untrained


def make_extraction(bfloat16: bool) -> Callable[[], Any]:
    cfg = default_config()
    cfg.hardware.mixed_precision = bfloat16
    model, source = untrained(cfg), load_images(cfg, "train")
    return lambda: encode_images(model, source, torch.arange(len(source)), cfg)


def make_judgement(kind: str) -> Callable[[], Any]:
    """On features that are at hand: of all training images and all test images."""
    cfg = default_config()
    model, sources = untrained(cfg), [load_images(cfg, split) for split in ("train", "test")]
    tokens = [encode_images(model, source, torch.arange(len(source)), cfg) for source in sources]
    train, test = (pool_tokens(t, cfg.grid_size, "mean" if kind == "mean" else "grid") for t in tokens)
    data = (train, sources[0].labels, test, sources[1].labels)
    if kind == "neighbours":
        return lambda: knn_accuracy(*data)
    return lambda: fit_probe(*data, FinetuneConfig())


def main() -> None:
    args = asked(parser(__doc__, repeats=5))
    contenders = [
        Contender("features in bfloat16", make_extraction, (True,), args.threads),
        Contender("features in float32", make_extraction, (False,), args.threads),
        Contender("probe on averaged tokens", make_judgement, ("mean",), args.threads),
        Contender("probe on the grid", make_judgement, ("grid",), args.threads),
        Contender("nearest neighbours", make_judgement, ("neighbours",), args.threads),
    ]
    times = in_turn(contenders, args.repeats, warmup=1, clock=args.clock)
    title = f"Judging on 10,000 images, {args.threads} thread(s), {args.clock} time"
    tell(title, ["", "median, ms", "10 to 90 %, ms"], [[name, *milliseconds(t)] for name, t in times.items()], plain(times), args)


if __name__ == "__main__":
    main()
