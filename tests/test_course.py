"""The ways into the course besides JupyterLab: `make tutorial`, papermill, nbmake, and the notebooks out of the wheel."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest
import test_links
from nbmake.nb_run import NotebookRun

from wejepa import course as written_course
from wejepa.errors import DataError

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
    (cell,) = [c for c in nbformat.read(path, as_version=4).cells if "parameters" in c.metadata.get("tags", [])]
    found = papermill.inspect_notebook(path)
    assert "seed" in found and list(found) == [line.partition(":")[0] for line in cell.source.splitlines()]
    for name, parameter in found.items():
        assert parameter["inferred_type_name"] in ("int", "float", "bool", "str", "list"), name
        assert len(parameter["help"]) > 10, name


TRAINING = [path for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")) if '"train: bool' in path.read_text(encoding="utf-8")]


@pytest.mark.slow
@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.stem)
def test_a_notebook_that_loads_weights_also_trains(path, tmp_path):
    """With `train = True` and on noise: no other test goes that way."""
    notebook = nbformat.read(path, as_version=4)
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    cell.metadata["nbmake"]["mock"]["train"] = True
    notebook.cells = [cell for cell in notebook.cells if "exercise" not in cell.metadata.get("tags", [])]
    written = tmp_path / "notebooks" / path.name
    written.parent.mkdir()
    nbformat.write(notebook, written)
    done = NotebookRun(written, 300).execute()
    assert done.error is None, done.error.trace


def code(source: str, **metadata):
    return nbformat.v4.new_code_cell(source, metadata=metadata)


EXERCISE = code("def double(x):\n    ...\n\n\nassert double(2) == 4", tags=["exercise", "skip-execution"])
SOLVED = code("def double(x):\n    return 2 * x\n\n\nassert double(2) == 4", tags=["exercise", "skip-execution"])
SWALLOWED = "try:\n    1 / 0\nexcept ZeroDivisionError:\n    get_ipython().showtraceback()"  # as a widget does with its callback's
DRAWN = "from IPython.display import Image\ndef plot_dot():\n    return Image(data=b'\\x89PNG', format='png')\n\nplot_dot()"


def solution(text: str):
    return nbformat.v4.new_markdown_cell(f"<details><summary>Solution</summary>\n\n```python\n{text}\n```\n</details>")


NOTEBOOKS = {  # cells, and what nbmake must say of them; None: nothing
    "good": ([code(DRAWN), EXERCISE, solution("def double(x):\n    return x + x")], None),
    "mocked": ([code("n: int = 5", nbmake={"mock": {"n": 2}}), code("assert n == 2")], None),
    "fails": ([code("assert 1 == 2, 'not one'")], "not one"),
    "swallowed": ([code(SWALLOWED)], "division by zero"),
    "not_drawn": ([code("def plot_dot():\n    return 1\n\nplot_dot()")], "the cell draws no picture"),
    "unsolved": ([SOLVED, solution("def double(x):\n    return x + x")], "passes unsolved"),
    "wrong": ([EXERCISE, solution("def double(x):\n    return x")], "AssertionError"),
    "no_solution": ([EXERCISE], "1 exercises, 0 solutions"),
}


@pytest.mark.slow
def test_nbmake_asks_more_of_a_notebook_than_that_its_cells_run(tmp_path):
    """notebooks/conftest.py on small notebooks, each with one thing wrong, and on two with nothing."""
    shutil.copy(ROOT / "notebooks" / "conftest.py", tmp_path)
    for name, (cells, _) in NOTEBOOKS.items():
        nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / f"{name}.ipynb")
    written = {path: path.read_bytes() for path in tmp_path.iterdir()}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-rA",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "--rootdir",
        tmp_path,
        "--nbmake",
        tmp_path,
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    for name, (_, problem) in NOTEBOOKS.items():
        assert f"{'FAILED' if problem else 'PASSED'} {name}.ipynb" in done.stdout, (name, done.stdout + done.stderr)
        assert problem is None or problem in done.stdout, name
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == written


# ---------------------------------------------------------------- python -m wejepa.course


def test_the_course_is_written_as_it_is_and_no_link_leads_nowhere(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "new" / "course"
    assert written_course.main([str(folder)]) == 0
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    originals = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
    assert {f"notebooks/{path.name}" for path in originals} | {"README.md", "benchmarks/README.md"} < names
    assert all((folder / name).read_bytes() == (ROOT / name).read_bytes() for name in names)
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith(f"{len(originals)} notebooks in {folder / 'notebooks'};") and str(folder / "notebooks") in told[-1]
    monkeypatch.setattr(test_links, "ROOT", folder)
    pages = [folder / name for name in sorted(names) if name.endswith((".md", ".ipynb"))]
    found = [test_links.problem(link, page) for page in pages for link in test_links.links(test_links.prose(page))]
    assert len(pages) > 20 and len(found) > 50 and set(found) == {None}


def test_nothing_is_overwritten(tmp_path, capsys):
    mine = tmp_path / "notebooks" / "05_attention_heatmaps.ipynb"
    mine.parent.mkdir()
    mine.write_text("mine")
    assert written_course.main([str(tmp_path)]) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.splitlines() == [
        f"DataError: {mine} is there already, and nothing is overwritten: name another directory, or move that one away"
    ]
    assert mine.read_text() == "mine" and list(mine.parent.iterdir()) == [mine]


def test_a_place_that_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file cannot be written to .*: name another directory"):
        written_course.write_course(tmp_path / "file")


def test_an_installed_package_has_its_own_course(tmp_path, monkeypatch):
    """What lies beside it in site-packages is another's."""
    monkeypatch.setattr(written_course, "PACKAGE", tmp_path / "wejepa")
    inside = tmp_path / "wejepa" / "course_files"
    for folder in (tmp_path / "notebooks", inside / "notebooks"):
        folder.mkdir(parents=True)
        (folder / "00_one.ipynb").touch()
    assert written_course.course_files() == {"notebooks/00_one.ipynb": inside / "notebooks" / "00_one.ipynb"}
    shutil.rmtree(inside)
    with pytest.raises(DataError, match="holds no notebooks: install wejepa anew"):
        written_course.course_files()


def test_jupyterlab_is_asked_for_where_it_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert written_course.main([str(tmp_path)]) == 0
    assert 'JupyterLab is missing: python -m pip install "wejepa[notebooks]"' in capsys.readouterr().out
