"""Where images come from, by name: the sets that ship, torchvision's, your own folder, Hugging Face's, or noise."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch

from wejepa.config import IJepaConfig
from wejepa.data.decoding import IMAGE_ENDINGS
from wejepa.data.embedded import emoji_images, fashion_images, framed_in_black
from wejepa.data.listing import Files, class_folders, image_files
from wejepa.data.sources import FolderImages, MemoryImages, RowImages
from wejepa.errors import ConfigError, DataError, did_you_mean
from wejepa.paths import path_of
from wejepa.seeds import generator_for

__all__ = ["IMAGENET", "STATISTICS", "available_datasets", "load_images"]

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

# Per set: mean and standard deviation of the pixels (0 to 1), one value a channel; and torchvision's class.
STATISTICS = {
    "fashion_mnist_mini": ((0.2193,), (0.3318,)),
    "emoji": ((0.8025, 0.7538, 0.6993), (0.2903, 0.2859, 0.3349)),
    "fashion_mnist": ((0.2190,), (0.3318,)),
    "mnist": ((0.1000,), (0.2752,)),
    "kmnist": ((0.1467,), (0.3156,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)),
    "svhn": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    "stl10": ((0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713)),
    "imagenette": IMAGENET,
    "imagefolder": IMAGENET,
    "hf": IMAGENET,
    "fake": ((0.5,), (0.29,)),
}


def available_datasets() -> list[str]:
    """The names that `data.dataset` takes, beside "hf:" and the name or folder of a Hugging Face data set."""
    return sorted(name for name in STATISTICS if name not in ("fake", "hf"))


def load_images(cfg: IJepaConfig, split: str = "train") -> MemoryImages | FolderImages:
    """The images that a config names.

    Args:
        cfg: its `data` section names the set and its root; its `model` section the size and the channels.
        split: "train" or "test".

    Raises:
        ConfigError: no such data set or split.
        DataError: the files are absent and could not be downloaded, or cannot be read, or their labels do not fit.
    """
    if split not in ("train", "test"):
        raise ConfigError(f"split = {split!r}: give 'train' or 'test'")
    name = "fake" if cfg.data.use_fake_data else cfg.data.dataset
    kind, _, rows_of = name.partition(":")  # "hf:NAME", or a name alone
    if not (rows_of if kind == "hf" else name in (*available_datasets(), "fake")):
        raise ConfigError(
            f"data.dataset = {name!r} is not known; {did_you_mean(name, available_datasets())}; hf:NAME takes a Hugging Face data set"
        )
    mean, std = STATISTICS[kind]
    shape = {"img_size": cfg.model.img_size, "in_chans": cfg.model.in_chans, "mean": mean, "std": std}
    decoding = {"num_workers": cfg.data.num_workers, "max_unreadable_share": cfg.data.max_unreadable_share}
    if kind == "hf":
        return RowImages(*_hugging_face_rows(rows_of, split, getattr(cfg.data, f"{split}_split"), cfg.data.streamed), **decoding, **shape)
    if name in ("imagefolder", "imagenette"):
        return FolderImages(*_folder_files(name, path_of(cfg.data.root), split), **decoding, **shape)
    if name == "fake":
        images, labels, classes = _fake_images(cfg, split)
    elif name == "fashion_mnist_mini":
        images, labels, classes = fashion_images(split)
    elif name == "emoji":
        images, labels, classes = emoji_images(split)
    else:
        images, labels, classes = _torchvision_images(name, str(path_of(cfg.data.root)), split)
    return MemoryImages(images, labels, classes, **shape)


def _fake_images(cfg: IJepaConfig, split: str):
    n, side = cfg.data.fake_data_size, cfg.model.img_size
    generator = generator_for(cfg.hardware.seed, ("train", "test").index(split))
    images = torch.randint(0, 256, (n, cfg.model.in_chans, side, side), dtype=torch.uint8, generator=generator)
    return images, torch.arange(n) % 10, tuple(f"noise {c}" for c in range(10))


def _torchvision_images(name: str, root: str, split: str):
    try:
        from torchvision import datasets as tv
    except (ImportError, RuntimeError) as error:  # builds of torch and torchvision that do not belong together
        raise DataError(
            f"data.dataset = {name!r} needs torchvision, which cannot be imported ({error}): reinstall both together"
        ) from error

    kind = {
        "fashion_mnist": tv.FashionMNIST,
        "mnist": tv.MNIST,
        "kmnist": tv.KMNIST,
        "cifar10": tv.CIFAR10,
        "cifar100": tv.CIFAR100,
        "svhn": tv.SVHN,
        "stl10": tv.STL10,
    }[name]
    choice = {"split": split} if name in ("svhn", "stl10") else {"train": split == "train"}
    try:
        found = kind(root, download=False, **choice)
    except RuntimeError:  # torchvision's way of saying that the files are not there
        try:
            found = kind(root, download=True, **choice)
        except Exception as error:  # no network, a full disk, a mirror that is gone: torchvision passes on whatever it met
            raise DataError(
                f"data.dataset = {name!r} is not in data.root = {root!r} and could not be downloaded ({error}): "
                f"go online once, put its files there, or take 'fashion_mnist_mini', which ships with wejepa"
            ) from error
    images = torch.as_tensor(np.asarray(found.data))
    if images.dim() == 3:
        images = framed_in_black(images[:, None])  # grey, 28 x 28
    elif name.startswith("cifar"):
        images = images.permute(0, 3, 1, 2)  # the only ones stored channels last
    labels = torch.as_tensor(np.asarray(found.targets if hasattr(found, "targets") else found.labels)).long()
    classes = getattr(found, "classes", None) or [str(c) for c in range(10)]
    return images.contiguous(), labels, tuple(classes)


def _folder_files(name: str, root: Path, split: str):
    """ROOT/train or ROOT/test (ROOT/val serves as well), and the files, labels and classes below it, a folder a class.

    An image folder without these is all for training, however its files lie; so is a text file that lists some, which have no classes.
    """
    if name == "imagenette":
        root = root / "imagenette2-160" if (root / "imagenette2-160").is_dir() else root / "imagenette2"
    tried = {"train": [root / "train"], "test": [root / "test", root / "val"]}
    folder = next((f for f in tried[split] if f.is_dir()), None)
    if name == "imagefolder" and split == "train" and root.is_file():
        return _listed_files(root)
    if name == "imagefolder" and split == "train" and root.is_dir() and not any(f.is_dir() for part in tried.values() for f in part):
        folder = root
    if folder is None:
        names = " or ".join(f.name for f in tried[split])
        raise DataError(f"data.root = {str(root)!r} has no folder {names}: put one there, with a folder a class in it")
    files = Files(folder, image_files(folder))
    if not files:
        raise DataError(f"{folder} holds no images ({', '.join(IMAGE_ENDINGS)}): put some there, with a folder a class")
    here, of = {}, []  # the top folders that hold images, numbered as they come; and the number of each file's
    for i in range(len(files)):
        top, slash, _ = files.name(i).partition("/")
        of.append(here.setdefault(top if slash else "", len(here)))
    for name in class_folders(folder):
        if name not in here:
            warnings.warn(f"{folder / name} holds no images: the class keeps its number and has none here", stacklevel=3)
    # A class has one number in both splits, also where one of them lacks it.
    classes = tuple(sorted({*here, *(name for part in tried.values() for top in part for name in class_folders(top))}))
    number = {name: i for i, name in enumerate(classes)}
    return folder, files, torch.tensor([number[name] for name in here])[torch.tensor(of)], classes


def _listed_files(path: Path):
    """The folder of a text file, and the image files that it names, one a line, relative to that folder or from the root."""
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.root = {str(path)!r} cannot be read as a list of image files, one a line, in UTF-8 ({error})") from error
    others = [name for name in names if not name.lower().endswith(IMAGE_ENDINGS)]
    if others or not names:
        found = f"names {others[0][:100]!r}" if others else "is empty"
        raise DataError(f"data.root = {str(path)!r} {found}: list image files ({', '.join(IMAGE_ENDINGS)}), one a line")
    return path.parent, Files(path.parent, names), torch.zeros(len(names), dtype=torch.long), ("",)


HUGGING_FACE_SPLITS = {"train": ("train",), "test": ("test", "validation", "valid", "val")}  # by the name that is looked for first


def _hugging_face_rows(given: str, split: str, named: str | None, streamed: int = 0):
    """NAME/SPLIT, and the image rows, labels and classes of a Hugging Face data set.

    Args:
        given: NAME, NAME@REVISION, NAME#CONFIG or NAME@REVISION#CONFIG; NAME is on the hub, or a folder.
        split: "train" or "test". Of several that could serve as "test" the first with labels is taken: on the hub the test images of many
            sets have none, but a class of -1 each.
        named: the set's own name for the split, if it is not to be looked for.
        streamed: how many rows to take from a stream, shuffled as it comes, since most sets are sorted; 0 for all, downloaded.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"data.dataset = 'hf:{given}' needs the package datasets ({error}): pip install 'wejepa[datasets]'") from error

    tried = (named,) if named else HUGGING_FACE_SPLITS[split]
    folder = path_of(given)
    name, revision, config = (str(folder), None, None) if folder.is_dir() else _parts_of(given)
    given = name if folder.is_dir() else given
    try:
        if any((folder / file).is_file() for file in ("dataset_dict.json", "state.json")):  # save_to_disk
            found = datasets.load_from_disk(name)
        else:
            found = datasets.load_dataset(name, config, revision=revision, streaming=streamed > 0)
            if streamed:
                found = {key: _taken(stream, streamed) if key in tried else stream for key, stream in found.items()}
    except Exception as error:  # offline, no such name, no image in the folder: the library has a type for each
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DataError(
            f"data.dataset = 'hf:{given}' could not be loaded ({reason}): check the name or folder, and go online once for one on the hub"
        ) from error
    splits = dict(found) if isinstance(found, dict) else {"train": found}
    there = [s for s in tried if s in splits]
    if not there:
        raise DataError(
            f"data.dataset = 'hf:{given}' has no split {' or '.join(tried)}, only {', '.join(splits)}: name one in data.{split}_split"
        )
    label = next((key for key, kind in splits[there[0]].features.items() if isinstance(kind, datasets.ClassLabel)), None)

    def labels_of(rows) -> torch.Tensor:
        return torch.tensor(rows[label][:]) if label else torch.zeros(len(rows), dtype=torch.long)

    found_split = next((s for s in there if (labels_of(splits[s]) >= 0).all()), there[0])
    rows = splits[found_split]
    images = [column for column, kind in rows.features.items() if isinstance(kind, datasets.Image)]
    if not images:
        raise DataError(f"data.dataset = 'hf:{given}' has no column of images, only {', '.join(rows.features)}: take a set that has one")
    column = "image" if "image" in images else images[0]
    classes = tuple(rows.features[label].names) if label else ("",)
    return path_of(name) / found_split, rows.cast_column(column, datasets.Image(decode=False))[column], labels_of(rows), classes


def _taken(stream, count: int):
    """The first rows of a shuffled stream, as a data set in memory whose images are not decoded."""
    import datasets

    features = stream.features or stream._resolve_features().features
    undecoded = {key: datasets.Image(decode=False) if isinstance(kind, datasets.Image) else kind for key, kind in features.items()}
    rows = stream.cast(datasets.Features(undecoded)).shuffle(seed=0, buffer_size=max(1000, count)).take(count)
    return datasets.Dataset.from_list(list(rows), features=datasets.Features(undecoded))


def _parts_of(given: str) -> tuple[str, str | None, str | None]:
    """NAME, REVISION and CONFIG of NAME@REVISION#CONFIG; None for what is not there."""
    rest, _, config = given.partition("#")
    name, _, revision = rest.partition("@")
    return name, revision or None, config or None
