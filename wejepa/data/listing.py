"""The image files below a folder, in a few bytes each."""

from __future__ import annotations

import os
import warnings
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from wejepa.data.decoding import IMAGE_ENDINGS
from wejepa.errors import DataError

__all__ = ["Files", "class_folders", "image_files"]


class Files(Sequence):
    """Paths below a folder, made when asked for.

    What is kept is one string of bytes and an offset a file: a list of 200,000 `Path` objects takes 60 megabytes and a second to send to
    a worker process, and its reference counts make a forked process copy every page of it.

    Args:
        folder: what the names are relative to.
        names: with "/" between folders.
    """

    def __init__(self, folder: Path, names: Iterable[str]):
        self.folder = Path(folder)
        text, ends = bytearray(), array("q", [0])
        for name in names:
            text += os.fsencode(name)
            ends.append(len(text))
        self._text, self._ends = bytes(text), ends

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: int | slice) -> Path | list[Path]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        return self.folder / self.name(i)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None

    def name(self, i: int) -> str:
        """Below the folder, with "/" between folders."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"file {i} of {len(self)}")
        i %= len(self)
        return os.fsdecode(self._text[self._ends[i] : self._ends[i + 1]])


def class_folders(folder: Path) -> list[str]:
    """The names of the folders, and of the links to folders, right below a folder; none where there is no such folder."""
    return [entry.name for entry in _entries(folder, "") if _is_folder(entry)] if os.path.isdir(folder) else []


def image_files(folder: Path) -> Iterator[str]:
    """The names of all images below a folder, in order, part by part, with "/" between folders.

    What other programs hide there is left out: .thumbnails, .ipynb_checkpoints, ._photo.jpg. Links are followed to files, and right below
    the folder to folders as well.
    """
    for entry in _entries(folder, ""):
        if _is_folder(entry):
            yield from _below(folder, entry.name)
        elif _is_image(entry):
            yield entry.name


def _below(folder: Path, inside: str) -> Iterator[str]:
    for entry in _entries(folder, inside):
        if _is_folder(entry) and not entry.is_symlink():
            yield from _below(folder, f"{inside}/{entry.name}")
        elif _is_image(entry):
            yield f"{inside}/{entry.name}"


def _entries(folder: Path, inside: str) -> list[os.DirEntry]:
    """What is not hidden in a folder, in the order of the names."""
    where = os.path.join(folder, inside)
    try:
        with os.scandir(where) as found:
            return sorted((entry for entry in found if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except PermissionError as error:
        warnings.warn(f"{where} cannot be listed ({error.strerror}): what is in it is left out", stacklevel=2)
        return []
    except OSError as error:
        raise DataError(f"{where} cannot be listed ({error.strerror}): check the disk or the network, and start again") from error


def _is_folder(entry: os.DirEntry) -> bool:
    """Also a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_image(entry: os.DirEntry) -> bool:
    """By its name; also a link to nothing and a file without permission, so that they are counted as unreadable, not lost."""
    if entry.name[entry.name.rfind(".") :].lower() not in IMAGE_ENDINGS:
        return False
    try:
        return entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))
    except OSError:
        return True
