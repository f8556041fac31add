"""What the doctor says of this machine and of others, of what is missing, and of the time."""

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest
import torch

from wejepa import devices, doctor
from wejepa.train import pretrain

ROOT = Path(__file__).parent.parent
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def installed(monkeypatch):
    """`installed(torch="2.14.1", ...)`: these are the packages of this Python; wejepa needs a few."""
    requires = [
        "torch<3,>=2.9",
        "pillow>=10",
        'onnx>=1.20; extra == "interop"',
        'wejepa[interop]; extra == "notebooks"',
        'nbconvert; extra == "notebooks"',
    ]

    def version(name):
        if name not in packages:
            raise importlib.metadata.PackageNotFoundError(name)
        return packages[name]

    packages = {}
    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: requires)
    return packages.update


def test_ten_lines_and_the_time(monkeypatch, capsys):
    monkeypatch.setattr(pretrain, "expected_minutes", lambda cfg: 5.0)
    assert doctor.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    headings = [line.split()[0] for line in lines]
    assert headings == ["processor", "cores", "precision", "GPU", "memory", "versions", *doctor.PARTS, "files", "time"]
    assert all(len(line) > 14 and line[12] != " " for line in lines)
    assert torch.backends.cpu.get_cpu_capability() in lines[0] and f"torch {importlib.metadata.version('torch')}" in lines[5]
    told = "about 5 minutes for 30 epochs of pretraining; with train = True 8 minutes for the quick tour, 53 minutes for the whole course"
    assert lines[-1] == f"time        {told}"


@pytest.mark.slow
def test_the_steps_are_timed_in_a_process_of_its_own_that_writes_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "wejepa.doctor"], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^time +about (a minute|[\d.]+ (minutes|hours)) for 30 epochs", done.stdout, re.MULTILINE) and not list(
        tmp_path.iterdir()
    )


def test_nothing_but_wejepas_own_dependencies_is_imported():
    """At the top nothing but the standard library and what has no dependency, so that a missing torch is told and not a traceback."""
    body = ast.parse(Path(doctor.__file__).read_text(encoding="utf-8")).body
    plain = {alias.name for node in body if isinstance(node, ast.Import) for alias in node.names}
    assert {name.split(".")[0] for name in plain} <= sys.stdlib_module_names
    names = {node.module for node in body if isinstance(node, ast.ImportFrom)}
    assert names == {"__future__", "collections.abc", "pathlib", "wejepa.errors", "wejepa.paths"}


def test_what_is_missing_or_too_old_is_one_line(installed, capsys):
    installed(torch="2.8.1+cpu")
    assert doctor.main([]) == 2
    told = capsys.readouterr()
    assert told.out == "" and len(told.err.splitlines()) == 1
    assert "not installed: pillow; torch 2.8.1+cpu is older than 2.9. In a clone of the repository: python -m pip install -e ." in told.err
    installed(torch="2.10.0", pillow="10.0")
    assert doctor.lacking() == []
    assert doctor.lacking("interop") == ["not installed: onnx"] and doctor.lacking("notebooks") == ["not installed: nbconvert"]


def test_wejepa_found_only_on_the_path_is_told(monkeypatch, capsys):
    def requires(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    assert doctor.main([]) == 2
    assert f"wejepa is not installed in this Python ({sys.executable})" in capsys.readouterr().err


def test_a_part_that_is_missing_is_told_with_how_to_install_it(monkeypatch, capsys):
    lacking = doctor.lacking
    monkeypatch.setattr(doctor, "lacking", lambda part="": ["not installed: datasets"] if part == "datasets" else lacking(part))
    monkeypatch.setattr(pretrain, "expected_minutes", lambda cfg: 5.0)
    assert doctor.main([]) == 0
    assert 'datasets    not installed: datasets; python -m pip install "wejepa[datasets]" helps (' in capsys.readouterr().out


def test_its_parts_are_pyprojects():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(project["optional-dependencies"]) - set(doctor.PARTS) == {"test", "benchmarks", "site"}
    assert set(doctor.PARTS) < set(project["optional-dependencies"])


@pytest.mark.parametrize(
    ("device", "native", "env", "told"),
    [
        (CPU, True, "1", "bfloat16, which this processor computes natively, and training uses it"),
        (CPU, False, "1", "float32: this processor has no native bfloat16"),
        (CPU, True, "0", "float32, as WEJEPA_MIXED_PRECISION=0 asks; this processor has bfloat16, which is faster"),
        (CUDA, True, "1", "bfloat16, which this GPU computes natively, and training uses it"),
        (CUDA, False, "1", "float16: this GPU has no native bfloat16"),
    ],
)
def test_the_precision_of_training(monkeypatch, device, native, env, told):
    monkeypatch.setattr(devices, "computes_bfloat16", lambda device: native)
    monkeypatch.setenv("WEJEPA_MIXED_PRECISION", env)
    assert doctor.arithmetic(device, True) == told


def test_gpus_and_why_there_is_none(monkeypatch):
    gpu = types.SimpleNamespace(name="H100", total_memory=80e9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: gpu)
    assert doctor.gpus() == "H100 with 80 GB, H100 with 80 GB"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert doctor.gpus() == "Apple's, by MPS"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert doctor.gpus() == "none; training runs on the processor"
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    for cuda, why in ((None, "built without CUDA"), ("13.0", "newer driver")):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        assert why in doctor.gpus()


def test_memory_cores_and_a_busy_machine(monkeypatch):
    assert 1e9 < doctor.memory() < 1e14
    monkeypatch.setattr(os, "getloadavg", lambda: (500.0, 0, 0), raising=False)
    assert "other programs are at work (load 500.0)" in doctor.cores()
    monkeypatch.setattr(os, "getloadavg", lambda: (0.1, 0, 0), raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert re.fullmatch(r"\d+, on which PyTorch runs \d+ at a time, as OMP_NUM_THREADS=3 asks", doctor.cores())


def test_windows_is_asked_in_its_own_way(monkeypatch):
    def kilobytes(pointer):
        pointer._obj.value = 16_000_000

    kernel = types.SimpleNamespace(GetPhysicallyInstalledSystemMemory=kilobytes)
    monkeypatch.setattr(doctor.ctypes, "windll", types.SimpleNamespace(kernel32=kernel), raising=False)
    monkeypatch.setattr(sys, "platform", "win32")
    assert doctor.memory() == 16_384_000_000


@pytest.mark.parametrize(("minutes", "words"), [(0.4, "a minute"), (1.6, "2 minutes"), (26.4, "26 minutes"), (130, "2.2 hours")])
def test_minutes_in_words(minutes, words):
    assert doctor.in_words(minutes) == words


@pytest.mark.parametrize("column", [0, 1], ids=["bfloat16", "AVX2"])
def test_the_courses_minutes_are_readmes(column):
    """By README's table, in which notebook 03 is little else than the quick tour's pretraining."""
    rows = re.findall(r"^\| \[(\d\d) .*\| ([\d-]+) \| ([\d-]+) \|$", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(rows) == len(list((ROOT / "notebooks").glob("[0-9]*.ipynb")))
    minutes = {notebook: float(told[column]) for notebook, *told in rows if told[column] != "-"}
    assert minutes["00"] / minutes["03"] == pytest.approx(doctor.QUICK_TOUR, rel=0.2), "set QUICK_TOUR in wejepa/doctor.py anew"
    assert sum(minutes.values()) / minutes["03"] == pytest.approx(doctor.COURSE, rel=0.2), "set COURSE in wejepa/doctor.py anew"
