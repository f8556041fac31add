"""What a sharded run's checkpoint costs each process: memory and seconds to write it and to go on from it.

    python -m benchmarks.sharding
    python -m benchmarks.sharding --width 640 --depth 8 --ranks 2

The processes are started by torchrun on this machine's processor (gloo), take one step, write a checkpoint and end; then as many others
go on from it. Memory is the process's resident set, from /proc (Linux): its peak while a checkpoint is written beside what was held before;
and its peak from the start of Python to the run's being ready to go on, beside that of a run that starts afresh.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.timing import machine, table
from wejepa.config import DataConfig, HardwareConfig, IJepaConfig, ModelConfig, OptimizerConfig

MARK = "figures of a rank: "


def sized_config(width: int, depth: int, folder: str) -> IJepaConfig:
    """One epoch of three steps; the predictor has half the width and depth."""
    return IJepaConfig(
        data=DataConfig(use_fake_data=True, fake_data_size=24, train_batch_size=8, eval_batch_size=8),
        model=ModelConfig(
            img_size=32, patch_size=4, embed_dim=width, enc_depth=depth, pred_dim=width // 2, pred_depth=depth // 2, num_heads=width // 64
        ),
        optimizer=OptimizerConfig(epochs=1, warmup_epochs=0.5),
        hardware=HardwareConfig(device="cpu", shard_model=True, output_dir=folder),
    )


def resident(which: str) -> int:
    """This process's memory in bytes: "VmRSS" now, "VmHWM" the most since it was last forgotten."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(which))) * 1024


def rank_work(what: str, width: int, depth: int, folder: str) -> None:
    """As one of the processes: "save" or "resume" or, as its yardstick, "start"; prints its figures."""
    import torch

    from wejepa.train.loop import Pretraining

    torch.set_num_threads(1)
    cfg = sized_config(width, depth, folder)
    start = time.perf_counter()
    run = Pretraining(cfg, "auto" if what == "resume" else None)
    figures = {"seconds": time.perf_counter() - start, "peak": resident("VmHWM")}
    if what == "save":
        run.losses = [run.train_step(torch.randn(8 // run.ranks.world, 3, 32, 32))]
        run.optimizer.zero_grad()
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what the step has freed, and a checkpoint could be written in it
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak
        before, start = resident("VmRSS"), time.perf_counter()
        run.save()
        run.ranks.sum(0)
        figures = {"seconds": time.perf_counter() - start, "before": before, "peak": resident("VmHWM")}
        figures["weights"] = sum(p.numel() for p in run.model.parameters())
    print(MARK + json.dumps(figures), flush=True)
    run.ranks.leave()


def started(args: argparse.Namespace, what: str, folder: str) -> list[dict]:
    """The figures of each rank of a start."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.ranks}"]
    call = [*launcher, "-m", "benchmarks.sharding", "--work", what, str(args.width), str(args.depth), folder]
    printed = subprocess.run(call, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, stdout=subprocess.PIPE, text=True).stdout
    return [json.loads(line.partition(MARK)[2]) for line in printed.splitlines() if MARK in line]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--ranks", type=int, default=2)
    args = parser.parse_args()
    mebi, rows = 2**20, []
    with tempfile.TemporaryDirectory() as folder:
        saved = started(args, "save", folder)
        written = [path for pattern in ("step_*.pt", "step_*.pt/*") for path in Path(folder).glob(pattern)]
        on_disk = sum(path.stat().st_size for path in written if path.is_file())
        resumed = started(args, "resume", folder)
    with tempfile.TemporaryDirectory() as folder:
        fresh = started(args, "start", folder)
    beyond = [(one["peak"] - one["before"]) / mebi for one in saved]
    rows.append(["writing it", f"{max(beyond):.0f}", f"{max(one['seconds'] for one in saved):.1f}"])
    beyond = (max(one["peak"] for one in resumed) - max(one["peak"] for one in fresh)) / mebi
    seconds = max(one["seconds"] for one in resumed) - max(one["seconds"] for one in fresh)
    rows.append(["going on from it", f"{beyond:.0f}", f"{seconds:.1f}"])
    print(f"{saved[0]['weights'] / 1e6:.0f} M weights, a checkpoint of {on_disk / mebi:.0f} MiB, {args.ranks} processes, {machine()}\n")
    print(table(["each process", "memory more than without it, MiB", "seconds"], rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        rank_work(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
    else:
        main()
