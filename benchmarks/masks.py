"""The masks of a batch: one vectorised call, beside lightly's collator, which follows the official one.

    python -m benchmarks.masks

A round is fifty batches in a row. The collator is asked for masks alone: what stands in for the images are numbers. It cannot be asked
for the same: it is given the paper's scales, and `min_keep` low enough to come to an end on a grid of 8 x 8.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.against_peers import peer
from benchmarks.timing import Contender, asked, in_turn, milliseconds, parser, plain, ratio, tell
from wejepa.config import MaskConfig
from wejepa.masking import sample_block_masks

GRIDS, BATCHES = (8, 14), 50


def make_ours(batch: int, side: int) -> Callable[[], Any]:
    generator = torch.Generator().manual_seed(0)
    return lambda: [sample_block_masks(batch, (side, side), MaskConfig(), generator) for _ in range(BATCHES)]


def make_collator(batch: int, side: int) -> Callable[[], Any]:
    from lightly.data.ijepa_collate import IJEPAMaskCollator

    collator = IJEPAMaskCollator(
        input_size=(16 * side, 16 * side),
        patch_size=16,
        enc_mask_scale=(0.85, 1.0),
        pred_mask_scale=(0.15, 0.2),
        aspect_ratio=(0.75, 1.5),
        npred=4,
        min_keep=4,
    )
    return lambda: [collator([0] * batch) for _ in range(BATCHES)]


def main() -> None:
    options = parser(__doc__, repeats=15)
    options.add_argument("--batches", type=int, nargs="+", default=[128, 256])
    args = asked(options)
    beside = peer("lightly")
    for side in GRIDS:
        for batch in args.batches:
            contenders = [Contender("wejepa", make_ours, (batch, side), args.threads)]
            contenders += [Contender("lightly's collator", make_collator, (batch, side), args.threads)] if beside else []
            times = in_turn(contenders, args.repeats, warmup=3, clock=args.clock)
            for taken in times.values():
                taken.seconds = [seconds / BATCHES for seconds in taken.seconds]
            rows = [[name, *milliseconds(t), f"{ratio(t, times['wejepa']):.1f}"] for name, t in times.items()]
            head = ["", "median, ms", "10 to 90 %, ms", "times wejepa's"]
            tell(f"Masks for {batch} images on {side} x {side}, {args.clock} time", head, rows, plain(times), args)


if __name__ == "__main__":
    main()
