"""Install wejepa in each way that README names into empty environments, and see that it works: `make release-check`, before a release.

    python scripts/release_check.py

Takes five to ten minutes, most of them for PyTorch's download, and 10 GB in the folder for temporary files while it runs. It needs
nothing but Python and git. The first failure ends it and shows what was printed. What is quick enough is in the tests as well.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

from first_cell import first_cell

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = "Scripts" if os.name == "nt" else "bin"
LOAD = "import wejepa; model = wejepa.load_pretrained('fashion'); print(type(model).__name__, 'from', wejepa.__file__)"
VERSIONS = "import importlib.metadata as m; print([m.version(name) for name in ('torch', 'torchvision', 'numpy')])"


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """What the command prints; a command that fails ends everything.

    It sees no package of this folder, nor of an environment that is active.
    """
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")} | environment
    done = subprocess.run(command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"FAILED: {' '.join(map(str, command))[:300]}\n{done.stdout[-5000:]}")
    return done.stdout


def copy_of_the_repository(folder: Path) -> Path:
    """What git knows of, and what is new and not ignored: what a clone would have after the next commit."""
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():  # else it was removed, and not yet committed
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def environment(folder: Path) -> Path:
    """The interpreter of a new, empty environment."""
    venv.create(folder, with_pip=True)
    return folder / SCRIPTS / "python"


def code_of(notebook: Path) -> str:
    """A notebook's code cells as one program, but for the unsolved exercises."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    run = [cell for cell in cells if cell["cell_type"] == "code" and "skip-execution" not in cell["metadata"].get("tags", [])]
    return "\n".join("".join(cell["source"]) for cell in run)


def check_pip(work: Path) -> str:
    """`pip install .`: the weights, the images, the notebooks and the doctor out of the wheel."""
    source, python = copy_of_the_repository(work / "source"), environment(work / "pip")
    run(python, "-m", "pip", "install", "-q", ".", cwd=source)
    empty = work / "empty"
    empty.mkdir()
    assert str(work / "pip") in run(python, "-c", LOAD, cwd=empty), "wejepa was imported from elsewhere"
    run(python, "-m", "wejepa.course", "course", cwd=empty)
    for path in (source / "notebooks").glob("[0-9]*.ipynb"):
        assert (empty / "course" / "notebooks" / path.name).read_bytes() == path.read_bytes(), f"{path.name} is not the repository's"
    return run(python, "-m", "wejepa.doctor", cwd=empty)


def check_first_cell(work: Path) -> str:
    """The first cell for Colab, where torch is there and wejepa is not, and a notebook with what it installed."""
    python, wheels = work / "pip" / SCRIPTS / "python", work / "wheels"
    run(python, "-m", "pip", "wheel", "-q", "--no-deps", "-w", wheels, ".", cwd=work / "source")
    run(python, "-m", "pip", "uninstall", "-q", "-y", "wejepa", cwd=work)
    before = run(python, "-c", VERSIONS, cwd=work)
    (wheel,) = wheels.glob("wejepa-*.whl")
    run(python, "-c", first_cell(wheel.as_uri()) + LOAD, cwd=work)
    after = run(python, "-c", VERSIONS, cwd=work)
    assert after == before, f"torch, torchvision and numpy were {before}, and are {after}"
    folder = work / "empty" / "course" / "notebooks"
    (folder / "cells.py").write_text(code_of(folder / "02_mask_sampling.ipynb"), encoding="utf-8")
    run(python, "-m", "IPython", "cells.py", cwd=folder, MPLBACKEND="Agg")
    return f"kept {after}"


def check_uv(work: Path) -> str:
    """`uv sync`, then JupyterLab, the weights and a notebook."""
    source = copy_of_the_repository(work / "uv_source")
    run(environment(work / "uv"), "-m", "pip", "install", "-q", "uv", cwd=work)
    uv = work / "uv" / SCRIPTS / "uv"
    run(uv, "sync", "-q", cwd=source)
    lab = run(uv, "run", "jupyter", "lab", "--version", cwd=source)
    loaded = run(uv, "run", "python", "-c", LOAD, cwd=source)
    run(uv, "run", "papermill", "notebooks/02_mask_sampling.ipynb", work / "02.ipynb", "--cwd", "notebooks", cwd=source)
    return f"JupyterLab {lab}{loaded}"


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="wejepa-release-") as folder:
        for check in (check_pip, check_first_cell, check_uv):
            print(f"=== {check.__doc__.splitlines()[0]}", flush=True)
            start = time.perf_counter()
            print(check(Path(folder)).rstrip(), f"\nok, {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
