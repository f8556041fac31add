"""A checkpoint of ViT-H/14's full shape, with random weights, through the readers and writers: the same numbers, and in what memory?

python -m benchmarks.interop                 # about 20 GB of disk for a while, 8 GB of memory, some minutes
python -m benchmarks.interop --depth 2       # the same with two blocks
python -m benchmarks.interop --online        # the four published checkpoints (12 GB) against what transformers expects of them
"""

from __future__ import annotations

import argparse
import gc
import shutil
import tempfile
import time
import urllib.request
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from wejepa.interop import from_huggingface, from_meta, to_huggingface
from wejepa.model import IJEPA_base

SIZES = (224, 280)  # as published, and one with interpolated positions

# What transformers' conversion script (models/ijepa/convert_ijepa_to_hf.py, Apache 2.0) expects of the published checkpoints on one picture
# of COCO's, within 1e-4: three numbers of each of the first three tokens.
CATS = "http://images.cocodataset.org/val2017/000000039769.jpg"
PUBLISHED = {
    "facebook/ijepa_vith14_1k": [[-0.0621, -0.0054, -2.7513], [-0.1952, 0.0909, -3.9536], [0.0942, -0.0331, -1.2833]],
    "facebook/ijepa_vith14_22k": [[0.0358, -0.0045, -0.2154], [0.0418, -0.0246, 0.0108], [0.2529, -0.0345, -0.0246]],
    "facebook/ijepa_vith16_1k": [[0.5145, -0.1259, 0.0615], [0.1132, 0.0028, -0.0496], [1.1586, -0.0056, -0.0387]],
    "facebook/ijepa_vitg16_22k": [[0.0512, -0.0510, -0.0649], [0.1972, 0.0380, -0.0790], [0.1667, -0.0834, -0.1240]],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=32, help="blocks of the encoder with random weights")
    parser.add_argument(
        "--online", nargs="*", metavar="NAME", help="published checkpoints to download and compare; all four without a name"
    )
    args = parser.parse_args()
    if args.online is None:
        through_all(args.depth)
    else:
        published(args.online or list(PUBLISHED))


def published(names: list[str]) -> None:
    """Our numbers for published checkpoints against those stated; a line says so where the picture cannot be downloaded."""
    try:
        with urllib.request.urlopen(CATS, timeout=60) as page:
            picture = Image.open(page).convert("RGB")
    except OSError as error:
        print(f"skipped: {CATS} cannot be downloaded ({error})")
        return
    for name in names:
        model = from_huggingface(name)
        found = of_ours(model, as_transformers_takes_it(picture, model.cfg.model.img_size))[0, :3, :3]
        difference = float((found - torch.tensor(PUBLISHED[name])).abs().max())
        print(f"{name}: largest difference {difference:.1e} from what is stated", flush=True)
        if difference >= 1e-4:
            raise SystemExit("more than 1e-4")


def as_transformers_takes_it(picture: Image.Image, size: int) -> torch.Tensor:
    """The picture as the processor of that script gives it: (1, 3, S, S), squeezed to a square, its pixels from -1 to 1."""
    pixels = np.array(picture.resize((size, size), Image.Resampling.BILINEAR))
    return (torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255 - 0.5) / 0.5


def through_all(depth: int) -> None:
    """A checkpoint with random weights through every reader and writer."""
    import transformers

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
