"""What a run computes on, and in which precision.

One rule holds everywhere: what takes images moves them, and their masks, to the model's device; what gives numbers for figures gives them
on the CPU. So sources and figures know of no device, and a model may be on any.
"""

from __future__ import annotations

import contextlib
import os

import torch
from torch import Tensor

from wejepa.errors import ConfigError

__all__ = ["autocast", "computes_bfloat16", "pick_device", "precision", "to_device"]


def pick_device(name: str | torch.device, setting: str = "hardware.device") -> torch.device:
    """The device of that name, or for "auto" the first that is there of CUDA, MPS and the CPU.

    Raises:
        ConfigError: naming the setting: there is no such device.
    """
    if name == "auto":
        found = [kind for kind, is_there in (("cuda", torch.cuda.is_available), ("mps", torch.backends.mps.is_available)) if is_there()]
        return torch.device(found[0] if found else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"{setting} = {name!r} is not to be had here: take 'auto' or 'cpu'") from error
    return device


def computes_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices natively; where it only emulates them they are slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capability = torch.backends.cpu.get_cpu_capability()  # less than the processor's where ATEN_CPU_CAPABILITY says so
    if device.type != "cpu" or "AVX512" not in capability:
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def precision(device: torch.device, mixed: bool) -> torch.dtype:
    """What matrices are multiplied in: if `mixed`, bfloat16 where it is native, else float16 on CUDA and MPS; otherwise float32.

    float16 has so small a range that training must scale its loss. WEJEPA_MIXED_PRECISION=0 in the environment asks for float32 whatever a
    config says, to see on this machine what one without bfloat16 computes.
    """
    if not mixed or os.environ.get("WEJEPA_MIXED_PRECISION") == "0":
        return torch.float32
    if computes_bfloat16(device):
        return torch.bfloat16
    return torch.float16 if device.type in ("cuda", "mps") else torch.float32


def autocast(device: torch.device, mixed: bool) -> contextlib.AbstractContextManager:
    """Matrix products in the device's `precision`; nothing where that is float32."""
    dtype = precision(device, mixed)
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def to_device(values: Tensor, device: torch.device | str) -> Tensor:
    """`values` on the device. To CUDA the copy is queued behind the kernels that are under way, and nobody waits for it."""
    if torch.device(device).type == "cuda" and values.device.type == "cpu":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)
