"""The first cell of a notebook that is opened on Colab, Kaggle or Binder, where wejepa is not installed and torch may be.

    python scripts/first_cell.py SOURCE              # print it
    python scripts/first_cell.py SOURCE DIRECTORY    # write the course into DIRECTORY, with this cell before every notebook

SOURCE is where pip gets wejepa from: a repository, such as git+https://HOST/OWNER/REPOSITORY, or the address of a wheel. The second form
is for the branch that the website's launch links open. A notebook stands alone there, so where SOURCE is a repository on GitHub its links
are made to lead to that branch.
"""

import inspect
import json
import posixpath
import re
import sys
from pathlib import Path

BRANCH = "launch"


def install_what_is_missing(source: str) -> None:
    """Install wejepa beside the torch that is here; do nothing where it is installed already."""
    import importlib
    import importlib.metadata
    import importlib.util
    import pathlib
    import subprocess
    import sys
    import tempfile

    if importlib.util.find_spec("wejepa"):
        return
    here = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
    kept = [f"{name}=={here[name]}" for name in ("torch", "torchvision", "numpy") if name in here]
    wanted = [f"wejepa[interop] @ {source}", "anywidget", "matplotlib", "scikit-learn"]
    with tempfile.TemporaryDirectory() as folder:
        constraints = pathlib.Path(folder, "kept.txt")
        constraints.write_text("\n".join(kept))
        command = [sys.executable, "-m", "pip", "install", "-q", "-c", str(constraints), *wanted]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"wejepa cannot be installed beside {', '.join(kept) or 'what is here'}: choose a "
            f"newer runtime if pip names one of these, else try again. pip says:\n{done.stderr}"
        )
    importlib.invalidate_caches()  # so that this process finds what was not there when it began


def first_cell(source: str) -> str:
    """The cell's text; `source` as `install_what_is_missing` takes it."""
    return f"{inspect.getsource(install_what_is_missing)}\n\ninstall_what_is_missing({json.dumps(source)})\n"


def leading_to(address: str, text: str) -> str:
    """A notebook's Markdown whose links to other files of the course lead to the repository at `address`, on the branch `launch`."""

    def absolute(link: re.Match) -> str:
        kind = "raw" if link[2].endswith((".svg", ".png")) else "blob"
        return f"{link[1]}{address}/{kind}/{BRANCH}/{posixpath.normpath(posixpath.join('notebooks', link[2]))}"

    return re.sub(r"(\]\(|src=\")(?![a-z]+:|#)([^)#\"\s]+)", absolute, text)


def write_launch(source: str, directory: Path) -> list[Path]:
    """Write the course into `directory`, each notebook with the first cell before its own; the notebooks' paths."""
    from wejepa.course import write_course

    repository = re.match(r"git\+(https://github\.com/[^@]+?)(?:\.git)?(?:@|$)", source)
    cell = {"cell_type": "code", "execution_count": None, "id": "install-what-is-missing", "outputs": []}
    cell |= {"metadata": {"cellView": "form"}, "source": "# @title Run this first: it installs what is missing\n" + first_cell(source)}
    written = write_course(directory)
    for path in written:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        for each in notebook["cells"]:
            if repository and each["cell_type"] == "markdown":
                each["source"] = leading_to(repository[1], "".join(each["source"]))
        notebook["cells"].insert(0, cell)
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    # Binder builds a machine from this, so that torch is there when the notebook opens; the large one for GPUs would not fit.
    (directory / "binder").mkdir()
    packages = f"--extra-index-url https://download.pytorch.org/whl/cpu\nwejepa[notebooks] @ {source}\n"
    (directory / "binder" / "requirements.txt").write_text(packages)
    return written


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python scripts/first_cell.py SOURCE [DIRECTORY], with a SOURCE such as git+https://HOST/OWNER/REPOSITORY")
    if len(sys.argv) == 2:
        print(first_cell(sys.argv[1]), end="")
    else:
        print(f"{len(write_launch(sys.argv[1], Path(sys.argv[2])))} notebooks in {sys.argv[2]}")
