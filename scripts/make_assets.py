"""Make the images that ship with wejepa from the original files, into wejepa/assets/.

    python scripts/make_assets.py fashion FOLDER
    python scripts/make_assets.py photograph FILE
    npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0
    python scripts/make_assets.py emoji emoji-datasource-google-16.0.0.tgz emoji-datasource-twitter-16.0.0.tgz

fashion: FOLDER holds the four original `*-ubyte.gz` files, for example those of Debian's package `dataset-fashion-mnist`
(in /usr/share/datasets/fashion-mnist). Written: two mosaics, 100 images of 28 x 28 a row, of the first 1,000 training and 200 test images
of each class in the official order, and their labels.

photograph: FILE is chelsea.png of scikit-image, a photograph of a cat by Stéfan van der Walt, CC0. Written: a square of it, 224 x 224.

emoji: written are a sheet of each vendor's drawings, 44 a row, 64 x 64 in a frame of a pixel, and emoji.csv, a line
for each place on both sheets. The licences beside them are kept by hand. The sheets in the repository were made with Pillow 13.0.0 and its
libwebp 1.6.0; another libwebp may write other bytes.

wejepa refuses images whose bytes have changed: the hashes that this prints belong in wejepa/data/embedded.py.
"""

import argparse
import base64
import csv
import gzip
import hashlib
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

ASSETS = Path(__file__).resolve().parent.parent / "wejepa" / "assets"

# What the npm registry says of each package: the SHA-512 of the file.
EMOJI_PACKAGES = {
    "google": "ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A==",
    "twitter": "7F+uCuHH+7Qnrc15P5tnbvKkg9E6tlzi4MnT2uW1RlN4pLYTza6cP/dstIfSDMtpjFLWuZewWg8jBbuL2eyELQ==",
}
EMOJI_CATEGORIES = {
    "Smileys & Emotion": "Smileys",
    "People & Body": "People",
    "Animals & Nature": "Animals",
    "Food & Drink": "Food",
    "Travel & Places": "Travel",
    "Activities": "Activities",
    "Objects": "Objects",
    "Symbols": "Symbols",
    "Flags": "Flags",
}  # the tenth, Component, holds swatches of skin
# What tells a man, a woman and a person, or one who faces right, who do the same: 👨 👩 🧑 ♀ ♂ ➡, and what joins code points.
WHO = {"1F468", "1F469", "1F9D1", "2640", "2642", "27A1", "200D", "FE0F"}
SIDE, ACROSS = 64, 44


def fashion(folder: Path) -> None:
    labels = {}
    for split, stem, per_class in (("train", "train", 1000), ("test", "t10k", 200)):
        y = read_idx(folder / f"{stem}-labels-idx1-ubyte.gz", 8)
        x = read_idx(folder / f"{stem}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
        keep = np.sort(np.concatenate([np.flatnonzero(y == c)[:per_class] for c in range(10)]))
        mosaic = x[keep].reshape(-1, 100, 28, 28).swapaxes(1, 2).reshape(-1, 2800)
        Image.fromarray(mosaic).save(ASSETS / f"fashion_mnist_mini_{split}.png", optimize=True)
        labels[split] = y[keep]
    np.savez_compressed(ASSETS / "fashion_mnist_mini_labels.npz", **labels)


def read_idx(path: Path, header: int) -> np.ndarray:
    """The bytes of a gzipped IDX file behind its header."""
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header)


def photograph(file: Path) -> None:
    square = Image.open(file).convert("RGB").crop((95, 0, 395, 300))
    square.resize((224, 224), Image.Resampling.LANCZOS).save(ASSETS / "chelsea.png", optimize=True)


