"""A checkpoint of ViT-H/14's full shape, with random weights, through the readers and writers: the same numbers, and in what memory?

python -m benchmarks.interop                 # about 20 GB of disk for a while, 8 GB of memory, some minutes
python -m benchmarks.interop --depth 2       # the same with two blocks
"""

from __future__ import annotations

import argparse
import gc
import shutil
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from wejepa.interop import from_huggingface, from_meta, to_huggingface
from wejepa.model import IJEPA_base

SIZES = (224, 280)  # as published, and one with interpolated positions


def main() -> None:
    import transformers

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=32)
    depth = parser.parse_args().depth
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sizes = {"hidden_size": 1280, "num_hidden_layers": depth, "num_attention_heads": 16, "intermediate_size": 5120, "patch_size": 14}
        torch.manual_seed(0)
        theirs = transformers.IJepaModel(transformers.IJepaConfig(image_size=224, layer_norm_eps=1e-6, **sizes)).eval()
        with torch.no_grad():
            for p in theirs.parameters():  # away from an initialisation in which each block hardly does anything
                p.add_(0.02 * torch.randn_like(p))
        images = [torch.randn(1, 3, size, size) for size in SIZES]
        expected = [of_theirs(theirs, x) for x in images]
        theirs.save_pretrained(folder / "theirs")
        del theirs

        model = read("Hugging Face folder", lambda: from_huggingface(folder / "theirs"))
        tell("teacher against transformers", [of_ours(model, x) for x in images], expected)
        to_huggingface(model, folder / "ours")
        again = transformers.IJepaModel.from_pretrained(folder / "ours").eval()
        tell("transformers on the export", [of_theirs(again, x) for x in images], expected)
        del again
        shutil.rmtree(folder / "ours")

        encoder = {"module." + in_meta(name): value for name, value in model.teacher_encoder.state_dict().items()}
        predictor = {"module." + in_meta(name, "predictor_"): value for name, value in model.predictor.state_dict().items()}
        torch.save({"encoder": encoder, "target_encoder": encoder, "predictor": predictor, "epoch": 300}, folder / "meta.pth.tar")
        del model, encoder, predictor
        model = read("Meta's layout", lambda: from_meta(folder / "meta.pth.tar"))
        tell("teacher against transformers", [of_ours(model, x) for x in images], expected)


@torch.no_grad()
def of_theirs(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x, interpolate_pos_encoding=x.shape[-1] != SIZES[0]).last_hidden_state


@torch.no_grad()
def of_ours(model: IJEPA_base, x: torch.Tensor) -> torch.Tensor:
    return model.encode(x)


def in_meta(name: str, prefix: str = "") -> str:
    """A tensor's name in Meta's layout."""
    return ("" if name == "mask_token" else prefix) + name.replace("mlp.0", "mlp.fc1").replace("mlp.2", "mlp.fc2")


def read(what: str, reader) -> IJEPA_base:
    """Read a checkpoint and tell how long it took, and by how much the memory grew at its highest (Linux)."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest so far
    before, start = memory("VmRSS"), time.perf_counter()
    model = reader()
    took, peak = time.perf_counter() - start, memory("VmHWM") - before
    one = sum(p.nbytes for p in model.teacher_encoder.parameters())
    print(f"{what}: read in {took:.1f} s; memory grew by {peak / 1e9:.2f} GB at most, one encoder has {one / 1e9:.2f} GB", flush=True)
    return model


def memory(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def tell(what: str, found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """The largest difference at each size; the run fails where it is 1e-5 or more."""
    for size, a, b in zip(SIZES, found, expected, strict=True):
        difference = float((a - b).abs().max())
        print(f"{what}, {size} x {size}: largest difference {difference:.1e}, largest number {float(b.abs().max()):.2f}", flush=True)
        if difference >= 1e-5:
            raise SystemExit("more than 1e-5")


if __name__ == "__main__":
    main()
