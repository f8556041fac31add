"""What benchmarks that record runs for a notebook share: the notebook's own cells, the file that ships, and the command line."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nbformat

ROOT = Path(__file__).resolve().parent.parent
Command = Callable[[argparse.Namespace], int]


def recorded_cells(notebook: Path, **settings: Any) -> dict[str, Any]:
    """What a notebook's cells tagged "recorded" define, with `settings` in place of those of its parameters cell."""
    names: dict[str, Any] = {}
    for cell in nbformat.read(notebook, as_version=4).cells:
        if "recorded" in cell.metadata.get("tags", []):
            exec(cell.source, names)
            if "parameters" in cell.metadata.tags:
                names |= settings
    return names


def write_recording(file: Path, module: str, machine: str, runs: list[dict[str, Any]]) -> None:
    """Write all runs, one a line, into a file that ships, with the command and the machine that made them."""
    lines = ",\n".join(json.dumps(result, separators=(",", ":")) for result in runs)
    text = f'{{"command": "python -m {module} run", "machine": {json.dumps(machine)}, "runs": [\n{lines}\n]}}\n'
    file.write_text(text)
    print(f"{file.relative_to(ROOT)}: {len(runs)} runs, {len(text):,} bytes")


def command_line(
    module: str, about: str, run: Command, merge: Command, seeds: Sequence[int], **others: Command
) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """A parser with the commands `run`, which makes what is not there yet, `merge`, and others by name; and the one of `run`, for more
    options.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=about)
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="make the runs that are not there yet")
    runner.add_argument("--seeds", type=int, nargs="+", default=seeds)
    runner.set_defaults(function=run)
    for name, function in others.items():
        commands.add_parser(name, help=function.__doc__.splitlines()[0]).set_defaults(function=function)
    merger = commands.add_parser("merge", help="put all runs into the file that ships")
    merger.add_argument("--machine", default="one core of an AMD EPYC, bfloat16", help="where the runs were made")
    merger.set_defaults(function=merge)
    return parser, runner
