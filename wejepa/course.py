"""The course for people without git: the notebooks, and the pages that they link to, written into a folder.

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

__all__ = ["course_files", "main", "write_course"]

PACKAGE = Path(__file__).parent


def course_files() -> dict[str, Path]:
    """The course by its files' names below the repository, such as "notebooks/00_quick_tour.ipynb" and "README.md", in their order.

    The installed package carries them; in a checkout they lie beside it, and MANIFEST.in lists them.

    Raises:
        DataError: they are in neither place.
    """
    inside, beside = PACKAGE / "course_files", PACKAGE.parent
    if inside.is_dir():
        folder, found = inside, [path for path in inside.rglob("*") if path.is_file()]
    elif (beside / "MANIFEST.in").is_file():
        lines = [
            line.split()[1:] for line in (beside / "MANIFEST.in").read_text(encoding="utf-8").splitlines() if line.startswith("include ")
        ]
        folder, found = beside, [path for patterns in lines for pattern in patterns for path in beside.glob(pattern)]
    else:
        folder, found = inside, []
    files = {path.relative_to(folder).as_posix(): path for path in found}
    if not any(name.endswith(".ipynb") for name in files):
        raise DataError(f"{inside} holds no notebooks: install wejepa anew, from its wheel or its whole repository")
    return dict(sorted(files.items()))


def write_course(directory: str | Path) -> list[Path]:
    """Copy the course into `directory`, which is made; the paths of the notebooks' copies.

    Raises:
        DataError: a file of that name is there already, and then nothing is written; or the folder cannot be written to.
    """
    folder = path_of(directory)
    copies = {folder / name: path for name, path in course_files().items()}
    for copy in copies:
        if copy.exists():
            raise DataError(f"{copy} is there already, and nothing is overwritten: name another directory, or move that one away")
    try:
        for copy, path in copies.items():
            copy.parent.mkdir(parents=True, exist_ok=True)
            with open(copy, "xb") as file:
                file.write(path.read_bytes())
    except OSError as error:
        raise DataError(f"{folder} cannot be written to ({error}): name another directory") from error
    return [copy for copy in copies if copy.suffix == ".ipynb"]


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
