"""Paths as people write them, and lines about paths that any terminal and any file takes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["path_of", "print_line", "printable"]


def path_of(given: str | Path) -> Path:
    """A path, with `~` and `~name` as the home folder of the user or of another one."""
    return Path(os.path.expanduser(given))


def printable(text: str, encoding: str | None = "utf-8") -> str:
    """Text with what an encoding lacks, as the bytes of a file's name that is not UTF-8, written as an escape."""
    encoding = encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def print_line(text: str) -> None:
    """Print a line at once, what the terminal cannot show as escapes."""
    print(printable(text, getattr(sys.stdout, "encoding", None)), flush=True)  # what stands in for it may tell none
