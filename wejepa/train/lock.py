"""A lock on a run's folder, so that no second run trains in it: held by a process, released by the operating system when that dies."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import threading
from pathlib import Path
from typing import Any

from wejepa.errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = ["LOCK", "FolderLock"]

LOCK = ".lock"  # in the folder, for as long as a run is
TAKEN = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)  # by another process; any other error is a file system without locks
FAR = 1 << 30  # on Windows a locked byte cannot be read either: lock one behind the text

# A record lock belongs to the process and is lost when the process closes any handle of the file: so there is one handle a file here.
_held: dict[Path, _Handle] = {}
_table = threading.RLock()  # also entered by the collection of a run that was forgotten, anywhere in the same thread


class _Handle:
    """The one handle of a lock file in this process, and how many runs share it."""

    def __init__(self, number: int):
        self.number, self.users, self.process = number, 1, os.getpid()


class FolderLock:
    """Keeps other processes' runs out of a folder; runs of the same process share it, as in a notebook.

    A forked process, as those that decode images are, does not hold it.

    Args:
        folder: made if need be, and removed again if it is empty when the lock is released.
    """

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder.absolute() / LOCK
        self._handle: _Handle | None = None
        self._made: list[Path] = []

    @property
    def held(self) -> bool:
        """Whether this process holds it by this object."""
        return self._handle is not None and self._handle.process == os.getpid()

    def take(self, about: dict[str, Any]) -> str | None:
        """Take it, and write down who holds it.

        Args:
            about: the run: process, host, since, and what a refused run is told of it.

        Returns:
            A line that says that the file system knows no locks, or None.

        Raises:
            CheckpointError: another process holds it, or the folder cannot be written to; nothing in it is changed.
        """
        with _table:
            if self.held:
                return None
            try:
                self._make_folder()
                self.path = self.folder.resolve() / LOCK
                shared = _held.get(self.path)
                if shared is not None and shared.process == os.getpid():
                    shared.users += 1
                    self._handle = shared
                    return None
                number, line = self._locked()
            except OSError as error:
                self._remove_folder()
                raise CheckpointError(f"cannot write to {self.folder} ({error}): choose another hardware.output_dir") from error
            with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
                os.ftruncate(number, 0)
                os.write(number, json.dumps(about).encode())
            self._handle = _held[self.path] = _Handle(number)
            return line

    def release(self) -> None:
        """Let go of it, if it is held; its file goes as well."""
        with _table:
            handle, self._handle = self._handle, None
            if handle is None or handle.process != os.getpid():  # a forked process has no share in it
                return
            handle.users -= 1
            if handle.users:
                return
            del _held[self.path]
            with contextlib.suppress(OSError):  # while it is still held, so that the file of no later run is taken away
                self.path.unlink()
            os.close(handle.number)
            self._remove_folder()

    def _locked(self) -> tuple[int, str | None]:
        """A handle of the locked file, and a line where nothing can be locked."""
        while True:
            number = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                _lock(number)
            except OSError as error:
                if error.errno not in TAKEN:
                    return number, f"{self.folder} is on a file system without locks ({error.strerror}): see that no second run uses it"
                holder = _holder(number)
                os.close(number)
                raise CheckpointError(
                    f"{self.folder} is in use by {holder}: wait until it ends, stop it, or choose another hardware.output_dir"
                ) from error
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(number), os.stat(self.path)):
                    return number, None
            os.close(number)  # its holder released it, and took the file away, between the two calls

    def _make_folder(self) -> None:
        folder = self.folder.absolute()
        self._made = [part for part in (folder, *folder.parents) if not part.exists()]
        folder.mkdir(parents=True, exist_ok=True)

    def _remove_folder(self) -> None:
        for part in self._made:
            with contextlib.suppress(OSError):  # not empty: something was written
                part.rmdir()


def _holder(number: int) -> str:
    """Who holds the lock, as the file tells."""
    try:
        about = json.loads(os.read(number, 100_000))
        return f"process {about['process']} on {about['host']} since {about['since']} ({about['run']})"
    except (OSError, ValueError, KeyError, TypeError):  # it has only just been taken
        return "another process"


def _lock(number: int) -> None:
    """Lock the file of a handle for this process, or raise OSError at once."""
    if fcntl:
        fcntl.lockf(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        import msvcrt

        os.lseek(number, FAR, os.SEEK_SET)
        msvcrt.locking(number, msvcrt.LK_NBLCK, 1)
        os.lseek(number, 0, os.SEEK_SET)
