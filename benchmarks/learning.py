"""What a few minutes of pretraining teach, over seeds, beside the baselines.

    python -m benchmarks.learning                         # three seeds at 1, 2, 5 and 10 minutes: about an hour and a quarter
    python -m benchmarks.learning --minutes 1 --seeds 0
    python -m benchmarks.learning --root DATA             # test on the 10,000 official images in DATA/FashionMNIST/raw

Pretraining always sees the 10,000 embedded images without their labels, and every row is judged with the labels of the first
500 of each class.
The test images are the embedded 2,000, or with --root the official 10,000. A budget in minutes is turned into epochs by timing two epochs
first, so that a busy machine makes the benchmark longer, not the runs shorter; --seconds-per-epoch takes an earlier timing instead.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from wejepa.config import IJepaConfig, default_config
from wejepa.train.callbacks import OnEpoch
from wejepa.train.finetune import FinetuneConfig, Judge, share_right, train_with_labels, untrained
from wejepa.train.loop import Pretraining

COLUMNS = ("mean", "grid", "knn")


def seconds_per_epoch(cfg: IJepaConfig) -> float:
    """The time of a whole epoch, its monitoring included, after one to warm up."""
    cfg = cfg.copy()
    cfg.optimizer.epochs = 2
    run = Pretraining(cfg, callbacks=[OnEpoch(lambda entry: times.append(time.perf_counter()))])
    times = [time.perf_counter()]
    run.run()
    return times[2] - times[1]


def table(results: dict[str, list[dict[str, float]]], tested: int) -> str:
    """Mean over the seeds, and the smallest and largest in brackets."""
    lines = [f"Test accuracy in percent over {tested:,} images: mean over the seeds (smallest to largest)", ""]
    lines += ["| | seeds | mean-pooled tokens | tokens on a 4 x 4 grid | k-NN |", "|---|---:|---:|---:|---:|"]
    for row, runs in results.items():
        cells = [str(len(runs))]
        for column in COLUMNS:
            values = [100 * run[column] for run in runs]
            cells.append(f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})")
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def merge(files: list[Path]) -> tuple[dict[str, list[dict[str, float]]], int]:
    """The rows of several runs of this benchmark, which must have been tested on as many images."""
    results: dict[str, list[dict[str, float]]] = {}
    tested = set()
    for file in files:
        found = json.loads(file.read_text())
        tested.add(found["test_images"])
        for row, runs in found["rows"].items():
            results.setdefault(row, []).extend(runs)
    if len(tested) != 1:
        raise SystemExit(f"these runs were tested on different images ({sorted(tested)}): merge those of one kind")
    return results, tested.pop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, nargs="*", default=[1, 2, 5, 10])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--root", help="folder with FashionMNIST/raw, for the official test images")
    parser.add_argument("--seconds-per-epoch", type=float, help="instead of timing it now")
    parser.add_argument("--skip-baselines", action="store_true", help="pretrain only; --merge joins it with a run that has them")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    parser.add_argument("--merge", type=Path, nargs="+", metavar="JSON", help="run nothing: print the table of these files together")
    args = parser.parse_args()
    if args.merge:
        print(table(*merge(args.merge)))
        return

    results: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        cfg = default_config()
        cfg.hardware.output_dir = folder
        pace = args.seconds_per_epoch or seconds_per_epoch(cfg)
        print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {pace:.2f} s an epoch", flush=True)
        for seed in args.seeds:
            cfg.hardware.seed = seed
            protocol, judged = FinetuneConfig(seed=seed), cfg.copy()
            if args.root:
                judged.data.dataset, judged.data.root = "fashion_mnist", args.root
            judge = Judge(protocol, judged)

            def note(row: str, scores: dict[str, float], seed: int = seed) -> None:
                results.setdefault(row, []).append(scores | {"seed": seed})
                print(f"seed {seed}  {row:<28}" + "".join(f"{100 * scores[c]:7.1f}" for c in COLUMNS), flush=True)

            if not args.skip_baselines:
                note("raw pixels", judge.pixel_scores())
                note("same encoder, random", judge.scores(untrained(cfg)))
                note("whole encoder, with labels", share_right(judge.right(train_with_labels(judge, None).encoder)))
            for minutes in args.minutes:
                cfg.optimizer.epochs = max(2, round(60 * minutes / pace))
                run = Pretraining(cfg)
                start = time.perf_counter()
                run.run()
                spent = time.perf_counter() - start
                note(f"pretrained {minutes:g} min, {cfg.optimizer.epochs} epochs", judge.scores(run.model.eval()) | {"seconds": spent})

    tested = len(judge.test_y)
    print("\n" + table(results, tested))
    if args.json:
        args.json.write_text(json.dumps({"test_images": tested, "seconds_per_epoch": pace, "rows": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
