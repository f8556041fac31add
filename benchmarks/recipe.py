"""What would let the default recipe learn more per minute? One change at a time, for the same seconds of one core.

    python -m benchmarks.recipe run                       # whatever is not there yet; may be stopped at any time
    python -m benchmarks.recipe run --trials base "convolutional stem" --seeds 0 1 2 --epochs 30
    python -m benchmarks.recipe table

Every trial pretrains on four fifths of Fashion-MNIST's *training* images and is judged on the last fifth, with 500 labelled images of
each class: the test images choose nothing. Steps of a trial and of the base are timed in turn, in one process and thread, and the trial
gets as many epochs as cost what the base's EPOCHS cost. A run is one small JSON file in benchmarks/recipe/.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.evidence import MUON_MOMENTUM, begun
from benchmarks.objectives import judge_of_trials
from benchmarks.stems import WithStem
from wejepa.config import IJepaConfig, default_config
from wejepa.data import training_batches
from wejepa.files import replaced
from wejepa.kernels import Linear
from wejepa.masking import Masks
from wejepa.model import IJEPA_base, for_each_context
from wejepa.patches import take
from wejepa.train.finetune import share_right
from wejepa.train.loop import Pretraining
from wejepa.train.pretrain import launch_pretraining

RESULTS = Path(__file__).resolve().parent / "recipe"
EPOCHS = 15
SET = "fashion_mnist_mini"


# ---------------------------------------------------------------- what needs more than a setting


class LayerTargets(IJEPA_base):
    """Targets: the mean of all blocks' outputs, each normalised, as in data2vec (Baevski et al., 2022)."""

    def forward(self, images: Tensor, masks: Masks) -> tuple[Tensor, Tensor]:
        context = self.student_encoder(for_each_context(images, masks), keep=masks.context)
        predictions = self.predictor(context, masks)
        with torch.no_grad():
            x, outputs = self.teacher_encoder.tokens(images), []
            for block in self.teacher_encoder.blocks:
                x = block(x)
                outputs.append(F.layer_norm(x.float(), x.shape[-1:]))
            told = for_each_context(torch.stack(outputs).mean(0), masks)
            hidden = take(told, masks.targets.flatten(1))
            return predictions, F.layer_norm(hidden, hidden.shape[-1:]).view(*masks.targets.shape, -1)


class WithPixels(IJEPA_base):
    """The predictor tells the hidden patches' normalised pixels as well (He et al., 2022): further features of each target."""

    def __init__(self, cfg: IJepaConfig):
        super().__init__(cfg)
        m = cfg.model
        self.predictor.proj = Linear(m.pred_dim, m.embed_dim + m.in_chans * m.patch_size**2)
        nn.init.normal_(self.predictor.proj.weight, std=m.pred_dim**-0.5)
        nn.init.zeros_(self.predictor.proj.bias)

    def forward(self, images: Tensor, masks: Masks) -> tuple[Tensor, Tensor]:
        predictions, targets = super().forward(images, masks)
        patches = F.unfold(images, self.cfg.model.patch_size, stride=self.cfg.model.patch_size).mT
        asked = take(for_each_context(patches, masks), masks.targets.flatten(1))
        pixels = F.layer_norm(asked, asked.shape[-1:], eps=1e-2).view(*masks.targets.shape, -1)
        return predictions, torch.cat([targets, pixels], dim=-1)


class WithVisible(IJEPA_base):
    """The predictor tells the teacher's tokens of the context as well (V-JEPA 2.1), at a smaller weight."""

    weight = 0.5

    def forward(self, images: Tensor, masks: Masks) -> tuple[Tensor, Tensor]:
        p, m = self.predictor, masks
        context = self.student_encoder(for_each_context(images, m), keep=m.context)
        positions = p.pos_embed[0]
        asked = p.mask_token + F.embedding(m.targets.flatten(1), positions)
        x = torch.cat([p.embed(context) + F.embedding(m.context, positions), asked], dim=1)
        for block in p.blocks:
            x = block(x)
        predictions = p.proj(p.norm(x))
        with torch.no_grad():
            places = torch.cat([m.context, m.targets.flatten(1)], dim=1)
            told = take(for_each_context(self.teacher_encoder(images), m), places).float()
            told = F.layer_norm(told, told.shape[-1:])
        scale = torch.ones(1, places.shape[1], 1)
        scale[:, : m.context.shape[1]] = self.weight
        return predictions * scale, told * scale


class WithStemAndPixels(WithPixels, WithStem):
    pass


class WithStemAndVisible(WithVisible, WithStem):
    pass


