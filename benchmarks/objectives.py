"""What would have been better than I-JEPA? The runs that notebook 09 shows: eight objectives, for the same seconds of one core.

    python -m benchmarks.objectives calibrate             # milliseconds a step of each objective, in turn; on a quiet machine
    python -m benchmarks.objectives run                   # whatever is not there yet; may be stopped at any time
    python -m benchmarks.objectives run --seeds 0 1 2 --only trials main
    python -m benchmarks.objectives merge                 # all of them into wejepa/assets/objectives.json

The objectives and the loop are the notebook's own: the cells tagged "recorded" are executed here. Each objective gets as many steps as
cost what BUDGET steps of I-JEPA cost by the calibration, so a run is a function of its seed, whatever else the machine does meanwhile. Each
objective's rate is chosen among RATES before, for both sets by trials on the first: half the steps, one seed, trained on four fifths of
the *training* images, judged on the last fifth. A run is one small JSON file in benchmarks/objectives/.
"""

from __future__ import annotations

import argparse
import ast
import functools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import torch
from torch import Tensor, nn

from benchmarks import evidence
from benchmarks.recording import ROOT, command_line, recorded_cells, write_recording
from wejepa.data import MemoryImages
from wejepa.devices import precision
from wejepa.files import replaced
from wejepa.masking import Masks
from wejepa.seeds import generator_for
from wejepa.train.finetune import FinetuneConfig, Judge, untrained

NOTEBOOK, MASKS_NOTEBOOK = (ROOT / "notebooks" / f"{name}.ipynb" for name in ("09_other_objectives", "02_mask_sampling"))
RESULTS = Path(__file__).resolve().parent / "objectives"
MERGED = ROOT / "wejepa" / "assets" / "objectives.json"
CALIBRATION = RESULTS / "calibration.json"
SETS, SEEDS, PARTS = ("fashion_mnist_mini", "emoji"), (0, 1, 2, 3, 4), ("trials", "main", "ablations", "longer", "references")
BUDGET = 400  # steps of I-JEPA
LONGER, LONGER_OBJECTIVES = 4, ("I-JEPA", "MAE", "SimCLR")  # times as many steps, for some of them
RATES = (3.75e-4, 7.5e-4, 1.5e-3, 3e-3, 6e-3)
DRAWS = {50: 3, 500: 1}  # draws of so many labelled images of each class; emoji's classes have 136 to 618
SOME_LABELS = 200  # of each class, for the trials and for readings on the way


@functools.cache
def definitions(dataset: str) -> dict[str, Any]:
    """What the notebook's cells tagged "recorded" define on a set: `objectives`, `descend`, `run`, `quick_reading`, `judged`."""
    return recorded_cells(NOTEBOOK, dataset=dataset)


# ---------------------------------------------------------------- the same seconds


def calibrate(args: argparse.Namespace) -> int:
    """Milliseconds a step of every objective and set: the best of some rounds, in each of which all take turns in one process."""
    rounds, steps, times = 9, 5, {}
    for dataset in SETS:
        names = definitions(dataset)
        runs = {name: names["descend"](kind, 0, 10**6, RATES[0], names["images"]) for name, kind in names["objectives"].items()}
        spent: dict[str, list[float]] = {name: [] for name in runs}
        for i in range(rounds + 1):
            for name, steps_of in runs.items():
                start = time.perf_counter()
                for _ in range(steps):
                    next(steps_of)
                if i:  # the first round warms up
                    spent[name].append(1000 * (time.perf_counter() - start) / steps)
        times[dataset] = {name: round(min(values), 2) for name, values in spent.items()}
        print(dataset, {name: (times[dataset][name], round(statistics.median(v), 2)) for name, v in spent.items()}, flush=True)
    RESULTS.mkdir(exist_ok=True)
    CALIBRATION.write_text(json.dumps({"rounds": rounds, "steps": steps, "milliseconds": times} | machine()) + "\n")
    return 0


def machine() -> dict[str, Any]:
    return {
        "precision": str(precision(torch.device("cpu"), True)).removeprefix("torch."),
        "torch": torch.__version__.partition("+")[0],
        "threads": torch.get_num_threads(),
    }


