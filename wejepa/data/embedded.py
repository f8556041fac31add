"""The images that ship with wejepa: a part of Fashion-MNIST, emoji by two vendors, and a photograph."""

from __future__ import annotations

import csv
import hashlib
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from wejepa.data.decoding import read_image
from wejepa.errors import ConfigError, DataError

__all__ = ["Emoji", "emoji_images", "emoji_index", "example_photograph", "fashion_images", "framed_in_black"]

ASSETS = Path(__file__).parent.parent / "assets"
# SHA-256 of each file, as scripts/make_assets.py prints them.
SHA256 = {
    "chelsea.png": "9e0b1b03627c5cbbf8859bd325c5a019b11a71a3075c42229e6cbc4f938cf6ce",
    "collapse.json": "5a1cb5c541d26d4ca001bb8906c739d46df24e1cbb5f9536a33142d8f564ddb9",
    "emoji.csv": "395d7a545d4e34762d2526360b5c924dee3c5374770ca9d76bc1edeb3c59e5e2",
    "emoji.json": "bc13ad1689875d83dccda0e69f51148646a2af7b6be369422238515df6334a35",
    "emoji.safetensors": "8ede4dfbadc56e3007c5c960061ad1a48f13ec50c31b76de746b5c67e6facf23",
    "emoji_noto.webp": "a5cf767808fadd253114e12ba3fdec709f0ff8cf8d464453d54fa9650d796111",
    "emoji_twemoji.webp": "0186d601f070c75233b618938a24c89febfd75fe7388598ff168614bf988c65c",
    "fashion.json": "d4c448f91492a6e90c86903e4eef0b3319a211922b36f4737fa00862173d4c8b",
    "fashion.safetensors": "d5ad865c4588703b8161d72a770a9709f548331877e603bbbc53b9a1d8667e9a",
    "fashion_mnist_mini_labels.npz": "d749ddb33cf41812aab38d4b0bc0ab9a6cb61b2a365d20865f324ffd4907787e",
    "fashion_mnist_mini_test.png": "2c9dcf338ca3d8f90ac1504e912d0707e4ae60ad461ed5d1c9214e1c4f7ec1e7",
    "fashion_mnist_mini_train.png": "cb3c4f430f5ef6988a6a407398ee6f546929cdaad178d26cc131502c9d7f5202",
    "objectives.json": "0368e09875ecfe45f6c1cbb614f8c41741a6094f44740580395fa468131a97f8",
    "own_images.json": "d0aa07a40a78e46a1b1db161bdb6e0723c82b9185f4d75fae7161bf374a169a9",
    "shift.json": "ff93f3d6ba2013c0652fc50fe34c2ae6bbd86b741175c38108b3c5d403a29bca",
}
FASHION_CLASSES = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
EMOJI_CLASSES = ("Smileys", "People", "Animals", "Food", "Travel", "Activities", "Objects", "Symbols", "Flags")
EMOJI_VENDORS = ("noto", "twemoji")


