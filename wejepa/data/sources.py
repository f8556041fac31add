"""Images to learn from. All kinds of source share one interface, `Source`.

`MemoryImages` holds every image as bytes and augments a batch at a time; `FolderImages` decodes files, in worker processes if asked, and
`RowImages` the rows of a Hugging Face data set in the same way. All give what the encoder takes: float32 (B, C, S, S), normalised, on the
device that they are asked for: bytes travel there, a quarter as much, and the device crops what is in memory and normalises. A file that
cannot be read is named in a warning and passed over; too many of them are an error.
"""

from __future__ import annotations

import functools
import io
import os
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from wejepa.config import IJepaConfig
from wejepa.data.crops import centre_square, crop_box, normalise, random_crops, resample, with_channels
from wejepa.data.decoding import no_fault_of_the_file, persistently, read_image, reason_unreadable
from wejepa.data.listing import Files
from wejepa.data.workers import DeadWorker, Workers
from wejepa.devices import to_device
from wejepa.errors import DataError
from wejepa.seeds import generator_for

__all__ = ["FolderImages", "MemoryImages", "RowImages", "Source", "check_source"]


class Source(Protocol):
    """What a run learns from: anything that has these. Batches are float32 (B, C, S, S), of the config's sizes, on the device asked for."""

    labels: Tensor  # classes (N,), for the monitor's k-NN; zeros where there are none
    classes: tuple[str, ...]  # their names; one, of any name, where there are no labels
    fingerprint: str  # tells these images from others: a checkpoint holds it, and a resumed run must have the same
    unreadable: dict[Path, str]  # what has been passed over so far, and why

    def __len__(self) -> int: ...  # N

    def batches(self, index: Tensor, batch_size: int, device: torch.device | str = "cpu") -> Iterator[Tensor]:
        """The images of `index` (M,), in this order, each the same whenever it is asked for."""

    def augmented(self, index: Tensor, crops: Tensor, device: torch.device | str = "cpu") -> Iterator[Tensor]:
        """A batch for each row of `index` (steps, B), all its randomness taken from `crops` (steps, B, 5), see `random_crops`."""

    def readable(self, index: Tensor) -> Tensor:
        """`index` (M,) without the images that cannot be read."""


def check_source(source: Source, cfg: IJepaConfig) -> None:
    """Refuse what is no source, or gives another kind of images than the config asks for, by a look at its first one.

    Raises:
        DataError: naming what was found, what is needed, and the remedy.
    """
    needed = ("__len__", "labels", "classes", "fingerprint", "unreadable", "batches", "augmented", "readable")
    if missing := [name for name in needed if not hasattr(source, name)]:
        raise DataError(f"source: {type(source).__name__} has no {missing[0]}; give wejepa.data.as_source(dataset, cfg)")
    if not len(source):
        raise DataError("source: it has no images; give one that has some")
    images = next(iter(source.augmented(torch.zeros(1, 1, dtype=torch.long), random_crops(1, cfg, generator_for(0))[None])))
    shape = (1, cfg.model.in_chans, cfg.model.img_size, cfg.model.img_size)
    if images.shape != shape or images.dtype != torch.float32:
        raise DataError(
            f"source: it gives images {images.dtype} {tuple(images.shape[1:])}, model.in_chans and model.img_size need torch.float32 "
            f"{shape[1:]}: make it for this config"
        )


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

    def batches(self, index: Tensor, batch_size: int, device: torch.device | str = "cpu") -> Iterator[Tensor]:
        """The images as they are, the largest square in the centre at the encoder's size, in the order of `index`: (B, C, S, S) each."""
        height, width = self.images.shape[-2:]
        box = torch.tensor(centre_square(width, height), device=device)
        for part in index.split(batch_size):
            x = to_device(self.images[part], device)
            if (height, width) != (self.img_size, self.img_size):
                x = resample(x, box.expand(len(part), 4), torch.zeros(len(part), device=device), self.img_size)
            yield self._prepared(x)

    def augmented(self, index: Tensor, crops: Tensor, device: torch.device | str = "cpu") -> Iterator[Tensor]:
        """One augmented batch for each row of `index` (steps, B) under `random_crops` (steps, B, 5): (B, C, S, S) each."""
        height, width = self.images.shape[-2:]
        for part, crop in zip(index, crops, strict=True):
            x, crop = to_device(self.images[part], device), to_device(crop, device)
            yield self._prepared(resample(x, crop_box(crop, width, height), crop[:, 4], self.img_size))

    def _prepared(self, pixels: Tensor) -> Tensor:
        return with_channels(normalise(pixels, self.mean, self.std), self.in_chans)


