"""Was anything learnt? A linear probe on frozen features, and the comparison that could embarrass it.

The protocol is the same for every row of a comparison: the same labelled training images, features standardised by their own mean and
deviation, a softmax regression trained by AdamW for every pair of learning rate and weight decay at once, the pair chosen on a fifth of
the *training* images, the regression trained anew with it on all of them, and one look at the test images.

    python -m wejepa.train.finetune --set checkpoint=outputs/pretrain/latest.pt              # the probe alone
    python -m wejepa.train.finetune --set checkpoint=outputs/pretrain/latest.pt --compare    # beside its baselines
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wejepa.analysis.features import POOLINGS, encode_images, knn_accuracy, pool_tokens
from wejepa.config import IJepaConfig, Section, parse_value, setting
from wejepa.data import load_images, random_crops
from wejepa.devices import autocast, pick_device, precision, to_device
from wejepa.errors import ConfigError, DataError, exit_code
from wejepa.memory import freed_memory_kept
from wejepa.model import IJEPA_base
from wejepa.seeds import generator_for
from wejepa.train.checkpoints import load_model
from wejepa.train.loop import parameter_groups
from wejepa.train.schedules import cosine

__all__ = ["Comparison", "FinetuneConfig", "Judge", "ProbeResult", "compare_pretrained_vs_scratch", "fit_probe", "train_linear_probe"]

LEARNING_RATES = (1e-3, 1e-2)  # times the square root of the feature's width
WEIGHT_DECAYS = (0.0, 1e-3, 1e-2)  # share of the weight that a step takes away at the full rate


@dataclass
class FinetuneConfig(Section):
    """How features are judged."""

    checkpoint: str = setting("outputs/pretrain/latest.pt", "checkpoint of wejepa.train.pretrain")
    encoder: str = setting("teacher", "teacher, as in the paper, or student")
    pooling: str = setting("grid", "mean over all tokens, or over each cell of a 4 x 4 grid")
    labels_per_class: int = setting(500, "labelled training images of each class; 0 takes all", low=0)
    epochs: int = setting(40, "passes of the probe over its features", low=1)
    batch_size: int = setting(250, "features per update of the probe", low=1)
    supervised_epochs: int = setting(30, "passes of the encoder that is trained with labels from scratch", low=1)
    seed: int = setting(0, "choice of the split, order of the batches, initial weights", low=0, high=2**31 - 1)
    device: str = setting("auto", "where features and probes are computed: cpu, cuda, mps, or auto for the best one present")
    data_root: str | None = setting(None, "where the data set is now, if not where the checkpoint saw it", optional=True)


@dataclass(frozen=True)
class ProbeResult:
    """A trained probe.

    Attributes:
        accuracy: share of the test images classified rightly after the last epoch.
        history: the same after each epoch.
        learning_rate, weight_decay: chosen on a fifth of the training images.
        predictions: the class given to each test image, (N,), on the CPU.
    """

    accuracy: float
    history: list[float]
    learning_rate: float
    weight_decay: float
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
    train, test = (pool_tokens(tokens, model.cfg.grid_size, cfg.pooling) for tokens in judge.tokens(model))
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
        cfg: `epochs`, `batch_size`, `seed` and `device` are used.

    Raises:
        ConfigError: there is no such device.
        DataError: fewer than 10 labelled images, too few to choose on a fifth of them; labels that are negative, or not one for
            each row of features.
    """
    for name, x, y in (("train", train_x, train_y), ("test", test_x, test_y)):
        if y.shape != x.shape[:1]:
            raise DataError(f"{name}_y has shape {tuple(y.shape)} for {len(x)} rows of {name}_x: give one label for each")
        if negative := (y < 0).nonzero().flatten().tolist():
            raise DataError(f"{name}_y[{negative[0]}] = {y[negative[0]]}: classes count from 0; leave out what has none")
    if len(train_x) < 10:
        raise DataError(f"a probe needs 10 labelled images or more, there are {len(train_x)}: raise labels_per_class or label some more")
    train_x, train_y, test_x, test_y = (values.to(device_of(cfg)) for values in (train_x, train_y, test_x, test_y))
    classes = int(train_y.max()) + 1
    order = torch.randperm(len(train_x), generator=generator_for(cfg.seed)).to(train_x.device)
    held, kept = order[: len(order) // 5], order[len(order) // 5 :]
    pairs = [(rate, decay) for rate in LEARNING_RATES for decay in WEIGHT_DECAYS]
    right = _softmax_regressions(train_x[kept], train_y[kept], train_x[held], classes, pairs, cfg)[-1] == train_y[held]
    best = pairs[int(right.float().mean(1).argmax())]
    every_epoch = _softmax_regressions(train_x, train_y, test_x, classes, [best], cfg)[:, 0]  # (epochs, N)
    history = (every_epoch == test_y).float().mean(1).tolist()
    return ProbeResult(history[-1], history, *best, every_epoch[-1].cpu())


def _softmax_regressions(train_x, train_y, test_x, classes: int, pairs: list[tuple[float, float]], cfg: FinetuneConfig) -> Tensor:
    """Train one regression for every (rate, decay) side by side; predictions after each epoch, (epochs, pairs, N_test)."""
    mean, std, width, device = train_x.mean(0), train_x.std(0) + 1e-6, train_x.shape[1], train_x.device
    train_x, test_x = ((x - mean) / std / width**0.5 for x in (train_x, test_x))  # each vector's norm is about 1
    weights = [torch.zeros(width, classes, device=device, requires_grad=True) for _ in pairs]
    biases = [torch.zeros(classes, device=device, requires_grad=True) for _ in pairs]
    groups = []
    for w, b, (rate, decay) in zip(weights, biases, pairs, strict=True):
        rate *= width**0.5
        groups += [{"params": [w], "lr": rate, "weight_decay": decay / rate}, {"params": [b], "lr": rate, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), fused=True)
    batch_size = min(cfg.batch_size, len(train_x))
    per_epoch = len(train_x) // batch_size
    fade = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, cfg.epochs * per_epoch)
    generator, predictions = generator_for(cfg.seed, 1), []

    def logits(x: Tensor) -> Tensor:  # (N, pairs, classes): one wide product, several times faster than a narrow one for each pair
        return (x @ torch.cat(weights, dim=1) + torch.cat(biases)).view(len(x), len(pairs), classes)

    for _ in range(cfg.epochs):
        order = torch.randperm(len(train_x), generator=generator)[: per_epoch * batch_size].to(device)
        for index in order.split(batch_size):
            wanted = train_y[index].repeat_interleave(len(pairs))
            loss = F.cross_entropy(logits(train_x[index]).flatten(0, 1), wanted) * len(pairs)  # each pair's mean, summed
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            fade.step()
        with torch.no_grad():
            predictions.append(logits(test_x).argmax(-1).T)
    return torch.stack(predictions)


