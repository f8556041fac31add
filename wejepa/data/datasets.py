"""Any map-style torch Dataset, or a list of image files, as a source."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import warnings
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset

from wejepa.config import IJepaConfig
from wejepa.data.crops import centre_square, crop_box, resample, with_channels
from wejepa.data.decoding import framed, reason_unreadable
from wejepa.data.listing import Files
from wejepa.data.named import IMAGENET
from wejepa.data.sources import Decoder, FolderImages
from wejepa.errors import DataError
from wejepa.paths import path_of

__all__ = ["DatasetImages", "as_source"]

TRIED, SAMPLED = 8, 16  # items that are read to find out what they are, and for the fingerprint


def as_source(dataset: Dataset | Sequence[str | Path], cfg: IJepaConfig) -> FolderImages:
    """A map-style Dataset, or a list of image files, as a source for a run.

    An item is an image, or a tuple that begins with one. Whether wejepa crops it is decided by what it is:

    - a PIL image, or bytes (C, H, W) or (H, W): cropped and mirrored as `cfg.data` says, and normalised as photographs are;
    - floats (C, S, S), of `model.in_chans` and `model.img_size`: taken as they are, so that a transform of your own replaces ours.

    While an item is read, the global generators of torch, random and numpy are seeded for this item of this epoch. So a transform that uses
    them is random in training, but the same in a resumed run and with any number of workers, and not random where images are compared.

    Labels, for the log's k-NN, are the dataset's `targets` or `labels`, as torchvision calls them, if it has any. The fingerprint is the
    number of items, and a checksum of the labels and of some images, or `dataset.fingerprint` where there is such a text.

    Args:
        dataset: with `__len__` and `__getitem__`; or the files' paths.
        cfg: its `model` section gives the size, its `data` section the number of workers and the share of items that may fail.

    Raises:
        DataError: it is no such dataset, has no items, or gives something else than images.
    """
    settings = {
        "num_workers": cfg.data.num_workers,
        "max_unreadable_share": cfg.data.max_unreadable_share,
        "img_size": cfg.model.img_size,
        "in_chans": cfg.model.in_chans,
    }
    name = type(dataset).__name__
    if isinstance(dataset, str | Path | IterableDataset) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise DataError(f"as_source: {name} has no numbered items; give a Dataset with __len__ and __getitem__, or a list of image files")
    if not len(dataset):
        raise DataError(f"as_source: {name} has no items; give one that has some")
    if isinstance(dataset, Sequence) and isinstance(dataset[0], str | Path):
        files = [Path(os.path.abspath(path_of(file))) for file in dataset]
        folder = Path(os.path.commonpath([file.parent for file in files]))
        none = torch.zeros(len(files), dtype=torch.long)
        return FolderImages(folder, files, none, ("",), mean=IMAGENET[0], std=IMAGENET[1], **settings)
    return DatasetImages(dataset, **settings)


class DatasetImages(FolderImages):
    """The items of a Dataset, see `as_source`; item i goes by the name TYPE/i. Items that cannot be read are passed over, as files are.

    Attributes:
        cropped: whether wejepa crops and normalises the images, or takes them as they are.
    """

    def __init__(self, dataset: Dataset, *, img_size: int, in_chans: int, **settings):
        self.dataset = dataset
        self.name, count = type(dataset).__name__, len(dataset)
        first, item = self._first_item(count)
        self.cropped = not (isinstance(item, Tensor) and item.is_floating_point())
        self.shape = (in_chans, img_size, img_size)
        labels, classes = labels_of(dataset)
        mean, std = IMAGENET
        files = Files(Path(self.name), map(str, range(count)))
        super().__init__(files.folder, files, labels, classes, img_size=img_size, in_chans=in_chans, mean=mean, std=std, **settings)
        looks = [self.decoder.image(first, None) for _ in range(2)]
        self._repeats = torch.equal(*looks)
        if not self._repeats:
            told = f"{self.name}[{first}] is not the same twice, though all global generators are seeded: a resumed run will not be exact"
            warnings.warn(told, stacklevel=3)

    def _first_item(self, count: int) -> tuple[int, Any]:
        """The first item that can be read, and its number."""
        faults = []
        for i in range(min(TRIED, count)):
            try:
                with seeded(i):
                    return i, image_of(self.dataset[i])
            except DataError as error:
                raise DataError(f"as_source: {self.name}[{i}] is no image: {error}") from error
            except Exception as error:
                faults.append(error)
        raise DataError(
            f"as_source: the first {len(faults)} items of {self.name} cannot be read ({type(faults[0]).__name__}: "
            f"{reason_unreadable(faults[0])}): give a Dataset whose items are images"
        ) from faults[0]

    def _decoder(self, tolerated: float) -> Decoder:
        return DatasetDecoder(self.dataset, self.files, self.shape, self.cropped, tolerated)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Tells this dataset from another one: its type, the number of items, and a checksum, see `as_source`."""
        own = getattr(self.dataset, "fingerprint", None)
        if isinstance(own, str):
            return f"{len(self)} items of {self.name}, {own}"
        checksum = zlib.crc32(self.labels.numpy().tobytes())
        for i in torch.linspace(0, len(self) - 1, SAMPLED).long().unique().tolist() if self._repeats else ():
            pixels = self.decoder[(i, None)].pixels
            checksum = zlib.crc32(b"" if pixels is None else pixels.numpy().tobytes(), checksum)
        return f"{len(self)} items of {self.name}, {checksum:08x}"

    def _prepared(self, pixels: Tensor) -> Tensor:
        return super()._prepared(pixels) if self.cropped else pixels


