"""What a torchvision backbone learns beside the plain ViT, and what it costs that a convolution cannot drop patches.

    python -m benchmarks.backbones                            # resnet18 and the plain ViT at 64 x 64: about half an hour on one core
    python -m benchmarks.backbones --backbones swin_t --epochs 2
    python -m benchmarks.backbones --masking                  # the cost of blanking patches instead of dropping them, only

Each encoder is pretrained on the embedded images, enlarged, and judged by `compare_pretrained_vs_scratch`.
"""

from __future__ import annotations

import argparse
import tempfile
import time

import torch

from wejepa.config import STAGE_WIDTHS, IJepaConfig, adapt_config_for_backbone, default_config
from wejepa.masking import sample_block_masks
from wejepa.model import IJEPA_base
from wejepa.train.callbacks import OnEpoch
from wejepa.train.finetune import FinetuneConfig, compare_pretrained_vs_scratch
from wejepa.train.loop import Pretraining

PLAIN = "plain ViT"


def config_for(name: str, img_size: int) -> IJepaConfig:
    """The default config at another image size: an 8 x 8 grid for our own ViT, what fits for a backbone."""
    cfg = default_config()
    cfg.model.img_size, cfg.model.patch_size = img_size, img_size // 8
    return cfg if name == PLAIN else adapt_config_for_backbone(cfg, name)


@torch.no_grad()
def masking_cost(name: str, img_size: int = 224, images: int = 4, repeats: int = 5) -> float:
    """Time of the student on a masked image over its time on as many pixels as the context has: what dropping patches would cost."""
    cfg = config_for(name, img_size)
    model = IJEPA_base(cfg).eval()
    x = torch.randn(images, 3, img_size, img_size)
    context = sample_block_masks(images, cfg.grid_size, cfg.mask).context
    rows = max(1, round(context.shape[1] / cfg.grid_size[1]))  # whole rows of patches, about as many as the context
    share = rows * cfg.grid_size[1] / context.shape[1]
    band = x[:, :, : rows * cfg.model.patch_size]
    whole = seconds(lambda: model.student_encoder(x, keep=context), repeats)
    return whole / (seconds(lambda: model.student_encoder(band), repeats) / share)


def seconds(run, repeats: int) -> float:
    """The fastest of some runs, after one to warm up."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", default=["resnet18", PLAIN])
    parser.add_argument("--img-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--labels", type=int, default=200, help="labelled images of each class")
    parser.add_argument("--supervised-epochs", type=int, default=10, help="of the row that is trained with labels")
    parser.add_argument("--masking", action="store_true", help="measure what blanking costs, and nothing else")
    args = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}", flush=True)
    if args.masking:
        print("| | student on blanked images over what dropping patches would cost |\n|---|---:|")
        for name in STAGE_WIDTHS:
            print(f"| {name} | {masking_cost(name):.1f} |", flush=True)
        return
    for name in args.backbones:
        cfg = config_for(name, args.img_size)
        cfg.optimizer.epochs = args.epochs
        with tempfile.TemporaryDirectory() as folder:
            cfg.hardware.output_dir = folder
            run = Pretraining(cfg, callbacks=[OnEpoch(lambda entry: print(entry, flush=True))])
            start = time.perf_counter()
            run.run()
            spent = time.perf_counter() - start
        protocol = FinetuneConfig(labels_per_class=args.labels, supervised_epochs=args.supervised_epochs)
        compared = compare_pretrained_vs_scratch(protocol, run.model.eval(), spent)
        weights = sum(p.numel() for p in run.model.student_encoder.parameters())
        print(
            f"\n{name}, {weights / 1e6:.2f} million weights, {cfg.grid_size[0]} x {cfg.grid_size[1]} tokens, {args.epochs} epochs, ", end=""
        )
        print(f"{compared.labels:,} labels, {compared.tested:,} test images\n\n{compared.table()}\n", flush=True)


if __name__ == "__main__":
    main()