def fashion_images(split: str) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Bytes (N, 1, 32, 32), labels (N,) and classes of `fashion_mnist_mini`: 10,000 training images, 2,000 for testing.

    Raises:
        DataError: a file is absent or damaged.
    """
    check_licences("FASHION_MNIST_LICENSE")
    mosaic = pixels_of(f"fashion_mnist_mini_{split}.png")
    labels = np.load(io.BytesIO(asset("fashion_mnist_mini_labels.npz")))[split]
    images = mosaic.reshape(-1, 28, 100, 28).swapaxes(1, 2).reshape(-1, 1, 28, 28)
    return framed_in_black(torch.from_numpy(images)), torch.from_numpy(labels).long(), FASHION_CLASSES


def framed_in_black(images: Tensor) -> Tensor:
    """28 x 28 to 32 x 32, so that patches of 4 and 8 divide it."""
    return F.pad(images, (2, 2, 2, 2))


class Emoji(NamedTuple):
    """What an image of the set `emoji` shows."""

    name: str  # the emoji's short name, "grinning"; the same for both vendors' drawings of it
    category: str  # its class
    vendor: str  # who drew it: "noto" (Google) or "twemoji" (Twitter)
    group: str  # the same for emoji that are variants of each other, or drawn alike to the pixel: all on one side of the split


def emoji_index(split: str = "train") -> list[Emoji]:
    """What each image of `load_images` shows, in its order: an emoji as drawn by Noto, then the same one by Twemoji.

    So image i and image i ^ 1 are the same emoji. The order of the emoji means nothing.

    Raises:
        ConfigError: a split other than "train" and "test".
        DataError: the file is absent or damaged.
    """
    if split not in ("train", "test"):
        raise ConfigError(f"split = {split!r}: give 'train' or 'test'")
    rows = [row for row in _emoji_rows() if row["split"] == split]
    return [Emoji(row["name"], row["category"], vendor, row["group"]) for row in rows for vendor in EMOJI_VENDORS]


def emoji_images(split: str) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Bytes (N, 3, 64, 64), labels (N,) and classes of `emoji`, in the order of `emoji_index`: 3,048 training images, 764 for testing.

    Raises:
        DataError: a file is absent or damaged.
    """
    check_licences("NOTO_EMOJI_LICENSE", "TWEMOJI_LICENSE", "EMOJI_DATASOURCE_LICENSE")
    places = np.array([i for i, row in enumerate(_emoji_rows()) if row["split"] == split])
    images = np.empty((len(places), len(EMOJI_VENDORS), 3, 64, 64), np.uint8)
    for i, vendor in enumerate(EMOJI_VENDORS):
        sheet = pixels_of(f"emoji_{vendor}.webp").reshape(-1, 66, 44, 66, 3)  # 44 a row, each in a frame of one pixel
        images[:, i] = sheet[places // 44, 1:-1, places % 44, 1:-1].transpose(0, 3, 1, 2)
    labels = [EMOJI_CLASSES.index(emoji.category) for emoji in emoji_index(split)]
    return torch.from_numpy(images).flatten(0, 1), torch.tensor(labels), EMOJI_CLASSES


def _emoji_rows() -> list[dict[str, str]]:
    """A row for each place on both sheets: name, category, split and group."""
    return list(csv.DictReader(io.StringIO(asset("emoji.csv").decode())))


def example_photograph() -> Tensor:
    """A photograph that ships with wejepa, a cat's face: bytes (3, 224, 224). By Stéfan van der Walt, CC0, from scikit-image."""
    return read_image(io.BytesIO(asset("chelsea.png")), 224)


def asset(name: str) -> bytes:
    """The content of a file that ships with wejepa, as it was made.

    Raises:
        DataError: it is absent, or not what it was.
    """
    try:
        content = (ASSETS / name).read_bytes()
    except OSError as error:
        raise DataError(f"{ASSETS / name} ships with wejepa and cannot be read ({error.strerror}): reinstall wejepa") from error
    if hashlib.sha256(content).hexdigest() != SHA256[name]:
        raise DataError(f"{ASSETS / name} is not as it ships with wejepa (another SHA-256): reinstall wejepa")
    return content


def pixels_of(name: str) -> np.ndarray:
    """The pixels of an image that ships with wejepa: (H, W), or (H, W, 3) in colour."""
    from PIL import Image

    content = io.BytesIO(asset(name))
    try:
        return np.asarray(Image.open(content))
    except OSError as error:  # the file is as it was made
        kind = name.rpartition(".")[2]
        raise DataError(f"{ASSETS / name} cannot be read by this Pillow ({error}): install one that was built with {kind}") from error


def check_licences(*names: str) -> None:
    """Refuse images whose licence is not beside them: they may not be passed on without it.

    Raises:
        DataError: naming the licence.
    """
    for name in names:
        if not (ASSETS / name).is_file():
            raise DataError(f"{ASSETS / name} is missing, the licence of images beside it: reinstall wejepa")