class Decoder(torch.utils.data.Dataset):
    """What a worker process is given: where the files are, and how they are read.

    Args:
        files: their paths.
        img_size: height and width of the result, in pixels.
        tolerated: how many files may be unreadable.
    """

    def __init__(self, files: Sequence[Path], img_size: int, tolerated: float):
        self.files, self.img_size, self.tolerated = files, img_size, tolerated

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, item: tuple[int, list[float] | None]) -> Decoded:
        """One image, or what stands in for it.

        Args:
            item: an index, and one row of `random_crops` (area, aspect, x, y, mirror); None for the image's centre.

        Returns:
            The image and what failed on the way to it. Under a crop the next readable file takes the place of one that cannot be read; at
            the centre, where labels count, nothing does.
        """
        index, crop = item
        failed: list[tuple[int, str]] = []
        for i in range(index, index + (1 if crop is None else len(self))):
            i %= len(self)
            try:
                return Decoded(persistently(lambda i=i: self.image(i, crop)), failed)
            except DataError as error:
                return Decoded(None, failed, str(error))
            except Exception as error:  # Pillow raises many types on damaged files
                if fault := no_fault_of_the_file(error):
                    return Decoded(None, failed, f"{self.files[i]} {fault}")
                failed.append((i, reason_unreadable(error)))
            if self.too_many(len(failed)):
                break
        return Decoded(None, failed)

    def image(self, i: int, crop: list[float] | None) -> Tensor:
        """The image (3, S, S) under a crop; it raises a DataError for what is to end the run."""
        return read_image(self.opened(i), self.img_size, crop)

    def opened(self, i: int) -> Path | io.BytesIO:
        """What `read_image` reads."""
        return self.files[i]

    def too_many(self, count: int) -> bool:
        """Whether so many files are more than may be unreadable."""
        return count == len(self) or count > self.tolerated


class RowDecoder(Decoder):
    """The same for the rows of a Hugging Face data set; `rows` as in `RowImages`."""

    def __init__(self, files: Sequence[Path], rows, img_size: int, tolerated: float):
        super().__init__(files, img_size, tolerated)
        self.rows = rows

    def opened(self, i: int) -> Path | io.BytesIO:
        row = self.rows[i]
        if row is None or (row["bytes"] is None and row["path"] is None):
            raise ValueError("the row has no image")
        return Path(row["path"]) if row["bytes"] is None else io.BytesIO(row["bytes"])


@dataclass(frozen=True)
class Decoded:
    """What was made of an item or of a batch.

    Attributes:
        pixels: bytes (3, S, S), or (B, 3, S, S) of those that are there; None where there is none.
        failed: the index of each file that could not be read, and why.
        fault: what ends the run, though the files may be good.
    """

    pixels: Tensor | None
    failed: list[tuple[int, str]]
    fault: str | None = None

    @classmethod
    def batch(cls, items: list[Decoded]) -> Decoded:
        """The items side by side."""
        pixels = [item.pixels for item in items if item.pixels is not None]
        failed = [entry for item in items for entry in item.failed]
        return cls(torch.stack(pixels) if pixels else None, failed, next((item.fault for item in items if item.fault), None))


