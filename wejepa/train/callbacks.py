"""What a run tells while it trains: a measurement of its features and a line for every epoch.

A callback is anything with two methods, `on_step(step, numbers)` and `on_epoch(entry)`; `entry` is the epoch's line of the history.
`launch_pretraining` adds those of its own: `EpochTable`, `MetricsFile` and, if the config asks for it, `TensorBoard`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from wejepa.analysis.features import encode_images, knn_accuracy, rankme, teacher_variance
from wejepa.config import IJepaConfig
from wejepa.data import Source
from wejepa.errors import CheckpointError, ConfigError
from wejepa.model import IJEPA_base
from wejepa.paths import print_line, printable
from wejepa.seeds import generator_for

__all__ = ["Callback", "EpochTable", "LogFile", "MetricsFile", "Monitor", "OnEpoch", "TensorBoard"]

# Training images that the monitor's k-NN votes with, at least so many and so many for each class; and others that it classifies.
VOTERS, VOTERS_PER_CLASS, CLASSIFIED = 1000, 20, 500
METRICS = ("step", "loss", "gradient_norm", "learning_rate", "weight_decay", "momentum")
COLUMNS = (
    ("epoch", "epoch", "{:d}"),
    ("loss", "loss", "{:.4f}"),
    ("teacher_variance", "teacher var", "{:.3f}"),
    ("rankme", "RankMe", "{:.1f}"),
    ("knn", "k-NN", "{:.3f}"),
    ("images_per_second", "images/s", "{:.0f}"),
)


class Callback:
    """Called as a run goes; each method does nothing unless it is overridden."""

    def on_step(self, step: int, numbers: dict[str, float]) -> None:
        """After update number `step`, counted from 1, on every process; on an accelerator the next update is under way by then.

        The numbers are the step's "loss", "gradient_norm" (before clipping), "learning_rate", "weight_decay" and "momentum".
        """

    def on_epoch(self, entry: dict[str, Any]) -> None:
        """After an epoch, with its line of the history, on the first process."""


class OnEpoch(Callback):
    """A function that is called with each epoch's line of the history."""

    def __init__(self, function: Callable[[dict[str, Any]], Any]):
        self.function = function

    def on_epoch(self, entry: dict[str, Any]) -> None:
        self.function(entry)


class LogFile:
    """Lines that are printed and kept in the output folder.

    Args:
        path: the file; lines are added to what is there.
    """

    def __init__(self, path: Path):
        self.path = path

    def write(self, line: str) -> None:
        """Print a line and keep it."""
        print_line(line)
        with contextlib.suppress(OSError), open(self.path, "a", encoding="utf-8") as file:  # a full disk stops checkpoints, not lines
            file.write(printable(line) + "\n")


class EpochTable(Callback):
    """One line an epoch, under a head of the columns' names.

    Args:
        log: where the lines go.
    """

    def __init__(self, log: LogFile):
        self.log = log

    def begin(self, history: list[dict[str, Any]]) -> None:
        """Write the head, and show the epochs that an earlier run has written down already."""
        self.log.write("  ".join(f"{title:>11}" for _, title, _ in COLUMNS))
        for entry in history:
            print(epoch_line(entry), flush=True)

    def on_epoch(self, entry: dict[str, Any]) -> None:
        self.log.write(epoch_line(entry))


def epoch_line(entry: dict[str, Any]) -> str:
    """One epoch of the history in one line; what a monitor of the caller's own does not measure is left open, what else it does follows."""
    known = {"step", "seconds", *(key for key, _, _ in COLUMNS)}
    columns = [f"{form.format(entry[key]) if entry.get(key) is not None else '-':>11}" for key, _, form in COLUMNS]
    return "  ".join(columns + [f"{key} {value}" for key, value in entry.items() if key not in known])


class MetricsFile(Callback):
    """The numbers of every step as a line of a CSV file, flushed at once: a run that is killed and resumed leaves each step in it once.

    Args:
        path: the file; what is in it of steps after `step`, which a resumed run makes anew, is cut off.
        step: the steps made so far.
    """

    def __init__(self, path: Path, step: int = 0):
        self.path, head = path, ",".join(METRICS)
        try:
            lines = path.read_text().split("\n")[:-1] if path.exists() else []  # what follows the last line's end is half a line
            kept = [line for line in lines[1:] if line.partition(",")[0].isdecimal() and int(line.partition(",")[0]) <= step]
            aside = path.with_name(f".{path.name}.tmp")
            aside.write_text("\n".join([head, *kept, ""]))
            os.replace(aside, path)
        except OSError as error:
            raise CheckpointError(f"cannot write {path} ({error}): choose another hardware.output_dir") from error
        self.missing = step - len(kept)  # where somebody removed the file

    def on_step(self, step: int, numbers: dict[str, float]) -> None:
        with contextlib.suppress(OSError), open(self.path, "a") as file:  # a full disk stops checkpoints, not lines
            file.write(",".join([str(step), *(repr(numbers[name]) for name in METRICS[1:])]) + "\n")


class TensorBoard(Callback):
    """The numbers of every step and epoch for TensorBoard, by torch's own writer.

    Args:
        folder: for its event files.
        step: the steps made so far; what is in the folder of later ones is hidden.

    Raises:
        ConfigError: the package tensorboard is not installed.
    """

    def __init__(self, folder: Path, step: int = 0):
        self.writer = tensorboard_writer()(str(folder), purge_step=step + 1)

    def on_step(self, step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(f"step/{name}", value, step)

    def on_epoch(self, entry: dict[str, Any]) -> None:
        for name, value in entry.items():
            if name not in ("epoch", "step") and isinstance(value, int | float):
                self.writer.add_scalar(f"epoch/{name}", value, entry["step"])
        self.writer.flush()


def tensorboard_writer() -> type:
    """torch's writer for TensorBoard; a ConfigError where the package tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            f"hardware.tensorboard = true needs the package tensorboard ({error}): pip install 'wejepa[tensorboard]', or set it to false"
        ) from error
    return SummaryWriter


class Monitor:
    """What tells learning from collapse, on images of the training set: teacher variance, RankMe, nearest neighbours.

    The voters of the k-NN grow with the classes, 20 a class and 1,000 at least; they are pooled a portion at a time.
    `Pretraining` takes a function of your own in its place.

    Args:
        cfg: the run's config.
        source: its images.
        model: the model that is measured.
    """

    def __init__(self, cfg: IJepaConfig, source: Source, model: IJEPA_base):
        self.cfg, self.source, self.model = cfg, source, model

    def __call__(self) -> dict[str, float | None]:
        """Measure the model as it is: "teacher_variance", "rankme", and "knn", which is None where there are no classes."""
        wanted = max(VOTERS, VOTERS_PER_CLASS * len(self.source.classes))
        index = torch.randperm(len(self.source), generator=generator_for(self.cfg.hardware.seed))[: wanted + CLASSIFIED]
        index = self.source.readable(index)
        voters = len(index) * wanted // (wanted + CLASSIFIED)
        first, *rest = index.split(VOTERS + CLASSIFIED)
        tokens = encode_images(self.model, self.source, first, self.cfg)
        more = [encode_images(self.model, self.source, part, self.cfg).mean(1) for part in rest]
        x, y = torch.cat([tokens.mean(1), *more]), self.source.labels[index]
        return {
            "teacher_variance": teacher_variance(tokens),
            "rankme": rankme(x),
            "knn": knn_accuracy(x[:voters], y[:voters], x[voters:], y[voters:]) if len(self.source.classes) > 1 else None,
        }
