"""The ways into the course besides JupyterLab: `make tutorial`, papermill, nbmake."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def course(tmp_path, monkeypatch):
    """The script run_course with a folder of its own; `course(cells)` runs a notebook of these cells and returns the exit code."""
    spec = importlib.util.spec_from_file_location("run_course", ROOT / "scripts" / "run_course.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "ROOT", tmp_path)
    monkeypatch.setattr(script, "COURSE", tmp_path / "course")
    monkeypatch.setattr(sys, "argv", ["run_course.py"])
    monkeypatch.setenv("MPLBACKEND", "agg")  # as a shell may have it; the script must not lose the figures for it
    (tmp_path / "notebooks").mkdir()

    def run(*cells: str) -> int:
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
        notebook.cells[-1].metadata["tags"] = ["results"]
        nbformat.write(notebook, tmp_path / "notebooks" / "00_small.ipynb")
        return script.main()

    return run


def test_course_ends_with_a_table_of_claims_and_figures(course, tmp_path, capsys):
    assert course("assert 1 + 1 == 2", "import matplotlib.pyplot as plt\nplt.plot([1, 2]);", "assert True\nprint('the result')") == 0
    report = (tmp_path / "course" / "results.md").read_text()
    assert report in capsys.readouterr().out
    name, minutes, claims, figures = (cell.strip() for cell in report.splitlines()[4].strip("|").split("|"))
    assert (name, claims, figures) == ("00_small", "2", "1") and float(minutes) >= 0
    assert "the result" in report
    assert (tmp_path / "course" / "figures" / "00_small-1.png").read_bytes().startswith(b"\x89PNG")


def test_course_stops_at_a_failure_and_names_it(course, tmp_path, capsys):
    assert course("x = 1", "assert x == 2, 'not two'", "print('never')") == 1
    assert "00_small, cell [2] `assert x == 2, 'not two'`\nAssertionError: not two" in capsys.readouterr().err
    assert (tmp_path / "course" / "00_small.ipynb").exists()
    assert not (tmp_path / "course" / "results.md").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")), ids=lambda p: p.stem)
def test_papermill_tells_each_parameter_with_type_and_meaning(path):
    found = papermill.inspect_notebook(path)
    assert {"output_dir", "seed", "use_fake_data"} <= set(found)
    for name, parameter in found.items():
        assert parameter["inferred_type_name"] in ("int", "float", "bool", "str", "list"), name
        assert len(parameter["help"]) > 10, name


def test_nbmake_runs_a_notebook_as_it_is():
    """With the mocked parameters and without the exercises, as its metadata say."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--nbmake", ROOT / "notebooks" / "01_patch_embedding.ipynb"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr
