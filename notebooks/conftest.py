"""What `pytest --nbmake notebooks` asks of a notebook beside that its cells run: solvable exercises, drawn figures, no swallowed error.

nbmake runs a copy, in a folder of its own that also gets what the notebook writes. In the copy each exercise is tried as it stands, which
must fail, and then with its folded solution.
"""

import ast
import os
import re
import tempfile
from pathlib import Path

import nbformat
import pytest
from nbmake.nb_result import NotebookError, NotebookResult
from nbmake.pytest_items import NotebookFailedException


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    notebook = nbformat.read(item.path, as_version=4)
    notebook.cells = with_exercises_solved(notebook.cells)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        copy = Path(folder) / "notebooks" / item.path.name
        copy.parent.mkdir()
        nbformat.write(notebook, copy)
        patch.setattr(item, "filename", str(copy))
        patch.setattr(item.config.option, "overwrite", True)  # nbmake writes the outputs into the copy
        if "OMP_NUM_THREADS" not in os.environ:  # threads gain nothing at these sizes, and on a busy machine they wait for one another
            patch.setenv("OMP_NUM_THREADS", "1")
        yield
        executed = nbformat.read(copy, as_version=4)
    for number, cell in enumerate(executed.cells):
        if problem := problem_of(cell):
            raise NotebookFailedException(NotebookResult(executed, NotebookError(problem, f"{cell.source}\n\n{problem}", number)))


def with_exercises_solved(cells: list) -> list:
    """The cells, with two in the place of each exercise: one that fails if it passes as it stands, and one with its folded solution."""
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    solutions = re.findall(r"Solution</summary>\s*```python\n(.*?)```", text, re.S)
    exercises = [cell for cell in cells if "exercise" in cell.metadata.get("tags", [])]
    assert len(exercises) == len(solutions), f"{len(exercises)} exercises, {len(solutions)} solutions"
    result = []
    for cell in cells:
        if cell not in exercises:
            result.append(cell)
            continue
        _, check = cell.source.split("\n\n\n", 1)  # the open function, then what it is tried on
        attempt = f"try:\n    exec({cell.source!r})\nexcept Exception:\n    pass\nelse:\n    raise AssertionError('passes unsolved')"
        solution = solutions.pop(0) + "\n\n" + check
        result += [nbformat.v4.new_code_cell(attempt), nbformat.v4.new_code_cell(solution)]
    return result


def problem_of(cell) -> str | None:
    """What is wrong with an executed cell that has not failed."""
    if cell.cell_type != "code":
        return None
    for output in cell.outputs:  # a widget's callback prints its traceback without failing the cell
        if output.output_type == "error":
            return f"the cell shows {output.ename}: {output.evalue}"
    last = ast.parse(cell.source).body[-1:]
    draws = last and isinstance(last[0], ast.Expr) and re.match(r"(plot|visualize)_", ast.unparse(last[0]))
    if draws and not any("image/png" in output.get("data", {}) for output in cell.outputs):
        return "the cell draws no picture"  # but leaves, say, the text of a figure object
    return None