class FolderImages:
    """Image files, decoded when asked for.

    Args:
        folder: what the files' names are relative to, in the fingerprint.
        files: their paths, below the folder.
        labels: their classes, (N,).
        num_workers: processes that decode; 0 for this one. They start with the first pass and end with this object.
        max_unreadable_share: share of the files that may be unreadable; not even 1 allows all of them.

    Attributes:
        files: the paths, made when asked for.
        unreadable: the files found so far that cannot be read, and why.
    """

    def __init__(
        self,
        folder: Path,
        files: Sequence[Path],
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
        if not isinstance(files, Files):
            files = Files(folder, (file.relative_to(folder).as_posix() for file in files))
        self.files, self.labels, self.classes = files, labels, tuple(classes)
        self.num_workers, self.max_unreadable_share = num_workers, max_unreadable_share
        self.img_size, self.in_chans = img_size, in_chans
        self.mean, self.std = mean, std
        self.unreadable: dict[Path, str] = {}
        self._judged = torch.zeros(len(files), dtype=torch.bool)  # by `readable`
        self._bad = torch.zeros(len(files), dtype=torch.bool)  # where `unreadable` are
        self.decoder = self._decoder(max_unreadable_share * len(files))
        self.workers = Workers(self.decoder, Decoded.batch, num_workers)

    def _decoder(self, tolerated: float) -> Decoder:
        return Decoder(self.files, self.img_size, tolerated)

    def __len__(self) -> int:
        return len(self.files)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Tells this set from another one, wherever it is: the number of files and a checksum of their names below the folder."""
        names = sorted(map(self.files.name, range(len(self))))
        checksum = zlib.crc32(os.fsencode("\n".join(names)))
        return f"{len(names)} files, {checksum:08x}"

    def batches(self, index: Tensor, batch_size: int, device: torch.device | str = "cpu") -> Iterator[Tensor]:
        """The centres of the images in the order of `index`: (B, C, S, S) each.

        Raises:
            DataError: naming a file that cannot be read; `readable` tells which can.
        """
        for pixels, failed in self._centres(index, batch_size):
            if failed:
                i, reason = failed[0]
                raise DataError(f"{self.files[i]} cannot be read as an image ({reason}): repair or remove it")
            yield self._prepared(to_device(pixels, device))

    def readable_batches(self, index: Tensor, batch_size: int, device: torch.device | str = "cpu") -> Iterator[tuple[Tensor, Tensor]]:
        """The centres of those images of `index` that can be read, (B, C, S, S), and their numbers, (B,); each file is decoded once.

        Raises:
            DataError: too many files cannot be read.
        """
        for part, (pixels, failed) in zip(index.split(batch_size), self._centres(index, batch_size), strict=True):
            self._pass_over(failed)
            if pixels is not None:
                left_out = {i for i, _ in failed}
                yield torch.tensor([i for i in part.tolist() if i not in left_out]), self._prepared(to_device(pixels, device))

    def augmented(self, index: Tensor, crops: Tensor, device: torch.device | str = "cpu") -> Iterator[Tensor]:
        """One augmented batch for each row of `index` (steps, B) under `random_crops` (steps, B, 5): (B, C, S, S) each.

        The next readable file stands in for one that cannot be read, whatever its class.

        Raises:
            DataError: too many files cannot be read, or a process that decodes died, now or since the last call.
        """
        if self.workers.death:
            raise DeadWorker(self.workers.death)
        items = (list(zip(part.tolist(), crop.tolist(), strict=True)) for part, crop in zip(index, crops, strict=True))
        for pixels, failed in self._sound(self.workers.load(items)):
            self._pass_over(failed)
            yield self._prepared(to_device(pixels, device))

    def readable(self, index: Tensor) -> Tensor:
        """`index` (N,) without the files that cannot be read: every file is decoded, once in the life of this object.

        Raises:
            DataError: too many files cannot be read.
        """
        new = index[~self._judged[index]].unique()
        for _, failed in self._centres(new, 64):
            self._pass_over(failed)
        self._judged[new] = True
        return index[~self._bad[index]]

    def _centres(self, index: Tensor, batch_size: int) -> Iterator[tuple[Tensor | None, list[tuple[int, str]]]]:
        """Batches of centres. Where a worker dies, this process does the rest: what is measured at an epoch's end is not to be lost."""
        parts = [[(i, None) for i in part.tolist()] for part in index.split(batch_size)]
        done = 0
        try:
            for batch in self._sound(self.workers.load(parts)):
                done += 1
                yield batch
        except DeadWorker as error:
            warnings.warn(f"{error}; this process decodes the rest", stacklevel=2)
            yield from self._sound(map(self.workers.here, parts[done:]))

    def _sound(self, batches: Iterable[Decoded]) -> Iterator[tuple[Tensor | None, list[tuple[int, str]]]]:
        for batch in batches:
            if batch.fault:
                raise DataError(batch.fault)
            yield batch.pixels, batch.failed

    def _prepared(self, pixels: Tensor) -> Tensor:
        return with_channels(normalise(pixels, self.mean, self.std), self.in_chans)

    def _pass_over(self, failed: list[tuple[int, str]]) -> None:
        """Name each file that cannot be read, once, and refuse to go on when they are too many."""
        for i, reason in failed:
            if not self._bad[i]:
                self._bad[i] = True
                self.unreadable[self.files[i]] = reason
                warnings.warn(f"{self.files[i]} cannot be read as an image ({reason}): passed over", stacklevel=2)
        if self.decoder.too_many(len(self.unreadable)):
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
        self.rows = rows
        super().__init__(folder, Files(folder, map(str, range(len(rows)))), labels, classes, **settings)

    def _decoder(self, tolerated: float) -> Decoder:
        return RowDecoder(self.files, self.rows, self.img_size, tolerated)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Tells this set from another one: the number of rows and a checksum of their labels."""
        return f"{len(self)} rows, {zlib.crc32(self.labels.numpy().tobytes()):08x}"
