"""The weights that a new run begins with, where `model.start_from` names some."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from wejepa.config import IJepaConfig, ModelConfig
from wejepa.errors import CheckpointError, WejepaError
from wejepa.interop import HEADS, local_copy, read_weights
from wejepa.patches import resize_positions
from wejepa.presets import STAGE_WIDTHS
from wejepa.train.checkpoints import Expected, check_tensors
from wejepa.train.ranks import Ranks

__all__ = ["starting_weights"]


def starting_weights(expected: Expected, ranks: Ranks) -> tuple[dict[str, Tensor], str]:
    """The weights that `model.start_from` names, under the names of the run's own. Every process of the run calls it.

    Each process reads the file, as on resuming; a name on the hub is downloaded once per machine.

    Args:
        expected: the run's config, weights and own parts.
        ranks: its processes.

    Returns:
        Student, teacher and, where the file has one and the run none of its own, predictor, with positions resized to the config's grid;
        and a line that says what was taken and what is fresh.

    Raises:
        CheckpointError, ConfigError: they cannot be read, or do not fit the config. On every process.
    """
    name = expected.cfg.model.start_from
    try:
        source = ranks.once_per_node(lambda: local_copy(name))
        return ranks.together(lambda: fitted(source, expected))
    except WejepaError as error:
        raise type(error)(f"model.start_from: {error}") from error


def fitted(source: str | Path, expected: Expected) -> tuple[dict[str, Tensor], str]:
    """What `starting_weights` gives, from a file or folder that is there."""
    cfg, own = expected.cfg, expected.parts.get("predictor")
    model, line = read_weights(source, num_heads=None if cfg.model.embed_dim in HEADS else cfg.model.num_heads)
    if own or model.predictor is None:
        model.predictor = None
        line += f"; the predictor is the run's own {own}" if own else "; the predictor is freshly initialised"
    check_sizes(source, model.cfg, cfg, with_predictor=model.predictor is not None)
    weights, grid = model.state_dict(), model.cfg.grid_size
    if grid != cfg.grid_size:
        for key in [key for key in weights if key.endswith("pos_embed")]:
            weights[key] = resize_positions(weights[key], grid, cfg.grid_size)
        line += f"; positions resized from {grid[0]} x {grid[1]} to {cfg.grid_size[0]} x {cfg.grid_size[1]}"
    wanted = {key: value for key, value in expected.weights.items() if model.predictor is not None or not key.startswith("predictor.")}
    check_tensors(weights, wanted, source)
    return weights, f"begins with {cfg.model.start_from}: {line}"


def check_sizes(source: str | Path, found: IJepaConfig, wanted: IJepaConfig, with_predictor: bool) -> None:
    """Refuse weights of other sizes than the config's, naming the settings, and how to set them."""
    theirs, ours = (sizes(cfg.model, with_predictor) for cfg in (found, wanted))
    other = [name for name in theirs if name in ours and not same(theirs[name], ours[name])]
    if other:
        have, need = (", ".join(f"{name} {values[name]}" for name in other) for values in (theirs, ours))
        fresh = "; or convert it to a folder, which leaves its predictor out" if all(name.startswith("pred") for name in other) else ""
        settings = " ".join(f"--set model.{name}={theirs[name]}" for name in other)
        raise CheckpointError(f"{source} has {have}, this run needs {need}: take other weights, or run with {settings}{fresh}")


def sizes(model: ModelConfig, with_predictor: bool) -> dict[str, Any]:
    """The settings that weights must share with the config: all sizes but the grid's."""
    names = ["classification_backbone", "patch_size", "in_chans", "embed_dim", "num_heads"]
    if model.classification_backbone not in STAGE_WIDTHS:  # a network of stages has depths of its own
        names += ["enc_depth", "mlp_ratio", "norm_eps"]
    if with_predictor:
        names += ["pred_dim", "pred_depth"]
    found = {name: getattr(model, name) for name in names}
    return found | ({"pred_mlp_ratio": model.pred_mlp_ratio or model.mlp_ratio} if with_predictor else {})


def same(one: Any, other: Any) -> bool:
    """Whether two settings are equal, but for the rounding of a ratio."""
    return math.isclose(one, other, rel_tol=1e-9) if isinstance(one, float) and isinstance(other, float) else one == other
