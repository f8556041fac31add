"""A notebook's first cell on a machine that has torch and no wejepa: it adds what is missing and replaces nothing.

The packages are empty ones, in a folder that pip is told to take for its registry, so that no network is asked.
"""

import importlib.util
import os
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import nbformat
import pytest
from test_links import links

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
pytestmark = pytest.mark.slow


def load_script():
    spec = importlib.util.spec_from_file_location("first_cell", ROOT / "scripts" / "first_cell.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def write_wheel(folder: Path, name: str, version: str, requires: tuple[str, ...] = (), extras: tuple[str, ...] = ()) -> Path:
    """An empty package of that name and version."""
    path = folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    info = f"{name.replace('-', '_')}-{version}.dist-info"
    metadata = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    metadata += [f"Provides-Extra: {extra}" for extra in extras] + [f"Requires-Dist: {requirement}" for requirement in requires]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name.replace('-', '_')}.py", "")
        archive.writestr(f"{info}/METADATA", "\n".join(metadata) + "\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    """A folder of empty packages, and wejepa with its own requirements."""
    folder = tmp_path_factory.mktemp("registry")
    interop = [f'{need}; extra == "interop"' for need in PROJECT["optional-dependencies"]["interop"]]
    write_wheel(folder, "wejepa", "9.0", (*PROJECT["dependencies"], *interop), ("interop",))
    torch = {"torch": ("2.8.0", "2.9.0+here", "2.99.0"), "torchvision": ("0.23.0", "0.24.0+here", "0.99.0"), "numpy": ("2.0.2", "2.99.0")}
    others = (
        "pillow",
        "safetensors",
        "tqdm",
        "onnx",
        "onnxruntime",
        "onnxscript",
        "transformers",
        "anywidget",
        "matplotlib",
        "scikit-learn",
    )
    for name, versions in (torch | dict.fromkeys(others, ("99.0",))).items():
        for version in versions:
            write_wheel(folder, name, version, (f"torch=={torch['torch'][torch[name].index(version)]}",) if name == "torchvision" else ())
    return folder


@pytest.fixture(scope="module")
def machine(tmp_path_factory, registry):
    """What runs Python in an environment of its own, which has the registry and no network."""
    folder = tmp_path_factory.mktemp("machine")
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHONPATH"))}
    env |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(registry), "PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    return lambda *arguments: subprocess.run([python, *arguments], cwd=folder, env=env, capture_output=True, text=True)


def given(machine, **packages: str) -> dict[str, str]:
    """Install these, whatever was there of them."""
    done = machine("-m", "pip", "install", "-q", *(f"{name}=={version}" for name, version in packages.items()))
    assert done.returncode == 0, done.stderr
    return versions(machine)


def versions(machine) -> dict[str, str]:
    return dict(line.split("==") for line in machine("-m", "pip", "freeze").stdout.splitlines() if "==" in line)


def test_a_torch_that_is_too_old_is_told_and_then_a_newer_one_stays(machine, registry):
    cell = load_script().first_cell((registry / "wejepa-9.0-py3-none-any.whl").as_uri())
    before = given(machine, torch="2.8.0", torchvision="0.23.0", numpy="2.0.2")
    done = machine("-c", cell)
    told = "RuntimeError: wejepa cannot be installed beside torch==2.8.0, torchvision==0.23.0, numpy==2.0.2: choose a newer runtime"
    assert done.returncode == 1 and told in done.stderr and versions(machine) == before

    before = given(machine, torch="2.9.0+here", torchvision="0.24.0+here")
    done = machine("-c", f"{cell}\nimport wejepa, torch, onnx")
    assert done.returncode == 0, done.stderr
    after = versions(machine)
    assert {name: after[name] for name in before} == before
    assert {"safetensors", "onnx", "matplotlib", "scikit-learn"} <= set(after)
    again = machine("-c", "import subprocess; subprocess.run = None\n" + cell)  # installed: pip is not even asked
    assert again.returncode == 0, again.stderr


def test_the_cell_is_printed_and_fits_a_notebook():
    command = [sys.executable, ROOT / "scripts" / "first_cell.py"]
    printed = subprocess.run([*command, "git+https://host/owner/repository"], capture_output=True, text=True, check=True).stdout
    assert printed.endswith('install_what_is_missing("git+https://host/owner/repository")\n')
    assert max(map(len, printed.splitlines())) < 100
    assert subprocess.run(command, capture_output=True).returncode == 1


def test_the_course_is_written_with_the_cell_before_every_notebook(tmp_path):
    """It opens on its own, so its links lead to the branch."""
    script, folder = load_script(), tmp_path / "launch"
    written = script.write_launch("git+https://github.com/owner/repository@0123abc", folder)
    assert [path.name for path in written] == [path.name for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))]
    linked = set()
    for path in written:
        notebook, original = (nbformat.read(each, as_version=4) for each in (path, ROOT / "notebooks" / path.name))
        nbformat.validate(notebook)
        first, *rest = notebook.cells
        assert first.cell_type == "code" and first.source.endswith(
            'install_what_is_missing("git+https://github.com/owner/repository@0123abc")\n'
        )
        assert [cell for cell in rest if cell.cell_type == "code"] == [cell for cell in original.cells if cell.cell_type == "code"]
        text = "\n".join(cell.source for cell in rest if cell.cell_type == "markdown")
        assert links(text) == []
        linked |= set(re.findall(r"https://github.com/owner/repository/(?:blob|raw)/launch/([^)#\"\s]+)", text))
    assert "notebooks/01_patch_embedding.ipynb" in linked and "README.md" in linked
    assert [name for name in linked if not (folder / name).is_file()] == []
    assert (
        (folder / "binder" / "requirements.txt")
        .read_text()
        .endswith("\nwejepa[notebooks] @ git+https://github.com/owner/repository@0123abc\n")
    )


def test_links_lead_to_the_branch():
    def lead(text):
        return load_script().leading_to("https://github.com/o/r", text)

    assert lead("[a](01_a.ipynb), [b](../README.md#c)") == (
        "[a](https://github.com/o/r/blob/launch/notebooks/01_a.ipynb), [b](https://github.com/o/r/blob/launch/README.md#c)"
    )
    assert lead('![](a.svg) <img src="../docs/b.png">') == (
        '![](https://github.com/o/r/raw/launch/notebooks/a.svg) <img src="https://github.com/o/r/raw/launch/docs/b.png">'
    )
    assert lead("[x](https://x) [y](#y)") == "[x](https://x) [y](#y)"
