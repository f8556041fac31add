"""Memory that a step frees, kept for the next one."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator

__all__ = ["freed_memory_kept"]

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # glibc's names for mallopt, M_TRIM_THRESHOLD and M_MMAP_MAX
DEFAULTS = {TRIM_THRESHOLD: 128 * 1024, MMAP_MAX: 65536}


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
    libc.mallopt(TRIM_THRESHOLD, -1)
    libc.mallopt(MMAP_MAX, 0)
    try:
        yield
    finally:
        for name, value in DEFAULTS.items():
            libc.mallopt(name, value)
        libc.malloc_trim(0)