class DatasetDecoder(Decoder):
    """What a worker process is given of a Dataset: the items, and what to make of them."""

    def __init__(self, dataset: Dataset, files: Files, shape: tuple[int, int, int], cropped: bool, tolerated: float):
        super().__init__(files, shape[-1], tolerated)
        self.dataset, self.shape, self.cropped = dataset, shape, cropped

    def image(self, i: int, crop: list[float] | None) -> Tensor:
        """Bytes (3, S, S), or floats (C, S, S) where the dataset gives them."""
        # A crop's x and y are two uniform numbers of its own, a function of seed, epoch, step and place in the batch: they seed the rest.
        with seeded(i, *(np.float32(crop[2:4]).view(np.uint32).tolist() if crop else ())):
            item = self.dataset[i]
        where = f"{self.files.folder.name}[{i}]"
        try:
            image = image_of(item)
        except DataError as error:
            raise DataError(f"{where} is no image: {error}") from error
        if isinstance(image, Tensor):
            image = image.detach().cpu().as_subclass(Tensor)
        if isinstance(image, Tensor) and image.is_floating_point():
            if self.cropped:
                raise DataError(f"{where} is a tensor of floats, where items before are PIL images or bytes: give one kind throughout")
            if image.shape != self.shape:
                raise DataError(
                    f"{where} is a tensor of floats {tuple(image.shape)}, model.in_chans and model.img_size need {self.shape}: make its "
                    f"transform give that, or end it before ToTensor, so that wejepa crops and normalises"
                )
            return image.float().contiguous()
        if not self.cropped:
            raise DataError(f"{where} is a {type(image).__name__}, where items before are tensors of floats: give one kind throughout")
        if not isinstance(image, Tensor):
            return framed(image, self.img_size, crop)
        pixels = with_channels(image.reshape(1, -1, *image.shape[-2:]), 3)
        height, width = pixels.shape[-2:]
        box = torch.tensor(centre_square(width, height)) if crop is None else crop_box(torch.tensor(crop), width, height)
        mirror = torch.tensor([0.0 if crop is None else crop[4]])
        return resample(pixels, box[None], mirror, self.img_size)[0].round().to(torch.uint8)


def image_of(item: Any) -> Any:
    """The image that an item is, or begins with: a PIL image, or a tensor of bytes or floats.

    Raises:
        DataError: there is none.
    """
    from PIL.Image import Image

    image = item[0] if isinstance(item, tuple | list) and item else item
    if isinstance(image, Image):
        return image
    if isinstance(image, Tensor):
        if image.is_floating_point() or (image.dtype == torch.uint8 and (image.dim() == 2 or image.shape[:-2] in ((1,), (3,)))):
            return image
        kind = f"a tensor {image.dtype} {tuple(image.shape)}"
    else:
        kind = type(image).__name__
    raise DataError(
        f"it is {kind}; a Dataset's items must be PIL images, bytes (1 or 3, H, W), floats (C, S, S), or tuples that begin with one"
    )


def labels_of(dataset: Dataset) -> tuple[Tensor, tuple[str, ...]]:
    """A dataset's labels (N,) and its classes' names; zeros and one name where it tells of none."""
    if isinstance(dataset, Subset):
        labels, classes = labels_of(dataset.dataset)
        return labels[torch.as_tensor(dataset.indices)], classes
    count = len(dataset)
    for name in ("targets", "labels"):
        try:
            found = np.asarray(getattr(dataset, name, ()))
        except ValueError:  # lists of boxes, or the like
            continue
        if found.shape == (count,) and np.issubdtype(found.dtype, np.integer) and found.min() >= 0:
            names = getattr(dataset, "classes", ())
            classes = names if len(names) > found.max() else range(found.max() + 1)
            return torch.from_numpy(found.astype(np.int64)), tuple(map(str, classes))
    return torch.zeros(count, dtype=torch.long), ("",)


@contextlib.contextmanager
def seeded(*key: int) -> Iterator[None]:
    """The global generators of torch (on the CPU), random and numpy begin from the key, and are afterwards as they were before."""
    before = torch.default_generator.get_state(), random.getstate(), np.random.get_state()
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(before[0])
        random.setstate(before[1])
        np.random.set_state(before[2])
