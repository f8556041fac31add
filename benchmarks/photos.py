"""The preset photos96 on a folder of photographs: images a second, minutes, and memory, without and with processes that decode.

    python -m benchmarks.photos                # two epochs of each run, from which the minutes of all 50 are reckoned
    python -m benchmarks.photos --epochs 50    # whole runs, about half an hour each

The photographs are made here: the emoji that ship with the package, enlarged to 256 x 256 and saved as JPEG. They stand for time and
memory, and for nothing that is learnt. Each run is a process of its own.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

RUN = """
import resource, sys, time
from wejepa.config import photos96_config
from wejepa.train.loop import Pretraining
cfg = photos96_config()
whole = cfg.optimizer.epochs
cfg.data.root, cfg.data.num_workers, cfg.hardware.output_dir = sys.argv[1], int(sys.argv[2]), sys.argv[3]
cfg.hardware.mixed_precision, cfg.optimizer.epochs = sys.argv[4] == "bfloat16", int(sys.argv[5])
cfg.optimizer.warmup_epochs = min(cfg.optimizer.warmup_epochs, cfg.optimizer.epochs)
run = Pretraining(cfg)
begun = time.perf_counter()
run.run()
seconds = time.perf_counter() - begun
rate = sum(e["images_per_second"] for e in run.history) / len(run.history)
own, child = (resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
minutes, child = seconds / 60 / cfg.optimizer.epochs * whole, f"{child:.0f}" if cfg.data.num_workers else ""
print(f"| {sys.argv[4]} | {sys.argv[2]} | {len(run.source)} | {rate:.0f} | {minutes:.0f} | {own:.0f} | {child} |")
"""


def make_photographs(folder: Path, images: int, size: int = 256) -> None:
    """An image folder with the emoji's nine classes, some emoji more than once."""
    import numpy as np
    from PIL import Image

    from wejepa.data.embedded import emoji_images

    pixels, labels, classes = emoji_images("train")
    step = max(1, len(pixels) // images)  # neighbours are of one class
    for i in range(images):
        at = i * step % len(pixels)
        path = folder / "train" / classes[labels[at]] / f"{i:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(np.ascontiguousarray(pixels[at].permute(1, 2, 0).numpy()))
        picture.resize((size, size), Image.Resampling.BICUBIC).save(path, quality=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=2, help="epochs of each run")
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--precision", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16", "float32"])
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 2], help="processes that decode")
    args = parser.parse_args()
    environment = {"GOMP_SPINCOUNT": "1000", **os.environ, "TQDM_DISABLE": "1"}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_photographs(folder / "images", args.images)
        print("| precision | workers | images | images/s | minutes for the preset's epochs | memory, MiB | of the largest worker |")
        print("|---|---:|---:|---:|---:|---:|---:|", flush=True)
        for precision in args.precision:
            for workers in args.workers:
                output = folder / f"{precision}-{workers}"
                command = [sys.executable, "-c", RUN, folder / "images", str(workers), output, precision, str(args.epochs)]
                lines = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.splitlines()
                print(lines[-1], flush=True)


if __name__ == "__main__":
    main()