def steps_of(dataset: str, objective: str) -> int:
    """How many steps of an objective cost what BUDGET steps of I-JEPA cost."""
    times = json.loads(CALIBRATION.read_text())["milliseconds"][dataset]
    return round(BUDGET * times["I-JEPA"] / times[objective])


# ---------------------------------------------------------------- judged


@functools.cache
def judge_of(dataset: str, labels: int = 0) -> Judge:
    """The protocol on the test images, with so many labelled images of each class; 0 for all."""
    return Judge(FinetuneConfig(labels_per_class=labels), definitions(dataset)["cfg"])


def part_of(source: MemoryImages, index: Tensor) -> MemoryImages:
    options = {name: getattr(source, name) for name in ("img_size", "in_chans", "mean", "std")}
    return MemoryImages(source.images[index], source.labels[index], source.classes, **options)


def judge_of_trials(dataset: str) -> Judge:
    """The same protocol on training images alone: a fifth of them takes the place of the test images."""
    judge = Judge(FinetuneConfig(labels_per_class=SOME_LABELS), definitions(dataset)["cfg"])
    order = torch.randperm(len(judge.train), generator=generator_for(0, 9))
    held, kept = order[: len(order) // 5].sort().values, order[len(order) // 5 :].sort().values
    judge.train, judge.test = part_of(judge.train, kept), part_of(judge.train, held)
    judge.draw_labels(0)
    judge.test_index, judge.test_y = torch.arange(len(judge.test)), judge.test.labels
    return judge


def right_of(encoder: nn.Module, dataset: str) -> dict[str, dict[str, str]]:
    """For each "labels/draw" and reading, which test images are classified rightly, as `benchmarks.evidence` keeps it."""
    return judged(lambda judge, seed: judge.features(encoder, ("mean", "grid")), dataset, 0)


def judged(features: Callable[[Judge, int], evidence.Features], dataset: str, seed: int) -> dict[str, dict[str, str]]:
    """`features` is asked for each number of labels anew: which images the judge has labelled differs."""
    row, found = evidence.Row("", features), {}
    for labels, draws in DRAWS.items():
        found |= evidence.judged(row, judge_of(dataset), seed, (labels,), draws)
    return found


def encoders_of(objective: nn.Module) -> dict[str, nn.Module]:
    """What is judged of a trained objective: its encoder, and the teacher where there is one."""
    found = {"student": objective.encoder}
    return found | ({"teacher": objective.teacher} if hasattr(objective, "teacher") else {})


# ---------------------------------------------------------------- the runs

Result = dict[str, Any]


def trial(objective: str, rate: float) -> Result:
    """Half the steps on four fifths of the training images of the first set; accuracy on the fifth."""
    dataset = SETS[0]
    names, judge = definitions(dataset), judge_of_trials(dataset)
    *_, (model, _, loss) = names["descend"](names["objectives"][objective], 0, steps_of(dataset, objective) // 2, rate, judge.train)
    scores = {name: share(judge.right(encoder)) for name, encoder in encoders_of(model).items()}
    return {"kind": "trial", "set": dataset, "objective": objective, "rate": rate, "loss": loss, "scores": scores}


def share(right: dict[str, Tensor]) -> dict[str, float]:
    return {name: round(float(values.double().mean()), 4) for name, values in right.items() if name != "layers"}


def chosen_rate(objective: str) -> float:
    """The rate whose encoder was the best on average over the three readings; of student and teacher, the better one."""
    found = [json.loads(trial_file(objective, rate).read_text()) for rate in RATES]
    return max(found, key=lambda result: max(statistics.mean(scores.values()) for scores in result["scores"].values()))["rate"]


def trained(dataset: str, objective: str, kind: type, seed: int, encoders: tuple[str, ...], settings: Any = None, times: int = 1) -> Result:
    """A whole run at the chosen rate; judged on the way, and at its end those of its encoders that are named."""
    names = definitions(dataset)
    steps, rate = times * steps_of(dataset, objective), chosen_rate(objective)
    options = {} if settings is None else {"settings": settings}
    model, history = names["run"](kind, seed, steps, rate, names["images"], judge_of(dataset, SOME_LABELS), **options)
    right = {name: right_of(encoder, dataset) for name, encoder in encoders_of(model).items() if name in encoders}
    return {"set": dataset, "objective": objective, "seed": seed, "steps": steps, "rate": rate, "history": history, "right": right}


def main_run(dataset: str, objective: str, seed: int) -> Result:
    kind = definitions(dataset)["objectives"][objective]
    return {"kind": "main"} | trained(dataset, objective, kind, seed, ("student", "teacher"))


def longer_run(objective: str, seed: int) -> Result:
    """The same on the first set, for more steps."""
    kind = definitions(SETS[0])["objectives"][objective]
    return {"kind": "longer"} | trained(SETS[0], objective, kind, seed, ("student", "teacher"), times=LONGER)


def random_patches(batch_size: int, grid_size: tuple[int, int], cfg: Any, generator: torch.Generator) -> Masks:
    """As many single patches as context and as targets, 60 % of the grid, at random."""
    count = grid_size[0] * grid_size[1]
    order = torch.rand(batch_size, count, generator=generator).argsort(1)
    asked, shown = round(0.6 * count), cfg.num_context_patches(grid_size)
    return Masks(order[:, asked : asked + shown].sort(1).values, order[:, :asked].sort(1).values[:, None])


def published_masks() -> Callable[..., Masks]:
    """The published sampler, as notebook 02 writes it down."""
    cells = [cell.source for cell in nbformat.read(MASKS_NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    (published,) = [
        node for cell in cells for node in ast.parse(cell).body if isinstance(node, ast.FunctionDef) and node.name == "published"
    ]
    names = {"torch": torch, "math": math, "Masks": Masks}
    exec(compile(ast.Module([published], []), str(MASKS_NOTEBOOK), "exec"), names)
    return lambda batch_size, grid_size, cfg, generator: names["published"](batch_size, cfg, generator, grid=grid_size)


def one_block(mask: Any) -> None:
    mask.num_target_blocks, mask.target_scale = 1, (0.6, 0.6)


def context(share_seen: float) -> Callable[[Any], None]:
    return lambda mask: setattr(mask, "context_share", share_seen)


# By name: what the class of I-JEPA gets instead, and how its mask settings are changed.
ABLATIONS: dict[str, tuple[dict[str, Any], Callable[[Any], None]]] = {
    "published sampler": ({"sample_masks": lambda: staticmethod(published_masks())}, lambda mask: None),
    "one large block": ({}, one_block),
    "random patches": ({"sample_masks": lambda: staticmethod(random_patches)}, lambda mask: None),
    "context 0.2": ({}, context(0.2)),
    "context 0.5": ({}, context(0.5)),
    "no crops": ({"crop_scale": lambda: (1.0, 1.0)}, lambda mask: None),
    "crops from 0.3": ({"crop_scale": lambda: (0.3, 1.0)}, lambda mask: None),
}


def ablation(variant: str, seed: int) -> Result:
    """I-JEPA on Fashion-MNIST with one thing changed, for as many steps and at the same rate."""
    dataset = SETS[0]
    names = definitions(dataset)
    changed, change_masks = ABLATIONS[variant]
    kind = type("Changed", (names["objectives"]["I-JEPA"],), {name: make() for name, make in changed.items()})
    settings = names["cfg"].copy()
    change_masks(settings.mask)
    return {"kind": "ablation", "variant": variant} | trained(dataset, "I-JEPA", kind, seed, ("teacher",), settings)


def reference(dataset: str, row: str, seed: int) -> Result:
    """What was not trained: the encoder as it begins, pixels, or k-means of patches."""
    if row == "random":
        cfg = definitions(dataset)["cfg"].copy()
        cfg.hardware.seed = seed
        right = right_of(untrained(cfg).teacher_encoder, dataset)
    else:
        features = {"raw pixels": evidence.pixels, "k-means of patches": evidence.k_means_patches}[row]
        right = judged(features, dataset, seed)
    return {"kind": "reference", "set": dataset, "row": row, "seed": seed, "right": {"student": right}}


def trial_file(objective: str, rate: float) -> Path:
    return RESULTS / f"trial-{objective}-{rate:g}.json"


Run = tuple[str, Path, Callable[[], Result]]


def queue(seeds: tuple[int, ...]) -> Iterator[Run]:
    """All runs: which part they belong to, their file, and what makes them; useful wherever it is cut."""
    first, later = seeds[:3], seeds[3:]
    for objective in definitions(SETS[0])["objectives"]:
        for rate in RATES:
            yield "trials", trial_file(objective, rate), functools.partial(trial, objective, rate)
    for dataset in SETS:
        yield from main_runs(dataset, first[0])
        for row in ("random", "raw pixels", "k-means of patches"):
            for seed in seeds if row == "random" else first[:1]:
                file = RESULTS / f"reference-{dataset}-{row.replace(' ', '-')}-{seed}.json"
                yield "references", file, functools.partial(reference, dataset, row, seed)
        for seed in first[1:]:
            yield from main_runs(dataset, seed)
    for seed in first:
        for variant in ABLATIONS:
            file = RESULTS / f"ablation-{variant.replace(' ', '-')}-{seed}.json"
            yield "ablations", file, functools.partial(ablation, variant, seed)
        for objective in LONGER_OBJECTIVES:
            yield "longer", RESULTS / f"longer-{objective}-{seed}.json", functools.partial(longer_run, objective, seed)
    for seed in later:
        for dataset in SETS:
            yield from main_runs(dataset, seed)


def main_runs(dataset: str, seed: int) -> Iterator[Run]:
    for objective in definitions(dataset)["objectives"]:
        file = RESULTS / f"main-{dataset}-{objective}-{seed}.json"
        yield "main", file, functools.partial(main_run, dataset, objective, seed)


def run(args: argparse.Namespace) -> int:
    """Make the runs that are not there yet."""
    torch.set_num_threads(1)
    RESULTS.mkdir(exist_ok=True)
    for part, path, make in queue(tuple(args.seeds)):
        if part not in args.only or path.exists():
            continue
        start, cpu = time.perf_counter(), time.process_time()
        result = make() | {"seconds": round(time.perf_counter() - start), "cpu": round(time.process_time() - cpu)} | machine()
        with replaced(path) as beside:
            beside.write_text(json.dumps(rounded(result)) + "\n")
        told = result.get("scores") or (result["history"][-1] if "history" in result else "")
        print(f"{path.stem}: {result['seconds']} s, {told}", flush=True)
    return 0


def rounded(value: Any) -> Any:
    """Five digits of each number."""
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def merge(args: argparse.Namespace) -> int:
    """All runs that were kept, of the seeds that all objectives have, and the calibration, in the file that ships."""
    objectives = definitions(SETS[0])["objectives"]
    runs = [json.loads(path.read_text()) for _, path, _ in queue(SEEDS) if path.exists()]
    there = {(result.get("set"), result.get("seed"), result.get("objective")) for result in runs if result["kind"] == "main"}
    whole = [(dataset, seed) for dataset in SETS for seed in SEEDS if all((dataset, seed, name) in there for name in objectives)]
    runs = [r for r in runs if r["kind"] == "trial" or (r.get("set"), r["seed"]) in whole]
    for result in runs:
        for name in ("cpu", "precision", "torch", "threads"):
            del result[name]
        if result["kind"] in ("ablation", "longer"):  # of which the notebook shows one number of labels
            result["right"] = {
                name: {key: right[key] for key in right if key.startswith("500/")} for name, right in result["right"].items()
            }
    write_recording(MERGED, "benchmarks.objectives", args.machine, [{"kind": "calibration"} | json.loads(CALIBRATION.read_text()), *runs])
    return 0


def main() -> int:
    parser, runner = command_line("benchmarks.objectives", __doc__.splitlines()[0], run, merge, SEEDS, calibrate=calibrate)
    runner.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="some of the parts")
    args = parser.parse_args()
    return args.function(args)


if __name__ == "__main__":
    sys.exit(main())