# ---------------------------------------------------------------- the comparison


@dataclass(frozen=True)
class Comparison:
    """Test accuracies under one protocol.

    Attributes:
        rows: for each encoder, the accuracy of the probe on mean-pooled tokens ("mean"), on a coarse grid ("grid") and of
            nearest neighbours on that grid ("knn"), and the seconds its training took ("seconds").
        labels: labelled images that every row was given.
        tested: test images.
    """

    rows: dict[str, dict[str, float]]
    labels: int
    tested: int

    def table(self) -> str:
        """The rows as a Markdown table, accuracies in percent."""
        head = ["", "mean-pooled tokens", "tokens on a 4 x 4 grid", "k-NN", "training, s"]
        lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * 4]
        for name, row in self.rows.items():
            scores = [f"{100 * row[key]:.1f}" for key in ("mean", "grid", "knn")]
            lines.append("| " + " | ".join([name, *scores, f"{row['seconds']:.0f}" if row["seconds"] else "-"]) + " |")
        return "\n".join(lines)


def compare_pretrained_vs_scratch(cfg: FinetuneConfig, model: IJEPA_base | None = None, pretraining_seconds: float = 0.0) -> Comparison:
    """Judge a pretrained encoder beside its baselines, all under the same protocol.

    Rows: the pretrained encoder; the same encoder at its random initialisation; raw pixels (the mean patch under "mean", every pixel
    under "grid": 32 x 32 places to the grid's 4 x 4 on the embedded set); and the whole encoder trained with the same labels from scratch.

    Args:
        cfg: the protocol.
        model: a model to judge instead of `cfg.checkpoint`.
        pretraining_seconds: told in the table.

    All computes on `cfg.device`, but for the features of a model that is handed in: those where it is.
    """
    device = device_of(cfg)
    model = model or load_model(cfg.checkpoint, device)
    judge = Judge(cfg, model.cfg)
    rows = {
        f"pretrained {cfg.encoder}": judge.scores(model) | {"seconds": pretraining_seconds},
        "same encoder, random": judge.scores(untrained(model.cfg).to(device)) | {"seconds": 0.0},
        "raw pixels": judge.pixel_scores() | {"seconds": 0.0},
    }
    start = time.perf_counter()
    supervised = train_supervised(model.cfg, judge.train, judge.index, cfg)
    rows["whole encoder, with labels"] = {"seconds": time.perf_counter() - start} | judge.scores(supervised)
    return Comparison(rows, len(judge.index), len(judge.test_y))


