"""The folder of a run: its checkpoints, the newest of which a run goes on from.

A checkpoint is a file, or a folder where several processes wrote one together; what is done with one is done with the other.
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wejepa.config import IJepaConfig
from wejepa.errors import CheckpointError
from wejepa.files import flush_folder, replaced
from wejepa.paths import path_of
from wejepa.train.checkpoints import Expected, read_training_state, save_checkpoint
from wejepa.train.lock import FolderLock
from wejepa.train.ranks import Ranks
from wejepa.train.start import starting_weights

__all__ = ["EVENTS", "LATEST", "LOG", "METRICS", "RUN", "CheckpointFolder", "about_run", "resume_from"]

LATEST = "latest.pt"
LOG = "log.txt"
METRICS = "metrics.csv"  # a line a step
EVENTS = "tensorboard"  # a folder
RUN = "run.json"  # which run the folder belongs to


class CheckpointFolder:
    """A run's checkpoints: step_00000120.pt and so on, and latest.pt, another name of the newest; and run.json, which says whose they are.

    Args:
        folder: where they are.
        keep: how many of the newest stay.
        keep_steps: checkpoints at multiples of this step stay for good; 0 for none.
    """

    def __init__(self, folder: str | Path, keep: int = 2, keep_steps: int = 0):
        self.folder, self.keep, self.keep_steps = Path(folder), keep, keep_steps
        self.lock = FolderLock(self.folder)
        self._about: dict[str, Any] = {}  # what begin has written into run.json

    @property
    def latest(self) -> Path:
        """The newest checkpoint's lasting name."""
        return self.folder / LATEST

    def newest_first(self) -> list[Path]:
        """The checkpoints that are there, the newest first; latest.pt only where it is not one of the numbered ones."""
        return self._numbered() + ([self.latest] if self._latest_is_alone() else [])

    def holds(self, step: int) -> bool:
        """Whether the checkpoint of a step is there; once the run has begun it can only be its own."""
        return self._of(step).exists()

    def begin(self, resumed: Path | None = None, step: int = 0, about: dict[str, Any] | None = None) -> str | None:
        """Make the folder ready for a run that goes on from `resumed` at `step`, or starts afresh for None; `about` goes into run.json.

        What another run, or this one after that step, has left is moved into a folder earlier-1, -2, ...: nothing is lost, and nothing of
        it is taken for this run's.

        Returns:
            A line that says what was moved, or None.

        Raises:
            CheckpointError: the folder cannot be written to.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for aside in self.folder.glob(".*.tmp"):  # what a killed process was writing
                _remove(aside)
            same = resumed is not None and resumed.parent.resolve() == self.folder.resolve()
            stale = [path for path in self._numbered() if not same or _step_of(path) > step]
            if self._latest_is_alone():
                stale += [self.latest] if not (same and self.latest.samefile(resumed)) else []
            elif not self.latest.exists() or any(self.latest.samefile(path) for path in stale):
                self.latest.unlink(missing_ok=True)
            if stale and not same:
                stale += [path for name in (LOG, RUN, METRICS, EVENTS) if (path := self.folder / name).exists()]
            earlier = self._move_aside(stale)
            if resumed is not None and (metrics := resumed.parent / METRICS).exists():
                if not same:
                    shutil.copyfile(metrics, self.folder / METRICS)
                elif stale:  # the run goes on from an earlier step than it had reached, and cuts off the later ones
                    shutil.copyfile(metrics, earlier / METRICS)
            if same and resumed.name != LATEST:
                self._link(resumed)
            with open(self.folder / LOG, "a"):  # a folder that cannot be written to is refused now, not after hours
                pass
            self._about = json.loads(json.dumps(about or {}))  # as it is read back
            self._write_about()  # last: a run that dies before has not begun
        except OSError as error:
            raise CheckpointError(f"cannot write to {self.folder} ({error}): choose another hardware.output_dir") from error
        return f"what an earlier run left in {self.folder} is now in {earlier}" if earlier else None

    def take_again(self) -> None:
        """Lock the folder for a run that had let go of it, if no other run has begun there since.

        Raises:
            CheckpointError: one has, or is under way.
        """
        if not self.lock.held:
            self.lock.take(self._about)
            if self.about() != self._about:
                self.lock.release()
                raise CheckpointError(
                    f"another run has begun in {self.folder} since: go on from a checkpoint, in another hardware.output_dir"
                )

    def about(self) -> dict[str, Any]:
        """What run.json says of the run that the folder belongs to, see `about_run`; nothing where there is no such file."""
        try:
            about = json.loads((self.folder / RUN).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return about if isinstance(about, dict) else {}

    def save(self, state: dict[str, Any], ranks: Ranks | None = None) -> Path:
        """Write the state of a step, remove what is older than the newest `keep`, and return the path of latest.pt.

        Args:
            state: the state.
            ranks: the processes that hold a share of its tensors each; every one of them calls this, and the checkpoint is a folder.

        Raises:
            CheckpointError: it cannot be written; with `ranks` on every process.
        """
        path, everyone = self._of(state["step"]), ranks or Ranks(0, 1, torch.device("cpu"))
        try:
            everyone.once(lambda: self._prune(max(1, self.keep - 1)))  # before writing, so that a nearly full disk has room
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"cannot make room in {self.folder} ({error}): choose another hardware.output_dir") from error
        save_checkpoint(path, state, ranks)
        try:
            everyone.once(lambda: self._name_latest(path))
        except (OSError, RuntimeError) as error:  # the latter stands for another process's error
            raise CheckpointError(f"cannot write {self.latest} ({error}); {path} is whole: resume from it") from error
        return self.latest

    def _of(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}.pt"

    def _name_latest(self, path: Path) -> None:
        self._link(path)
        self._prune(self.keep)

    def _write_about(self) -> None:
        with replaced(self.folder / RUN) as aside:
            aside.write_text(json.dumps(self._about, indent=2) + "\n", encoding="utf-8")

    def _link(self, path: Path) -> None:
        aside = self.folder / f".{LATEST}.{os.getpid()}.tmp"
        aside.unlink(missing_ok=True)
        if path.is_dir():  # which cannot have two names
            aside.symlink_to(path.name)
        else:
            try:
                os.link(path, aside)
            except OSError:  # a file system without hard links
                shutil.copyfile(path, aside)
        os.replace(aside, self.latest)
        aside.unlink(missing_ok=True)  # os.replace does nothing where both already are the same file
        flush_folder(self.folder)

    def _prune(self, keep: int) -> None:
        for path in self._numbered()[keep:]:
            if not (self.keep_steps and _step_of(path) % self.keep_steps == 0):
                _remove(path)

    def _numbered(self) -> list[Path]:
        return sorted(self.folder.glob("step_[0-9]*.pt"), key=_step_of, reverse=True)

    def _latest_is_alone(self) -> bool:
        return self.latest.exists() and not any(self.latest.samefile(path) for path in self._numbered())

    def _move_aside(self, paths: list[Path]) -> Path | None:
        """Move them into a new folder earlier-1, -2, ...; returns it, or None where there is nothing to move."""
        if not paths:
            return None
        number = 1
        while (self.folder / f"earlier-{number}").exists():
            number += 1
        earlier = self.folder / f"earlier-{number}"
        earlier.mkdir()
        for path in paths:
            path.rename(earlier / path.name)
        return earlier


def _remove(path: Path) -> None:
    """Remove a checkpoint or what was left of one; of a folder no part keeps the name while it goes."""
    if path.is_dir() and not path.is_symlink():
        if not path.name.endswith(".tmp"):
            path = path.rename(path.with_name(f".{path.name}.{os.getpid()}.tmp"))
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _step_of(path: Path) -> int:
    digits = path.stem.removeprefix("step_")
    return int(digits) if digits.isdecimal() else -1


def about_run(cfg: IJepaConfig, job: str | None = None) -> dict[str, Any]:
    """What a folder's run.json, and its lock, tell of a run: the process that began it, host, time, job, and config."""
    images = "fake data" if cfg.data.use_fake_data else f"data.dataset = {cfg.data.dataset!r}"
    return {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="milliseconds"),
        "run": f"{images}, {cfg.optimizer.epochs} epochs",
        "job": job,
        "config": cfg.to_dict(),
    }


