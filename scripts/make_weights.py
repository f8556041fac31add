"""Train the small models that ship with wejepa, and write them into wejepa/assets/.

    python scripts/make_weights.py train fashion --root FOLDER    # hours on one core; the same command goes on with a run that was stopped
    python scripts/make_weights.py write fashion                  # after it
    python scripts/make_weights.py choose emoji RUN RUN ...       # folders of runs, compared without a test image

FOLDER holds Fashion-MNIST's four files in FashionMNIST/raw/, unpacked: all 60,000 training images are learnt from, without their labels.
What is written is `fashion.safetensors`, all weights rounded to float16, and `fashion.json`: the config, how
the training went, on what machine, and the accuracy of the very weights that ship. Their hashes, which this prints, belong in
wejepa/data/embedded.py.
"""

import argparse
import hashlib
import json
import platform
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from wejepa.analysis.features import knn_predictions
from wejepa.config import IJepaConfig, default_config
from wejepa.data.embedded import ASSETS
from wejepa.files import replaced
from wejepa.train.checkpoints import load_checkpoint, load_model
from wejepa.train.finetune import FinetuneConfig, Judge, fit_probe, untrained
from wejepa.train.pretrain import launch_pretraining

LICENCE = "MIT, as wejepa. Trained on {}."
# What differs from the default config; the set that the shipped model reads; where its images are from.
MODELS = {
    "fashion": ({"data.dataset": "fashion_mnist", "optimizer.epochs": 60}, "fashion_mnist_mini", "Fashion-MNIST (MIT, Zalando SE)"),
    "emoji": (
        {"data.dataset": "emoji", "model.img_size": 64, "optimizer.epochs": 200},
        "emoji",
        "the drawings of Noto Emoji (Apache 2.0, Google) and Twemoji (CC BY 4.0, Twitter, Inc and other contributors)",
    ),
}


def config_of(name: str, root: str) -> IJepaConfig:
    """How a model is trained."""
    cfg = default_config()
    for setting, value in MODELS[name][0].items():
        section, field = setting.split(".")
        setattr(getattr(cfg, section), field, value)
    cfg.data.root = root
    cfg.hardware.output_dir = f"outputs/weights/{name}"
    cfg.hardware.keep_every = cfg.optimizer.epochs // 10  # ten points of training
    return cfg


def write(name: str, run: Path) -> None:
    """Round a trained model to float16, judge what is left, and write it."""
    model = load_model(run / "latest.pt")
    model.cfg.data.dataset, model.cfg.data.root = MODELS[name][1], "data"
    model.cfg.hardware.output_dir, model.cfg.hardware.keep_every = "outputs/pretrain", 0
    weights = {key: value.half().contiguous() for key, value in model.state_dict().items()}
    model.load_state_dict({key: value.float() for key, value in weights.items()})
    protocol = FinetuneConfig()
    judge = Judge(protocol, model.cfg)
    scores = {"trained": judge.scores(model), "random": judge.scores(untrained(model.cfg)), "pixels": judge.pixel_scores()}
    history = load_checkpoint(run / "latest.pt")["history"]
    facts = {
        "licence": LICENCE.format(MODELS[name][2]),
        "config": model.cfg.to_dict(),
        "accuracy": scores,
        "protocol": f"{len(judge.index)} labelled and {len(judge.test_index)} test images of {model.cfg.data.dataset}; {protocol}",
        "torch": torch.__version__,
        "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "history": history,
    }
    file = ASSETS / f"{name}.safetensors"
    with replaced(file) as aside:
        save_file(weights, aside)
    with replaced(file.with_suffix(".json")) as aside:
        aside.write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(scores, indent=1))
    for written in (file, file.with_suffix(".json")):
        print(f'    "{written.name}": "{hashlib.sha256(written.read_bytes()).hexdigest()}",')


def choose(name: str, runs: list[Path]) -> None:
    """Judge trained models by their training images alone: each fifth is told by probes on the other four.

    Images 2 i and 2 i + 1, which are the two drawings of an emoji, are in the same fifth. "pairs" is how often the image nearest to one,
    by the cells of the grid, is the other of its pair.
    """
    protocol = FinetuneConfig(labels_per_class=0)
    for run in runs:
        model = load_model(run / "latest.pt")
        model.cfg.data.dataset, model.cfg.data.root = MODELS[name][1], "data"
        judge = Judge(protocol, model.cfg)
        fifth, right = judge.index // 2 % 5, dict.fromkeys(("mean", "layers", "grid", "knn", "pairs"), 0)
        features = {pooling: x for pooling, (x, _) in judge.features(model.encoder(), ("mean", "layers", "grid")).items()}
        for held in range(5):
            rest, own, y = fifth != held, fifth == held, judge.train_y
            for pooling, x in features.items():
                right[pooling] += (fit_probe(x[rest], y[rest], x[own], y[own], protocol).predictions == y[own]).sum().item()
            right["knn"] += (knn_predictions(features["grid"][rest], y[rest], features["grid"][own]) == y[own]).sum().item()
        cells = F.normalize(features["grid"] - features["grid"].mean(0), dim=1)
        nearest = (cells @ cells.T).fill_diagonal_(-1).argmax(1)
        right["pairs"] = (judge.index[nearest] == judge.index ^ 1).sum().item()
        print(run.name, {reading: round(100 * count / len(judge.index), 1) for reading, count in right.items()}, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train and write the models that ship with wejepa.")
    parser.add_argument("command", choices=("train", "write", "choose"))
    parser.add_argument("name", choices=tuple(MODELS))
    parser.add_argument("runs", nargs="*", type=Path, help="the folders of the runs to choose from")
    parser.add_argument("--root", default="data", help="the folder with FashionMNIST/raw/")
    args = parser.parse_args()
    if bool(args.runs) != (args.command == "choose"):
        parser.error("runs: name the folders of the runs to choose from after choose, and none after train or write")
    cfg = config_of(args.name, args.root)
    if args.command == "train":
        torch.set_num_threads(1)
        launch_pretraining(cfg, resume="auto")
    elif args.command == "choose":
        choose(args.name, args.runs)
    else:
        write(args.name, Path(cfg.hardware.output_dir))


if __name__ == "__main__":
    main()
