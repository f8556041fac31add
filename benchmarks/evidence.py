"""What does pretraining buy, on which images, against what, and how sure is that?

    python -m benchmarks.evidence run --set emoji --seeds 0 1 2    # whatever is not there yet; may be stopped at any time
    python -m benchmarks.evidence table --set emoji
    python -m benchmarks.evidence write                            # all tables, into benchmarks/README.md

Every row is judged on the same test images, with the same draws of 5, 10, 50 and 500 labelled images of each class (all of them where a
class has fewer). A row's result for one seed is one file in benchmarks/evidence/, which holds which test images were classified rightly, so
that any two rows can be compared image by image, and long runs can be made in parts. What is trained with the labels has the draw's number
as its seed, so its draws differ in both. The intervals are of 95 %, by a bootstrap over seeds, draws and test images at once. `emoji_64` is
`emoji` at 64 x 64.

--root DATA tests on the 10,000 official images of Fashion-MNIST in DATA/FashionMNIST/raw instead of the 2,000 that ship.
"""

from __future__ import annotations

import argparse
import base64
import functools
import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.stems import WithStem
from wejepa.analysis.features import knn_predictions
from wejepa.config import IJepaConfig, adapt_config_for_backbone, default_config
from wejepa.errors import optional
from wejepa.files import replaced
from wejepa.model import Encoder, IJEPA_base
from wejepa.pretrained import load_pretrained, pretrained_facts
from wejepa.seeds import generator_for
from wejepa.train.classifier import Classifier, train_classifier
from wejepa.train.finetune import FinetuneConfig, Judge, drawn_of_each_class, fit_probe, from_scratch, untrained
from wejepa.train.pretrain import launch_pretraining

RESULTS = Path(__file__).resolve().parent / "evidence"
RUNS = Path("outputs/evidence")
README = Path(__file__).resolve().parent / "README.md"
LABELS, DRAWS = (5, 10, 50, 500), 5
COLUMNS = {"mean": "mean-pooled", "layers": "all layers", "grid": "grid", "knn": "k-NN"}  # beside "own" of what is trained with labels
FIRST = ("the model that ships", "pretrained")  # whose leads are told
SHIPPED = {"fashion_mnist_mini": "fashion", "fashion_mnist": "fashion", "emoji_64": "emoji"}  # by set, the model that ships for it
SETS = ("fashion_mnist_mini", "emoji", "emoji_64", "fashion_mnist")
SEEN = 90_000  # images that a training with labels sees, within MOST passes
MOST = 100
STEM_COST, MUON_COST = 1.15, 1.1  # processor time of a step with the stem, with Muon, over one without, by benchmarks.recipe
MUON_MOMENTUM = 0.996  # that the teacher's average ends with, in place of 1
Features = dict[str, tuple[Tensor, Tensor]]  # by column: of the images that a draw labels (N, F), and of the test images


@dataclass(frozen=True)
class Row:
    """A way from images to classes.

    Attributes:
        name: what the table calls it.
        features: frozen features of all images, from the judge and a seed; or None.
        trained: a classifier trained with the judge's labelled images, from the judge and a seed, which is the draw's number; or None.
        seeds: False for what has nothing random but the draw of labels, or is trained with them.
        sets: where it can be judged.
    """

    name: str
    features: Callable[[Judge, int], Features] | None = None
    trained: Callable[[Judge, int], Classifier] | None = None
    seeds: bool = True
    sets: tuple[str, ...] = SETS


# ---------------------------------------------------------------- features without learning


def images_of(judge: Judge) -> tuple[Tensor, Tensor]:
    """All images that a draw labels and all test images, (N, C, S, S); of grey ones one channel."""
    both = [torch.cat(list(s.batches(i, 500))) for s, i in ((judge.train, judge.index), (judge.test, judge.test_index))]
    grey = all((x == x[:, :1]).all() for x in both)
    return tuple(x[:, :1] if grey else x for x in both)


def pixels(judge: Judge, seed: int) -> Features:
    return {"grid": tuple(x.flatten(1) for x in images_of(judge))}


