"""What this machine has, and how long the course will take on it: `python -m wejepa.doctor`.

It needs nothing but wejepa's own dependencies, writes nothing, and asks no network.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from wejepa.errors import ConfigError, exit_code
from wejepa.paths import print_line

__all__ = ["lacking", "main", "report"]

# How many times as long as 30 epochs of pretraining the quick tour and the whole course take with all their trainings: README's minutes, a
# test compares them.
QUICK_TOUR, COURSE = 1.5, 10.6

PARTS = {  # what each optional part of pyproject.toml is for; those for developers are left out
    "notebooks": "to read and run the course",
    "interop": "checkpoints from and to elsewhere",
    "datasets": "data sets of Hugging Face",
    "tensorboard": "TensorBoard's curves of a run",
}


def report() -> Iterator[tuple[str, str]]:
    """What there is to know, as pairs of a heading and a line; the time comes last, since steps are timed for it.

    Raises:
        ConfigError: wejepa or one of its dependencies is not installed, or too old.
        DataError: a file that ships with wejepa is absent or damaged.
    """
    if problems := lacking():
        raise ConfigError(f"{'; '.join(problems)}. In a clone of the repository: python -m pip install -e .")

    import torch

    from wejepa.config import default_config
    from wejepa.devices import pick_device
    from wejepa.pretrained import PRETRAINED, load_pretrained
    from wejepa.train.pretrain import expected_minutes

    cfg = default_config()
    device = pick_device(cfg.hardware.device)
    yield "processor", f"{processor()}; PyTorch computes with {torch.backends.cpu.get_cpu_capability()}"
    yield "cores", cores()
    yield "precision", arithmetic(device, cfg.hardware.mixed_precision)
    yield "GPU", gpus()
    yield "memory", f"{total / 1e9:.0f} GB" if (total := memory()) else "unknown"
    packages = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("wejepa", "torch", "torchvision"))
    yield "versions", f"{packages}, Python {platform.python_version()}, {platform.system()}"
    for part, purpose in PARTS.items():
        missing = lacking(part)
        found = f'{"; ".join(missing)}; python -m pip install "wejepa[{part}]" helps' if missing else "installed"
        yield part, f"{found} ({purpose})"
    for name in PRETRAINED:
        load_pretrained(name)
    yield "files", "the weights and images that ship are whole"
    minutes = expected_minutes(cfg)  # reads the images
    told = f"about {in_words(minutes)} for {cfg.optimizer.epochs} epochs of pretraining"
    tour, course = in_words(QUICK_TOUR * minutes), in_words(COURSE * minutes)
    yield "time", f"{told}; with train = True {tour} for the quick tour, {course} for the whole course"


def lacking(part: str = "") -> list[str]:
    """What is not installed, or too old, of what wejepa needs for an optional part, or by itself; each as words.

    Args:
        part: a name under `optional-dependencies` of pyproject.toml; empty for what wejepa always needs.
    """
    try:
        requirements = importlib.metadata.requires("wejepa") or []
    except importlib.metadata.PackageNotFoundError:
        return [f"wejepa is not installed in this Python ({sys.executable}), only found on its path"]
    missing, old = [], []
    for requirement in requirements:
        needed, _, marker = requirement.partition(";")
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", marker)
        name = re.match(r"[\w.-]+", needed)[0]
        if (extra[1] if extra else "") != part or name == "wejepa":  # wejepa: a part that brings another one
            continue
        lowest = re.search(r">=([\d.]+)", needed)
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
            continue
        if lowest and numbers(version) < numbers(lowest[1]):
            old.append(f"{name} {version} is older than {lowest[1]}")
    return [f"not installed: {', '.join(missing)}", *old] if missing else old


def numbers(version: str) -> list[int]:
    """A version as numbers that compare: "2.14.1+cpu" as [2, 14, 1]."""
    return [int(number) for number in re.match(r"[\d.]+", version)[0].strip(".").split(".")]


def processor() -> str:
    """Its name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()  # platform.processor() says nothing on most Linux systems
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(filter(None, [*names, platform.processor(), platform.machine()]), "unknown")


def cores() -> str:
    """How many cores this process may use, PyTorch's threads, and whether other programs are at work."""
    import torch

    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    line = f"{mine}, on which PyTorch runs {torch.get_num_threads()} at a time"
    if threads := os.environ.get("OMP_NUM_THREADS"):
        line += f", as OMP_NUM_THREADS={threads} asks"
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0
    if load > mine / 4:
        line += f"; other programs are at work (load {load:.1f}): the time below counts them, and GOMP_SPINCOUNT=1000 helps"
    return line


def arithmetic(device, mixed: bool) -> str:
    """What training multiplies matrices in on the device, and why."""

    from wejepa.devices import computes_bfloat16, precision

    dtype = str(precision(device, mixed)).removeprefix("torch.")
    where = "GPU" if device.type != "cpu" else "processor"
    native = computes_bfloat16(device)
    if native and dtype == "float32":
        return f"float32, as WEJEPA_MIXED_PRECISION=0 asks; this {where} has bfloat16, which is faster"
    if native:
        return f"bfloat16, which this {where} computes natively, and training uses it"
    return f"{dtype}: this {where} has no native bfloat16"


def gpus() -> str:
    """What PyTorch can train on besides the processor; where it cannot use a GPU that is there, why not."""
    import torch

    if torch.cuda.is_available():
        found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return ", ".join(f"{gpu.name} with {gpu.total_memory / 1e9:.0f} GB" for gpu in found)
    if torch.backends.mps.is_available():
        return "Apple's, by MPS"
    if shutil.which("nvidia-smi"):
        why = "needs a newer driver" if torch.version.cuda else "was built without CUDA: pytorch.org says how to install the other build"
        return f"none in use: NVIDIA's driver is here, but this PyTorch ({torch.__version__}) {why}"
    return "none; training runs on the processor"


def memory() -> int:
    """Bytes of main memory; 0 where the system does not tell."""
    if sys.platform == "win32":
        kilobytes = ctypes.c_ulonglong(0)
        ctypes.windll.kernel32.GetPhysicallyInstalledSystemMemory(ctypes.byref(kilobytes))
        return 1024 * kilobytes.value
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return 0


def in_words(minutes: float) -> str:
    """Minutes as one says them: "8 minutes", "1.3 hours"."""
    if minutes >= 90:
        return f"{minutes / 60:.1f} hours"
    return f"{minutes:.0f} minutes" if minutes >= 1.5 else "a minute"


def main(argv: list[str] | None = None) -> int:
    """The command line; returns 0, or 2 with one line on standard error where something is missing."""
    words = "Tell what this machine has, and how long the course will take on it."
    argparse.ArgumentParser(prog="python -m wejepa.doctor", description=words).parse_args(argv)
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as make sets it: else threads spin while other programs want the cores

    def tell() -> None:
        for heading, line in report():
            print_line(f"{heading:<12}{line}")

    return exit_code(tell)


if __name__ == "__main__":
    sys.exit(main())
