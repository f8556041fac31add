"""What `pytest --nbmake notebooks` asks of a notebook beside that its cells run: solvable exercises, drawn figures, no swallowed error.

nbmake runs a copy, in a folder of its own that also gets what the notebook writes. In the copy each exercise is tried as it stands, which
must fail, and then with its folded solution. tests/test_exercises.py tries solutions that are wrong in one place.
"""

import ast
import itertools
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


def unsolved(exercise: str, solution: str, check: str) -> str:
    """A cell that fails if the exercise passes as it stands."""
    return f"try:\n    exec({exercise!r})\nexcept Exception:\n    pass\nelse:\n    raise AssertionError('passes unsolved')"


def with_exercises_solved(cells: list, trial=unsolved) -> list:
    """The cells, with two in the place of each exercise: `trial(exercise, solution, check)`, and the folded solution with the check."""
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    solutions = re.findall(r"Solution</summary>\s*```python\n(.*?)```", text, re.S)
    exercises = [cell for cell in cells if "exercise" in cell.metadata.get("tags", [])]
    assert len(exercises) == len(solutions), f"{len(exercises)} exercises, {len(solutions)} solutions"
    result = []
    for cell in cells:
        if cell not in exercises:
            result.append(cell)
            continue
        solution = solutions.pop(0)
        check = check_of(cell.source, solution)
        for source in (trial(cell.source, solution, check), f"{solution}\n\n{check}"):
            result.append(nbformat.v4.new_code_cell(source))
    return result


def check_of(exercise: str, solution: str) -> str:
    """What follows the open functions and values, those that the solution defines."""
    solved = {name for statement in ast.parse(solution).body for name in names_of(statement)}
    opened = list(itertools.takewhile(lambda statement: solved.intersection(names_of(statement)), ast.parse(exercise).body))
    assert opened, f"the exercise does not begin with what its solution defines:\n{exercise}"
    return "\n".join(exercise.splitlines()[opened[-1].end_lineno :]).strip()


def names_of(statement: ast.stmt) -> list[str]:
    """What a statement defines: a function, a class, or values."""
    match statement:
        case ast.FunctionDef() | ast.ClassDef():
            return [statement.name]
        case ast.Assign() | ast.AnnAssign():
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            return [node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)]
    return []


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
