"""The course for people without git: the notebooks and their drawings, which the wheel carries, written into a folder.

    python -m wejepa.course DIRECTORY

They go to DIRECTORY/notebooks, and what they write when they run goes to DIRECTORY/outputs. Nothing is overwritten.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

from wejepa.errors import DataError, exit_code
from wejepa.paths import path_of, print_line

__all__ = ["main", "notebook_files", "write_course"]

PACKAGE = Path(__file__).parent


def notebook_files() -> list[Path]:
    """The course's notebooks in their order: in the installed package, or beside it in a checkout.

    Raises:
        DataError: they are in neither place.
    """
    for folder in (PACKAGE / "notebooks", PACKAGE.parent / "notebooks"):
        if found := sorted(folder.glob("[0-9][0-9]_*.ipynb")):
            return found
    raise DataError(f"{PACKAGE / 'notebooks'} holds no notebooks: install wejepa anew, from its wheel or its whole repository")


def write_course(directory: str | Path) -> list[Path]:
    """Copy the notebooks and their drawings to `directory`/notebooks, which is made; the paths of the notebooks' copies.

    Raises:
        DataError: a file of that name is there already, and then nothing is written; or the folder cannot be written to.
    """
    folder = path_of(directory) / "notebooks"
    notebooks = notebook_files()
    drawings = sorted(notebooks[0].parent.glob("schematic-*.svg"))
    copies = {folder / path.name: path for path in notebooks + drawings}
    for copy in copies:
        if copy.exists():
            raise DataError(f"{copy} is there already, and nothing is overwritten: name another directory, or move that one away")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for copy, path in copies.items():
            with open(copy, "xb") as file:
                file.write(path.read_bytes())
    except OSError as error:
        raise DataError(f"{folder} cannot be written to ({error}): name another directory") from error
    return [folder / path.name for path in notebooks]


def main(argv: list[str] | None = None) -> int:
    """The command line; returns 0, or 2 with one line on standard error where it refuses."""
    parser = argparse.ArgumentParser(prog="python -m wejepa.course", description="Write the course's notebooks into a folder.")
    parser.add_argument("directory", type=Path, metavar="DIRECTORY", help="where to; nothing in it is overwritten")
    directory = parser.parse_args(argv).directory

    def write() -> None:
        written = write_course(directory)
        print_line(f"{len(written)} notebooks in {written[0].parent}; what they write goes to {path_of(directory) / 'outputs'}")
        if importlib.util.find_spec("jupyterlab") is None:
            print_line('JupyterLab is missing: python -m pip install "wejepa[notebooks]"')
        print_line(f'open them: python -m jupyterlab "{written[0].parent}"')

    return exit_code(write)


if __name__ == "__main__":
    sys.exit(main())
