"""Does search find the same emoji as the other vendor drew it? And what does an exact search cost?

python -m benchmarks.collection --checkpoint outputs/emoji/latest.pt   # beside the same encoder at random, and raw pixels
python -m benchmarks.collection --size 1000000 --width 64              # random numbers: seconds and memory
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.interop import memory
from wejepa.collection import CELLS, Collection
from wejepa.config import default_config
from wejepa.data import load_images
from wejepa.data.listing import Files
from wejepa.train.checkpoints import load_model
from wejepa.train.finetune import untrained


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="pretrained on emoji; without one the random encoder stands alone")
    parser.add_argument("--size", type=int, help="random images instead of emoji")
    parser.add_argument("--width", type=int, default=64, help="the encoder's, of random images")
    args = parser.parse_args()
    if args.size:
        cost(args.size, args.width)
    else:
        across_vendors(args.checkpoint)


def across_vendors(checkpoint: str | None) -> None:
    model = load_model(checkpoint) if checkpoint else None
    cfg = model.cfg if model else default_config()
    cfg.data.dataset, cfg.data.use_fake_data = "emoji", False
    if model is None:
        cfg.model.img_size, cfg.model.patch_size = 64, 8
    source = load_images(cfg, "test")
    print(f"The other vendor's drawing among the {len(source) - 1} others, in % of {len(source)} searches, with a 95 % interval:\n")
    print("| | nearest | among the nearest ten |\n|---|---:|---:|")
    for name, encoder in (("pretrained", model), ("same encoder, random", untrained(cfg))):
        for pooling in CELLS if encoder else ():
            with contextlib.redirect_stdout(io.StringIO()):
                found = Collection.build(encoder, source, pooling=pooling)
            print(row(f"{name}, {pooling}", found))
    pixels = torch.cat(list(source.batches(torch.arange(len(source)), 500)))
    print(row("raw pixels", of_numbers(pixels)))


def places(found: Collection, k: int = 10) -> Tensor:
    """For each image where the same emoji by the other vendor comes among the k nearest, from 0; k where it does not."""
    numbers = torch.arange(len(found))
    similarity, index = found.nearest(found.cells, k + 1)
    similarity[index == numbers[:, None]] = torch.inf  # first of all, also where another one is drawn alike to the pixel
    others = index.gather(1, similarity.argsort(dim=1, descending=True, stable=True))[:, 1:]
    hits = others == (numbers ^ 1)[:, None]
    return torch.where(hits.any(1), hits.int().argmax(1), k)


def row(name: str, found: Collection) -> str:
    place = places(found)
    return "| " + " | ".join([name, *(share(place < k) for k in (1, 10))]) + " |"


def share(hits: Tensor) -> str:
    """In percent, with half the width of its interval."""
    p = float(hits.double().mean())
    return f"{100 * p:.1f} ± {196 * (p * (1 - p) / len(hits)) ** 0.5:.1f}"


def of_numbers(cells: Tensor) -> Collection:
    """A collection of numbers (N, D, H, W) that no encoder made."""
    n = len(cells)
    none = torch.zeros(n, 32, dtype=torch.uint8), torch.full((n, 2), -1)
    return Collection(Files(Path(), map(str, range(n))), cells, *none, ((0.5,), (0.5,)), "none", None)


def cost(size: int, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for pooling, side in CELLS.items():
        cells = torch.empty(size, width, side, side, dtype=torch.float16)
        for part in cells.split(10_000):
            part.copy_(torch.randn(part.shape, generator=generator))
        photos = of_numbers(cells)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "photos.safetensors"
            saving = seconds(lambda photos=photos, file=file: photos.save(file))
            loading = seconds(lambda file=file: Collection.load(file))
        query = torch.randn(1, width, side, side, generator=generator)
        Path("/proc/self/clear_refs").write_text("5")  # forget the most memory so far (Linux)
        before = memory("VmRSS")
        whole, part = (searching(photos, asked) for asked in (query, query[:, :, :2, :2]))
        line = f"{pooling}: {size:,} images of {width} x {side} x {side}, {cells.nbytes / 1e9:.2f} GB; saved in {saving:.1f} s, "
        line += f"read and checked in {loading:.1f} s; a search {whole:.2f} s"
        line += f", of a part {part:.2f} s" if side > 1 else ""
        line += f"; {(memory('VmHWM') - before) / 1e6:.0f} MB of memory more"
        print(line, flush=True)


def searching(photos: Collection, query: Tensor) -> float:
    return statistics.median(seconds(lambda: photos.nearest(query, 10)) for _ in range(3))


def seconds(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
