"""Images by name: the embedded set, torchvision's, your own folder, or noise.

Two kinds of source share one interface. `MemoryImages` holds every image as bytes and augments a batch at a time; `FolderImages`
decodes files, in worker processes if asked. Both give what the encoder takes: float32 (B, C, S, S), normalised.

Every random choice is derived from (seed, epoch, step), so a run that stops in between goes on as if it had not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from wejepa.config import IJepaConfig, did_you_mean
from wejepa.errors import ConfigError, DataError

__all__ = ["FolderImages", "MemoryImages", "available_datasets", "load_images", "training_batches"]

ASSETS = Path(__file__).parent / "assets"
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

# Per set: mean and standard deviation of the pixels (0 to 1), one value a channel; and torchvision's class.
STATISTICS = {
    "fashion_mnist_mini": ((0.2193,), (0.3318,)),
    "fashion_mnist": ((0.2190,), (0.3318,)),
    "mnist": ((0.1000,), (0.2752,)),
    "kmnist": ((0.1467,), (0.3156,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)),
    "svhn": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    "stl10": ((0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713)),
    "imagenette": IMAGENET,
    "imagefolder": IMAGENET,
    "fake": ((0.5,), (0.29,)),
}
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
FASHION_CLASSES = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


def available_datasets() -> list[str]:
    """The names that `data.dataset` takes."""
    return sorted(name for name in STATISTICS if name != "fake")


def load_images(cfg: IJepaConfig, split: str = "train") -> MemoryImages | FolderImages:
    """The images that a config names.

    Args:
        cfg: its `data` section names the set and its root; its `model` section the size and the channels.
        split: "train" or "test".

    Raises:
        ConfigError: no such data set or split.
        DataError: the files are absent and could not be downloaded, or cannot be read.
    """
    if split not in ("train", "test"):
        raise ConfigError(f"split = {split!r}: give 'train' or 'test'")
    name = "fake" if cfg.data.use_fake_data else cfg.data.dataset
    if name not in STATISTICS:
        raise ConfigError(f"data.dataset = {name!r} is not known; {did_you_mean(name, available_datasets())}")
    mean, std = STATISTICS[name]
    shape = {"img_size": cfg.model.img_size, "in_chans": cfg.model.in_chans, "mean": mean, "std": std}
    if name in ("imagefolder", "imagenette"):
        return FolderImages(*_folder_files(name, Path(cfg.data.root), split), num_workers=cfg.data.num_workers, **shape)
    if name == "fake":
        images, labels, classes = _fake_images(cfg, split)
    elif name == "fashion_mnist_mini":
        images, labels, classes = _embedded_images(split)
    else:
        images, labels, classes = _torchvision_images(name, cfg.data.root, split)
    return MemoryImages(images, labels, classes, **shape)


class MemoryImages:
    """Images held as bytes (N, C, H, W), with labels (N,); augmented and normalised a batch at a time."""

    def __init__(self, images: Tensor, labels: Tensor, classes: tuple[str, ...], *, img_size, in_chans, mean, std):
        self.images, self.labels, self.classes = images, labels, tuple(classes)
        self.img_size, self.in_chans = img_size, in_chans
        self.mean, self.std = mean, std

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, index: Tensor, batch_size: int) -> Iterator[Tensor]:
        """The images as they are, at the encoder's size, in the order of `index`: (B, C, S, S) each."""
        for part in index.split(batch_size):
            x = normalise(self.images[part], self.mean, self.std)
            if x.shape[-2:] != (self.img_size, self.img_size):
                x = F.interpolate(x, size=(self.img_size, self.img_size), mode="bilinear", antialias=True)
            yield with_channels(x, self.in_chans)

    def augmented(self, index: Tensor, crops: Tensor) -> Iterator[Tensor]:
        """One augmented batch for each row of `index` (steps, B) under `crops` (steps, B, 5): (B, C, S, S) each."""
        for part, crop in zip(index, crops, strict=True):
            left, top, wide, high, mirror = crop.unbind(1)
            theta = torch.zeros(len(part), 2, 3)  # one affine map an image crops, resizes and mirrors at once
            theta[:, 0, 0], theta[:, 0, 2] = wide * (1 - 2 * mirror), 2 * left + wide - 1
            theta[:, 1, 1], theta[:, 1, 2] = high, 2 * top + high - 1
            at = F.affine_grid(theta, [len(part), 1, self.img_size, self.img_size], align_corners=False)
            x = normalise(self.images[part], self.mean, self.std)
            x = F.grid_sample(x, at, mode="bilinear", padding_mode="border", align_corners=False)
            yield with_channels(x, self.in_chans)


