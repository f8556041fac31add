"""How a step's cost grows: with the batch, the depth, the tokens, the width; and what a second process brings.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --only ranks

Starts from the 32 x 32 configuration of `benchmarks.step`, with batches of 32, and changes one thing at a time. *Exponent*: 1 where twice
the size takes twice the time. Ranks: one process with one thread, one with two, and two processes with one thread each, started by turns,
on the same whole batch, at both configurations and at the default config, which the quick tour takes. The share is that of
`benchmarks.step`, beside products that all processes of the same start do at the same time, each step's after it.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time

from benchmarks.step import CONFIGURATIONS, arithmetic, configuration, images_of, make_step
from benchmarks.timing import (
    Contender,
    Times,
    asked,
    in_turn,
    matrix_products,
    milliseconds,
    native_precision,
    parser,
    plain,
    product_arithmetic,
    ratio,
    tell,
)
from wejepa.config import IJepaConfig, default_config

SIZES = {"batch": (32, 64, 128), "depth": (3, 6, 12), "tokens": (64, 144, 256), "width": (96, 192, 384)}
TOUR = "the default config"
MARK = "seconds of each step, and of products after it: "


def sized(what: str, size: int) -> IJepaConfig:
    """The 32 x 32 configuration with one size changed; batches of 32 unless it is the batch."""
    cfg = configuration(CONFIGURATIONS[0])
    cfg.data.train_batch_size = size if what == "batch" else 32
    if what == "depth":
        cfg.model.enc_depth = size
    elif what == "width":
        cfg.model.embed_dim, cfg.model.pred_dim = size, size // 2
    elif what == "tokens":
        cfg.model.img_size = 4 * math.isqrt(size)
    return cfg


def exponent(sizes: tuple[int, ...], seconds: list[float]) -> float:
    """The power of the size with which the time grows, from the smallest to the largest."""
    return math.log(seconds[-1] / seconds[0]) / math.log(sizes[-1] / sizes[0])


def growth(what: str, args) -> None:
    contenders = [Contender(str(size), make_step, (sized(what, size),), args.threads) for size in SIZES[what]]
    times = in_turn(contenders, args.repeats, clock=args.clock)
    power = exponent(SIZES[what], [t.median for t in times.values()])
    rows = [[size, *milliseconds(t), f"{t.memory / 2**20:.0f}"] for size, t in times.items()]
    title = f"Cost against {what}, {args.threads} thread(s), {args.clock} time: exponent {power:.2f}"
    tell(title, [what, "median, ms", "10 to 90 %, ms", "memory, MiB"], rows, plain(times) | {"exponent": power}, args)


# ---------------------------------------------------------------- ranks


def config_of(name: str) -> IJepaConfig:
    cfg = default_config() if name == TOUR else configuration(name)
    cfg.hardware.device = "cpu"
    return cfg


def rank_work(name: str, steps: int) -> None:
    """As a process of a run, or alone: takes steps and products by turns and, as the first, prints their times."""
    from wejepa.memory import freed_memory_kept
    from wejepa.train.loop import Pretraining

    with tempfile.TemporaryDirectory() as folder, freed_memory_kept():
        cfg = config_of(name)
        cfg.hardware.output_dir = folder
        run = Pretraining(cfg)
        images, products = images_of(cfg).chunk(run.ranks.world)[run.ranks.rank], matrix_products(native_precision())
        seconds = []
        for _ in range(steps + 2):
            for work in (lambda: run.train_step(images), products):
                run.ranks.sum(0)  # together
                start = time.perf_counter()
                work()
                run.ranks.sum(0)
                seconds.append(time.perf_counter() - start)
        if run.ranks.first:
            print(MARK + json.dumps([seconds[4::2], seconds[5::2]]), flush=True)
        run.ranks.leave()


def started(ranks: int, threads: int, name: str, steps: int) -> tuple[list[float], list[float]]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    call = [sys.executable, *launcher, "-m", "benchmarks.scaling", "--work", name, str(steps)]
    printed = subprocess.run(call, env=environment, check=True, capture_output=True, text=True).stdout
    return json.loads(next(line for line in printed.splitlines() if line.startswith(MARK)).removeprefix(MARK))


def ranks(args) -> None:
    for name in (*CONFIGURATIONS, TOUR):
        kinds = {"one process, one thread": (1, 1), "one process, two threads": (1, 2), "two processes, one thread each": (2, 1)}
        times, shares = {kind: Times() for kind in kinds}, {kind: [] for kind in kinds}
        steps = max(3, args.repeats // 3) * (30 if name == TOUR else 1)  # a tenth of a second each, and slower until memory is warm
        for _ in range(3):
            for kind, (count, threads) in kinds.items():
                step, products = (statistics.median(taken) for taken in started(count, threads, name, steps))
                times[kind].seconds.append(step)
                shares[kind].append(arithmetic(config_of(name)) / step / (count * product_arithmetic() / products))
        one = times["one process, one thread"]
        rows = [
            [kind, *milliseconds(t), f"{ratio(one, t):.2f}", f"{100 * statistics.median(shares[kind]):.0f}"] for kind, t in times.items()
        ]
        head = ["", "median, ms", "lowest to highest, ms", "throughput", f"% of the {native_precision()} products' rate"]
        tell(f"Ranks at {name}, three starts each, wall time", head, rows, plain(times) | {"shares": shares}, args)


def main() -> None:
    options = parser(__doc__, repeats=9)
    options.add_argument("--only", choices=[*SIZES, "ranks"], nargs="+", default=[*SIZES, "ranks"])
    args = asked(options)
    for what in args.only:
        ranks(args) if what == "ranks" else growth(what, args)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        rank_work(sys.argv[2], int(sys.argv[3]))
    else:
        main()