def principal_components(judge: Judge, seed: int) -> Features:
    """The 128 directions of most variance among the pool's pixels."""
    train, test = (x.flatten(1) for x in images_of(judge))
    mean = train.mean(0)
    directions = torch.linalg.eigh((train - mean).T @ (train - mean)).eigenvectors[:, -128:]
    return {"grid": tuple((x - mean) @ directions for x in (train, test))}


def gradients(judge: Judge, seed: int) -> Features:
    """Histograms of oriented gradients (Dalal and Triggs, 2005), by scikit-image: 4 x 4 cells."""
    hog, side = optional("skimage.feature", "scikit-image").hog, judge.config.model.img_size // 4

    def of(images: Tensor) -> Tensor:
        shapes = {"orientations": 9, "pixels_per_cell": (side, side), "cells_per_block": (2, 2), "channel_axis": -1}
        return torch.from_numpy(np.stack([hog(x.permute(1, 2, 0).numpy(), **shapes) for x in images])).float()

    return {"grid": tuple(of(x) for x in images_of(judge))}


def random_convolutions(judge: Judge, seed: int) -> Features:
    """64 random filters of 6 x 6, rectified, averaged over a 4 x 4 grid: as wide as the encoder's grid."""
    train, test = images_of(judge)
    filters = torch.randn(64, train.shape[1], 6, 6, generator=generator_for(seed)) / (36 * train.shape[1]) ** 0.5

    def of(images: Tensor) -> Tensor:
        return torch.cat([F.adaptive_avg_pool2d(F.relu(F.conv2d(x, filters)), 4).flatten(1) for x in images.split(500)])

    return {"grid": (of(train), of(test))}


def k_means_patches(judge: Judge, seed: int, size: int = 6, centres: int = 256) -> Features:
    """Distances to k-means centres of whitened patches, pooled over quarters: Coates, Lee and Ng (2011)."""
    train, test = images_of(judge)
    generator = generator_for(seed)

    def patches(images: Tensor) -> Tensor:  # (B, L, C * size * size), each of mean 0 and deviation 1
        x = F.unfold(images, size).mT
        return (x - x.mean(2, keepdim=True)) / (x.var(2, keepdim=True) + 0.01).sqrt()

    some = patches(train[torch.randperm(len(train), generator=generator)[:1000]]).flatten(0, 1)
    some = some[torch.randperm(len(some), generator=generator)[:50_000]]
    mean = some.mean(0)
    values, directions = torch.linalg.eigh((some - mean).T @ (some - mean) / len(some))
    whiten = directions @ torch.diag((values + 0.1) ** -0.5) @ directions.T
    kmeans = optional("sklearn.cluster", "scikit-learn").MiniBatchKMeans(centres, n_init=1, random_state=seed)
    means = torch.from_numpy(kmeans.fit(((some - mean) @ whiten).numpy()).cluster_centers_).float()
    side = train.shape[-1] - size + 1

    def of(images: Tensor) -> Tensor:
        found = []
        for x in images.split(100):
            distance = torch.cdist((patches(x) - mean) @ whiten, means)  # (B, L, centres)
            near = F.relu(distance.mean(2, keepdim=True) - distance)
            found.append(F.adaptive_avg_pool2d(near.mT.unflatten(2, (side, side)), 2).flatten(1))
        return torch.cat(found)

    return {"grid": (of(train), of(test))}


# ---------------------------------------------------------------- features of an encoder


def read(judge: Judge, encoder: nn.Module) -> Features:
    poolings = ("mean", "layers", "grid") if isinstance(encoder, Encoder) else ("mean", "grid")
    return judge.features(encoder, poolings)


def with_seed(cfg: IJepaConfig, seed: int) -> IJepaConfig:
    cfg = cfg.copy()
    cfg.hardware.seed = seed
    return cfg


def random(judge: Judge, seed: int) -> Features:
    return read(judge, untrained(with_seed(judge.config, seed)).teacher_encoder)