def untrained(cfg: IJepaConfig) -> IJEPA_base:
    """The model of a config as its pretraining begins, without any weights from elsewhere."""
    torch.manual_seed(cfg.hardware.seed)
    return IJEPA_base(from_scratch(cfg)).eval()


def from_scratch(cfg: IJepaConfig) -> IJepaConfig:
    """A copy of a config whose encoder starts at random and learns."""
    cfg = cfg.copy()
    cfg.model.classification_pretrained = cfg.model.classification_frozen = False
    return cfg


@freed_memory_kept()
def train_supervised(cfg: IJepaConfig, source, index: Tensor, finetune: FinetuneConfig) -> IJEPA_base:
    """A model whose encoders were trained from scratch with labels: mean-pooled tokens, a linear layer, cross-entropy.

    The images are augmented as in pretraining, the rate is pretraining's, warmed up for a tenth and lowered along a cosine.
    """
    device = device_of(finetune)
    torch.manual_seed(finetune.seed)
    model = IJEPA_base(from_scratch(cfg))
    head = nn.Linear(model.student_encoder.embed_dim, len(source.classes)).to(device)
    encoder = model.to(device).student_encoder
    optimizer = torch.optim.AdamW([*parameter_groups(encoder), {"params": head.parameters(), "decays": False}], fused=True)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.05 * group["decays"]
    batch_size = min(cfg.data.train_batch_size, len(index))
    per_epoch = len(index) // batch_size
    steps, step = finetune.supervised_epochs * per_epoch, 0
    scaler = torch.amp.GradScaler(device.type, enabled=precision(device, cfg.hardware.mixed_precision) == torch.float16)
    for epoch in range(finetune.supervised_epochs):
        order = index[torch.randperm(len(index), generator=generator_for(finetune.seed, epoch))]
        parts = order[: per_epoch * batch_size].view(per_epoch, batch_size)
        crops = torch.stack([random_crops(batch_size, cfg, generator_for(finetune.seed, epoch, i)) for i in range(per_epoch)])
        for part, images in zip(parts, source.augmented(parts, crops, device), strict=True):
            rate = min(1.0, 10 * (step + 1) / steps) * cosine(step / steps, cfg.optimizer.base_learning_rate, 0.0)
            for group in optimizer.param_groups:
                group["lr"] = rate
            with autocast(device, cfg.hardware.mixed_precision):
                loss = F.cross_entropy(head(encoder(to_device(images, device)).mean(1)).float(), to_device(source.labels[part], device))
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            step += 1
    model.teacher_encoder.load_state_dict(encoder.state_dict())
    return model.eval()