class FolderImages(torch.utils.data.Dataset):
    """Image files, decoded when asked for."""

    def __init__(self, files: list[Path], labels: Tensor, classes: tuple[str, ...], *, num_workers, img_size, in_chans, mean, std):
        self.files, self.labels, self.classes = files, labels, tuple(classes)
        self.num_workers, self.img_size, self.in_chans = num_workers, img_size, in_chans
        self.mean, self.std = mean, std

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, item: tuple[int, list[float] | None]) -> Tensor:
        """Bytes (3, S, S) of an image: its crop, given as (left, top, width, height, mirror), or its centre."""
        from PIL import Image, ImageOps

        index, crop = item
        try:
            with Image.open(self.files[index]) as opened:
                image = ImageOps.exif_transpose(opened)
                if image.mode.startswith("I;16"):  # sixteen bits: convert() would cut them off at 255
                    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
                image = image.convert("RGB")
        except Exception as error:  # Pillow raises many types on damaged files
            raise DataError(f"{self.files[index]} cannot be read as an image ({error}): repair or remove it") from error
        width, height = image.size
        if crop is None:
            side = min(width, height)
            left, top, wide, high, mirror = (width - side) / 2, (height - side) / 2, side, side, 0
        else:
            left, wide, top, high = crop[0] * width, crop[2] * width, crop[1] * height, crop[3] * height
            mirror = crop[4]
        box = (left, top, left + wide, top + high)
        image = image.resize((self.img_size, self.img_size), Image.Resampling.BILINEAR, box=box, reducing_gap=2.0)
        pixels = np.array(ImageOps.mirror(image) if mirror else image)
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()

    def batches(self, index: Tensor, batch_size: int) -> Iterator[Tensor]:
        """The centres of the images in the order of `index`: (B, C, S, S) each."""
        yield from self._load([[(i, None) for i in part.tolist()] for part in index.split(batch_size)])

    def augmented(self, index: Tensor, crops: Tensor) -> Iterator[Tensor]:
        """One augmented batch for each row of `index` (steps, B) under `crops` (steps, B, 5): (B, C, S, S) each."""
        yield from self._load([list(zip(part.tolist(), crop.tolist(), strict=True)) for part, crop in zip(index, crops, strict=True)])

    def _load(self, batches: list[list]) -> Iterator[Tensor]:
        loader = torch.utils.data.DataLoader(self, batch_sampler=batches, num_workers=self.num_workers)
        try:
            for pixels in loader:
                yield with_channels(normalise(pixels, self.mean, self.std), self.in_chans)
        except DataError as error:  # from a worker it comes wrapped in that process's traceback; its own line is the last
            raise DataError(str(error).strip().splitlines()[-1].removeprefix("wejepa.errors.DataError: ")) from None


def training_batches(source: MemoryImages | FolderImages, cfg: IJepaConfig, epoch: int, first_step: int = 0) -> Iterator[Tensor]:
    """The augmented batches (B, C, S, S) of one epoch, each image once, from step `first_step` on; a short last batch is left out.

    Raises:
        DataError: the set has fewer images than a batch.
    """
    steps, size, seed = steps_per_epoch(source, cfg), cfg.data.train_batch_size, cfg.hardware.seed
    order = torch.randperm(len(source), generator=generator_for(seed, epoch))
    index = order[: steps * size].view(steps, size)[first_step:]
    crops = [random_crops(size, cfg, generator_for(seed, epoch, step)) for step in range(first_step, steps)]
    if crops:
        yield from source.augmented(index, torch.stack(crops))