def hardest_random(judge: Judge, seed: int) -> Features:
    """The initialisation whose random encoder is the hardest to beat: what a block adds is not made small."""
    encoder = untrained(with_seed(judge.config, seed)).teacher_encoder
    with torch.no_grad():
        for block in encoder.blocks:
            for layer in (block.attn.proj, block.mlp[-1]):
                layer.weight.mul_(10)
    return read(judge, encoder)


def random_resnet(judge: Judge, seed: int) -> Features:
    """ResNet-18 as it is initialised, up to a total stride that leaves a 4 x 4 grid."""
    cfg = adapt_config_for_backbone(judge.config, "resnet18")
    cfg.model.classification_pretrained = False
    return read(judge, untrained(with_seed(cfg, seed)).teacher_encoder)


def random_stem(judge: Judge, seed: int) -> Features:
    return read(judge, begun(with_seed(judge.config, seed), WithStem).teacher_encoder)


def begun(cfg: IJepaConfig, kind: type[IJEPA_base]) -> IJEPA_base:
    """A model of one's own, its weights drawn by the config's seed."""
    torch.manual_seed(cfg.hardware.seed)
    return kind(cfg)


def pretrained(**changed: Any) -> Callable[[Judge, int], Features]:
    return lambda judge, seed: read(judge, pretrained_model(judge, seed, **changed).teacher_encoder)


def pretrained_model(
    judge: Judge, seed: int, crops: bool = True, stem: bool = False, muon: bool = False, epochs: int | None = None
) -> IJEPA_base:
    """The model that the set's recipe gives; trained once, and taken from its folder from then on.

    Without crops and mirrors; or with a convolutional stem, by Muon or both, and as much fewer epochs as its steps take longer, unless
    `epochs` says how many.
    """
    cfg = with_seed(judge.config, seed)
    if cfg.data.dataset == "fashion_mnist":  # the official test images; what is learnt from is what ships
        cfg.data.dataset = "fashion_mnist_mini"
    if not crops:
        cfg.data.crop_scale, cfg.data.horizontal_flip = (1.0, 1.0), False
    changed = ("-no-crops" if not crops else "") + ("-stem" if stem else "") + ("-muon" if muon else "") + (f"-{epochs}" if epochs else "")
    cfg.hardware.output_dir = str(RUNS / f"{cfg.data.dataset}-{cfg.model.img_size}{changed}-{seed}")
    cfg.optimizer.epochs = epochs or round(cfg.optimizer.epochs / (STEM_COST if stem else 1) / (MUON_COST if muon else 1))
    if muon:
        set_muon(cfg)
    return launch_pretraining(cfg, resume="auto", model=begun(cfg, WithStem) if stem else None).model


def set_muon(cfg: IJepaConfig) -> None:
    """Train by Muon, with a teacher whose average ends short."""
    cfg.optimizer.kind, cfg.optimizer.momentum_teacher_final = "muon", MUON_MOMENTUM


def shipped_name(judge: Judge) -> str:
    """Of the model that ships for such images."""
    cfg = judge.config
    return SHIPPED[cfg.data.dataset if cfg.model.img_size == 32 else f"{cfg.data.dataset}_{cfg.model.img_size}"]


def shipped(judge: Judge) -> nn.Module:
    """The teacher of the model that ships for such images."""
    return load_pretrained(shipped_name(judge)).teacher_encoder


def shipped_by_muon(judge: Judge, seed: int) -> Features:
    """That model trained anew by Muon: some 40 minutes of one core."""
    cfg = IJepaConfig.from_dict(pretrained_facts(shipped_name(judge))["config"])
    cfg.data.dataset, cfg.data.root = judge.config.data.dataset, judge.config.data.root
    set_muon(cfg)
    cfg.hardware.output_dir = str(RUNS / f"{shipped_name(judge)}-that-ships-muon")
    return read(judge, launch_pretraining(cfg, resume="auto").model.teacher_encoder)


# ---------------------------------------------------------------- trained with the labels


