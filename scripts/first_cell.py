"""Print the first cell of a notebook that is opened on Colab, Kaggle or Binder, where torch is installed and wejepa is not.

    python scripts/first_cell.py git+https://HOST/OWNER/REPOSITORY

The argument is where pip gets wejepa from: a repository, or the address of a wheel.
"""

import inspect
import json
import sys


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
    wanted = [f"wejepa[interop] @ {source}", "ipywidgets", "matplotlib", "scikit-learn"]
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


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python scripts/first_cell.py SOURCE, such as git+https://HOST/OWNER/REPOSITORY")
    print(first_cell(sys.argv[1]), end="")
