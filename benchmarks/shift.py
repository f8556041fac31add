"""Do crops teach an encoder to bear a shifted image? Pretrained with and without them, and probed on images moved by up to two pixels.

    python -m benchmarks.shift run      # eight runs of 10 epochs, two minutes each on one core; may be stopped at any time
    python -m benchmarks.shift merge    # all of them into wejepa/assets/shift.json, which notebook 04 shows

Every encoder reads the same images: 5,000 labelled and 2,000 test images of fashion_mnist_mini, on the 4 x 4 grid, as they are and moved.
A run is one small JSON file in benchmarks/shift/.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.recording import ROOT, command_line, write_recording
from wejepa.config import default_config
from wejepa.devices import precision
from wejepa.files import replaced
from wejepa.model import IJEPA_base
from wejepa.seeds import generator_for
from wejepa.train.finetune import FinetuneConfig, Judge, fit_probe, untrained
from wejepa.train.pretrain import launch_pretraining

RESULTS = Path(__file__).resolve().parent / "shift"
MERGED = ROOT / "wejepa" / "assets" / "shift.json"
CROPS = {"crops": (0.8, 1.0), "no crops": (1.0, 1.0)}  # share of the image that a training crop keeps
SEEDS, EPOCHS, BY = (0, 1, 2, 3), 10, 2


def moved(images: Tensor, by: int, generator: torch.Generator) -> Tensor:
    """Images (N, C, H, W), each rolled by up to `by` pixels in each direction."""
    steps = torch.randint(-by, by + 1, (len(images), 2), generator=generator)  # (N, 2): down and across
    return torch.stack([image.roll(step, (1, 2)) for image, step in zip(images, steps.tolist(), strict=True)])


def scores(model: IJEPA_base, seed: int) -> dict[str, float]:
    """Test accuracy of probes on the grid, by what they were trained on and what they are tested on."""
    judge = Judge(FinetuneConfig(labels_seed=seed, seed=seed), model.cfg)
    generator = generator_for(seed, 5)
    found = {"still": judge.features(model.encoder(), ("grid",))["grid"]}
    for source in (judge.train, judge.test):
        source.images = moved(source.images, BY, generator)
    found["moved"] = judge.features(model.encoder(), ("grid",))["grid"]
    return {
        f"{trained} to {tested}": fit_probe(found[trained][0], judge.train_y, found[tested][1], judge.test_y, judge.cfg).accuracy
        for trained, tested in (("still", "still"), ("still", "moved"), ("moved", "moved"))
    }


def run(args: argparse.Namespace) -> int:
    """Make the runs that are not there yet."""
    for seed in args.seeds:
        for name, scale in CROPS.items():
            path = RESULTS / f"{name.replace(' ', '_')}-{seed}.json"
            if path.exists():
                continue
            cfg = default_config()
            cfg.data.crop_scale, cfg.optimizer.epochs, cfg.hardware.seed = scale, EPOCHS, seed
            cfg.hardware.output_dir = str(ROOT / "outputs" / "shift" / path.stem)
            start = time.perf_counter()
            model = launch_pretraining(cfg, resume="auto").model
            result = {
                "pretraining": name,
                "seed": seed,
                "epochs": EPOCHS,
                "precision": str(precision(torch.device("cpu"), True)).removeprefix("torch."),
                "torch": torch.__version__.partition("+")[0],
                "seconds": round(time.perf_counter() - start),
                "trained": scores(model, seed),
                "random": scores(untrained(cfg), seed),
            }
            with replaced(path) as beside:
                beside.write_text(json.dumps(result) + "\n")
            print(result, flush=True)
    return 0


def merge(args: argparse.Namespace) -> int:
    """All runs that were kept, in the file that ships."""
    runs = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    write_recording(MERGED, "benchmarks.shift", args.machine, runs)
    return 0


def main() -> int:
    parser, _ = command_line("benchmarks.shift", __doc__.splitlines()[0], run, merge, SEEDS)
    args = parser.parse_args()
    return args.function(args)


if __name__ == "__main__":
    sys.exit(main())
