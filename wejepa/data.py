"""Images by name: the embedded set, torchvision's, your own folder, Hugging Face's, or noise.

Two kinds of source share one interface. `MemoryImages` holds every image as bytes and augments a batch at a time; `FolderImages`
decodes files, in worker processes if asked, and `RowImages` the rows of a Hugging Face data set in the same way. All give what the
encoder takes: float32 (B, C, S, S), normalised.

Every random choice is derived from (seed, epoch, step), so a run that stops in between goes on as if it had not. A file that cannot be
read is named in a warning and passed over; too many of them are an error.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import os
import warnings
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from wejepa.config import IJepaConfig, did_you_mean
from wejepa.errors import ConfigError, DataError

__all__ = [
    "FolderImages",
    "MemoryImages",
    "RowImages",
    "available_datasets",
    "example_photograph",
    "load_images",
    "naming_dead_workers",
    "training_batches",
]

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
    "hf": IMAGENET,
    "fake": ((0.5,), (0.29,)),
}
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
FASHION_CLASSES = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


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
        return RowImages(*_hugging_face_rows(rows_of, split), **decoding, **shape)
    if name in ("imagefolder", "imagenette"):
        return FolderImages(*_folder_files(name, Path(cfg.data.root), split), **decoding, **shape)
    if name == "fake":
        images, labels, classes = _fake_images(cfg, split)
    elif name == "fashion_mnist_mini":
        images, labels, classes = _embedded_images(split)
    else:
        images, labels, classes = _torchvision_images(name, cfg.data.root, split)
    return MemoryImages(images, labels, classes, **shape)


class MemoryImages:
    """Images held as bytes (N, C, H, W), with labels (N,); augmented and normalised a batch at a time.

    Raises:
        DataError: images of another type or shape, a number of labels other than of images, or a label without a class.
    """

    def __init__(self, images: Tensor, labels: Tensor, classes: tuple[str, ...], *, img_size, in_chans, mean, std):
        if images.dtype != torch.uint8 or images.dim() != 4:
            raise DataError(f"images: give bytes (N, C, H, W), uint8 from 0 to 255, not {images.dtype} {tuple(images.shape)}")
        if labels.shape != images.shape[:1]:
            raise DataError(f"labels: give one for each of the {len(images)} images, ({len(images)},), not {tuple(labels.shape)}")
        if outside := ((labels < 0) | (labels >= len(classes))).nonzero().flatten().tolist():
            raise DataError(
                f"labels[{outside[0]}] = {labels[outside[0]]} is no class from 0 to {len(classes) - 1}: correct it, or name all classes"
            )
        self.images, self.labels, self.classes = images, labels, tuple(classes)
        self.unreadable: dict[Path, str] = {}  # as in FolderImages, but never any
        self.img_size, self.in_chans = img_size, in_chans
        self.mean, self.std = mean, std

    def __len__(self) -> int:
        return len(self.images)

    @property
    def fingerprint(self) -> str:
        """Tells this set from another one: the number of images."""
        return f"{len(self)} images"

    def readable(self, index: Tensor) -> Tensor:
        """`index` as it is: what is in memory has been read."""
        return index

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
    """Image files, decoded when asked for.

    Args:
        folder: what the files' names are relative to, in the fingerprint.
        files: their paths.
        labels: their classes, (N,).
        num_workers: processes that decode; 0 for this one.
        max_unreadable_share: share of the files that may be unreadable; not even 1 allows all of them.

    Attributes:
        unreadable: the files found so far that cannot be read, and why.
    """

    def __init__(
        self,
        folder: Path,
        files: list[Path],
        labels: Tensor,
        classes: tuple[str, ...],
        *,
        num_workers,
        max_unreadable_share,
        img_size,
        in_chans,
        mean,
        std,
    ):
        self.folder, self.files, self.labels, self.classes = folder, files, labels, tuple(classes)
        self.num_workers, self.max_unreadable_share = num_workers, max_unreadable_share
        self.img_size, self.in_chans = img_size, in_chans
        self.mean, self.std = mean, std
        self.unreadable: dict[Path, str] = {}
        self._judged = torch.zeros(len(files), dtype=torch.bool)  # by `readable`

    def __len__(self) -> int:
        return len(self.files)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Tells this set from another one, wherever it is: the number of files and a checksum of their names below the folder."""
        names = sorted(file.relative_to(self.folder).as_posix() for file in self.files)
        checksum = zlib.crc32(os.fsencode("\n".join(names)))
        return f"{len(names)} files, {checksum:08x}"

    def __getitem__(self, item: tuple[int, list[float] | None]) -> tuple[Tensor | None, list[tuple[int, str]]]:
        """One image, or what stands in for it.

        Args:
            item: an index, and a crop as shares of the image (left, top, width, height, mirror); None for its centre.

        Returns:
            Bytes (3, S, S), and the (index, reason) of each file that could not be read on the way. Under a crop the next readable file
            takes the place of one that is not; at the centre, where labels count, nothing does: None.
        """
        index, crop = item
        failed: list[tuple[int, str]] = []
        for i in range(index, index + (1 if crop is None else len(self))):
            i %= len(self)
            try:
                return read_image(self._opened(i), self.img_size, crop), failed
            except Exception as error:  # Pillow raises many types on damaged files
                failed.append((i, _reason(error)))
            if self._too_many(len(failed)):
                break
        return None, failed

    def _opened(self, i: int) -> Path | io.BytesIO:
        return self.files[i]

    def batches(self, index: Tensor, batch_size: int) -> Iterator[Tensor]:
        """The centres of the images in the order of `index`: (B, C, S, S) each.

        Raises:
            DataError: naming a file that cannot be read; `readable` tells which can.
        """
        for pixels, failed in self._centres(index, batch_size):
            if failed:
                i, reason = failed[0]
                raise DataError(f"{self.files[i]} cannot be read as an image ({reason}): repair or remove it")
            yield self._prepared(pixels)

    def augmented(self, index: Tensor, crops: Tensor) -> Iterator[Tensor]:
        """One augmented batch for each row of `index` (steps, B) under `crops` (steps, B, 5): (B, C, S, S) each.

        The next readable file stands in for one that cannot be read, whatever its class.

        Raises:
            DataError: too many files cannot be read.
        """
        items = (list(zip(part.tolist(), crop.tolist(), strict=True)) for part, crop in zip(index, crops, strict=True))
        for pixels, failed in self._load(items):
            self._pass_over(failed)
            yield self._prepared(pixels)

    def readable(self, index: Tensor) -> Tensor:
        """`index` (N,) without the files that cannot be read: every file is decoded, once in the life of this object.

        Raises:
            DataError: too many files cannot be read.
        """
        new = index[~self._judged[index]].unique()
        for _, failed in self._centres(new, 64):
            self._pass_over(failed)
        self._judged[new] = True
        return index[torch.tensor([self.files[i] not in self.unreadable for i in index.tolist()], dtype=torch.bool)]

    def _centres(self, index: Tensor, batch_size: int) -> Iterator[tuple[Tensor | None, list[tuple[int, str]]]]:
        return self._load([(i, None) for i in part.tolist()] for part in index.split(batch_size))

    def _load(self, items: Iterable[list]) -> Iterator[tuple[Tensor | None, list[tuple[int, str]]]]:
        """Bytes (B, 3, S, S) and what failed, of each list of items."""
        loader = torch.utils.data.DataLoader(self, batch_sampler=items, num_workers=self.num_workers, collate_fn=_collate)
        with naming_dead_workers(self.num_workers):
            yield from loader

    def _prepared(self, pixels: Tensor) -> Tensor:
        return with_channels(normalise(pixels, self.mean, self.std), self.in_chans)

    def _too_many(self, count: int) -> bool:
        return count == len(self) or count > self.max_unreadable_share * len(self)

    def _pass_over(self, failed: list[tuple[int, str]]) -> None:
        """Name each file that cannot be read, once, and refuse to go on when they are too many."""
        for i, reason in failed:
            if self.files[i] not in self.unreadable:
                self.unreadable[self.files[i]] = reason
                warnings.warn(f"{self.files[i]} cannot be read as an image ({reason}): passed over", stacklevel=2)
        if self._too_many(len(self.unreadable)):
            first = ", ".join(str(path) for path in list(self.unreadable)[:3])
            raise DataError(
                f"data.max_unreadable_share = {self.max_unreadable_share:g}, but already {len(self.unreadable)} of {len(self)} files "
                f"cannot be read as images (the first: {first}): repair or remove them, or allow a larger share"
            )


