"""Pretrain an I-JEPA: `launch_pretraining(cfg)`, or from the shell

    python -m wejepa.train.pretrain --set optimizer.epochs=5 --set data.dataset=cifar10
    python -m wejepa.train.pretrain --config my.json --resume auto
    python -m wejepa.train.pretrain --print-config > my.json
    python -m wejepa.train.pretrain --help-settings
    torchrun --nproc-per-node=2 -m wejepa.train.pretrain --config my.json      # or srun, or another launcher: see launchers.py

Exit codes: 0 done; 2 refused, with one line that says what to do; 130 (SIGINT) or 143 (SIGTERM) interrupted, with a checkpoint written:
the same command with --resume auto goes on from it. torch is imported when training starts, so that a config is printed or refused at once.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wejepa.config import IJepaConfig, parse_override, settings
from wejepa.errors import ConfigError, WejepaError
from wejepa.paths import path_of, print_line
from wejepa.presets import PRESETS
from wejepa.train.launchers import launched

if TYPE_CHECKING:
    from torch import Tensor

    from wejepa.data import Source
    from wejepa.model import IJEPA_base
    from wejepa.train.callbacks import Callback

__all__ = ["PretrainResult", "expected_minutes", "launch_pretraining", "main"]


@dataclass(frozen=True)
class PretrainResult:
    """What a run leaves behind.

    Attributes:
        checkpoint: path of the last checkpoint.
        history: one dict an epoch: epoch, step, loss, teacher_variance, rankme, knn, images_per_second, seconds.
        model: the trained model, in evaluation mode.
    """

    checkpoint: Path
    history: list[dict[str, Any]]
    model: IJEPA_base


def launch_pretraining(
    cfg: IJepaConfig,
    resume: str | Path | None = None,
    *,
    source: Source | None = None,
    model: IJEPA_base | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    monitor: Callable[[IJEPA_base], dict[str, Any]] | None = None,
    callbacks: Iterable[Callback] = (),
) -> PretrainResult:
    """Pretrain by a config, printing one line an epoch.

    Args:
        cfg: the config; see `IJepaConfig.summary`.
        resume: a checkpoint to go on from; "auto" for the newest good one in `hardware.output_dir`, if any; None to start afresh,
            which moves what an earlier run has left there into a folder earlier-1, -2, ... in it.
        source, model, loss, monitor, callbacks: your own images, model, loss (`wejepa.model.ijepa_loss` for None), measurement and logging,
            see `Pretraining`.

    Beside the checkpoints `hardware.output_dir` gets log.txt, metrics.csv with every step, and with `hardware.tensorboard` event files.

    With several processes (torchrun, srun and others, see `wejepa.train.launchers`) each calls this; `data.train_batch_size` is what they
    all take together. After a restart by torchrun the run goes on from the newest checkpoint that the job has written, whatever `resume`.

    Raises:
        ConfigError, DataError, CheckpointError, TrainingError: each with one line that says what to do.
        RunInterrupted: SIGINT or SIGTERM came; the checkpoint of the last whole step is written. A KeyboardInterrupt.
    """
    from wejepa.model import ijepa_loss
    from wejepa.train.callbacks import EpochTable, MetricsFile, TensorBoard
    from wejepa.train.checkpoints import load_model
    from wejepa.train.folder import EVENTS, METRICS
    from wejepa.train.interruption import RunInterrupted, RunStopped
    from wejepa.train.loop import Pretraining

    run = Pretraining(cfg, resume, source=source, model=model, loss=loss or ijepa_loss, monitor=monitor, callbacks=callbacks)
    if run.ranks.first:
        table = EpochTable(run.log)
        table.begin(run.history)
        metrics = MetricsFile(run.output / METRICS, run.step)
        if metrics.missing:
            run.log.write(f"{metrics.path} lacks {metrics.missing} of the first {run.step} steps: what had them was removed")
        own = [table, metrics] + ([TensorBoard(run.output / EVENTS, run.step)] if cfg.hardware.tensorboard else [])
        run.callbacks[:0] = own
    try:
        checkpoint = run.run()
    except (RunInterrupted, RunStopped):  # which all processes raise at the same step
        run.ranks.leave()
        raise
    model = load_model(checkpoint) if cfg.hardware.shard_model else run.model.eval()
    run.ranks.leave()
    return PretrainResult(checkpoint, run.history, model)


def expected_minutes(cfg: IJepaConfig, steps: int = 10) -> float:
    """Minutes that `launch_pretraining(cfg)` will take on this machine, by timing a few of its steps and its monitor.

    Args:
        cfg: the config; nothing is written to its output folder.
        steps: timed steps; one more warms up.

    Raises:
        ConfigError, DataError: as `launch_pretraining`.
    """
    from wejepa.data import training_batches
    from wejepa.memory import freed_memory_kept
    from wejepa.train.loop import Pretraining

    cfg = cfg.copy()
    with tempfile.TemporaryDirectory() as folder, freed_memory_kept():
        cfg.hardware.output_dir = folder
        run = Pretraining(cfg)
        seconds, begun = [], time.perf_counter()
        for images in itertools.islice(training_batches(run.source, cfg, epoch=0), steps + 1):
            run.train_step(images)
            seconds.append(time.perf_counter() - begun)
            begun = time.perf_counter()
        a_step = statistics.median(seconds[1:] or seconds)  # the first one is slow
        run.monitor()
        a_measurement = time.perf_counter() - begun
    return cfg.optimizer.epochs * (run.steps_per_epoch * a_step + a_measurement) / 60


def config_from_arguments(args: argparse.Namespace) -> IJepaConfig:
    """The preset, overlaid with the file, overlaid with each --set."""
    values = IJepaConfig.from_dict(PRESETS[args.preset]).to_dict()
    if args.config:
        try:
            given = json.loads(path_of(args.config).read_text())
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ConfigError(f"--config {args.config} cannot be read as JSON ({error}): --print-config writes such a file") from error
        IJepaConfig.from_dict(given)  # refused here if it is no config, before it is mixed with the preset
        for section, settings in given.items():
            values[section] |= settings
    for text in args.set:
        section, name, value = parse_override(text)
        values.setdefault(section, {})[name] = value
    return IJepaConfig.from_dict(values)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code that the module's docstring tells."""
    parser = argparse.ArgumentParser(prog="python -m wejepa.train.pretrain", description="Pretrain an I-JEPA.")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="default", help="the config to start from")
    parser.add_argument("--config", type=Path, metavar="FILE", help="a JSON file of settings")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="one setting; repeatable")
    parser.add_argument("--resume", metavar="auto|PATH", help="go on from the newest checkpoint in the output folder, or from one")
    parser.add_argument("--print-config", action="store_true", help="print the config as JSON and stop")
    parser.add_argument("--help-settings", action="store_true", help="print every setting, its help, default and range, and stop")
    args = parser.parse_args(argv)
    launch, rank = None, 0
    try:
        if args.help_settings:
            print("\n".join(f"{name}: {text}" for name, text in settings().items()))
            return 0
        launch = launched()
        rank = launch.rank if launch else 0
        cfg = config_from_arguments(args)
        if args.print_config:
            print(json.dumps(cfg.to_dict(), indent=2))
            return 0
        if rank == 0:
            print_line(cfg.summary())
        result = launch_pretraining(cfg, args.resume)
        if rank == 0:
            print_line(f"checkpoint {result.checkpoint}")
        return 0
    except WejepaError as error:
        where = f"[rank {rank}] " if launch else ""
        print(f"{where}{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        if rank == 0:
            print(f"interrupted: {stop}" if str(stop) else "interrupted", file=sys.stderr)
        return 128 + getattr(stop, "signum", 2)


if __name__ == "__main__":
    code = main()
    with contextlib.suppress(ConfigError):
        if launched():
            # Everything is on the disk. The interpreter's end would take gloo's threads apart in any order, and a finished job now and then
            # ends with "terminate called without an active exception", which torchrun takes for a failure.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    sys.exit(code)