class SmallNetwork(nn.Module):
    """Three convolutions, as a first course on images has them: (B, C, S, S) to tokens (B, N, 128)."""

    embed_dim = 128

    def __init__(self, channels: int):
        super().__init__()
        widths = (channels, 32, 64, 128)
        layers = [
            nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2))
            for i, o in itertools.pairwise(widths)
        ]
        self.blocks = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        return self.blocks(images).flatten(2).mT


def trained_with_labels(encoder: Callable[[Judge, int], nn.Module], **options: float) -> Callable[[Judge, int], Classifier]:
    """A classifier on such an encoder, trained as a whole."""

    def train(judge: Judge, seed: int) -> Classifier:
        torch.manual_seed(seed)
        classifier = Classifier(judge.config, encoder(judge, seed), judge.train.classes)
        epochs = min(MOST, max(1, round(SEEN / len(judge.index))))
        rate = judge.config.optimizer.base_learning_rate
        train_classifier(classifier, judge.train, judge.index, epochs=epochs, seed=seed, learning_rate=rate, **options)
        return classifier

    return train


ROWS = (
    Row("the model that ships", lambda judge, seed: read(judge, shipped(judge)), seeds=False, sets=tuple(SHIPPED)),
    Row("pretrained", pretrained()),
    Row("pretrained without crops", pretrained(crops=False)),
    Row("pretrained with a stem, as long", pretrained(stem=True)),
    Row("pretrained by Muon, as long", pretrained(muon=True)),
    Row("the model that ships, by Muon", shipped_by_muon, seeds=False, sets=("fashion_mnist", "emoji_64")),
    Row("pretrained by Muon, five minutes", pretrained(muon=True, epochs=43), sets=("fashion_mnist",)),
    Row("same encoder, random", random),
    Row("same encoder with a stem, random", random_stem),
    Row("same encoder, random, hardest", hardest_random),
    Row("raw pixels", pixels, seeds=False),
    Row("principal components", principal_components, seeds=False),
    Row("oriented gradients", gradients, seeds=False),
    Row("random convolutions", random_convolutions),
    Row("k-means of patches", k_means_patches),
    Row("ResNet-18, random", random_resnet),
    Row(
        "small network, with labels",
        trained=trained_with_labels(lambda judge, seed: SmallNetwork(judge.config.model.in_chans)),
        seeds=False,
    ),
    Row(
        "whole encoder, with labels",
        trained=trained_with_labels(lambda judge, seed: IJEPA_base(from_scratch(with_seed(judge.config, seed))).student_encoder),
        seeds=False,
    ),
    Row(
        "pretrained, then with labels",
        trained=trained_with_labels(
            lambda judge, seed: pretrained_model(judge, seed).teacher_encoder, layer_decay=0.75, label_smoothing=0.1
        ),
        seeds=False,
    ),
    Row(
        "the model that ships, then with labels",
        trained=trained_with_labels(lambda judge, seed: shipped(judge), layer_decay=0.75, label_smoothing=0.1),
        seeds=False,
        sets=tuple(SHIPPED),
    ),
)


# ---------------------------------------------------------------- judged, kept and compared


def recipe(name: str) -> IJepaConfig:
    """How a set is learnt."""
    cfg = default_config()
    cfg.data.dataset = name.removesuffix("_64")
    if cfg.data.dataset == "emoji":
        cfg.optimizer.epochs, cfg.model.img_size = 60, 64 if name == "emoji_64" else 32
    return cfg


