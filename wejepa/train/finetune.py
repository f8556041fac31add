"""Was anything learnt? A linear probe on frozen features, fine-tuning, and the comparison that could embarrass both.

The protocol is the same for every row of a comparison: the same labelled training images, features standardised by their own mean and
deviation, a softmax regression brought to its minimum by L-BFGS for each of nine penalties, the penalty chosen on a fifth of the
*training* images, the regression brought to its minimum on all of them, and one look at the test images.

    python -m wejepa.train.finetune --set checkpoint=outputs/pretrain/latest.pt                    # the probe alone
    python -m wejepa.train.finetune --set checkpoint=outputs/pretrain/latest.pt --mode compare     # beside its baselines
    python -m wejepa.train.finetune --set checkpoint=outputs/pretrain/latest.pt --mode finetune    # the whole encoder
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wejepa.analysis.features import POOLINGS, READINGS, encode_images, knn_predictions, pooled_features
from wejepa.config import IJepaConfig, Section, parse_value, setting
from wejepa.data import load_images
from wejepa.devices import pick_device
from wejepa.errors import ConfigError, DataError, exit_code
from wejepa.model import Encoder, IJEPA_base
from wejepa.seeds import generator_for
from wejepa.train.checkpoints import load_model
from wejepa.train.classifier import Classifier, train_classifier

__all__ = [
    "Comparison",
    "FinetuneConfig",
    "FinetuneResult",
    "Judge",
    "ProbeResult",
    "compare_pretrained_vs_scratch",
    "finetune_encoder",
    "fit_probe",
    "train_linear_probe",
]

PENALTIES = tuple(10.0**-power for power in range(2, 11))  # from strong to weak
STEPS = 30  # of L-BFGS for each penalty, each begun at the solution before; 100 give the same accuracies within their noise
PIXELS = 32  # height and width at which raw pixels are judged at most


@dataclass
class FinetuneConfig(Section):
    """How features are judged."""

    checkpoint: str = setting(
        "outputs/pretrain/latest.pt", "checkpoint of wejepa.train.pretrain, or the name of a model that ships: fashion, emoji"
    )
    encoder: str = setting("teacher", "teacher, as in the paper, or student")
    pooling: str = setting("mean", "what the probe reads: mean of the last layer's tokens, layers (of each layer's), or grid (4 x 4 cells)")
    labels_per_class: int = setting(500, "labelled training images of each class; 0 takes all", low=0)
    labels_seed: int = setting(0, "which labelled images are drawn", low=0, high=2**31 - 1)
    draws: int = setting(1, "draws of labelled images that a comparison makes: labels_seed, and those that follow it", low=1)
    supervised_epochs: int = setting(30, "passes of an encoder that is trained with labels", low=1)
    layer_decay: float = setting(
        0.75, "share of the rate of the layer above that a pretrained layer gets in fine-tuning", low=0.0, high=1.0
    )
    label_smoothing: float = setting(0.1, "share of the target that fine-tuning spreads over all classes", low=0.0, high=0.9)
    from_scratch: bool = setting(False, "fine-tuning begins with random weights, for comparison")
    classifier: str = setting("outputs/finetune/classifier.pt", "where the command line writes what it has fine-tuned")
    seed: int = setting(
        0,
        "which fifth of the labelled images the probe holds out; initial weights and order of the batches in fine-tuning",
        low=0,
        high=2**31 - 1,
    )
    device: str = setting("auto", "where features and probes are computed: cpu, cuda, mps, or auto for the best one present")
    data_root: str | None = setting(None, "where the data set is now, if not where the checkpoint saw it", optional=True)


@dataclass(frozen=True)
class ProbeResult:
    """A trained probe.

    Attributes:
        accuracy: share of the test images classified rightly.
        penalty: weight of half the squared norm in the probe's loss, chosen on a fifth of the training images.
        predictions: the class given to each test image, (N,), on the CPU.
    """

    accuracy: float
    penalty: float
    predictions: Tensor


def train_linear_probe(cfg: FinetuneConfig, model: IJEPA_base | None = None) -> ProbeResult:
    """Train a linear classifier on the frozen features of a pretrained encoder and test it on held-out images.

    Args:
        cfg: the protocol; `cfg.checkpoint` names the encoder unless `model` is given.
        model: a model to probe instead of a checkpoint; its features are computed where it is, all else on `cfg.device`.

    Raises:
        ConfigError: there is no such device.
        CheckpointError: the checkpoint is absent or damaged.
        DataError: the labelled images are too few.
    """
    model = model or load_model(cfg.checkpoint, device_of(cfg))
    judge = Judge(cfg, model.cfg)
    ((train, test),) = judge.features(model.encoder(cfg.encoder), (cfg.pooling,)).values()
    return fit_probe(train, judge.train_y, test, judge.test_y, cfg)


def device_of(cfg: FinetuneConfig) -> torch.device:
    """What a protocol computes on.

    Raises:
        ConfigError: there is no such device.
    """
    return pick_device(cfg.device, "FinetuneConfig.device")


def fit_probe(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, cfg: FinetuneConfig) -> ProbeResult:
    """The probe on features that are at hand.

    Args:
        train_x, test_x: features (N, F).
        train_y, test_y: classes (N,).
        cfg: `seed` and `device` are used.

    Raises:
        ConfigError: there is no such device.
        DataError: fewer than 10 labelled images, too few to choose on a fifth of them; labels that are negative, or not one for
            each row of features; features that are not finite.
    """
    for name, x, y in (("train", train_x, train_y), ("test", test_x, test_y)):
        if y.shape != x.shape[:1]:
            raise DataError(f"{name}_y has shape {tuple(y.shape)} for {len(x)} rows of {name}_x: give one label for each")
        if negative := (y < 0).nonzero().flatten().tolist():
            raise DataError(f"{name}_y[{negative[0]}] = {y[negative[0]]}: classes count from 0; leave out what has none")
        if broken := int((~x.isfinite().all(1)).sum()):
            raise DataError(f"{broken} rows of {name}_x hold NaN or infinity: the encoder has diverged, or an image is broken")
    if len(train_x) < 10:
        raise DataError(f"a probe needs 10 labelled images or more, there are {len(train_x)}: raise labels_per_class or label some more")
    train_x, train_y, test_x, test_y = (values.to(device_of(cfg)) for values in (train_x, train_y, test_x, test_y))
    classes = int(train_y.max()) + 1
    train_x, test_x, variances = _along_axes(train_x, test_x)
    order = torch.randperm(len(train_x), generator=generator_for(cfg.seed)).to(train_x.device)
    held, kept = order[: len(order) // 5], order[len(order) // 5 :]
    kept_x, kept_y, held_x, held_y = train_x[kept], train_y[kept], train_x[held], train_y[held]
    weights, biases, tried = train_x.new_zeros(classes, train_x.shape[1]), train_x.new_zeros(classes), []
    for penalty in PENALTIES:
        weights, biases = _softmax_regression(kept_x, kept_y, variances, penalty, weights, biases)
        right = (F.linear(held_x, weights, biases).argmax(1) == held_y).float().mean()
        tried.append((float(right), penalty, weights, biases))
    _, penalty, weights, biases = max(tried, key=lambda trial: trial[0])  # of equals the first, the strongest penalty
    weights, biases = _softmax_regression(train_x, train_y, variances, penalty, weights, biases)
    predictions = F.linear(test_x, weights, biases).argmax(1)
    return ProbeResult(float((predictions == test_y).double().mean()), penalty, predictions.cpu())


def _along_axes(train_x: Tensor, test_x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both standardised, turned to the K principal axes of the first, (N, K) each; and the variance along each axis, (K,)."""
    mean, std, width = train_x.mean(0), train_x.std(0), train_x.shape[1]
    # A pixel that is black in nearly every training image must not drown the others when light falls on it in a test image: what is
    # constant in training says nothing, and what hardly varies is not blown up.
    std = torch.where(std > 1e-4 * std.mean(), std.clamp(min=std.mean() / 20), torch.inf)
    train_x, test_x = ((x - mean) / std / width**0.5 for x in (train_x, test_x))  # each vector's norm is about 1
    here = train_x.cpu()  # not every device can do what follows
    if len(here) < width:  # fewer images than features: the weights lie in the space of the images, and along no other axis
        _, sizes, axes = torch.linalg.svd(here, full_matrices=False)
        variances, axes = sizes.square() / len(here), axes.T
    else:
        variances, axes = torch.linalg.eigh(here.T @ here / len(here))
    variances, axes = variances.clamp(min=0).to(train_x.device), axes.to(train_x.device)
    return train_x @ axes, test_x @ axes, variances


