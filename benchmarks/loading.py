"""What loading costs beside a step, and how near an image folder comes to the processor's rate of decoding.

    python -m benchmarks.loading
    python -m benchmarks.loading --files 200000    # what it costs to start on so many files, and nothing else

Sets in memory: the next augmented batch beside a step of the default config. Folders: JPEG files of 500 x 375, made here from the
photograph that ships with the package, read in this process and in as many workers as there are cores, beside Pillow decoding the same
files in one process, with and without the scaling of a crop, and doing nothing else. The way to a device: what the main process does for a
batch that workers have decoded, where floats travel and where bytes do.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.step import images_of, make_step
from benchmarks.timing import Contender, asked, in_turn, milliseconds, parser, plain, ratio, tell
from wejepa.config import DataConfig, IJepaConfig, ModelConfig, default_config
from wejepa.data import IMAGENET, crop_box, example_photograph, load_images, normalise, random_crops, resample, training_batches
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
    """All batches of an epoch; the first one starts the workers."""
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


def make_old_crops(images: torch.Tensor, size: int) -> Callable[[], Any]:
    """Crops by one affine map an image, bilinear, without antialiasing: what `resample` is measured against."""
    left, top, wide, high = crop_box(usual_crops(len(images)), 1, 1).unbind(1)
    theta = torch.zeros(len(images), 2, 3)
    theta[:, 0, 0], theta[:, 0, 2], theta[:, 1, 1], theta[:, 1, 2] = wide, 2 * left + wide - 1, high, 2 * top + high - 1

    def crop() -> torch.Tensor:
        at = F.affine_grid(theta, [len(images), 1, size, size], align_corners=False)
        return F.grid_sample(normalise(images, *IMAGENET), at, mode="bilinear", padding_mode="border", align_corners=False)

    return crop


def make_crops(images: torch.Tensor, size: int) -> Callable[[], Any]:
    crops, (height, width) = usual_crops(len(images)), images.shape[-2:]
    return lambda: normalise(resample(images, crop_box(crops, width, height), crops[:, 4], size), *IMAGENET)


def usual_crops(count: int) -> torch.Tensor:
    return random_crops(count, default_config(), torch.Generator().manual_seed(0))


def make_floats() -> Callable[[], Any]:
    """A decoded batch normalised by the main process, for floats to travel."""
    pixels = torch.randint(0, 256, (256, 3, 224, 224), dtype=torch.uint8)
    return lambda: normalise(pixels, *IMAGENET)


def make_bytes() -> Callable[[], Any]:
    """A decoded batch copied, for bytes to travel."""
    pixels = torch.randint(0, 256, (256, 3, 224, 224), dtype=torch.uint8)
    return pixels.clone


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


def crops(args) -> None:
    rows, figures = [], {}
    for shape, size in (((64, 3, 32, 32), 32), ((128, 3, 96, 96), 32)):
        images = torch.randint(0, 256, shape, dtype=torch.uint8)
        contenders = [Contender("one affine map", make_old_crops, (images, size)), Contender("antialiased", make_crops, (images, size))]
        times = in_turn(contenders, 10 * args.repeats, warmup=5, clock=args.clock)
        old, new = times.values()
        name = f"{' x '.join(map(str, shape))} to {size}"
        rows.append([name, milliseconds(old)[0], *milliseconds(new), f"{ratio(new, old):.2f}"])
        figures[name] = plain(times)
    head = ["", "one affine map, median, ms", "antialiased, median, ms", "10 to 90 %, ms", "times as long"]
    tell(f"Crops of images in memory, one thread, {args.clock} time", head, rows, figures, args)


def travel(args) -> None:
    contenders = [Contender("floats, normalised here", make_floats), Contender("bytes, copied", make_bytes)]
    times = in_turn(contenders, args.repeats, clock="cpu")
    rows = [[name, *milliseconds(t)] for name, t in times.items()]
    title = "The main process's share of a batch of 256 x 3 x 224 x 224 on its way to a device, CPU time"
    tell(title, ["", "median, ms", "10 to 90 %, ms"], rows, plain(times), args)


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


def private_memory(pid: int | str = "self") -> int:
    """Bytes of a process that no other one shares."""
    lines = [line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()]
    return 1024 * sum(int(line[1]) for line in lines if line[0] in ("Private_Clean:", "Private_Dirty:"))


def start(root: str, method: str, pipe) -> None:
    """In a process of its own: list the files, start one worker, let it try a tenth of them, and tell seconds and bytes."""
    multiprocessing.set_start_method(method, force=True)
    warnings.simplefilter("ignore")
    cfg = folder_config(root, workers=1)
    cfg.data.max_unreadable_share = 1.0  # the files are empty
    gc.collect()
    before, begun = private_memory(), time.perf_counter()
    source = load_images(cfg)
    listed = time.perf_counter() - begun
    gc.collect()
    rank, begun = private_memory() - before, time.perf_counter()
    first, worker = 0.0, 0
    parts = [[(i, None) for i in part.tolist()] for part in torch.arange(0, len(source), 10).split(500)]
    for number, _ in enumerate(source.workers.load(parts)):
        first = first or time.perf_counter() - begun
        if number == len(parts) - 1:
            (child,) = multiprocessing.active_children()
            worker = private_memory(child.pid)
    pipe.send((listed, rank, first, worker))


def many_files(args) -> None:
    """The memory of a worker includes what it has whatever the files: so beside the one of a hundredth as many."""
    context, rows, figures = multiprocessing.get_context("spawn"), [], {}
    with tempfile.TemporaryDirectory() as root:
        for count in (max(1000, args.files // 100), args.files):
            for number in range(count):
                folder = Path(root, str(count), "train", f"class_{number % 100:03d}")
                if number < 100:
                    folder.mkdir(parents=True)
                (folder / f"photograph_{number:07d}.jpg").touch()
            for method in ("fork", "spawn"):
                here, there = context.Pipe()
                process = context.Process(target=start, args=(str(Path(root, str(count))), method, there))
                process.start()
                listed, rank, first, worker = figures[f"{count} {method}"] = here.recv()
                process.join()
                rows.append([f"{count:,}, {method}", f"{listed:.2f}", f"{rank / 1e6:.1f}", f"{first:.2f}", f"{worker / 1e6:.1f}"])
    head = ["files, start of the worker", "list, s", "a process, MB", "first batch, s", "its worker, MB"]
    tell("The start on a folder", head, rows, figures, args)


def main() -> None:
    options = parser(__doc__, repeats=9)
    options.add_argument("--files", type=int, default=0, help="measure the start on so many empty files instead")
    args = asked(options)
    if args.files:
        many_files(args)
        return
    in_memory(args)
    crops(args)
    travel(args)
    folders(args)


if __name__ == "__main__":
    main()