def judged(row: Row, judge: Judge, seed: int, labels: tuple[int, ...] = LABELS, draws: int = DRAWS) -> dict[str, dict[str, str]]:
    """For each "labels/draw" and column, which test images are classified rightly, as `packed`."""
    y, test_y = judge.train.labels, judge.test_y
    readable = judge.train.readable(torch.arange(len(y)))
    y = y[readable]
    most = int(torch.bincount(y).max())
    drawn = {  # places among the readable; all labels can be drawn in one way
        (count, draw): drawn_of_each_class(y, count, draw) for count in labels for draw in range(draws if count < most else 1)
    }
    features, pool = None, torch.cat(list(drawn.values())).unique()
    if row.features:
        judge.index, judge.train_y = readable[pool], y[pool]
        features = row.features(judge, seed)
    found = {}
    for (count, draw), places in drawn.items():
        cell = {}
        if features:
            index, labels_y = torch.searchsorted(pool, places), y[places]
            for column, (train, test) in features.items():
                cell[column] = fit_probe(train[index], labels_y, test, test_y, FinetuneConfig(seed=draw)).predictions
            train, test = features["grid"]
            cell["knn"] = knn_predictions(train[index], labels_y, test)
        else:
            judge.index, judge.train_y = readable[places], y[places]
            cell["own"] = row.trained(judge, draw).predict(judge.test, judge.test_index)
        found[f"{count}/{draw}"] = {column: packed(predictions == test_y) for column, predictions in cell.items()}
    return found


def packed(right: Tensor) -> str:
    return base64.b64encode(np.packbits(right.numpy())).decode()


def unpacked(text: str, count: int) -> Tensor:
    return torch.from_numpy(np.unpackbits(np.frombuffer(base64.b64decode(text), dtype=np.uint8), count=count)).bool()


def file_of(name: str, row: Row, seed: int) -> Path:
    return RESULTS / f"{name}-{row.name.replace(', ', '-').replace(' ', '-')}-{seed}.json"


def run(name: str, rows: list[Row], seeds: list[int], root: str | None) -> None:
    """Judge whatever is not there yet."""
    cfg = recipe(name)
    if root:
        cfg.data.root = root
    judge = Judge(FinetuneConfig(labels_per_class=0), cfg)
    for seed in seeds:
        for row in rows:
            if (seed and not row.seeds) or name not in row.sets:
                continue
            file = file_of(name, row, seed)
            if file.exists():
                continue
            start = time.perf_counter()
            right = judged(row, judge, seed)
            about = {"set": name, "row": row.name, "seed": seed, "tested": len(judge.test_y), "seconds": time.perf_counter() - start}
            about |= {"torch": torch.__version__, "threads": torch.get_num_threads(), "right": right}
            with replaced(file) as aside:
                aside.write_text(json.dumps(about) + "\n")
            print(f"{name}, seed {seed}, {row.name}: {about['seconds']:.0f} s", flush=True)


def kept(name: str) -> dict[str, list[dict]]:
    """What is there of a set, by row; a seed each."""
    found: dict[str, list[dict]] = {}
    for row in ROWS:
        for file in sorted(RESULTS.glob(file_of(name, row, 0).name.replace("-0.json", "-*.json"))):
            about = json.loads(file.read_text())
            if about["row"] == row.name and about["set"] == name:
                found.setdefault(row.name, []).append(about)
    return found


def cube(results: list[dict], labels: int, column: str) -> Tensor | None:
    """Which test images were classified rightly, (seeds, draws, images), or None where the row has no such column."""
    cells = [
        [unpacked(cell[column], about["tested"]) for key, cell in about["right"].items() if key.startswith(f"{labels}/") and column in cell]
        for about in results
    ]
    return torch.stack([torch.stack(seed) for seed in cells]).double() if cells and all(cells) else None


@functools.cache
def drawn_anew(images: int, repeats: int) -> Tensor:
    """How often each test image is drawn, with replacement, in each repeat: (repeats, images)."""
    generator = generator_for(0)
    return torch.stack(
        [torch.bincount(torch.randint(images, (images,), generator=generator), minlength=images).float() for _ in range(repeats)]
    )


def interval(values: Tensor, repeats: int = 2000) -> tuple[float, float, float]:
    """The mean of (seeds, draws, images), and the ends of its 95 % interval: all three are drawn anew, with replacement."""
    seeds, draws, images = values.shape
    means = (drawn_anew(images, repeats) @ values.flatten(0, 1).mT.float() / images).double()  # sums of 1 and -1 are exact
    generator = generator_for(0, 1)
    some_seeds = torch.randint(seeds, (repeats, seeds, 1), generator=generator)
    some_draws = torch.randint(draws, (repeats, 1, draws), generator=generator)
    means = means.unflatten(1, (seeds, draws))[torch.arange(repeats)[:, None, None], some_seeds, some_draws].mean((1, 2))
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(values.mean()), low, high


