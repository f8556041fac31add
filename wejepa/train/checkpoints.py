"""Checkpoints that are whole or not there: written aside and renamed, checked and read strictly, never unpickled into code."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wejepa.config import IJepaConfig
from wejepa.devices import pick_device
from wejepa.errors import CheckpointError, ConfigError
from wejepa.files import replaced
from wejepa.model import IJEPA_base, Predictor, ijepa_loss
from wejepa.paths import path_of
from wejepa.pretrained import PRETRAINED, load_pretrained
from wejepa.train.ranks import Ranks, is_spread, own_part

__all__ = [
    "MOMENTS",
    "Expected",
    "check_tensors",
    "load_checkpoint",
    "load_model",
    "read_training_state",
    "save_checkpoint",
    "save_model",
]

FORMAT = "wejepa checkpoint 2"
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's names

# Settings that a resumed run may change: they do not say what is learnt.
FREE = {
    "data": {"root", "num_workers", "eval_batch_size", "max_unreadable_share"},
    "optimizer": {"accumulation_steps"},
    "hardware": {
        "device", "mixed_precision", "compile_model", "shard_model",
        "checkpoint_every", "checkpoint_minutes", "keep_checkpoints", "keep_every", "output_dir", "tensorboard",
    },
}  # fmt: skip


def save_checkpoint(path: Path, state: dict[str, Any], ranks: Ranks | None = None) -> None:
    """Write a training state so that `path` holds, at every moment, the old one or the new one, whole.

    Args:
        path: the file; with `ranks` a folder, which must not be there yet.
        state: the state.
        ranks: the processes that hold a share of every tensor of "model" and "moments" each; every one of them calls this.

    Raises:
        CheckpointError: the folder cannot be written to, or the disk is full; what was there before is untouched.
    """
    if ranks:
        from wejepa.train.sharded import write_shards  # torch.distributed.checkpoint takes half a second to import

        rest = {key: value for key, value in state.items() if key not in ("model", "moments")}
        write_shards(path, flat(state["model"], state["moments"]), {"format": FORMAT, **rest}, ranks)
        return
    try:
        with replaced(path) as aside, open(aside, "wb") as file:  # by a file's name, torch.save would write that name into it
            torch.save({"format": FORMAT, **state}, file)
    except (OSError, RuntimeError) as error:  # torch.save turns some I/O errors into RuntimeError
        raise CheckpointError(f"cannot write {path} ({error}): free some space or choose another hardware.output_dir") from error


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """The state that `save_checkpoint` wrote, whole tensors on the CPU, whether one process wrote it or many.

    Raises:
        CheckpointError: no such file, a truncated, damaged or foreign one, or one that holds more than tensors and plain values.
    """
    path = path_of(path)
    if not path.is_dir():
        return read_file(path)
    from wejepa.train.sharded import Shards

    shards = Shards(path)
    tensors = {name: torch.empty_like(tensor, device="cpu") for name, tensor in shards.tensors.items()}
    shards.read(tensors)
    return read_file(shards.rest) | nested(tensors, path)


def read_file(path: Path) -> dict[str, Any]:
    """What a checkpoint's file holds, or a sharded one's file of what is no tensor."""
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


def load_model(path: str | Path, device: str | torch.device = "cpu") -> IJEPA_base:
    """The model of a checkpoint, built from the config it carries and loaded strictly, in evaluation mode.

    Args:
        path: the checkpoint; or, where there is no such file, the name of a model that ships with wejepa, see `load_pretrained`.
        device: where the model is wanted: "cpu", "cuda", "mps", or "auto" for the best one present.

    Where the run had a predictor of its own, only the encoders are loaded, and `model.predictor` is None: the file holds its weights, not
    its code. With `model.predictor = MyPredictor(...)`, `model.load_state_dict(load_checkpoint(path)["model"])` loads all of it.

    Raises:
        ConfigError: there is no such device.
        CheckpointError: see `load_checkpoint`; or the weights do not fit the config.
    """
    device = pick_device(device, "device")
    if str(path) in PRETRAINED and not path_of(path).exists():
        return load_pretrained(str(path), device)
    state = load_checkpoint(path)
    try:
        model, weights = IJEPA_base.without_weights(IJepaConfig.from_dict(state["config"])), state["model"]
        if "predictor" in state.get("parts", {}):
            model.predictor = None
            weights = {name: value for name, value in weights.items() if not name.startswith("predictor.")}
        load_weights(model, weights, path)
    except (KeyError, ConfigError) as error:
        raise CheckpointError(f"{path} does not fit this version of wejepa ({error}): take the version that wrote it") from error
    return model.eval().to(device)


def save_model(path: str | Path, model: IJEPA_base, source: str) -> None:
    """Write a model's weights for `load_model`: no training state, so no run goes on from it.

    Args:
        path: the file.
        model: the model.
        source: where the weights come from; kept in the file.
    """
    save_checkpoint(path_of(path), {"config": model.cfg.to_dict(), "model": model.state_dict(), "source": source})


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
    check_kinds(found, expected, path)
    broken = [k for k, v in found.items() if not own_part(v).isfinite().all()]
    if broken:
        raise CheckpointError(f"{path} holds numbers that are not finite, in {broken[0]}: take an earlier one")


def check_kinds(found: dict[str, Any], expected: dict[str, Tensor], path: str | Path) -> None:
    """Refuse tensors other than the expected ones by name, shape and type, whatever numbers they hold."""
    fault = first_fault(describe(found, with_type=True), describe(expected, with_type=True))
    if fault:
        raise CheckpointError(f"{path} was made for another architecture: {fault}; give the config it was trained with")


def describe(tensors: dict[str, Any], with_type: bool = False) -> dict[str, str]:
    """Each tensor's shape, and its type if asked for, in words; the kind of what is no tensor."""
    return {
        name: (f"{tuple(value.shape)} {value.dtype}" if with_type else f"{tuple(value.shape)}")
        if isinstance(value, Tensor)
        else type(value).__name__
        for name, value in tensors.items()
    }


