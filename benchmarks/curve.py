"""How fast the quick tour's result comes: probe accuracy over seconds, of this checkout and another one, in turn in one run.

    git worktree add /tmp/before COMMIT
    python -m benchmarks.curve --before /tmp/before

Each run is a process with one checkout's package; they take turns, an epoch each. Only pretraining is timed, its monitoring included, the
probes are not. A third row is this checkout in float32: where bfloat16 ends beside it.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve().parent.parent


def work(seed: int, epochs: int, every: int, clock: str, bfloat16: bool) -> None:
    """One run, an epoch for each line on standard input: prints the seconds so far and, every so many epochs, the probe's accuracy."""

    from wejepa.analysis.features import pool_tokens
    from wejepa.config import default_config
    from wejepa.train.finetune import FinetuneConfig, Judge, fit_probe
    from wejepa.train.loop import Pretraining

    now = {"wall": time.perf_counter, "cpu": time.process_time}[clock]
    cfg = default_config()
    cfg.optimizer.epochs, cfg.hardware.seed, cfg.hardware.mixed_precision = epochs, seed, bfloat16
    with tempfile.TemporaryDirectory() as folder:
        cfg.hardware.output_dir = folder
        protocol = FinetuneConfig(seed=seed)
        run, judge = Pretraining(cfg), Judge(protocol, cfg)
        spent, start = 0.0, 0.0

        def report(entry: dict) -> None:
            nonlocal spent, start
            spent += now() - start
            point = {"seconds": spent, "epoch": entry["epoch"]}
            if entry["epoch"] % every == 0:
                train, test = (pool_tokens(tokens, cfg.grid_size, "mean") for tokens in judge.tokens(run.model))
                point["mean"] = fit_probe(train, judge.train_y, test, judge.test_y, protocol).accuracy
            print(json.dumps(point), flush=True)
            sys.stdin.readline()
            start = now()

        sys.stdin.readline()
        start = now()
        if hasattr(run, "callbacks"):
            run.callbacks.append(SimpleNamespace(on_step=lambda *_: None, on_epoch=report))
            run.run()
        else:  # a checkout from before there were callbacks
            run.run(report)


def runs(checkouts: dict[str, tuple[Path, bool]], seed: int, args) -> dict[str, list[dict[str, float]]]:
    """The points of each checkout's curve for one seed: dicts of seconds, epoch and mean, the accuracy on averaged tokens."""
    workers, curves = {}, {name: [] for name in checkouts}
    for name, (path, bfloat16) in checkouts.items():
        call = json.dumps([seed, args.epochs, args.every, args.clock, bfloat16])
        environment = os.environ | {"PYTHONPATH": str(path), "TQDM_DISABLE": "1", "OMP_NUM_THREADS": str(args.threads)}
        workers[name] = subprocess.Popen(
            [sys.executable, __file__, call], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
    try:
        for _ in range(args.epochs):
            for name, worker in workers.items():
                print("go", file=worker.stdin, flush=True)
                point = json.loads(worker.stdout.readline())
                if "mean" in point:
                    curves[name].append(point)
        return curves
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()


def seconds_to(curve: list[dict[str, float]], accuracy: float) -> float:
    """When a curve first reaches an accuracy, on the straight line between its points; not a number where it never does."""
    before = None
    for point in curve:
        if point["mean"] >= accuracy:
            if before is None:
                return point["seconds"]
            share = (accuracy - before["mean"]) / (point["mean"] - before["mean"])
            return before["seconds"] + share * (point["seconds"] - before["seconds"])
        before = point
    return float("nan")


def averaged(curves: list[list[dict[str, float]]]) -> list[dict[str, float]]:
    """The mean of several seeds' curves, point by point."""
    return [{key: statistics.mean(p[key] for p in points) for key in points[0]} for points in zip(*curves, strict=True)]


def main() -> None:
    from benchmarks.timing import asked, parser, tell

    options = parser(__doc__)
    options.add_argument("--before", type=Path, required=True, help="the other checkout")
    options.add_argument("--epochs", type=int, default=30)
    options.add_argument("--every", type=int, default=5, help="epochs between probes")
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = asked(options)
    checkouts = {"before": (args.before, True), "now": (HERE, True), "now, float32": (HERE, False)}
    curves: dict[str, list] = {name: [] for name in checkouts}
    for seed in args.seeds:
        for name, curve in runs(checkouts, seed, args).items():
            curves[name].append(curve)
            print(f"seed {seed}  {name:<14}" + "".join(f"  {p['seconds']:.0f} s {100 * p['mean']:.1f}" for p in curve), flush=True)
    rows = []
    for name, seeds in curves.items():
        for point in averaged(seeds):
            ends = [100 * p["mean"] for curve in seeds for p in curve if p["epoch"] == point["epoch"]]
            spread = f"{100 * point['mean']:.1f} ({min(ends):.1f} to {max(ends):.1f})"
            rows.append([name, f"{point['epoch']:.0f}", f"{point['seconds']:.0f}", spread])
    title = f"Probe accuracy over seconds of pretraining, {len(args.seeds)} seeds, {args.threads} thread(s), {args.clock} time"
    tell(title, ["", "epoch", "seconds", "mean-pooled tokens, %"], rows, curves, args)
    old, new = averaged(curves["before"]), averaged(curves["now"])
    print(f"\nThe same epochs: {old[-1]['seconds'] / new[-1]['seconds']:.2f} times as fast")
    ended = old[-1]["mean"]  # on a curve that is flat by then, the first time there is mostly chance: for both alike
    first, now = seconds_to(old, ended), seconds_to(new, ended)
    print(f"{100 * ended:.1f} %, where it ended before, was first reached after {first:.0f} s before and {now:.0f} s now")


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1].startswith("["):
        work(*json.loads(sys.argv[1]))
    else:
        main()
