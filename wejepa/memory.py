"""Memory that a step frees, kept for the next one."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator

__all__ = ["freed_memory_kept"]

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4  # mallopt's M_TRIM_THRESHOLD and so on
# glibc begins with 128 KiB and raises its thresholds by itself up to here, but no longer once one was set: so leave them at the top.
AFTERWARDS = {MMAP_MAX: 65536, MMAP_THRESHOLD: 32 * 2**20, TRIM_THRESHOLD: 64 * 2**20}
_open = 0  # how many are within one another


@contextlib.contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Keep what is freed on the CPU inside the `with` for the process's next use, and give it back at the end.

    A step asks for the same tensors as the step before. By default glibc gives large ones back to the system as they are freed, which
    then maps and clears them anew, page by page: up to a fifth of a step. Nothing happens where the C library is another one.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(libc, "mallopt"):
        yield
        return
    global _open
    if not _open:
        libc.mallopt(TRIM_THRESHOLD, -1)
        libc.mallopt(MMAP_MAX, 0)
    _open += 1
    try:
        yield
    finally:
        _open -= 1
        if not _open:
            for name, value in AFTERWARDS.items():
                libc.mallopt(name, value)
            libc.malloc_trim(0)