def first_fault(found: dict[str, str], expected: dict[str, str]) -> str | None:
    """The first name that is missing, unexpected or of another kind, and how many more there are; None where there is none."""
    faults = [f"{name} is missing" for name in expected if name not in found]
    faults += [f"{name} is unexpected" for name in found if name not in expected]
    faults += [f"{name} is {found[name]}, not {kind}" for name, kind in expected.items() if name in found and found[name] != kind]
    return (faults[0] + (f", and {len(faults) - 1} more" if len(faults) > 1 else "")) if faults else None


# ---------------------------------------------------------------- a state to go on from


@dataclass(frozen=True)
class Expected:
    """What the state of a checkpoint must agree with, for a run to go on from it.

    Attributes:
        cfg: the run's config.
        weights: the model's tensors; DTensors where its weights are spread over processes.
        trained: those that the optimizer has moments of.
        steps_per_epoch: updates in an epoch.
        images: the fingerprint of the training images.
        parts: what the run has of its own, see `own_parts`.
    """

    cfg: IJepaConfig
    weights: dict[str, Tensor]
    trained: dict[str, Tensor]
    steps_per_epoch: int
    images: str
    parts: dict[str, str] = field(default_factory=dict)


def own_parts(model: IJEPA_base, loss: Callable) -> dict[str, str]:
    """The names of a run's own "predictor" and "loss"; nothing of those that the package brings."""
    found = {"predictor": type(model.predictor).__name__, "loss": getattr(loss, "__name__", type(loss).__name__)}
    usual = {"predictor": Predictor.__name__, "loss": ijepa_loss.__name__}
    return {part: name for part, name in found.items() if name != usual[part]}


def read_training_state(path: Path, expected: Expected, ranks: Ranks) -> dict[str, Any]:
    """The state in a checkpoint, after all of it has been checked against this run. Every process of the run calls it.

    Where the model's weights are spread over the processes and the checkpoint is as well, each reads its own parts into DTensors.

    Raises:
        CheckpointError: see `load_checkpoint`; or the state is not whole, or of other settings, weights or images. On every process.
    """
    if any(map(is_spread, expected.weights.values())) and ranks.from_first(path.is_dir()):
        state = read_own_parts(path, expected, ranks)
    else:
        state = ranks.together(lambda: load_checkpoint(path))
    ranks.together(lambda: check_state(state, expected, path))
    return state


def read_own_parts(path: Path, expected: Expected, ranks: Ranks) -> dict[str, Any]:
    """The state in a sharded checkpoint, this process's parts of its tensors: each one spread as the expected one is."""
    from wejepa.train.sharded import Shards

    shards = ranks.together(lambda: Shards(path, part=(ranks.rank, ranks.world)))
    tensors = flat(expected.weights, dict.fromkeys(MOMENTS, expected.trained))
    ranks.together(lambda: check_kinds(shards.tensors, tensors, path))
    tensors = {name: torch.empty_like(tensor, requires_grad=False) for name, tensor in tensors.items()}
    ranks.together(lambda: shards.read(tensors))
    return ranks.together(lambda: read_file(shards.rest)) | nested(tensors, path)