def ahead(one: Tensor, other: Tensor) -> Tensor:
    """The difference of two rows, image by image; what has one seed, or one draw, stands beside each of the other's."""
    if min(len(one), len(other)) > 1:
        both = min(len(one), len(other))
        one, other = one[:both], other[:both]
    return one - other


def table(name: str) -> Iterator[str]:
    """A set's tables in Markdown: accuracies in percent with their intervals, and how far ahead of each row the pretrained encoders are."""
    found = kept(name)
    own = {row.name for row in ROWS if row.trained}
    for labels in LABELS:
        yield f"\nAccuracy with {labels} labelled images of each class:\n"
        yield "| | seeds | " + " | ".join(COLUMNS.values()) + " |\n|---|---:|" + "---:|" * len(COLUMNS)
        for row, results in found.items():
            cells = [shown(cube(results, labels, column)) for column in COLUMNS]
            if row in own:  # one reading, its own, stands under the first
                cells[0] = shown(cube(results, labels, "own"))
            yield f"| {row} | {'one a draw' if row in own else len(results)} | " + " | ".join(cells) + " |"
    yield from leads(found, "whole encoder, with labels", "own", [f"{first}, then with labels" for first in FIRST], of_first=True)
    others = [row for row in found if row not in FIRST and not row.endswith("then with labels")]
    for first, column in itertools.product(FIRST, COLUMNS):
        yield from leads(found, first, column, others)


def shown(values: Tensor | None) -> str:
    return "-" if values is None else "{:.1f} ({:.1f} to {:.1f})".format(*(100 * v for v in interval(values)))


def signed(difference: tuple[float, float, float]) -> str:
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * v for v in difference))


def leads(found: dict[str, list[dict]], first: str, column: str, others: list[str], of_first: bool = False) -> Iterator[str]:
    """How far one row is ahead of each other one, in points, by the number of labels; `of_first`: how far the others are ahead of it.

    What is trained with the labels has one reading, and is compared with each of the encoder's.
    """
    lines = []
    for row in others:
        if row not in found or first not in found:
            continue
        own = "own" if "own" in next(iter(found[row][0]["right"].values())) else column
        cells = []
        for labels in LABELS:
            mine, other = cube(found[first], labels, column), cube(found[row], labels, own)
            if mine is not None and other is not None:
                cells.append(signed(interval(ahead(other, mine) if of_first else ahead(mine, other))))
        if cells:
            lines.append(f"| {row} | " + " | ".join(cells) + " |")
    if lines:
        yield f"\nPoints ahead of {first}:\n" if of_first else f"\nPoints that {first}, {COLUMNS[column]}, is ahead of:\n"
        yield "| labels of each class | " + " | ".join(map(str, LABELS)) + " |\n|---|" + "---:|" * len(LABELS)
        yield from lines


def written(text: str) -> str:
    """`text` with every set's tables where it has the marks for them."""
    for name in SETS:
        begin, end = f"<!-- evidence {name} -->\n", f"<!-- end of evidence {name} -->\n"
        if begin in text:
            before, rest = text.split(begin)
            text = before + begin + "\n".join(table(name)).strip() + "\n\n" + end + rest.split(end)[1]
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "table", "write"))
    parser.add_argument("--set", choices=SETS, default="fashion_mnist_mini")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--rows", nargs="+", default=[row.name for row in ROWS], help="some of the rows, by name")
    parser.add_argument("--root", help="folder with FashionMNIST/raw, for --set fashion_mnist")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.command == "table":
        print("\n".join(table(args.set)))
    elif args.command == "write":
        README.write_text(written(README.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        run(args.set, [row for row in ROWS if row.name in args.rows], args.seeds, args.root)


if __name__ == "__main__":
    main()
