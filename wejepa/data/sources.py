"""Images to learn from. Two kinds of source share one interface.

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
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from wejepa.data.crops import centre_square, crop_box, normalise, resample, to_device, with_channels
from wejepa.data.decoding import read_image, reason_unreadable
from wejepa.data.loaders import naming_dead_workers
from wejepa.errors import DataError

__all__ = ["FolderImages", "MemoryImages", "RowImages"]


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
            x, crop = to_device(self.images[part], device), crop.to(device)
            yield self._prepared(resample(x, crop_box(crop, width, height), crop[:, 4], self.img_size))

    def _prepared(self, pixels: Tensor) -> Tensor:
        return with_channels(normalise(pixels, self.mean, self.std), self.in_chans)


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
            item: an index, and one row of `random_crops` (area, aspect, x, y, mirror); None for the image's centre.

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
                failed.append((i, reason_unreadable(error)))
            if self._too_many(len(failed)):
                break
        return None, failed

    def _opened(self, i: int) -> Path | io.BytesIO:
        return self.files[i]

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

    def augmented(self, index: Tensor, crops: Tensor, device: torch.device | str = "cpu") -> Iterator[Tensor]:
        """One augmented batch for each row of `index` (steps, B) under `random_crops` (steps, B, 5): (B, C, S, S) each.

        The next readable file stands in for one that cannot be read, whatever its class.

        Raises:
            DataError: too many files cannot be read.
        """
        items = (list(zip(part.tolist(), crop.tolist(), strict=True)) for part, crop in zip(index, crops, strict=True))
        for pixels, failed in self._load(items):
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