class RowImages(FolderImages):
    """The rows of a Hugging Face data set, decoded when asked for, as `FolderImages` decodes files; a row is named NAME/SPLIT/NUMBER.

    Args:
        folder: NAME/SPLIT.
        rows: for each row {"bytes": the image file's content, "path": where it is if the content is None}.
        labels, classes and the rest: as for `FolderImages`.
    """

    def __init__(self, folder: Path, rows, labels: Tensor, classes: tuple[str, ...], **settings):
        super().__init__(folder, [folder / str(i) for i in range(len(rows))], labels, classes, **settings)
        self.rows = rows

    @functools.cached_property
    def fingerprint(self) -> str:
        """Tells this set from another one: the number of rows and a checksum of their labels."""
        return f"{len(self)} rows, {zlib.crc32(self.labels.numpy().tobytes()):08x}"

    def _opened(self, i: int) -> Path | io.BytesIO:
        row = self.rows[i]
        if row is None or (row["bytes"] is None and row["path"] is None):
            raise ValueError("the row has no image")
        return Path(row["path"]) if row["bytes"] is None else io.BytesIO(row["bytes"])


def _collate(items: list[tuple[Tensor | None, list]]) -> tuple[Tensor | None, list]:
    pixels = [x for x, _ in items if x is not None]
    return torch.stack(pixels) if pixels else None, [entry for _, failed in items for entry in failed]


