"""The small trained models that ship with wejepa, made by scripts/make_weights.py."""

from __future__ import annotations

import json
from typing import Any

import torch

from wejepa.config import IJepaConfig
from wejepa.data.embedded import asset, check_licences
from wejepa.devices import pick_device
from wejepa.errors import ConfigError, did_you_mean
from wejepa.model import IJEPA_base

__all__ = ["PRETRAINED", "load_pretrained", "pretrained_facts"]

# What each model learnt from: the licences of those images, which go with the weights.
PRETRAINED = {
    "fashion": ("FASHION_MNIST_LICENSE",),
    "emoji": ("NOTO_EMOJI_LICENSE", "TWEMOJI_LICENSE", "EMOJI_DATASOURCE_LICENSE"),
}


def load_pretrained(name: str, device: str | torch.device = "cpu") -> IJEPA_base:
    """A small trained model that ships with wejepa: student, teacher and predictor, in evaluation mode. Nothing is downloaded.

    Args:
        name: "fashion", trained on Fashion-MNIST's 60,000 training images at 32 x 32 (8 x 8 tokens); or "emoji", trained on the 3,048
            training drawings of `emoji` at 64 x 64 (16 x 16 tokens).
        device: where the model is wanted: "cpu", "cuda", "mps", or "auto" for the best one present.

    Raises:
        ConfigError: there is no such model or device.
        DataError: a file is absent or is not as it ships.
    """
    from safetensors.torch import load

    device = pick_device(device, "device")
    facts = pretrained_facts(name)
    model = IJEPA_base.without_weights(IJepaConfig.from_dict(facts["config"]))
    weights = {key: value.float() for key, value in load(asset(f"{name}.safetensors")).items()}  # they ship as float16
    model.load_state_dict(weights, assign=True)
    return model.eval().to(device)


def pretrained_facts(name: str) -> dict[str, Any]:
    """How a shipped model was made: "config", "history" (a line for each epoch), "accuracy" and its "protocol", "licence".

    Raises:
        ConfigError: there is no such model.
        DataError: a file is absent or is not as it ships.
    """
    if name not in PRETRAINED:
        raise ConfigError(f"{name!r} is no model that ships with wejepa; {did_you_mean(name, tuple(PRETRAINED))}")
    check_licences(*PRETRAINED[name])
    return json.loads(asset(f"{name}.json"))
