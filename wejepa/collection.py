"""A folder of images as an index: search by an image or a part of it, near-duplicates, clusters, outliers.

    photos = Collection.build(model, "photos", "photos.safetensors")   # again: only what is new is computed
    photos = Collection.load("photos.safetensors", model)
    photos.search("beach.jpg", k=20)
    photos.search("beach.jpg", patch=(0.5, 0.5, 1, 1))                 # what has something like its lower right quarter?

    python -m wejepa.collection build photos photos.safetensors --checkpoint outputs/first/latest.pt
    python -m wejepa.collection search photos.safetensors beach.jpg --checkpoint outputs/first/latest.pt --sheet found.png
    python -m wejepa.collection duplicates photos.safetensors
    python -m wejepa.collection clusters photos.safetensors --count 10

An image is kept as the means of the teacher's tokens over the 4 x 4 cells of a grid, in float16: 32 bytes times the encoder's width. Two
images are as similar as the cosine of these numbers, a part and an image as the part and the most similar window of its size.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from wejepa.config import IJepaConfig
from wejepa.data import STATISTICS, FolderImages, MemoryImages, as_source, check_source, read_image
from wejepa.data.decoding import persistently, reason_unreadable
from wejepa.data.listing import Files, image_files
from wejepa.devices import autocast, pick_device
from wejepa.errors import ConfigError, DataError, WejepaError, exit_code, optional
from wejepa.files import replaced
from wejepa.interop import read_weights
from wejepa.memory import freed_memory_kept
from wejepa.model import IJEPA_base
from wejepa.paths import path_of, print_line

__all__ = ["Collection", "Hit", "Pair"]

FORMAT = "wejepa collection 1"
CELLS = {"grid": 4, "mean": 1}  # pooling -> cells down and across
BATCH = 64  # images a forward pass
SAVE_SECONDS = 300.0
MOST_PAIRS = 1_000_000
NEIGHBOURS = 20  # that an outlier is compared with
# Beside the weights, the settings that an encoder's answer depends on.
SETTINGS = ("img_size", "patch_size", "in_chans", "num_heads", "norm_eps", "classification_backbone")
UNKNOWN = (-1, -1)  # the size and the time of what is no file

Box = tuple[float, float, float, float]


class Hit(NamedTuple):
    """An image that was found: its name below the folder, and its cosine similarity, at most 1."""

    name: str
    similarity: float


class Pair(NamedTuple):
    """Two images and their cosine similarity."""

    first: str
    second: str
    similarity: float


class Collection:
    """Images by what an encoder makes of them. `build` and `load` make one.

    Attributes:
        files: the images' paths; an image's name is its path below `files.folder`. Images that are no files go by their numbers.
        cells: the teacher's tokens averaged over a grid of cells, (N, D, 4, 4), or (N, D, 1, 1) with pooling "mean"; float16 on the CPU.
        checksums: SHA-256 of each file, (N, 32) bytes; zeros for what is no file.
        stamps: size in bytes and time of the last change in ns of each file, (N, 2); -1 for what is no file.
        statistics: mean and deviation that pixels are normalised by.
        encoder: SHA-256 of the teacher's weights, the settings that shape it, and `statistics`.
        model: what images to be searched for are encoded with; None if it was loaded without one.
    """

    def __init__(self, files: Files, cells: Tensor, checksums: Tensor, stamps: Tensor, statistics, encoder: str, model: IJEPA_base | None):
        self.files, self.cells, self.checksums, self.stamps = files, cells, checksums, stamps
        self.statistics, self.encoder, self.model = statistics, encoder, model

    def __len__(self) -> int:
        return len(self.files)

    @property
    def names(self) -> list[str]:
        """All names, in order."""
        return [self.files.name(i) for i in range(len(self))]

    # ------------------------------------------------------------ made and kept

    @classmethod
    def build(cls, model: IJEPA_base, images, file: str | Path | None = None, *, pooling: str = "grid") -> Collection:
        """Encode the images of a folder or a source, those alone that `file` does not know yet.

        A file is known if its name, size and time are, or else if its content is: moved and renamed files are not computed again. What
        is no longer there is dropped. Files that cannot be read are named in warnings, and passed over. `file` is written every five
        minutes and at the end, also at an early one: the same call goes on from there.

        Args:
            model: its teacher is taken, where the model is.
            images: a folder, with all images below it, normalised like those of the set that `model.cfg` names; or a source, such as
                `load_images` and `as_source` give. Only image files are known again.
            file: where the collection is kept, `.safetensors`; None keeps it in memory alone.
            pooling: "grid", 4 x 4 means of tokens an image, tells where things are. "mean", one for the whole image, takes a sixteenth of
                the memory and finds parts less well.

        Raises:
            DataError: there are no images, or none can be read; `file` is no collection, is one by another encoder or pooling, or knows
                none of these images; it cannot be written. Before anything is computed, but for the last.
            ConfigError: a pooling that is not known.
        """
        if pooling not in CELLS:
            raise ConfigError(f"pooling = {pooling!r}: give {' or '.join(CELLS)}")
        if isinstance(images, str | Path):
            source = folder_images(images, model.cfg)
        else:
            check_source(source := images, model.cfg)
        # Another kind of source normalises as it likes: what is searched for is then normalised as the set that the config names.
        ours = isinstance(source, FolderImages | MemoryImages)
        statistics = (source.mean, source.std) if ours else statistics_of(model.cfg)
        encoder, side, count = identity(model, statistics), CELLS[pooling], len(source)
        known = known_in(path_of(file), encoder, side) if file is not None else None
        are_files = type(source) is FolderImages  # rows and items only look like files
        files = source.files if isinstance(source, FolderImages) else Files(Path(), map(str, range(count)))
        stamps = torch.tensor([stamp_of(path) for path in files] if are_files else [UNKNOWN] * count)
        checksums = torch.zeros(count, 32, dtype=torch.uint8)
        rows = rows_known(known, files, stamps, checksums) if known and are_files else torch.full((count,), -1)
        done = rows >= 0
        if known and not done.any():
            raise DataError(f"{file} holds {len(known)} other images and none of these: give its own folder, or another file")
        cells = torch.empty(count, model.teacher_encoder.embed_dim, side, side, dtype=torch.float16)
        if known:
            cells[done], checksums[done] = known.cells[rows[done]], known.checksums[rows[done]]
        new = (~done).nonzero().flatten()
        print_line(f"{count:,} images, {len(new):,} to compute; {cells.nbytes / 1e6:,.1f} MB of memory")

        def so_far() -> Collection:
            here = done.nonzero().flatten()
            if len(here) == count:
                return cls(files, cells, checksums, stamps, statistics, encoder, model)
            some = Files(files.folder, map(files.name, here.tolist()))
            return cls(some, cells[here], checksums[here], stamps[here], statistics, encoder, model)

        saved_at = time.monotonic()
        try:
            for index, batch in embedded(model, source, new, pooling):
                cells[index], done[index] = batch, True
                for i in index.tolist() if are_files else ():
                    if not checksums[i].any():
                        checksums[i] = checksum_of(files[i])
                    if stamp_of(files[i]) != tuple(stamps[i].tolist()):  # changed meanwhile: which content was seen is not known
                        stamps[i], checksums[i] = -1, 0
                if file is not None and time.monotonic() > saved_at + SAVE_SECONDS:
                    so_far().save(file)
                    saved_at = time.monotonic()
        finally:
            if file is not None and done.any():
                so_far().save(file)
        found = so_far()
        dropped = len(known) - len(rows[rows >= 0].unique()) if known else 0
        print_line(f"{len(found):,} images in the collection, {count - len(found):,} cannot be read, {dropped:,} former ones dropped")
        return found

    def save(self, file: str | Path) -> None:
        """Write the collection, whole or not at all.

        Raises:
            DataError: the place cannot be written to; or there is something other than a collection by this encoder.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        path = path_of(file)
        if path.exists() and read_header(path)["encoder"] != self.encoder:
            raise other_encoder(path)
        names = b"\0".join(map(os.fsencode, self.names))
        tensors = {
            "cells": self.cells.contiguous(),
            "checksums": self.checksums.contiguous(),
            "stamps": self.stamps.contiguous(),
            "names": torch.frombuffer(bytearray(names), dtype=torch.uint8),
        }
        header = {
            "format": FORMAT,
            "folder": os.path.abspath(self.files.folder),
            "statistics": json.dumps(self.statistics),
            "encoder": self.encoder,
        }
        try:
            with replaced(path) as aside:
                save_file(tensors, aside, {**header, "sha256": content_hash(header, tensors)})
        except (OSError, SafetensorError) as error:
            raise DataError(f"cannot write {path} ({error}): free some space or choose another place") from error

    @classmethod
    def load(cls, file: str | Path, model: IJEPA_base | None = None) -> Collection:
        """Read what `save` wrote; the numbers are mapped from the file, not copied into memory.

        Args:
            file: the collection.
            model: the one that it was built with, to search by images; all else works without it.

        Raises:
            DataError: no such file, one that is damaged or no collection; or another model's.
        """
        from safetensors import SafetensorError, safe_open

        path = path_of(file)
        header = read_header(path)
        try:
            with safe_open(path, "pt") as opened:
                tensors = {name: opened.get_tensor(name) for name in ("cells", "checksums", "stamps", "names")}
        except (OSError, SafetensorError) as error:
            raise no_collection(path, error) from error
        if content_hash(header, tensors) != header["sha256"]:
            raise no_collection(path, "its content does not match its checksum")
        statistics = tuple(map(tuple, json.loads(header["statistics"])))
        if model is not None and identity(model, statistics) != header["encoder"]:
            raise other_encoder(path)
        files = Files(Path(header["folder"]), map(os.fsdecode, bytes(tensors.pop("names").numpy()).split(b"\0")))
        return cls(files, **tensors, statistics=statistics, encoder=header["encoder"], model=model)

    # ------------------------------------------------------------ asked

    def search(self, image, k: int = 10, *, patch: Box = (0, 0, 1, 1)) -> list[Hit]:
        """The k images most like an image, or that have something most like a part of it; the most similar first.

        Args:
            image: a path, a PIL image, bytes (C, H, W), or floats (C, S, S) that are normalised already. It need not be in the collection.
            patch: left, top, right and bottom of the part, from 0 to 1, in the square in the image's centre, which is what the encoder
                sees. The part keeps its surroundings: the encoder sees all of the image.

        Raises:
            ConfigError: no model was given to `load`; k is below 1; a patch that is no box.
            DataError: the image cannot be read.
        """
        if self.model is None:
            raise ConfigError("search needs the model that the collection was built with: Collection.load(file, model)")
        if k < 1:
            raise ConfigError(f"k = {k}: give the number of images to find, 1 or more")
        left, top, right, bottom = patch
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            raise ConfigError(f"patch = {tuple(patch)}: give left, top, right and bottom from 0 to 1, left < right and top < bottom")
        cfg = self.model.cfg.copy()
        cfg.data.num_workers = 0  # none for one image
        source = as_source([image], cfg)
        source.mean, source.std = self.statistics
        (images,) = source.batches(torch.zeros(1, dtype=torch.long), 1, self.model.device)
        with torch.no_grad(), autocast(self.model.device, cfg.hardware.mixed_precision):
            tokens = self.model.encode(images).float().cpu()
        rows, columns = self.model.teacher_encoder.token_grid(images)
        plane, side = tokens.mT.unflatten(2, (rows, columns)), self.cells.shape[-1]  # (1, D, rows, columns)
        part = plane[:, :, within(top, bottom, rows), within(left, right, columns)]
        similarity, index = self.nearest(F.adaptive_avg_pool2d(part, (cells_of(bottom - top, side), cells_of(right - left, side))), k)
        return [Hit(self.files.name(i), s) for i, s in zip(index[0].tolist(), similarity[0].tolist(), strict=True)]

    def nearest(self, cells: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k images nearest to each of some others, by all their cells, or to parts, by the best window: an exact search.

        Args:
            cells: (Q, D, h, w), as in `cells`; fewer cells than an image has are looked for in all its windows of h x w.
            k: how many; all for more than there are.

        Returns:
            Cosine similarities and indices, (Q, k) each, the most similar first.
        """
        k, cells = min(k, len(self)), cells.float()
        unit = cells / cells.flatten(1).norm(dim=1).clamp(min=1e-12)[:, None, None, None]
        best, index = torch.empty(len(unit), 0), torch.empty(len(unit), 0, dtype=torch.long)
        for start, block in self._blocks():
            cosine = cosines(block, unit)  # (B, Q)
            candidates = torch.cat([best, cosine.T], dim=1)
            numbers = torch.cat([index, torch.arange(start, start + len(block)).expand(len(unit), -1)], dim=1)
            best, order = candidates.topk(min(k, candidates.shape[1]), dim=1)
            index = numbers.gather(1, order)
        return best, index

    def near_duplicates(self, threshold: float = 0.98) -> list[Pair]:
        """All pairs of images at least so similar, the most similar first. Each image is compared with each other one.

        Raises:
            ConfigError: a threshold that is not above 0 and at most 1.
            DataError: more than a million pairs.
        """
        if not 0 < threshold <= 1:
            raise ConfigError(f"threshold = {threshold}: give a cosine similarity above 0 and at most 1")
        found = []
        for first, rows in self._blocks():
            rows = F.normalize(rows.flatten(1), dim=1)
            for second, others in self._blocks(first):
                cosine = rows @ F.normalize(others.flatten(1), dim=1).T
                if first == second:
                    cosine = cosine.triu(1)
                i, j = (cosine >= threshold).nonzero(as_tuple=True)
                found += zip((i + first).tolist(), (j + second).tolist(), cosine[i, j].tolist(), strict=True)
                if len(found) > MOST_PAIRS:
                    raise DataError(f"threshold = {threshold}: more than {MOST_PAIRS:,} pairs are so similar; give one nearer to 1")
        found.sort(key=lambda pair: -pair[2])
        return [Pair(self.files.name(i), self.files.name(j), cosine) for i, j, cosine in found]

    def outliers(self, k: int = 10) -> list[Hit]:
        """The k images least like any others: of the lowest mean similarity to their 20 nearest, which is given; the lowest first."""
        if len(self) < 2:
            raise DataError("outliers: there is one image alone, and nothing to compare it with")
        near = min(NEIGHBOURS, len(self) - 1)
        means = [self.nearest(block, near + 1)[0][:, 1:].mean(1) for _, block in self._blocks()]  # the nearest is the image itself
        lowest, index = torch.cat(means).topk(min(k, len(self)), largest=False)
        return [Hit(self.files.name(i), s) for i, s in zip(index.tolist(), lowest.tolist(), strict=True)]

    def clusters(self, count: int = 10, *, seed: int = 0) -> list[list[str]]:
        """The names of the images in groups by k-means (scikit-learn), the largest group first, in each the most typical image first.

        Takes float32 copies of all cells.

        Raises:
            ConfigError: scikit-learn is not installed, or `count` is not from 1 to the number of images.
        """
        if not 1 <= count <= len(self):
            raise ConfigError(f"count = {count}: give a number of clusters from 1 to {len(self)}, the number of images")
        vectors = F.normalize(self.cells.flatten(1).float(), dim=1).numpy()
        fitted = optional("sklearn.cluster", "scikit-learn").KMeans(count, n_init=1, random_state=seed).fit(vectors)
        distance = np.linalg.norm(vectors - fitted.cluster_centers_[fitted.labels_], axis=1)
        groups: list[list[str]] = [[] for _ in range(count)]
        for i in np.argsort(distance, kind="stable"):
            groups[fitted.labels_[i]].append(self.files.name(int(i)))
        return sorted(groups, key=len, reverse=True)

    # ------------------------------------------------------------ shown

    def sheet(self, found: Sequence[Hit | str], *, columns: int = 6, title: str = ""):
        """A figure of thumbnails, from hits, whose similarity is told, or names (needs matplotlib).

        Raises:
            DataError: a file is no longer there; the collection is not of files.
        """
        plot_images = optional("wejepa.analysis.visualization", "matplotlib").plot_images
        names = [hit if isinstance(hit, str) else hit.name for hit in found]
        if not names or (self.stamps < 0).all():
            raise DataError("sheet: " + ("its images are no files: draw them by plot_images" if names else "there is nothing to draw"))
        thumbnails = []
        for name in names:
            try:
                thumbnails.append(read_image(self.files.folder / name, 96))
            except Exception as error:  # Pillow raises many types
                raise DataError(f"{self.files.folder / name} cannot be drawn ({reason_unreadable(error)}): build again") from error
        stems = [Path(name).stem for name in names]
        titles = [stem if len(stem) <= 12 else f"{stem[:6]}…{stem[-5:]}" for stem in stems]  # what fits above a thumbnail
        titles = [title if isinstance(hit, str) else f"{title}\n{hit.similarity:.3f}" for title, hit in zip(titles, found, strict=True)]
        return plot_images(torch.stack(thumbnails), titles, columns=columns, title=title)

    def table(self):
        """A pandas DataFrame, a row an image: name, size in bytes, time of the last change, SHA-256 (needs pandas)."""
        pandas = optional("pandas", "pandas")
        size, changed = self.stamps.T.tolist()
        checksums = [bytes(row).hex() for row in self.checksums.numpy()]
        return pandas.DataFrame({"name": self.names, "bytes": size, "changed": pandas.to_datetime(changed, utc=True), "sha256": checksums})

    def _blocks(self, start: int = 0) -> Iterator[tuple[int, Tensor]]:
        """The cells in float32, as many images at a time as a processor's cache holds; and the number of the first one."""
        step = min(4096, max(1, 2**20 // self.cells[0].numel()))
        for first in range(start, len(self), step):
            yield first, self.cells[first : first + step].float()


# ---------------------------------------------------------------- images and what an encoder makes of them


def folder_images(folder: str | Path, cfg: IJepaConfig) -> FolderImages:
    """All images below a folder, normalised like those of the set that the config names."""
    path = Path(os.path.abspath(path_of(folder)))
    if not path.is_dir():
        raise DataError(f"{path} is no folder: give one that holds images")
    files = Files(path, image_files(path))
    if not files:
        raise DataError(f"{path} holds no images: give a folder that does")
    mean, std = statistics_of(cfg)
    settings = {"num_workers": cfg.data.num_workers, "max_unreadable_share": 1.0, "mean": mean, "std": std}
    labels = torch.zeros(len(files), dtype=torch.long)
    return FolderImages(path, files, labels, ("",), img_size=cfg.model.img_size, in_chans=cfg.model.in_chans, **settings)


def statistics_of(cfg: IJepaConfig):
    """Mean and deviation that a config's images are normalised by."""
    return STATISTICS["fake" if cfg.data.use_fake_data else cfg.data.dataset.partition(":")[0]]


def embedded(model: IJEPA_base, source, index: Tensor, pooling: str) -> Iterator[tuple[Tensor, Tensor]]:
    """The numbers (B,) and the cells (B, D, side, side), float16 on the CPU, of the images of `index` that can be read."""
    from tqdm.auto import tqdm

    with freed_memory_kept(), tqdm(total=len(index), leave=False, unit="image", desc="encoding") as bar:
        for numbers, images in readable_batches(source, index, model.device):
            with autocast(model.device, model.cfg.hardware.mixed_precision):
                vectors = model.features(images, pooling)
            cells = vectors.unflatten(1, (-1, CELLS[pooling], CELLS[pooling])).half().cpu()
            if not cells.isfinite().all():
                raise DataError("the encoder gives numbers that are not finite, or beyond float16: take another checkpoint")
            yield numbers, cells
            bar.update(len(numbers))
        bar.update(bar.total - bar.n)  # those that cannot be read: a bar that ends short is shown as a failure


def readable_batches(source, index: Tensor, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """The images (B, C, S, S) of `index` that can be read, and their numbers (B,)."""
    if isinstance(source, FolderImages):
        yield from source.readable_batches(index, BATCH, device)
    else:
        index = source.readable(index)
        yield from zip(index.split(BATCH), source.batches(index, BATCH, device), strict=True)


def within(low: float, high: float, count: int) -> slice:
    """Which of `count` tokens in a row have their centres from `low` to `high`; the one in the middle where none has."""
    first, last = math.ceil(low * count - 0.5), math.ceil(high * count - 0.5)
    if first == last:
        first = min(int((low + high) / 2 * count), count - 1)
        last = first + 1
    return slice(first, last)


def cells_of(share: float, side: int) -> int:
    """How many cells a part of so large a share of an image's side takes."""
    return max(1, round(share * side))


def cosines(cells: Tensor, unit: Tensor) -> Tensor:
    """Of each image's cells (B, D, H, W) and each query (Q, D, h, w) of norm 1: the cosine, of the best window of h x w, (B, Q)."""
    if cells.shape[1:] == unit.shape[1:]:
        return F.normalize(cells.flatten(1), dim=1) @ unit.flatten(1).T
    size = unit.shape[-2:]
    squares = F.avg_pool2d(cells.square().sum(1, keepdim=True), size, stride=1) * size.numel()  # (B, 1, windows down, windows across)
    return (F.conv2d(cells, unit) / squares.sqrt().clamp(min=1e-12)).flatten(2).amax(2)


# ---------------------------------------------------------------- what is known, and by whom


def identity(model: IJEPA_base, statistics) -> str:
    """SHA-256 of all that an image's cells depend on, beside the image."""
    settings = {name: getattr(model.cfg.model, name) for name in SETTINGS}
    digest = hashlib.sha256(json.dumps([settings, statistics]).encode())
    for name, tensor in model.teacher_encoder.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def stamp_of(path: Path) -> tuple[int, int]:
    """Size in bytes and time of the last change in ns."""
    try:
        found = os.stat(path)
    except OSError:  # a link to nothing, which the decoder names
        return UNKNOWN
    return found.st_size, found.st_mtime_ns


def checksum_of(path: Path) -> Tensor:
    """SHA-256 of a file, (32,) bytes; zeros where it cannot be read."""

    def read() -> bytes:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()

    try:
        return torch.frombuffer(bytearray(persistently(read)), dtype=torch.uint8)
    except OSError:
        return torch.zeros(32, dtype=torch.uint8)


def rows_known(known: Collection, files: Files, stamps: Tensor, checksums: Tensor) -> Tensor:
    """Where each file is in a collection, (N,), or -1; the `checksums` (N, 32) of files that are not known by name are filled in."""
    by_name = {name: (i, tuple(stamp)) for i, (name, stamp) in enumerate(zip(known.names, known.stamps.tolist(), strict=True))}
    by_content = {bytes(row): i for i, row in enumerate(known.checksums.numpy()) if row.any()}
    rows = torch.full((len(files),), -1)
    for i, stamp in enumerate(map(tuple, stamps.tolist())):
        row, before = by_name.get(files.name(i), (-1, UNKNOWN))
        if stamp == UNKNOWN or stamp != before:
            checksums[i] = checksum_of(files[i])
            row = by_content.get(bytes(checksums[i].numpy()), -1)
        rows[i] = row
    return rows


def known_in(path: Path, encoder: str, side: int) -> Collection | None:
    """The collection in a file that a build is to write, None where there is no file; refused before hours are spent.

    Raises:
        DataError: the place cannot be written to; or it holds something else than a collection by this encoder and pooling.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise DataError(f"cannot write {path} ({error}): choose another place") from error
    if not path.exists():
        return None
    known = Collection.load(path)
    if known.encoder != encoder:
        raise other_encoder(path)
    if known.cells.shape[-1] != side:
        raise DataError(f"{path} was built with another pooling: build with that one again, or into another file")
    return known


def read_header(path: Path) -> dict[str, str]:
    """A collection's metadata."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise DataError(f"there is no collection {path}: check the path, or build it first")
    try:
        with safe_open(path, "pt") as opened:
            header = opened.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise no_collection(path, error) from error
    if header.get("format") != FORMAT:
        raise no_collection(path, "it is of another kind")
    return header


def content_hash(header: dict[str, str], tensors: dict[str, Tensor]) -> str:
    """SHA-256 of a collection's metadata and numbers."""
    digest = hashlib.sha256(json.dumps([header[key] for key in ("folder", "statistics", "encoder")]).encode())
    for name in ("cells", "checksums", "stamps", "names"):
        digest.update(f"{name} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def no_collection(path: Path, reason: Any) -> DataError:
    return DataError(f"{path} is truncated, damaged or not a collection ({reason}): take another one, or build it into another file")


def other_encoder(path: str | Path) -> DataError:
    return DataError(f"{path} was made by another encoder: give the model that it was built with, or build into another file")


# ---------------------------------------------------------------- the command line


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0 done, 2 refused with one line on standard error, 130 interrupted."""
    parser = argparse.ArgumentParser(prog="python -m wejepa.collection", description="Search a folder of images.")
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="encode a folder's images, or those alone that are new")
    build.add_argument("folder", help="with all images below it")
    build.add_argument("file", help="where the collection is kept, .safetensors")
    build.add_argument("--pooling", choices=tuple(CELLS), default="grid", help="mean: one vector an image, a sixteenth of the memory")
    build.add_argument("--num-workers", type=int, default=0, help="processes that decode")
    search = commands.add_parser("search", help="the images most like an image, or a part of it")
    search.add_argument("file", help="the collection")
    search.add_argument("image")
    search.add_argument("-k", type=int, default=10, help="how many")
    box = ("LEFT", "TOP", "RIGHT", "BOTTOM")
    search.add_argument("--patch", type=float, nargs=4, default=(0, 0, 1, 1), metavar=box, help="a part of it, from 0 to 1")
    search.add_argument("--sheet", metavar="PNG", help="draw what is found")
    for command in (build, search):
        command.add_argument("--checkpoint", default="outputs/pretrain/latest.pt", help="ours, Meta's .pth.tar, or Hugging Face's")
    duplicates = commands.add_parser("duplicates", help="pairs of images that are nearly the same")
    duplicates.add_argument("file", help="the collection")
    duplicates.add_argument("--threshold", type=float, default=0.98, help="least cosine similarity")
    clusters = commands.add_parser("clusters", help="groups of images, with three typical ones each")
    clusters.add_argument("file", help="the collection")
    clusters.add_argument("--count", type=int, default=10)
    args = parser.parse_args(argv)

    def model_of(args: argparse.Namespace) -> IJEPA_base:
        return read_weights(args.checkpoint)[0].to(pick_device("auto"))

    def run() -> None:
        if args.command == "build":
            model = model_of(args)
            model.cfg.data.num_workers = args.num_workers
            Collection.build(model, args.folder, args.file, pooling=args.pooling)
        elif args.command == "search":
            photos = Collection.load(args.file, model_of(args))
            hits = photos.search(args.image, args.k, patch=args.patch)
            for hit in hits:
                print_line(f"{hit.similarity:.4f}  {hit.name}")
            if args.sheet:
                try:
                    photos.sheet(hits).savefig(args.sheet)
                except (OSError, ValueError) as error:  # no such folder; no such kind of file
                    raise error if isinstance(error, WejepaError) else DataError(f"--sheet {args.sheet}: {error}") from None
        elif args.command == "duplicates":
            for pair in Collection.load(args.file).near_duplicates(args.threshold):
                print_line(f"{pair.similarity:.4f}  {pair.first}  {pair.second}")
        else:
            for names in Collection.load(args.file).clusters(args.count):
                print_line(f"{len(names):6,} images, such as {', '.join(names[:3])}")

    try:
        return exit_code(run)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