def squared(predictions: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(predictions.float(), targets.float())


# ---------------------------------------------------------------- the trials


@dataclass(frozen=True)
class Trial:
    """What is changed: settings, by section and name; the model's class; the loss."""

    settings: dict[str, object]
    model: type[IJEPA_base] = IJEPA_base
    loss: Callable[[Tensor, Tensor], Tensor] | None = None

    def config(self, seed: int = 0) -> IJepaConfig:
        cfg = default_config()
        cfg.data.dataset, cfg.hardware.seed, cfg.optimizer.epochs = SET, seed, EPOCHS
        for name, value in self.settings.items():
            section, field = name.split(".")
            setattr(getattr(cfg, section), field, value)
        return cfg


MUON = {"optimizer.kind": "muon"}
SHORTER = {"optimizer.momentum_teacher_final": MUON_MOMENTUM}  # an average over fewer steps at the end
TRIALS = {
    "base": Trial({}),
    "convolutional stem": Trial({}, WithStem),
    "pixels beside": Trial({}, WithPixels),
    "visible tokens beside": Trial({}, WithVisible),
    "targets of all layers": Trial({}, LayerTargets),
    "squared error": Trial({}, loss=squared),
    "stem, pixels beside": Trial({}, WithStemAndPixels),
    "stem, visible tokens beside": Trial({}, WithStemAndVisible),
    "stem, rate 3e-3": Trial({"optimizer.base_learning_rate": 3e-3}, WithStem),
    "stem, two contexts": Trial({"mask.num_contexts": 2}, WithStem),
    "teacher to 0.996": Trial(SHORTER),
    "Muon": Trial(MUON),
    "Muon, teacher to 0.996": Trial(MUON | SHORTER),
    "stem, Muon, teacher to 0.996": Trial(MUON | SHORTER, WithStem),
    "visible tokens beside, Muon, teacher to 0.996": Trial(MUON | SHORTER, WithVisible),
}


def cost(trial: Trial, source) -> float:
    """Seconds of processor an image over the base's: the least of some rounds, in each of which both take turns."""
    rounds, steps, runs = 6, 6, []
    with tempfile.TemporaryDirectory() as folder:
        for i, one in enumerate((TRIALS["base"], trial)):
            cfg = one.config()
            cfg.hardware.output_dir = f"{folder}/{i}"
            run = Pretraining(cfg, source=source, model=one.model(cfg), **({"loss": one.loss} if one.loss else {}))
            runs.append((run, training_batches(source, cfg, epoch=0), []))
        for turn in range(rounds + 1):
            for run, batches, spent in runs:
                start, seen = time.process_time(), 0
                for images in islice(batches, steps):
                    run.train_step(images)
                    seen += len(images)
                if turn:  # the first round warms up
                    spent.append((time.process_time() - start) / seen)
    return min(runs[1][2]) / min(runs[0][2])


def run_one(name: str, seed: int, epochs: int) -> dict:
    trial, judge = TRIALS[name], judge_of_trials(SET)
    judge.cfg.labels_per_class = 500
    judge.draw_labels(0)
    ratio = 1.0 if name == "base" else cost(trial, judge.train)
    cfg = trial.config(seed)
    cfg.optimizer.epochs = max(1, round(epochs / ratio))
    with tempfile.TemporaryDirectory() as folder:
        cfg.hardware.output_dir = folder
        start = time.process_time()
        options = {"loss": trial.loss} if trial.loss else {}
        model = launch_pretraining(cfg, source=judge.train, model=begun(cfg, trial.model), monitor=lambda model: {}, **options).model
        spent = time.process_time() - start
    scores = {kind: share_right(judge.right(model.encoder(kind))) for kind in ("teacher", "student")}
    return {"trial": name, "seed": seed, "of": epochs, "epochs": cfg.optimizer.epochs, "cost": ratio, "cpu": spent, "scores": scores}


def file_of(name: str, seed: int, epochs: int) -> Path:
    return RESULTS / f"{name.replace(', ', '-').replace(' ', '-')}-{epochs}-{seed}.json"


def run(args: argparse.Namespace) -> None:
    RESULTS.mkdir(exist_ok=True)
    for seed in args.seeds:
        for name in args.trials:
            file = file_of(name, seed, args.epochs)
            if file.exists():
                continue
            found = run_one(name, seed, args.epochs)
            with replaced(file) as aside:
                aside.write_text(json.dumps(found) + "\n")
            print(line(found), flush=True)


def line(found: dict) -> str:
    cells = [" / ".join(f"{100 * v:.1f}" for v in found["scores"][kind].values()) for kind in ("teacher", "student")]
    return (
        f"| {found['trial']} | {found['seed']} | {found['epochs']} | {found['cost']:.2f} | {found['cpu']:.0f} s | "
        + " | ".join(cells)
        + " |"
    )


def table() -> Iterator[str]:
    for file in sorted(RESULTS.glob("*.json")):
        yield line(json.loads(file.read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("--trials", nargs="+", default=list(TRIALS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.command == "table":
        print("\n".join(table()))
    else:
        run(args)


if __name__ == "__main__":
    main()