def _softmax_regression(x: Tensor, y: Tensor, variances: Tensor, penalty: float, weights: Tensor, biases: Tensor) -> tuple[Tensor, Tensor]:
    """Minimise the mean cross-entropy of `x @ weights.T + biases` plus `penalty / 2` times the squared norm of the weights.

    The loss curves along an axis by about a tenth of the variance there, plus the penalty. Measured in units of one over its root, all
    weights have the same curvature, and tens of steps do what would take thousands: a random encoder's averaged tokens have nearly
    all of their variance along few axes, and most of what they tell along the others.
    """
    unit = (variances + 10 * penalty).rsqrt()
    scaled, biases = (weights / unit).requires_grad_(), biases.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([scaled, biases], max_iter=STEPS, tolerance_change=1e-7, history_size=10, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        weights = scaled * unit
        value = F.cross_entropy(F.linear(x, weights, biases), y) + penalty / 2 * weights.square().sum()
        value.backward()
        return value.detach()

    optimizer.step(loss)
    return (scaled * unit).detach(), biases.detach()


# ---------------------------------------------------------------- the comparison


@dataclass(frozen=True)
class Comparison:
    """Test accuracies under one protocol.

    Attributes:
        rows: for each encoder, the accuracy of the probe on mean-pooled tokens ("mean"), on those of every layer ("layers", of a
            transformer), on a coarse grid ("grid") and of nearest neighbours on that grid ("knn"), means over the draws of labels, and the
            seconds its training took ("seconds").
        labels: labelled images that every row was given.
        tested: test images.
        right: for each encoder and column, which test images were classified rightly under each draw, (draws, tested).
    """

    rows: dict[str, dict[str, float]]
    labels: int
    tested: int
    right: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def difference(self, row: str, other: str, column: str) -> tuple[float, float, float]:
        """How far `row` is ahead of `other`, and the ends of its 95 % interval, as shares of the test images.

        Both are compared on the same draws and images: draws and test images are drawn anew, with replacement, 2,000 times.
        """
        ahead = self.right[row][column].double() - self.right[other][column].double()  # (draws, tested)
        generator, (draws, tested) = generator_for(0), ahead.shape
        means = [
            ahead[torch.randint(draws, (draws,), generator=generator)].mean(0)[torch.randint(tested, (tested,), generator=generator)].mean()
            for _ in range(2000)
        ]
        low, high = torch.stack(means).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        return float(ahead.mean()), low, high

    def table(self) -> str:
        """The rows as a Markdown table, accuracies in percent; and the seconds of training, where any row took some."""
        timed = any(row["seconds"] for row in self.rows.values())
        titles = [*READINGS.values(), *(["training, s"] if timed else [])]
        lines = ["| " + " | ".join(["", *titles]) + " |", "|---|" + "---:|" * len(titles)]
        for name, row in self.rows.items():
            cells = [f"{100 * row[key]:.1f}" if key in row else "-" for key in READINGS]
            if timed:
                cells.append(f"{row['seconds']:.0f}" if row["seconds"] else "-")
            lines.append("| " + " | ".join([name, *cells]) + " |")
        return "\n".join(lines)

    def differences(self) -> str:
        """How far the first row is ahead of each other one, in points, with its 95 % interval, as a Markdown table."""
        first, *others = self.rows
        lines = [f"| {first}, ahead of | " + " | ".join(READINGS.values()) + " |", "|---|" + "---:|" * len(READINGS)]
        for other in others:
            cells = []
            for column in READINGS:
                if column in self.right[first] and column in self.right[other]:
                    mean, low, high = (100 * value for value in self.difference(first, other, column))
                    cells.append(f"{mean:+.1f} ({low:+.1f} to {high:+.1f})")
                else:
                    cells.append("-")
            lines.append(f"| {other} | " + " | ".join(cells) + " |")
        return "\n".join(lines)


def compare_pretrained_vs_scratch(
    cfg: FinetuneConfig, model: IJEPA_base | None = None, pretraining_seconds: float = 0.0, with_labels: bool = True
) -> Comparison:
    """Judge a pretrained encoder beside its baselines, all under the same protocol.

    Rows: the pretrained encoder; the same encoder at its random initialisation; raw pixels (the mean patch under "mean", every pixel
    under "grid", of images shrunk to 32 x 32 if they are larger); the whole encoder trained with the same labels from scratch; and the
    pretrained encoder trained with them.

    Args:
        cfg: the protocol.
        model: a model to judge instead of `cfg.checkpoint`.
        pretraining_seconds: told in the table.
        with_labels: also the two rows that are trained with labels; without them the comparison takes seconds.

    All computes on `cfg.device`, but for the features of a model that is handed in: those where it is.
    """
    device = device_of(cfg)
    model = model or load_model(cfg.checkpoint, device)
    judge, right, seconds = Judge(cfg, model.cfg), {}, {}
    random = untrained(model.cfg).to(device)
    for draw in range(cfg.draws):
        judge.draw_labels(cfg.labels_seed + draw)
        rows = {
            f"pretrained {cfg.encoder}": (judge.right(model.encoder(cfg.encoder)), pretraining_seconds),
            "same encoder, random": (judge.right(random.encoder(cfg.encoder)), 0.0),
            judge.pixel_row: (judge.pixels_right(), 0.0),
        }
        for name, begun_with in (("whole encoder, with labels", None), ("pretrained, then with labels", model)) if with_labels else ():
            start = time.perf_counter()
            trained = train_with_labels(judge, begun_with)
            spent = time.perf_counter() - start
            rows[name] = judge.right(trained.encoder), spent
        for name, (found, spent) in rows.items():
            seconds[name] = seconds.get(name, 0.0) + spent / cfg.draws
            for column, values in found.items():
                right.setdefault(name, {}).setdefault(column, []).append(values)
    stacked = {name: {column: torch.stack(values) for column, values in row.items()} for name, row in right.items()}
    rows = {name: share_right(found) | {"seconds": seconds[name]} for name, found in stacked.items()}
    return Comparison(rows, len(judge.index), len(judge.test_y), stacked)


def untrained(cfg: IJepaConfig) -> IJEPA_base:
    """The model of a config as its pretraining begins, without any weights from elsewhere."""
    torch.manual_seed(cfg.hardware.seed)
    return IJEPA_base(from_scratch(cfg)).eval()


def from_scratch(cfg: IJepaConfig) -> IJepaConfig:
    """A copy of a config whose encoder starts at random and learns."""
    cfg = cfg.copy()
    cfg.model.classification_pretrained = cfg.model.classification_frozen = False
    return cfg


@dataclass(frozen=True)
class FinetuneResult:
    """A classifier that was trained as a whole.

    Attributes:
        classifier: the trained encoder with its linear layer, in evaluation mode.
        accuracy: share of the test images classified rightly.
        predictions: the class given to each test image, (N,), on the CPU.
        seconds: what its training took.
    """

    classifier: Classifier
    accuracy: float
    predictions: Tensor
    seconds: float


def finetune_encoder(cfg: FinetuneConfig, model: IJEPA_base | None = None) -> FinetuneResult:
    """Train a pretrained encoder and a linear layer on its mean-pooled tokens with labels, and test them on held-out images.

    Args:
        cfg: the labelled images, and `supervised_epochs`, `layer_decay`, `label_smoothing`. With `from_scratch` the encoder begins at
            random, as for comparison; then every layer has the same rate and the labels are not smoothed.
        model: a model to begin with instead of `cfg.checkpoint`; it stays as it is.

    Raises:
        ConfigError: there is no such device.
        CheckpointError: the checkpoint is absent or damaged.
        DataError: the set has fewer than two classes.
    """
    model = model or load_model(cfg.checkpoint, device_of(cfg))
    judge = Judge(cfg, model.cfg)
    start = time.perf_counter()
    classifier = train_with_labels(judge, None if cfg.from_scratch else model)
    seconds = time.perf_counter() - start
    predictions = classifier.predict(judge.test, judge.test_index)
    return FinetuneResult(classifier, float((predictions == judge.test_y).float().mean()), predictions, seconds)


def train_with_labels(judge: Judge, model: IJEPA_base | None) -> Classifier:
    """A classifier that was trained with a protocol's labelled images, begun from a model's encoder, or at random for None."""
    cfg = judge.cfg
    torch.manual_seed(cfg.seed)
    if model is None:
        config = from_scratch(judge.config)
        encoder, options = IJEPA_base(config).student_encoder, {}
    else:
        config, encoder = judge.config, copy.deepcopy(model.encoder(cfg.encoder))
        options = {"layer_decay": cfg.layer_decay, "label_smoothing": cfg.label_smoothing}
    classifier = Classifier(config, encoder, judge.train.classes).to(device_of(cfg))
    rate = config.optimizer.base_learning_rate
    train_classifier(classifier, judge.train, judge.index, epochs=cfg.supervised_epochs, seed=cfg.seed, learning_rate=rate, **options)
    return classifier


class Judge:
    """One protocol for every encoder: the same labelled images, the same test images, the same probes.

    Args:
        cfg: the protocol.
        config: names the data set, the image's size and the grid.

    Attributes:
        train, test: the images.
        index, test_index: which of `train` have labels, which of `test` are asked: files that cannot be read are left out.
        train_y, test_y: their classes.

    Raises:
        ConfigError: an encoder or a pooling that is not known; there is no such device.
        DataError: the set has fewer than two classes, images without a label, or too many files that cannot be read.
    """

    def __init__(self, cfg: FinetuneConfig, config: IJepaConfig):
        for name, known in (("encoder", ("teacher", "student")), ("pooling", (*POOLINGS, "layers"))):
            if getattr(cfg, name) not in known:
                raise ConfigError(f"{name} = {getattr(cfg, name)!r}: give {' or '.join(known)}")
        device_of(cfg)  # refused before any image is read
        config = config.copy()
        if cfg.data_root is not None:
            config.data.root = cfg.data_root
        self.cfg, self.config = cfg, config
        self.train, self.test = load_images(config, "train"), load_images(config, "test")
        if len(self.train.classes) < 2:
            raise DataError(f"data.dataset = {config.data.dataset!r} has one class, a probe needs two: sort the images into class folders")
        for split, source in (("train", self.train), ("test", self.test)):
            if without := int((source.labels < 0).sum()):
                raise DataError(
                    f"{without} of the {len(source)} {split} images of data.dataset = {config.data.dataset!r} have no label (their "
                    f"class is below 0): take a set with labels, or leave those images out"
                )
        self.test_index = self.test.readable(torch.arange(len(self.test)))
        self.test_y = self.test.labels[self.test_index]
        self.draw_labels(cfg.labels_seed)

    def draw_labels(self, seed: int) -> None:
        """Draw the labelled images, `labels_per_class` of each class."""
        self.index = self.train.readable(drawn_of_each_class(self.train.labels, self.cfg.labels_per_class, seed))
        self.train_y = self.train.labels[self.index]

    def features(self, encoder: nn.Module, poolings: tuple[str, ...] = POOLINGS) -> dict[str, tuple[Tensor, Tensor]]:
        """For each pooling the features of the labelled and of the test images, (N, F) each, on the CPU."""
        options = {"batch_size": self.config.data.eval_batch_size, "mixed_precision": self.config.hardware.mixed_precision}
        train = pooled_features(encoder, self.train, self.index, poolings, **options)
        test = pooled_features(encoder, self.test, self.test_index, poolings, **options)
        return {pooling: (train[pooling], test[pooling]) for pooling in poolings}

    def tokens(self, model: IJEPA_base) -> tuple[Tensor, Tensor]:
        """Tokens of the labelled and of the test images, each (N, P, D), on the CPU."""
        images = ((self.train, self.index), (self.test, self.test_index))
        train, test = (encode_images(model, source, index, model.cfg, self.cfg.encoder) for source, index in images)
        return train, test

    def scores(self, model: IJEPA_base) -> dict[str, float]:
        """Test accuracy of a model's encoder under each of `READINGS` that it has."""
        return share_right(self.right(model.encoder(self.cfg.encoder)))

    def pixel_scores(self) -> dict[str, float]:
        """The same for the pixels, which have no layers."""
        return share_right(self.pixels_right())

    def right(self, encoder: nn.Module) -> dict[str, Tensor]:
        """Which test images are classified rightly, (N,), from an encoder's features, under each of `READINGS` that it has."""
        return self._right(self.features(encoder, ("mean", *(("layers",) if isinstance(encoder, Encoder) else ()), "grid")))

    @property
    def pixel_side(self) -> int:
        """Height and width of the images whose pixels are judged; larger ones would need more memory than any encoder's features."""
        return min(PIXELS, self.config.model.img_size)

    @property
    def pixel_row(self) -> str:
        """What the row of the pixels is called."""
        side = self.pixel_side
        return "raw pixels" if side == self.config.model.img_size else f"raw pixels, at {side} x {side}"

    def pixels_right(self) -> dict[str, Tensor]:
        """The same for the pixels: the mean patch under "mean"; every pixel, at `pixel_side`, under "grid" and "knn"."""
        train = self._pixels(self.train, self.index)
        test = self._pixels(self.test, self.test_index)
        if all((x == x[:, :1]).all() for x, _ in (train, test)):  # grey images: their channels are copies of one another
            train, test = ((x[:, :1], patch.view(len(patch), x.shape[1], -1)[:, 0]) for x, patch in (train, test))
        pixels, patches = zip(train, test, strict=True)
        return self._right({"mean": patches, "grid": [x.flatten(1) for x in pixels]})

    def _pixels(self, source, index: Tensor) -> tuple[Tensor, Tensor]:
        """Images (N, C, side, side) and their mean patches (N, C * size * size)."""
        small, patches, size = [], [], self.config.model.patch_size
        for images in source.batches(index, 500):
            patches.append(F.unfold(images, size, stride=size).mean(2))
            shrunk = images.shape[-1] > self.pixel_side
            small.append(F.interpolate(images, (self.pixel_side,) * 2, mode="bilinear", antialias=True) if shrunk else images)
        return torch.cat(small), torch.cat(patches)

    def _right(self, pooled: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        found = {name: fit_probe(train, self.train_y, test, self.test_y, self.cfg).predictions for name, (train, test) in pooled.items()}
        train, test = pooled["grid"]
        found["knn"] = knn_predictions(train.to(device_of(self.cfg)), self.train_y, test)
        return {name: predictions == self.test_y for name, predictions in found.items()}


def share_right(right: dict[str, Tensor]) -> dict[str, float]:
    """Accuracies from which test images were classified rightly."""
    return {name: float(values.double().mean()) for name, values in right.items()}


def drawn_of_each_class(labels: Tensor, count: int, seed: int) -> Tensor:
    """Indices of `count` images of each class, drawn at random, in order; all of them for 0, or where a class has fewer."""
    if count == 0:
        return torch.arange(len(labels))
    order = torch.randperm(len(labels), generator=generator_for(seed))
    return torch.cat([order[labels[order] == c][:count] for c in labels.unique()]).sort().values


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0 done, 2 refused with one line on standard error."""
    parser = argparse.ArgumentParser(prog="python -m wejepa.train.finetune", description="Judge a pretrained encoder.")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="a setting of FinetuneConfig; repeatable")
    parser.add_argument(
        "--mode", choices=("probe", "compare", "finetune"), default="probe", help="the probe alone; beside its baselines; the whole encoder"
    )
    args = parser.parse_args(argv)

    def run() -> None:
        cfg = FinetuneConfig()
        for text in args.set:
            name, equals, raw = text.partition("=")
            if not equals:
                raise ConfigError(f"{text!r}: write field=value, such as pooling=mean")
            setattr(cfg, name.strip(), parse_value(raw))
        if args.mode == "compare":
            comparison = compare_pretrained_vs_scratch(cfg)
            print(comparison.table(), comparison.differences(), sep="\n\n")
        elif args.mode == "finetune":
            result = finetune_encoder(cfg)
            result.classifier.save(cfg.classifier)
            print(f"test accuracy {100 * result.accuracy:.2f} % after {result.seconds:.0f} s; classifier {cfg.classifier}")
        else:
            result = train_linear_probe(cfg)
            print(f"test accuracy {100 * result.accuracy:.2f} % ({cfg.pooling}; penalty {result.penalty:g})")

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