def read_image(path: Path | io.BytesIO, size: int, crop: list[float] | None = None) -> Tensor:
    """Bytes (3, size, size) of an image file: the first frame, upright, in colour, on white where it is transparent.

    Args:
        path: a file of any kind that Pillow knows, or its content.
        size: height and width of the result, in pixels.
        crop: which part, as shares of the image (left, top, width, height, mirror); the largest square in the centre for None.

    Raises:
        Exception: of many types, as Pillow has it, for a file that is absent, damaged, no image or too large; ValueError where the range
            of the numbers is not known.
    """
    from PIL import Image, ImageOps

    left, top, wide, high, mirror = crop or (0, 0, 1, 1, 0)
    need = math.ceil(2 * size / min(wide, high))  # of both sides: which one is the height is known only once the image is upright
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow remarks on large images and on odd metadata, and reads them all the same
        with Image.open(path) as image:
            image.draft(None, (need, need))  # a large JPEG costs a fraction of the time at a half, a quarter or an eighth of its size
            image.load()
            with contextlib.suppress(Exception):  # where the metadata are damaged, the pixels are not
                ImageOps.exif_transpose(image, in_place=True)
            image = _in_colour(image)
    width, height = image.size
    if crop is None:
        side = min(width, height)
        box = ((width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2)
    else:  # shares are rounded numbers, and may add up to a little more than the whole
        box = (left * width, top * height, min((left + wide) * width, width), min((top + high) * height, height))
    image = image.resize((size, size), Image.Resampling.BILINEAR, box=box, reducing_gap=2.0)
    pixels = np.array(ImageOps.mirror(image) if mirror else image)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _in_colour(image):
    """A Pillow image of any mode as RGB."""
    from PIL import Image

    if image.mode == "F" or (image.mode == "I" and (np.asarray(image) >> 16).any()):  # not 0 in negative numbers either
        raise ValueError(f"pixels of Pillow's mode {image.mode}, whose range is not known: save them with 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):  # sixteen bits: convert() would cut them off at 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        layer, image = image.convert("RGBA"), Image.new("RGB", image.size, "white")
        image.paste(layer, mask=layer)
    return image.convert("RGB")


def _reason(error: Exception) -> str:
    """What is wrong with a file, in one line that leaves out its name."""
    from PIL import Image, UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "its content is no image of a known kind"
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels: scale it down"
    return " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())


@contextlib.contextmanager
def naming_dead_workers(num_workers: int) -> Iterator[None]:
    """Make PyTorch's error about a dead worker process a `DataError`.

    It comes up wherever the main process happens to be: who does more with the batches than to fetch them wraps that as well.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise DataError(
            f"a process that decodes images died, probably for want of memory ({' '.join(str(error).split())}): "
            f"lower data.num_workers = {num_workers}, or set it to 0"
        ) from error


def example_photograph() -> Tensor:
    """A photograph that ships with wejepa, a cat's face: bytes (3, 224, 224). By Stéfan van der Walt, CC0, from scikit-image."""
    return read_image(ASSETS / "chelsea.png", 224)


def training_batches(
    source: MemoryImages | FolderImages, cfg: IJepaConfig, epoch: int, first_step: int = 0, part: tuple[int, int] = (0, 1)
) -> Iterator[Tensor]:
    """The augmented batches (B, C, S, S) of one epoch, each image once; a short last batch is left out.

    Args:
        source: the images.
        cfg: its `data` section gives the size of a batch and the crops, its `hardware` section the seed.
        epoch: which order and crops, from 0.
        first_step: step of the epoch to begin with.
        part: (rank, ranks) gives the rank-th of so many equal parts of every batch, (B / ranks, C, S, S); side by side they are the whole
            batch, however many they are. The number of ranks must divide `data.train_batch_size`.

    Raises:
        DataError: the set has fewer images than a batch, or too many of its files cannot be read.
    """
    steps, size, seed = steps_per_epoch(source, cfg), cfg.data.train_batch_size, cfg.hardware.seed
    order = torch.randperm(len(source), generator=generator_for(seed, epoch))
    index = order[: steps * size].view(steps, size)[first_step:]
    crops = [random_crops(size, cfg, generator_for(seed, epoch, step)) for step in range(first_step, steps)]
    rank, ranks = part
    mine = slice(rank * size // ranks, (rank + 1) * size // ranks)
    if crops:
        yield from source.augmented(index[:, mine], torch.stack(crops)[:, mine])


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
    """ROOT/train or ROOT/test (ROOT/val serves as well), and the files, labels and classes below it, a folder a class."""
    if name == "imagenette":
        root = root / "imagenette2-160" if (root / "imagenette2-160").is_dir() else root / "imagenette2"
    tried = {"train": [root / "train"], "test": [root / "test", root / "val"]}
    folder = next((f for f in tried[split] if f.is_dir()), None)
    if folder is None:
        names = " or ".join(f.name for f in tried[split])
        raise DataError(f"data.root = {str(root)!r} has no folder {names}: put one there, with a folder a class in it")
    tops = sorted(_visible(folder.glob("*"), folder))  # not rglob from here: it would not follow a class folder that is a link
    files = sorted(f for top in tops for f in (_visible(top.rglob("*"), folder) if os.path.isdir(top) else [top]) if _is_image(f))
    if not files:
        raise DataError(f"{folder} holds no images ({', '.join(IMAGE_ENDINGS)}): put some there, with a folder a class")
    names = [f.relative_to(folder).parts[0] if f.parent != folder else "" for f in files]
    for top in tops:
        if os.path.isdir(top) and top.name not in names:
            warnings.warn(f"{top} holds no images: the class keeps its number and has none here", stacklevel=3)
    # A class has one number in both splits, also where one of them lacks it.
    both = {f.name for part in tried.values() for top in part for f in _visible(top.glob("*"), top) if os.path.isdir(f)}
    classes = tuple(sorted(both | set(names)))
    number = {name: i for i, name in enumerate(classes)}
    return folder, files, torch.tensor([number[n] for n in names]), classes


def _hugging_face_rows(name: str, split: str):
    """NAME/SPLIT, and the image rows, labels and classes of a Hugging Face data set: a name on the hub or a folder."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"data.dataset = 'hf:{name}' needs the package datasets ({error}): pip install 'wejepa[datasets]'") from error

    folder = Path(name)
    try:
        if any((folder / file).is_file() for file in ("dataset_dict.json", "state.json")):  # save_to_disk
            found = datasets.load_from_disk(name)
        else:
            found = datasets.load_dataset(name)
    except Exception as error:  # offline, no such name, no image in the folder: the library has a type for each
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DataError(
            f"data.dataset = 'hf:{name}' could not be had ({reason}): check the name or folder, and go online once for one on the hub"
        ) from error
    splits = dict(found) if isinstance(found, dict) else {"train": found}
    tried = {"train": ("train",), "test": ("test", "validation", "valid", "val")}[split]
    chosen = next((s for s in tried if s in splits), None)
    if chosen is None:
        raise DataError(f"data.dataset = 'hf:{name}' has no split {' or '.join(tried)}, only {', '.join(splits)}: take a set that has one")
    rows = splits[chosen]
    images = [column for column, kind in rows.features.items() if isinstance(kind, datasets.Image)]
    if not images:
        raise DataError(f"data.dataset = 'hf:{name}' has no column of images, only {', '.join(rows.features)}: take a set that has one")
    column = "image" if "image" in images else images[0]
    label = next((key for key, kind in rows.features.items() if isinstance(kind, datasets.ClassLabel)), None)
    classes = tuple(rows.features[label].names) if label else ("",)
    labels = torch.tensor(rows[label][:]) if label else torch.zeros(len(rows), dtype=torch.long)
    return folder / chosen, rows.cast_column(column, datasets.Image(decode=False))[column], labels, classes


def _visible(paths: Iterable[Path], folder: Path) -> Iterator[Path]:
    """Without what other programs hide below the folder: .thumbnails, .ipynb_checkpoints, ._photo.jpg."""
    return (path for path in paths if not any(name.startswith(".") for name in path.relative_to(folder).parts))


def _is_image(path: Path) -> bool:
    """By its name; also a link to nothing and a file without permission, so that they are counted as unreadable, not lost."""
    return path.suffix.lower() in IMAGE_ENDINGS and (os.path.isfile(path) or not os.path.exists(path))
