"""What happens to I-JEPA without one of its parts: the runs that notebook 06 shows, each variant with five seeds.

    python -m benchmarks.collapse run                             # 55 runs of a minute each on one core; may be stopped at any time
    python -m benchmarks.collapse run --epochs 20 --variants healthy "frozen teacher" --seeds 0 1 2
    python -m benchmarks.collapse merge                           # all of them into wejepa/assets/collapse.json

The loop and its variants are the notebook's own: the cells tagged "recorded" are executed here. Each run is one small JSON file in
benchmarks/collapse/, so that long runs can be made in parts and on several machines.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.recording import ROOT, command_line, recorded_cells, write_recording
from wejepa.devices import precision
from wejepa.files import replaced

NOTEBOOK = ROOT / "notebooks" / "06_collapse.ipynb"
RESULTS = Path(__file__).resolve().parent / "collapse"
MERGED = ROOT / "wejepa" / "assets" / "collapse.json"
SEEDS, EPOCHS = (0, 1, 2, 3, 4), 4
LONG = (0, 104, 312, 624, 936, 1248, 1560, 1872, 2184, 2496, 2808)  # steps after which a longer run is measured


def definitions(epochs: int) -> dict[str, Any]:
    """What the notebook's cells tagged "recorded" define: `run`, `measure`, `variants` and their settings."""
    return recorded_cells(NOTEBOOK, epochs=epochs, **({} if epochs == EPOCHS else {"measured_after": LONG}))


def run(args: argparse.Namespace) -> int:
    """Make the runs that are not there yet."""
    names = definitions(args.epochs)
    RESULTS.mkdir(exist_ok=True)
    for seed in args.seeds:
        for variant in args.variants or names["variants"]:
            path = RESULTS / f"{variant.replace(', ', '-').replace(' ', '_')}-{args.epochs}-{seed}.json"
            if path.exists():
                continue
            start = time.perf_counter()
            model, history, _ = names["run"](seed, **names["variants"][variant])
            student = names["measure"](model, seed, "student")
            result = {
                "variant": variant,
                "seed": seed,
                "epochs": args.epochs,
                "precision": str(precision(torch.device("cpu"), True)).removeprefix("torch."),
                "torch": torch.__version__.partition("+")[0],
                "seconds": round(time.perf_counter() - start),
                "history": [rounded(entry) for entry in history],
                "student": rounded(student),
            }
            with replaced(path) as beside:
                beside.write_text(json.dumps(result) + "\n")
            print(f"{variant}, {args.epochs} epochs, seed {seed}: {result['seconds']} s, {result['history'][-1]}", flush=True)
    return 0


def rounded(entry: dict[str, float]) -> dict[str, float | None]:
    """Five digits of each number; what is none becomes null, as JSON has no NaN."""
    return {key: None if math.isnan(value) else value if isinstance(value, int) else float(f"{value:.5g}") for key, value in entry.items()}


def merge(args: argparse.Namespace) -> int:
    """All runs that were kept, in the order of the notebook's variants, in the file that ships."""
    order = list(definitions(EPOCHS)["variants"])
    runs = [json.loads(path.read_text()) for path in RESULTS.glob("*.json")]
    runs.sort(key=lambda result: (result["epochs"], order.index(result["variant"]), result["seed"]))
    write_recording(MERGED, "benchmarks.collapse", args.machine, runs)
    return 0


def main() -> int:
    parser, runner = command_line("benchmarks.collapse", __doc__.splitlines()[0], run, merge, SEEDS)
    runner.add_argument("--variants", nargs="+", help="of those in the notebook; all by default")
    runner.add_argument("--epochs", type=int, default=EPOCHS)
    args = parser.parse_args()
    return args.function(args)


if __name__ == "__main__":
    sys.exit(main())
