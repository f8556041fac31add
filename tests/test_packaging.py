"""The repo's plumbing: what is packaged, what is pinned, what is tracked, and what importing costs."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest

import wejepa
from wejepa.course import course_files

ROOT = Path(__file__).resolve().parent.parent
COURSE = set(course_files())
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
HEAVY = (
    "torch",
    "matplotlib",
    "sklearn",
    "IPython",
    "anywidget",
    "ipywidgets",
    "transformers",
    "safetensors",
    "datasets",
    "onnx",
    "onnxruntime",
)


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def direct_dependencies() -> set[str]:
    project = PYPROJECT["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    return {normal(re.match(r"[\w.-]+", requirement)[0]) for group in groups for requirement in group} - {"wejepa"}  # an extra in another


def lines(file: str) -> list[str]:
    """The lines of a file that say something."""
    text = [line.split(" #")[0].strip() for line in (ROOT / file).read_text().splitlines()]
    return [line for line in text if line and not line.startswith("#")]


def heavy_modules_after(code: str) -> tuple[str, list[str]]:
    """What a fresh interpreter prints when it runs `code`, and which of the heavy modules it has loaded then."""
    code += f"\nimport json, sys; print('\\n' + json.dumps([m for m in {HEAVY} if m in sys.modules]))"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    printed, _, heavy = out.rstrip("\n").rpartition("\n")
    return printed, json.loads(heavy)


def test_import_is_light():
    assert heavy_modules_after("import wejepa, wejepa.config") == ("", [])


def test_dir_shows_the_public_names_and_brings_each_when_it_is_asked_for():
    printed, heavy = heavy_modules_after("import wejepa; print(*dir(wejepa)); wejepa.default_config()")
    names = printed.split()
    assert heavy == [] and {"launch_pretraining", "Pretraining", "as_source", "IJEPA_base", "load_model", "default_config"} <= set(names)
    for name in names:
        assert getattr(wejepa, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'launch_pretrainings'"):
        wejepa.launch_pretrainings  # noqa: B018


def test_help_settings_imports_no_torch():
    printed, heavy = heavy_modules_after("from wejepa.train.pretrain import main; assert main(['--help-settings']) == 0")
    assert "optimizer.epochs: passes over the training images (default 30; 1 or more)" in printed.splitlines() and heavy == []


def test_print_config_is_json_and_imports_no_torch():
    printed, heavy = heavy_modules_after("from wejepa.train.pretrain import main; assert main(['--print-config']) == 0")
    assert set(json.loads(printed)) == {"data", "mask", "model", "optimizer", "hardware"}
    assert heavy == []


def test_version_has_one_source():
    assert PYPROJECT["project"]["dynamic"] == ["version"]
    assert PYPROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "wejepa.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", wejepa.__version__)


def test_every_asset_is_package_data():
    package = ROOT / "wejepa"
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"]["wejepa"]
    assets = [p.relative_to(package).as_posix() for p in (package / "assets").rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")]
    assert assets
    assert [a for a in assets if not any(fnmatch(a, p) and a.count("/") == p.count("/") for p in patterns)] == []


def test_lock_pins_every_direct_dependency_and_nothing_but_versions():
    pins = [re.fullmatch(r"([\w.-]+)==([\w.]+)", line) for line in lines("requirements.lock")]
    assert all(pins), "a line of requirements.lock is not name==version"
    names = [normal(pin[1]) for pin in pins]
    assert len(set(names)) == len(names)
    assert direct_dependencies() - set(names) == set()
    assert [n for n in names if n.startswith(("cuda-", "nvidia-", "triton"))] == [], "these exist for some systems only"


def test_conda_environment_defers_to_pyproject():
    entries = [line.removeprefix("- ") for line in lines("environment.yml") if line.startswith("- ")]
    python = "python" + PYPROJECT["project"]["requires-python"]
    assert entries == ["conda-forge", python, "pip", "pip:", "-c requirements.lock", "-e .[notebooks,test]"]


def test_no_large_or_generated_file_is_tracked():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True) if shutil.which("git") else None
    if not (ROOT / ".git").exists() or listed is None or listed.returncode:
        pytest.skip("not a git checkout")
    tracked = [name for name in listed.stdout.split("\0") if name]
    assert [n for n in tracked if n.endswith(".pt") or ".ipynb_checkpoints" in n or "__pycache__" in n] == []
    assert [n for n in tracked if (ROOT / n).is_file() and (ROOT / n).stat().st_size > 6e6] == []


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The source distribution, and the wheel built from it: each as its names within."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("needs setuptools: pip install '.[test]'")
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"  # a copy, so that neither an old build/ gets in nor a new one is left behind
    shutil.copytree(ROOT / "wejepa", source / "wejepa", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", *COURSE):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    make = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    subprocess.run([sys.executable, "-c", make], cwd=source, check=True, capture_output=True)
    (sdist,) = folder.glob("*.tar.gz")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder), str(sdist)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    (wheel,) = folder.glob("*.whl")
    assert wheel.name.startswith(f"wejepa-{wejepa.__version__}-")
    with tarfile.open(sdist) as tar, zipfile.ZipFile(wheel) as archive:
        return {name.partition("/")[2] for name in tar.getnames()}, set(archive.namelist())


@pytest.mark.slow
def test_wheel_holds_the_package_its_images_weights_and_notebooks(built):
    _, names = built
    package = {p.relative_to(ROOT).as_posix() for p in (ROOT / "wejepa").rglob("*") if p.is_file() and p.suffix != ".pyc"}
    assert {n for n in names if n.startswith("wejepa/")} == package | {f"wejepa/course_files/{name}" for name in COURSE}
    assert {n.split("/")[0] for n in names} == {"wejepa", f"wejepa-{wejepa.__version__}.dist-info"}
    licences = {p.name for p in (ROOT / "wejepa" / "assets").glob("*_LICENSE")}
    assert licences == {"FASHION_MNIST_LICENSE", "NOTO_EMOJI_LICENSE", "TWEMOJI_LICENSE", "EMOJI_DATASOURCE_LICENSE"}
    assert {n.rpartition("/")[2] for n in names if "/licenses/" in n} == {"LICENSE", *licences}


@pytest.mark.slow
def test_sdist_holds_what_the_wheel_is_built_from(built):
    names, _ = built
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE"} <= names
    assert names >= COURSE


@pytest.mark.slow
def test_a_wheel_without_notebooks_is_not_built(tmp_path):
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "wejepa" / "assets").mkdir(parents=True)
    (tmp_path / "wejepa" / "__init__.py").write_text('__version__ = "0"')
    (tmp_path / "wejepa" / "assets" / "A_LICENSE").touch()
    done = subprocess.run([sys.executable, "setup.py", "-q", "build"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("error: notebooks/ holds no notebooks")