def flat(model: dict[str, Tensor], moments: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """A state's tensors by names that tell where they belong, as a sharded checkpoint keeps them."""
    tensors = {f"model/{name}": value for name, value in model.items()}
    return tensors | {f"moments/{kind}/{name}": value for kind, kept in moments.items() for name, value in kept.items()}


def nested(tensors: dict[str, Tensor], path: Path) -> dict[str, Any]:
    """What `flat` has made flat."""
    places: dict[str, dict[str, Tensor]] = {place: {} for place in ("model", *(f"moments/{kind}" for kind in MOMENTS))}
    for name, value in tensors.items():
        place, _, short = name.rpartition("/")
        if place not in places:
            raise CheckpointError(
                f"{path} is not a checkpoint of wejepa.train.pretrain in this version (it holds {name}): take one that is"
            )
        places[place][short] = value
    return {"model": places["model"], "moments": {kind: places[f"moments/{kind}"] for kind in MOMENTS}}


def check_state(state: dict[str, Any], expected: Expected, path: Path) -> None:
    """Refuse a state that is not whole, or not of this run."""
    if "source" in state:
        raise CheckpointError(f"{path} holds weights alone, from {state['source']}: load_model reads it, no run goes on from it")
    check_settings(state.get("config"), expected.cfg, path)
    if (parts := state.get("parts", {})) != expected.parts:
        before, now = (", ".join(f"{part} {name}" for part, name in p.items()) or "the usual parts" for p in (parts, expected.parts))
        raise CheckpointError(f"{path} was trained with {before}, this run has {now}: give it the same predictor and loss")
    check_tensors(state.get("model"), expected.weights, path)
    moments = state.get("moments")
    for kind in MOMENTS:
        check_tensors(moments.get(kind) if isinstance(moments, dict) else None, expected.trained, path)
    kinds = {"step": int, "history": list, "losses": list, "seconds": float, "images": str}
    wrong = [name for name, kind in kinds.items() if not isinstance(state.get(name), kind)]
    if not wrong:
        epoch, done = divmod(state["step"], expected.steps_per_epoch)
        wrong += ["step"] if not 0 < state["step"] <= expected.cfg.optimizer.epochs * expected.steps_per_epoch else []
        wrong += ["history"] if len(state["history"]) != epoch or not all(isinstance(e, dict) for e in state["history"]) else []
        wrong += ["losses"] if len(state["losses"]) != done or not all(isinstance(v, float) for v in state["losses"]) else []
        # Only runs that have computed in float16 have these two.
        wrong += ["scaler"] if "scaler" in state and not is_scaler(state["scaler"]) else []
        skipped = state.get("skipped", 0)
        wrong += ["skipped"] if not (isinstance(skipped, int) and 0 <= skipped <= state["step"]) else []
    if wrong:
        raise CheckpointError(f"{path} is no whole training state: {wrong[0]} = {str(state.get(wrong[0]))[:60]}; take an earlier one")
    if state["images"] != expected.images:
        raise CheckpointError(
            f"{path} was trained on {state['images']}, data.root now has {expected.images}: "
            f"put the same images back, or start afresh in another hardware.output_dir"
        )


def is_scaler(found: Any) -> bool:
    """Whether this is the state of a gradient scaler: its numbers by name, of its types, and a scale that is one."""
    kinds = {name: type(value) for name, value in torch.amp.GradScaler("cpu").state_dict().items()}
    if not isinstance(found, dict) or {name: type(value) for name, value in found.items()} != kinds:
        return False
    return all(0 <= value < math.inf for value in found.values()) and found["scale"] > 0


def check_settings(saved: Any, cfg: IJepaConfig, path: Path) -> None:
    """Refuse a checkpoint whose run had other settings, but for those that a resumed run may change."""
    defaults = IJepaConfig().to_dict()  # what a setting was before there was one
    for section, settings in cfg.to_dict().items():
        before = saved.get(section) if isinstance(saved, dict) else None
        for name, value in settings.items():
            found = before.get(name, defaults[section][name]) if isinstance(before, dict) else None
            if name not in FREE.get(section, ()) and not is_setting(found, value):
                raise CheckpointError(
                    f"{path} was trained with {section}.{name} = {found!r}, this run says {value!r}: a resumed run goes on with the "
                    f"settings it began with; set it back, or start afresh in another hardware.output_dir"
                )


def is_setting(found: Any, value: Any) -> bool:
    """Whether what a checkpoint has in a setting's place is the setting's value."""
    try:
        return bool(found == value)
    except RuntimeError:  # a tensor of several numbers, or a list with one in it
        return False