def steps_per_epoch(source: MemoryImages | FolderImages, cfg: IJepaConfig) -> int:
    """Whole batches in the set."""
    if len(source) < cfg.data.train_batch_size:
        raise DataError(f"data.train_batch_size = {cfg.data.train_batch_size} is more than the set's {len(source)} images: make it smaller")
    return len(source) // cfg.data.train_batch_size


def random_crops(batch_size: int, cfg: IJepaConfig, generator: torch.Generator) -> Tensor:
    """Crops as shares of an image: (B, 5) of left, top, width, height and mirror (0 or 1); aspect ratios from 3:4 to 4:3."""
    u = torch.rand(5, batch_size, generator=generator)
    area = cfg.data.crop_scale[0] + u[0] * (cfg.data.crop_scale[1] - cfg.data.crop_scale[0])
    aspect = torch.exp((2 * u[1] - 1) * math.log(4 / 3))
    wide, high = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    mirror = (u[4] < 0.5).float() * cfg.data.horizontal_flip
    return torch.stack([u[2] * (1 - wide), u[3] * (1 - high), wide, high, mirror], dim=1)


def generator_for(*key: int) -> torch.Generator:
    """A random generator of its own for each tuple of whole numbers, such as (seed, epoch, step)."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))


def normalise(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Bytes (B, C, H, W) as float32 with the set's mean and deviation taken out."""
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (mean, std))
    return pixels.float().div_(255).sub_(mean).div_(std)


def with_channels(x: Tensor, channels: int) -> Tensor:
    """Grey to colour by repetition, colour to grey by the mean."""
    if x.shape[1] == channels:
        return x
    return (x if x.shape[1] == 1 else x.mean(1, keepdim=True)).expand(-1, channels, -1, -1)


# ---------------------------------------------------------------- where the images come from


def _embedded_images(split: str):
    from PIL import Image

    try:
        mosaic = np.asarray(Image.open(ASSETS / f"fashion_mnist_mini_{split}.png"))
        labels = np.load(ASSETS / "fashion_mnist_mini_labels.npz")[split]
    except OSError as error:
        raise DataError(f"the embedded images are missing or damaged ({error}): reinstall wejepa") from error
    images = mosaic.reshape(-1, 28, 100, 28).swapaxes(1, 2).reshape(-1, 1, 28, 28)
    return _padded(torch.from_numpy(images)), torch.from_numpy(labels).long(), FASHION_CLASSES


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
        images = _padded(images[:, None])  # grey, 28 x 28
    elif name.startswith("cifar"):
        images = images.permute(0, 3, 1, 2)  # the only ones stored channels last
    labels = torch.as_tensor(np.asarray(found.targets if hasattr(found, "targets") else found.labels)).long()
    classes = getattr(found, "classes", None) or [str(c) for c in range(10)]
    return images.contiguous(), labels, tuple(classes)


def _padded(images: Tensor) -> Tensor:
    """28 x 28 to 32 x 32 with black, so that patches of 4 and 8 divide it."""
    return F.pad(images, (2, 2, 2, 2))


def _folder_files(name: str, root: Path, split: str):
    """The files, labels and classes below ROOT/train or ROOT/test, a folder a class; ROOT/val serves as test as well."""
    if name == "imagenette":
        root = root / "imagenette2-160" if (root / "imagenette2-160").is_dir() else root / "imagenette2"
    tried = {"train": [root / "train"], "test": [root / "test", root / "val"]}
    folder = next((f for f in tried[split] if f.is_dir()), None)
    if folder is None:
        names = " or ".join(f.name for f in tried[split])
        raise DataError(f"data.root = {str(root)!r} has no folder {names}: put one there, with a folder a class in it")
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in IMAGE_ENDINGS and f.is_file())
    if not files:
        raise DataError(f"{folder} holds no images ({', '.join(IMAGE_ENDINGS)}): put some there, with a folder a class")
    names = [f.relative_to(folder).parts[0] if f.parent != folder else "" for f in files]
    # A class has one number in both splits, also where one of them lacks it.
    both = {f.name for part in tried.values() for top in part if top.is_dir() for f in top.iterdir() if f.is_dir()}
    classes = tuple(sorted(both | set(names)))
    return files, torch.tensor([classes.index(n) for n in names]), classes
