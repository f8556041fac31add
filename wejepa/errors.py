"""The package's own errors: what a person can put right is a `WejepaError`, whose one line says how."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable
from typing import Any


class WejepaError(ValueError):
    """Something the caller can put right; the message, one line, names the field or file and the remedy."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))  # what it quotes may hold line breaks


class ConfigError(WejepaError):
    """A setting that is unknown, of the wrong type, out of range, or at odds with another one."""


class DataError(WejepaError):
    """A data set that is missing, unreadable or not of the shape that the config asks for."""


class CheckpointError(WejepaError):
    """A checkpoint that is missing, damaged, foreign, or made for another architecture."""


class TrainingError(WejepaError):
    """A run that cannot go on: the loss is no longer finite, or nothing is left to train on."""


def did_you_mean(name: str, known: list[str]) -> str:
    """The tail of an error message: the nearest known name, and all of them when none is near."""
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"


def optional(module: str, install: str) -> Any:
    """A module, imported now, of a package that wejepa does without otherwise; `install` is what pip is told.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"{(error.name or module).split('.')[0]} is not installed ({error}): pip install {install}") from error


def exit_code(command: Callable[[], None]) -> int:
    """Run a command of the shell: 0 when it is done, 2 with one line on standard error when it refuses."""
    try:
        command()
    except WejepaError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0
