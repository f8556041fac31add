"""What a run computes on, and in which precision."""

from __future__ import annotations

import contextlib

import torch

from wejepa.errors import ConfigError

__all__ = ["autocast", "computes_bfloat16", "pick_device"]


def pick_device(name: str) -> torch.device:
    """The device of that name, or for "auto" CUDA where there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"hardware.device = {name!r} is not to be had here: take 'auto' or 'cpu'") from error
    return device


def computes_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices natively; where it only emulates them they are slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if (
        device.type != "cpu" or "AVX512" not in torch.backends.cpu.get_cpu_capability()
    ):  # the processor's, or less where a user asks for less
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def autocast(device: torch.device, wanted: bool) -> contextlib.AbstractContextManager:
    """bfloat16 matrix products if wanted and native, else nothing."""
    if wanted and computes_bfloat16(device):
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()