def emoji(google: Path, twitter: Path) -> None:
    entries, noto = emoji_package(google, "google")
    _, twemoji = emoji_package(twitter, "twitter")
    entries = [entry for entry in entries if entry["category"] in EMOJI_CATEGORIES]
    entries.sort(key=lambda entry: order_of(entry["short_name"]))  # so that the first of a class are a fair sample of it
    groups = emoji_groups(entries, [(noto[e["image"]].tobytes(), twemoji[e["image"]].tobytes()) for e in entries])
    test = a_fifth_of_each_class([entry["category"] for entry in entries], groups)
    for name, drawings in (("noto", noto), ("twemoji", twemoji)):
        cell = SIDE + 2  # the edge once more around each, or the colours of neighbours would run together in WebP
        sheet = Image.new("RGB", (ACROSS * cell, -(-len(entries) // ACROSS) * cell), "white")
        for i, entry in enumerate(entries):
            framed = np.pad(np.asarray(drawings[entry["image"]]), ((1, 1), (1, 1), (0, 0)), mode="edge")
            sheet.paste(Image.fromarray(framed), (i % ACROSS * cell, i // ACROSS * cell))
        sheet.save(ASSETS / f"emoji_{name}.webp", quality=95, method=6)
    with open(ASSETS / "emoji.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["name", "category", "split", "group"])
        for i, entry in enumerate(entries):
            table.writerow([entry["short_name"], EMOJI_CATEGORIES[entry["category"]], "test" if i in test else "train", groups[i]])


def emoji_package(path: Path, vendor: str) -> tuple[list[dict], dict[str, Image.Image]]:
    """The entries of emoji.json, and each drawing on white by its file's name."""
    if sha512(path) != EMOJI_PACKAGES[vendor]:
        raise SystemExit(f"{path} is not emoji-datasource-{vendor} 16.0.0 as published: pack it again")
    drawings = {}
    with tarfile.open(path) as package:
        for member in package:
            if member.name == "package/emoji.json":
                entries = json.load(package.extractfile(member))
            elif member.name.startswith(f"package/img/{vendor}/{SIDE}/") and member.isfile():
                white = Image.new("RGBA", (SIDE, SIDE), "white")
                white.alpha_composite(Image.open(package.extractfile(member)).convert("RGBA"))
                drawings[member.name.rpartition("/")[2]] = white.convert("RGB")
    return entries, drawings


def sha512(path: Path) -> str:
    """A file's SHA-512 as npm writes it."""
    return base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()


def order_of(name: str) -> str:
    """What emoji are sorted by: no order that means anything, the same for ever."""
    return hashlib.sha256(name.encode()).hexdigest()


def emoji_groups(entries: list[dict], drawings: list[tuple[bytes, bytes]]) -> list[str]:
    """For each emoji the name of the first that must be on its side of the split, perhaps its own.

    A man, a woman and a person who do the same differ by some hair, and some emoji are drawn alike to the pixel, as the flags of Norway and
    Svalbard are: were one of them a training image, another would be no fair test.
    """
    groups = list(range(len(entries)))
    first: dict[tuple, int] = {}
    for i, entry in enumerate(entries):
        parts = entry["unified"].split("-")
        deed = tuple(part for part in parts if part not in WHO) or tuple(parts)
        for key in ((entry["category"], deed), ("noto", drawings[i][0]), ("twemoji", drawings[i][1])):
            here, there = groups[i], groups[first.setdefault(key, i)]
            groups = [min(here, there) if group in (here, there) else group for group in groups]
    return [entries[group]["short_name"] for group in groups]


def a_fifth_of_each_class(categories: list[str], groups: list[str]) -> set[int]:
    """Which emoji are the test set: whole groups, in the order of their names' hashes, as long as the fifth has room."""
    test: set[int] = set()
    for category in EMOJI_CATEGORIES:
        here = [i for i, c in enumerate(categories) if c == category]
        room = round(len(here) / 5)
        for group in sorted({groups[i] for i in here}, key=order_of):
            members = [i for i in here if groups[i] == group]
            if len(members) <= room:
                test.update(members)
                room -= len(members)
    return test


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(required=True)
    for make, given in ((fashion, ["folder"]), (photograph, ["file"]), (emoji, ["google", "twitter"])):
        kind = kinds.add_parser(make.__name__)
        for name in given:
            kind.add_argument(name, type=Path)
        kind.set_defaults(make=make)
    args = vars(parser.parse_args())
    args.pop("make")(**args)
    for path in sorted(ASSETS.iterdir()):
        if path.suffix:  # licences have none
            print(f'    "{path.name}": "{hashlib.sha256(path.read_bytes()).hexdigest()}",')


if __name__ == "__main__":
    main()
