"""What loading costs beside a step, and how near an image folder comes to the processor's rate of decoding.

    python -m benchmarks.loading

Sets in memory: the next augmented batch beside a step of the default config. Folders: JPEG files of 500 x 375, made here from the
photograph that ships with the package, read in this process and in as many workers as there are cores, beside Pillow decoding the same
files in one process, with and without the scaling of a crop, and doing nothing else.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.step import images_of, make_step
from benchmarks.timing import Contender, in_turn, milliseconds, parser, plain, tell
from wejepa.config import DataConfig, IJepaConfig, ModelConfig, default_config
from wejepa.data import example_photograph, load_images, training_batches
from wejepa.memory import freed_memory_kept

FILES, BATCH = 1024, 64


def make_batches(cfg: IJepaConfig) -> Callable[[], Any]:
    """The next augmented batch, epoch after epoch."""
    source = load_images(cfg, "train")

    def endless():
        epoch = 0
        while True:
            yield from training_batches(source, cfg, epoch)
            epoch += 1

    batches = endless()
    return lambda: next(batches)


def make_epoch(cfg: IJepaConfig) -> Callable[[], Any]:
    """All batches of an epoch, the start of the workers included."""
    multiprocessing.set_start_method("fork", force=True)  # as on Linux by default; this process itself was spawned
    source, kept = load_images(cfg, "train"), freed_memory_kept()  # as in training
    kept.__enter__()
    return lambda kept=kept: sum(1 for _ in training_batches(source, cfg, 0))


def make_decoding(root: str, size: int, scaled: bool) -> Callable[[], Any]:
    """Pillow alone, at the same reduced scale for which the loader asks; with a crop of the usual area scaled to a square, or not."""
    from PIL import Image

    files = sorted(Path(root).rglob("*.jpg"))

    def decode() -> None:
        for file in files:
            with Image.open(file) as image:
                image.draft(None, (2 * size, 2 * size))
                image.load()
                if scaled:
                    side, box = 0.65**0.5, (0.1, 0.1)  # the mean of the crops' areas
                    corners = [share * length for share, length in zip((*box, *(b + side for b in box)), 2 * image.size, strict=True)]
                    image.resize((size, size), Image.Resampling.BILINEAR, box=corners, reducing_gap=2.0)

    return decode


def write_folder(root: Path) -> None:
    """Photographs in two classes, each a little different from the others."""
    from PIL import Image

    picture = Image.fromarray(example_photograph().permute(1, 2, 0).numpy()).resize((500, 375))
    for i in range(FILES):
        folder = root / "train" / f"class {i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        picture.rotate(i).save(folder / f"{i:04d}.jpg", quality=90)


def folder_config(root: str, workers: int) -> IJepaConfig:
    data = DataConfig(dataset="imagefolder", root=root, train_batch_size=BATCH, num_workers=workers, crop_scale=(0.3, 1.0))
    return IJepaConfig(data=data, model=ModelConfig(img_size=224, patch_size=16))


def in_memory(args) -> None:
    plain_cfg, colour = default_config(), default_config()
    plain_cfg.hardware.output_dir = colour.hardware.output_dir = "outputs/benchmark"
    colour.data.use_fake_data, colour.data.fake_data_size = True, 10_000  # what CIFAR-10 is, in memory
    contenders = [
        Contender("a step", make_step, (plain_cfg,), args.threads),
        Contender("batch of fashion_mnist_mini", make_batches, (plain_cfg,), args.threads),
        Contender("batch of 32 x 32 in colour", make_batches, (colour,), args.threads),
    ]
    times = in_turn(contenders, 10 * args.repeats, warmup=5, clock=args.clock)
    step = times["a step"].median
    rows = [[name, *milliseconds(t), f"{100 * t.median / step:.1f}"] for name, t in times.items()]
    size = images_of(plain_cfg).shape[0]
    head = ["", "median, ms", "10 to 90 %, ms", "% of a step"]
    tell(f"Loading a batch of {size}, {args.threads} thread(s), {args.clock} time", head, rows, plain(times), args)


def folders(args) -> None:
    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as root:
        write_folder(Path(root))
        contenders = [
            Contender("Pillow alone, decoding", make_decoding, (root, 224, False)),
            Contender("Pillow alone, decoding and scaling", make_decoding, (root, 224, True)),
            Contender("ours, no workers", make_epoch, (folder_config(root, 0),)),
            Contender(f"ours, {cores} workers", make_epoch, (folder_config(root, cores),)),
        ]
        times = in_turn(contenders, args.repeats, warmup=1)
    alone = times["Pillow alone, decoding and scaling"].median
    rows = [[name, *milliseconds(t), f"{FILES / t.median:.0f}", f"{alone / t.median:.2f}"] for name, t in times.items()]
    head = ["", "median, ms", "10 to 90 %, ms", "images/s", "times Pillow's rate with scaling, on one core"]
    tell(f"{FILES} JPEG files of 500 x 375, wall time", head, rows, plain(times), args)


def main() -> None:
    args = parser(__doc__, repeats=9).parse_args()
    torch.set_num_threads(args.threads)
    in_memory(args)
    folders(args)


if __name__ == "__main__":
    main()
