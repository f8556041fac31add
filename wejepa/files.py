"""Files that are whole or not there: written aside, flushed, and renamed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

__all__ = ["flush_folder", "flushed", "replaced"]


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; at the end that file is flushed and takes the place of `path`, which holds old or new, whole.

    The folder is made. If writing fails, `path` is as it was and nothing lies beside it.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.touch()
        mode = aside.stat().st_mode
        yield aside
        aside.chmod(mode)  # safetensors makes files that nobody else may read, whatever the umask
        with open(aside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
        flush_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


@contextlib.contextmanager
def flushed(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to, all of which is on the disk at the end."""
    with open(path, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Make a rename outlast a power failure, where the system lets a folder be flushed."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
