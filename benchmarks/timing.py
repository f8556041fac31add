"""Time several ways of doing a thing, in turn within one run.

Each contender has a process of its own, so that it has its own memory and settings, and none is warm from another's work. The parent asks
them one after the other, round by round: what else the machine does falls on all of them alike.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

# What makes a processor compute as one with AVX2 and without bfloat16 does; libraries read it as they are loaded.
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "WEJEPA_MIXED_PRECISION": "0"}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Contender:
    """A way of doing it: `make(*args)` prepares, in a process with so many threads, and returns what is timed."""

    name: str
    make: Callable[..., Callable[[], Any]]
    args: tuple = ()
    threads: int = 1


@dataclass
class Times:
    """What was measured of one contender.

    Attributes:
        seconds: of each round.
        memory: most that its process held at any time beyond what it held before `make`, in bytes.
    """

    seconds: list[float] = field(default_factory=list)
    memory: int = 0

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> tuple[float, float]:
        """The 10th and the 90th percentile."""
        ordered = sorted(self.seconds)
        return ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]


def in_turn(contenders: list[Contender], repeats: int, warmup: int = 2, clock: str = "wall") -> dict[str, Times]:
    """Time the contenders in turn, `repeats` rounds of one call each, after `warmup` calls that do not count.

    Args:
        clock: "wall"; or "cpu", the time that the process was given, for a machine that is busy with other work. With one thread only:
            threads that wait for one another take time as well.
    """
    if clock == "cpu" and any(c.threads > 1 for c in contenders):
        raise SystemExit("--clock cpu counts threads that wait: take --threads 1 with it")
    context = multiprocessing.get_context("spawn")
    workers = {}
    try:
        for contender in contenders:
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(contender, there, warmup, clock), daemon=False)  # loading has workers of its own
            # Not `torch.set_num_threads`: after it MKL opens a parallel region for every product that is inside one already. Fused
            # attention on 64 x 2 heads x 64 tokens then enters 1,025 in place of 1.
            with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": str(contender.threads)}):
                process.start()
            there.close()
            workers[contender.name] = (process, here)
            here.recv()  # one prepares after the other
        times = {name: Times() for name in workers}
        for _ in range(repeats):
            for name, (_, pipe) in workers.items():
                pipe.send(True)
                times[name].seconds.append(pipe.recv())
        for name, (_, pipe) in workers.items():
            pipe.send(False)
            times[name].memory = pipe.recv()
        return times
    finally:
        for process, _ in workers.values():
            process.kill()


def _work(contender: Contender, pipe, warmup: int, clock: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    call, now = contender.make(*contender.args), CLOCKS[clock]
    for _ in range(warmup):
        call()
    pipe.send(None)
    while pipe.recv():
        start = now()
        call()
        pipe.send(now() - start)
    pipe.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)


def matrix_products(dtype: str, size: int = 1024, count: int = 8) -> Callable[[], Any]:
    """The yardstick: `count` products of square matrices, `product_arithmetic(size, count)` operations."""
    import torch

    a, b = (torch.randn(size, size, dtype=getattr(torch, dtype)) for _ in range(2))
    return lambda: [a @ b for _ in range(count)]


def product_arithmetic(size: int = 1024, count: int = 8) -> int:
    return 2 * size**3 * count


# ---------------------------------------------------------------- telling it


def parser(description: str, repeats: int = 15) -> argparse.ArgumentParser:
    """The options that the benchmarks share."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--repeats", type=int, default=repeats, help="rounds")
    made.add_argument("--threads", type=int, default=1, help="of each contender")
    made.add_argument("--clock", choices=sorted(CLOCKS), default="wall", help="cpu: time given to the process, for a busy machine")
    made.add_argument("--avx2", action="store_true", help="compute as a processor with AVX2 and without bfloat16 does")
    made.add_argument("--json", type=Path, help="write the figures there as well")
    return made


def asked(options: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line's options; the command starts anew where its environment is not what `--threads` and `--avx2` ask for."""
    args = options.parse_args()
    wanted = {"OMP_NUM_THREADS": str(args.threads)} | (AVX2 if args.avx2 else {})
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, sys.orig_argv, os.environ | wanted)
    return args


def native_precision() -> str:
    """What matrices are multiplied in here under mixed precision: "bfloat16" or "float32"."""
    import torch

    from wejepa.devices import precision

    return str(precision(torch.device("cpu"), mixed=True)).removeprefix("torch.")


def machine() -> dict[str, Any]:
    """What it was measured on."""
    import torch

    model = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), platform.machine())
    bf16 = "bfloat16 by AMX" if torch.cpu._is_amx_tile_supported() else "bfloat16 by AVX-512"
    kind = bf16 if torch.cpu._is_avx512_bf16_supported() else "no native bfloat16"
    return {
        "processor": model,
        "matrix products": kind,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "torch": str(torch.__version__),
        "load": os.getloadavg()[0],
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, numbers to the right."""
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def milliseconds(times: Times) -> list[str]:
    """Median and spread as two cells."""
    low, high = times.spread
    return [f"{1e3 * times.median:.4g}", f"{1e3 * low:.4g} to {1e3 * high:.4g}"]


def ratio(slow: Times, fast: Times) -> float:
    """How many times as long `slow` takes: the median over the rounds, in each of which the two ran one after the other."""
    return statistics.median(s / f for s, f in zip(slow.seconds, fast.seconds, strict=True))


def tell(title: str, head: list[str], rows: list[list[str]], figures: dict[str, Any], args: argparse.Namespace) -> None:
    """Print the table, and add the figures to the JSON file under the title."""
    print(f"\n{title}\n\n{table(head, rows)}", flush=True)
    if args.json:
        found = json.loads(args.json.read_text()) if args.json.exists() else {}
        options = {k: v for k, v in vars(args).items() if k != "json"}
        found[title] = {"machine": machine(), "options": options, "figures": figures}
        args.json.write_text(json.dumps(found, indent=2, default=str) + "\n")


def plain(times: dict[str, Times]) -> dict[str, Any]:
    """As JSON holds it."""
    return {name: {"median": t.median, "spread": t.spread, "seconds": t.seconds, "memory": t.memory} for name, t in times.items()}
