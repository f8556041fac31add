"""What a run tells while it trains: a measurement of its features and a line for every epoch.

A callback is anything with two methods, `on_step(step, numbers)` and `on_epoch(entry)`; `entry` is the epoch's line of the history.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from wejepa.analysis.features import encode_images, knn_accuracy, rankme, teacher_variance
from wejepa.config import IJepaConfig
from wejepa.model import IJEPA_base
from wejepa.paths import print_line, printable
from wejepa.seeds import generator_for

__all__ = ["Callback", "EpochTable", "LogFile", "Monitor", "OnEpoch"]

VOTERS, CLASSIFIED = 1000, 500  # training images that the monitor's k-NN votes with, and other training images that it classifies
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
        """After update number `step`, counted from 1, on every process; on an accelerator the next update is under way by then."""

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
    """One epoch of the history in one line."""
    return "  ".join(f"{form.format(entry[key]) if entry[key] is not None else '-':>11}" for key, _, form in COLUMNS)


class Monitor:
    """What tells learning from collapse, on images of the training set: teacher variance, RankMe, nearest neighbours.

    Args:
        cfg: the run's config.
        source: its images.
        model: the model that is measured.
    """

    def __init__(self, cfg: IJepaConfig, source, model: IJEPA_base):
        self.cfg, self.source, self.model = cfg, source, model

    def __call__(self) -> dict[str, float | None]:
        """Measure the model as it is: "teacher_variance", "rankme", and "knn", which is None where there are no classes."""
        index = torch.randperm(len(self.source), generator=generator_for(self.cfg.hardware.seed))[: VOTERS + CLASSIFIED]
        index = self.source.readable(index)
        voters = len(index) * VOTERS // (VOTERS + CLASSIFIED)
        tokens = encode_images(self.model, self.source, index, self.cfg)
        x, y = tokens.mean(1), self.source.labels[index]
        return {
            "teacher_variance": teacher_variance(tokens),
            "rankme": rankme(x),
            "knn": knn_accuracy(x[:voters], y[:voters], x[voters:], y[voters:]) if len(self.source.classes) > 1 else None,
        }
