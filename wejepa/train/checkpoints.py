"""Checkpoints that are whole or not there: written aside and renamed, read strictly, never unpickled into code."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import torch

from wejepa.config import IJepaConfig
from wejepa.errors import CheckpointError, ConfigError
from wejepa.model import IJEPA_base

__all__ = ["load_checkpoint", "load_model", "save_checkpoint"]

FORMAT = "wejepa checkpoint 1"
LATEST = "latest.pt"


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
    except (OSError, RuntimeError) as error:  # torch.save turns some I/O errors into RuntimeError
        raise CheckpointError(f"cannot write {path} ({error}): free some space or choose another hardware.output_dir") from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """The state that `save_checkpoint` wrote, on the CPU.

    Raises:
        CheckpointError: no such file, a truncated or foreign one, or one that holds more than tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}: check the path, or run wejepa.train.pretrain first")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises whatever a damaged byte makes it stumble over
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is truncated, damaged or not a wejepa checkpoint ({reason}): take another one") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = sorted(map(str, state))[:6] if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(f"{path} is not a checkpoint of wejepa.train.pretrain (it holds {found}): take one that is")
    return state


def load_model(path: str | Path) -> IJEPA_base:
    """The model of a checkpoint, built from the config it carries and loaded strictly, in evaluation mode.

    Raises:
        CheckpointError: see `load_checkpoint`; or the weights do not fit the config.
    """
    state = load_checkpoint(path)
    try:
        model = IJEPA_base.from_config(IJepaConfig.from_dict(state["config"]))
        load_weights(model, state["model"], path)
    except (KeyError, ConfigError) as error:
        raise CheckpointError(f"{path} does not fit this version of wejepa ({error}): take the version that wrote it") from error
    return model.eval()


def load_weights(model: IJEPA_base, weights: dict[str, torch.Tensor], path: str | Path) -> None:
    """Load strictly, naming the first key that is missing, unexpected or of another shape."""
    own, shapes = model.state_dict(), {k: tuple(getattr(v, "shape", ())) for k, v in weights.items()}
    faults = [f"{k} is missing" for k in own if k not in weights]
    faults += [f"{k} is unexpected" for k in weights if k not in own]
    faults += [f"{k} is {shapes[k]}, not {tuple(v.shape)}" for k, v in own.items() if k in weights and shapes[k] != tuple(v.shape)]
    if faults:
        more = f", and {len(faults) - 1} more" if len(faults) > 1 else ""
        raise CheckpointError(f"{path} was made for another architecture: {faults[0]}{more}; give the config it was trained with")
    model.load_state_dict(weights)
