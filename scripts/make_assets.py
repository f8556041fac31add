"""Make the images that ship with wejepa from the original files.

    python scripts/make_assets.py FOLDER CHELSEA

CHELSEA is the file chelsea.png of scikit-image, a photograph of a cat by Stéfan van der Walt, CC0; written to wejepa/assets/ cropped
to a square of 224 x 224. FOLDER holds the four original `*-ubyte.gz` files, for example those of Debian's package `dataset-fashion-mnist`
(in /usr/share/datasets/fashion-mnist). Written to wejepa/assets/: two mosaics, 100 images of 28 x 28 a row, of the first
1,000 training and 200 test images of each class in the official order, and their labels.
"""

import argparse
import gzip
from pathlib import Path

import numpy as np
from PIL import Image

ASSETS = Path(__file__).resolve().parent.parent / "wejepa" / "assets"


def read_idx(path: Path, header: int) -> np.ndarray:
    """The bytes of a gzipped IDX file behind its header."""
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("chelsea", type=Path)
    args = parser.parse_args()
    photograph = Image.open(args.chelsea).convert("RGB").crop((95, 0, 395, 300))
    photograph.resize((224, 224), Image.Resampling.LANCZOS).save(ASSETS / "chelsea.png", optimize=True)
    folder = args.folder
    labels = {}
    for split, stem, per_class in (("train", "train", 1000), ("test", "t10k", 200)):
        y = read_idx(folder / f"{stem}-labels-idx1-ubyte.gz", 8)
        x = read_idx(folder / f"{stem}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
        keep = np.sort(np.concatenate([np.flatnonzero(y == c)[:per_class] for c in range(10)]))
        mosaic = x[keep].reshape(-1, 100, 28, 28).swapaxes(1, 2).reshape(-1, 2800)
        Image.fromarray(mosaic).save(ASSETS / f"fashion_mnist_mini_{split}.png", optimize=True)
        labels[split] = y[keep]
    np.savez_compressed(ASSETS / "fashion_mnist_mini_labels.npz", **labels)


if __name__ == "__main__":
    main()