class Judge:
    """One protocol for every encoder: the same labelled images, the same test images, the same probes.

    Args:
        cfg: the protocol.
        config: names the data set, the image's size and the grid.

    Attributes:
        train, test: the images.
        index, test_index: which of `train` have labels, which of `test` are asked: files that cannot be read are left out.

    Raises:
        ConfigError: an encoder or a pooling that is not known; there is no such device.
        DataError: the set has fewer than two classes, or too many files that cannot be read.
    """

    def __init__(self, cfg: FinetuneConfig, config: IJepaConfig):
        for name, known in (("encoder", ("teacher", "student")), ("pooling", POOLINGS)):
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
        self.index = self.train.readable(first_of_each_class(self.train.labels, cfg.labels_per_class))
        self.test_index = self.test.readable(torch.arange(len(self.test)))
        self.train_y, self.test_y = self.train.labels[self.index], self.test.labels[self.test_index]

    def tokens(self, model: IJEPA_base) -> tuple[Tensor, Tensor]:
        """Tokens of the labelled and of the test images, each (N, P, D), on the CPU."""
        images = ((self.train, self.index), (self.test, self.test_index))
        train, test = (encode_images(model, source, index, model.cfg, self.cfg.encoder) for source, index in images)
        return train, test

    def scores(self, model: IJEPA_base) -> dict[str, float]:
        """Test accuracy of an encoder: "mean", "grid" and "knn"."""
        tokens = self.tokens(model)
        return self._scores({pooling: [pool_tokens(t, self.config.grid_size, pooling) for t in tokens] for pooling in POOLINGS})

    def pixel_scores(self) -> dict[str, float]:
        """The same for the pixels: the mean patch under "mean"; every pixel under "grid" and "knn"."""
        size = self.config.model.patch_size
        images = ((self.train, self.index), (self.test, self.test_index))
        pixels = [torch.cat(list(source.batches(index, 500))) for source, index in images]
        if all((x == x[:, :1]).all() for x in pixels):
            pixels = [x[:, :1] for x in pixels]  # grey images: their channels are copies of one another
        patches = [F.unfold(x, size, stride=size).mean(2) for x in pixels]  # (N, C * size * size)
        return self._scores({"mean": patches, "grid": [x.flatten(1) for x in pixels]})

    def _scores(self, pooled: dict[str, list[Tensor]]) -> dict[str, float]:
        scores = {name: fit_probe(train, self.train_y, test, self.test_y, self.cfg).accuracy for name, (train, test) in pooled.items()}
        train, test = pooled["grid"]
        return scores | {"knn": knn_accuracy(train.to(device_of(self.cfg)), self.train_y, test, self.test_y)}


def first_of_each_class(labels: Tensor, count: int) -> Tensor:
    """Indices of the first `count` images of each class, in order; all of them for 0."""
    if count == 0:
        return torch.arange(len(labels))
    return torch.cat([(labels == c).nonzero().flatten()[:count] for c in labels.unique()]).sort().values


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0 done, 2 refused with one line on standard error."""
    parser = argparse.ArgumentParser(prog="python -m wejepa.train.finetune", description="Judge a pretrained encoder.")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="a setting of FinetuneConfig; repeatable")
    parser.add_argument("--compare", action="store_true", help="beside a random encoder, raw pixels, and training with labels")
    args = parser.parse_args(argv)

    def run() -> None:
        cfg = FinetuneConfig()
        for text in args.set:
            name, equals, raw = text.partition("=")
            if not equals:
                raise ConfigError(f"{text!r}: write field=value, such as pooling=mean")
            setattr(cfg, name.strip(), parse_value(raw))
        if args.compare:
            print(compare_pretrained_vs_scratch(cfg).table())
            return
        result = train_linear_probe(cfg)
        print(f"test accuracy {100 * result.accuracy:.2f} % ({cfg.pooling}; rate {result.learning_rate:g}, decay {result.weight_decay:g})")

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