def resume_from(
    resume: str | Path | None, folder: CheckpointFolder, expected: Expected, ranks: Ranks, log: Callable[[str], None]
) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    """Lock the output folder, choose the checkpoint to go on from, and make the folder ready. Every process of the run calls it.

    Where the run starts afresh from `model.start_from`, those weights are read before the folder is made ready.

    Args:
        resume: a checkpoint; "auto" for the newest good one in the folder, if any; None to start afresh. All three hold for a job's first
            start; after a restart by torchrun it goes on from the newest that it has written.
        folder: the run's output folder.
        expected: what the checkpoint must agree with.
        ranks: the run's processes.
        log: gets a line for whatever was passed over or moved.

    Returns:
        The state in it, or None where the run starts afresh; and the weights to begin with, none where they are those of the seed.

    Raises:
        CheckpointError: another process trains there; or the checkpoint, or every one that is there, cannot be resumed; or the weights
            to start from do not fit. In all processes.
    """
    about = about_run(expected.cfg, ranks.job)

    def asked_for() -> tuple[str | Path | None, list[Path], str | None]:
        without_locks = folder.lock.take(about)
        # A job that torchrun has started anew goes on from what it has written itself.
        own = ranks.restarted and folder.about().get("job") == ranks.job and folder.newest_first()
        asked = "auto" if own else resume
        return asked, folder.newest_first() if asked == "auto" else [] if asked is None else [path_of(asked)], without_locks

    resume, paths, without_locks = ranks.once(asked_for)
    path, state, notes = None, None, []
    for path in paths:
        try:
            state = read_training_state(path, expected, ranks)
            break
        except CheckpointError as error:
            if resume != "auto":
                raise
            notes.append(f"passed over: {error}")
    if paths and state is None:
        first = notes[0].removeprefix("passed over: ")
        raise CheckpointError(f"none of the {len(paths)} checkpoints in {folder.folder} can be resumed: {first}")
    weights, begun = (state["model"], None) if state else ({}, None)
    if state is None and expected.cfg.model.start_from:
        weights, begun = starting_weights(expected, ranks)
    # All have read it before files are moved.
    step = state["step"] if state else 0
    moved = ranks.once(lambda: folder.begin(path, step, about))
    if ranks.first:
        for line in [*notes, without_locks, moved, begun or (f"going on from {path} at step {step}" if path else None)]:
            if line:
                log(line)
    return state, weights
