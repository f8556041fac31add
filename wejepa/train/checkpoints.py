"""Checkpoints that are whole or not there: written aside and renamed, checked and read strictly, never unpickled into code."""

from __future__ import annotations

import contextlib
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wejepa.config import IJepaConfig
from wejepa.errors import CheckpointError, ConfigError
from wejepa.model import IJEPA_base

__all__ = ["CheckpointFolder", "load_checkpoint", "load_model", "save_checkpoint", "save_model"]

FORMAT = "wejepa checkpoint 2"
LATEST = "latest.pt"
LOG = "log.txt"


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a training state so that `path` holds, at every moment, the old one or the new one, whole.

    Raises:
        CheckpointError: the folder cannot be written to, or the disk is full; what was there before is untouched.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        _flush_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch.save turns some I/O errors into RuntimeError
        raise CheckpointError(f"cannot write {path} ({error}): free some space or choose another hardware.output_dir") from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """The state that `save_checkpoint` wrote, on the CPU.

    Raises:
        CheckpointError: no such file, a truncated, damaged or foreign one, or one that holds more than tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}: check the path, or run wejepa.train.pretrain first")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load alone takes flipped bits for weights
            # It also takes an entry marked as a folder for one without content, and leaves the tensor's memory as it was.
            marked = [entry.filename for entry in archive.infolist() if entry.external_attr]
            damaged = archive.testzip() or next(iter(marked), None)
        if damaged:
            raise zipfile.BadZipFile(f"{damaged} does not match its checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises whatever a damaged byte makes it stumble over
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is truncated, damaged or not a wejepa checkpoint ({reason}): take another one") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = sorted(map(str, state))[:6] if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(f"{path} is not a checkpoint of wejepa.train.pretrain in this version (it holds {found}): take one that is")
    return state


def load_model(path: str | Path) -> IJEPA_base:
    """The model of a checkpoint, built from the config it carries and loaded strictly, in evaluation mode.

    Raises:
        CheckpointError: see `load_checkpoint`; or the weights do not fit the config.
    """
    state = load_checkpoint(path)
    try:
        model = IJEPA_base.without_weights(IJepaConfig.from_dict(state["config"]))
        load_weights(model, state["model"], path)
    except (KeyError, ConfigError) as error:
        raise CheckpointError(f"{path} does not fit this version of wejepa ({error}): take the version that wrote it") from error
    return model.eval()


def save_model(path: Path, model: IJEPA_base, source: str) -> None:
    """Write a model's weights for `load_model`: no training state, so no run goes on from it.

    Args:
        path: the file.
        model: the model.
        source: where the weights come from; kept in the file.
    """
    save_checkpoint(path, {"config": model.cfg.to_dict(), "model": model.state_dict(), "source": source})


def load_weights(model: IJEPA_base, weights: dict[str, Tensor], path: str | Path) -> None:
    """Load strictly, naming the first key that is missing, unexpected, of another shape or type, or not finite."""
    check_tensors(weights, model.state_dict(), path)
    model.load_state_dict(weights, assign=True)


def check_tensors(found: Any, expected: dict[str, Tensor], path: str | Path) -> None:
    """Refuse tensors other than the expected ones: by name, shape and type; and numbers that are not finite.

    Raises:
        CheckpointError: naming the first fault and counting the others.
    """
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a {type(found).__name__} where its weights should be: take another one")
    kinds = {k: f"{tuple(v.shape)} {v.dtype}" if isinstance(v, Tensor) else type(v).__name__ for k, v in found.items()}
    wanted = {k: f"{tuple(v.shape)} {v.dtype}" for k, v in expected.items()}
    faults = [f"{k} is missing" for k in wanted if k not in found]
    faults += [f"{k} is unexpected" for k in found if k not in wanted]
    faults += [f"{k} is {kinds[k]}, not {wanted[k]}" for k in wanted if k in found and kinds[k] != wanted[k]]
    more = f", and {len(faults) - 1} more" if len(faults) > 1 else ""
    if faults:
        raise CheckpointError(f"{path} was made for another architecture: {faults[0]}{more}; give the config it was trained with")
    broken = [k for k, v in found.items() if not v.isfinite().all()]
    if broken:
        raise CheckpointError(f"{path} holds numbers that are not finite, in {broken[0]}: take an earlier one")


class CheckpointFolder:
    """A run's checkpoints: step_00000120.pt and so on, and latest.pt, another name of the newest.

    Args:
        folder: where they are.
        keep: how many of the newest stay.
        keep_steps: checkpoints at multiples of this step stay for good; 0 for none.
    """

    def __init__(self, folder: str | Path, keep: int = 2, keep_steps: int = 0):
        self.folder, self.keep, self.keep_steps = Path(folder), keep, keep_steps

    @property
    def latest(self) -> Path:
        """The newest checkpoint's lasting name."""
        return self.folder / LATEST

    def newest_first(self) -> list[Path]:
        """The checkpoints that are there, the newest first; latest.pt only where it is not one of the numbered ones."""
        return self._numbered() + ([self.latest] if self._latest_is_alone() else [])

    def begin(self, resumed: Path | None = None, step: int = 0) -> str | None:
        """Make the folder ready for a run that goes on from `resumed` at `step`, or starts afresh for None.

        What another run, or this one after that step, has left is moved into a folder earlier-1, -2, ...: nothing is lost, and nothing of
        it is taken for this run's.

        Returns:
            A line that says what was moved, or None.

        Raises:
            CheckpointError: the folder cannot be written to.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for aside in self.folder.glob(".*.pt.*.tmp"):  # what a killed process was writing
                aside.unlink()
            ours = resumed is not None and resumed.parent.resolve() == self.folder.resolve()
            stale = [path for path in self._numbered() if not ours or _step_of(path) > step]
            if self._latest_is_alone():
                stale += [self.latest] if not (ours and self.latest.samefile(resumed)) else []
            elif any(self.latest.is_file() and self.latest.samefile(path) for path in stale):
                self.latest.unlink()
            if stale and not ours and (self.folder / LOG).is_file():
                stale.append(self.folder / LOG)
            moved = self._move_aside(stale)
            if ours and resumed.name != LATEST:
                self._link(resumed)
            with open(self.folder / LOG, "a"):  # a folder that cannot be written to is refused now, not after hours
                pass
        except OSError as error:
            raise CheckpointError(f"cannot write to {self.folder} ({error}): choose another hardware.output_dir") from error
        return moved

    def save(self, state: dict[str, Any]) -> Path:
        """Write the state of a step, remove what is older than the newest `keep`, and return the path of latest.pt."""
        path = self.folder / f"step_{state['step']:08d}.pt"
        self._prune(max(1, self.keep - 1))  # before writing, so that a nearly full disk has room
        save_checkpoint(path, state)
        try:
            self._link(path)
            self._prune(self.keep)
        except OSError as error:
            raise CheckpointError(f"cannot write {self.latest} ({error}); {path} is whole: resume from it") from error
        return self.latest

    def _link(self, path: Path) -> None:
        aside = self.folder / f".{LATEST}.{os.getpid()}.tmp"
        aside.unlink(missing_ok=True)
        try:
            os.link(path, aside)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, aside)
        os.replace(aside, self.latest)
        aside.unlink(missing_ok=True)  # os.replace does nothing where both already are the same file
        _flush_folder(self.folder)

    def _prune(self, keep: int) -> None:
        for path in self._numbered()[keep:]:
            if not (self.keep_steps and _step_of(path) % self.keep_steps == 0):
                path.unlink(missing_ok=True)

    def _numbered(self) -> list[Path]:
        return sorted(self.folder.glob("step_[0-9]*.pt"), key=_step_of, reverse=True)

    def _latest_is_alone(self) -> bool:
        return self.latest.is_file() and not any(self.latest.samefile(path) for path in self._numbered())

    def _move_aside(self, paths: list[Path]) -> str | None:
        if not paths:
            return None
        number = 1
        while (self.folder / f"earlier-{number}").exists():
            number += 1
        earlier = self.folder / f"earlier-{number}"
        earlier.mkdir()
        for path in paths:
            path.rename(earlier / path.name)
        return f"what an earlier run left in {self.folder} is now in {earlier}"


def _step_of(path: Path) -> int:
    digits = path.stem.removeprefix("step_")
    return int(digits) if digits.isdecimal() else -1


def _flush_folder(folder: Path) -> None:
    """Make a rename outlast a power failure, where the system lets a folder be flushed."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
