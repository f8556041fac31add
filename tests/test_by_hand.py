"""What notebooks 01 to 03 call "by hand" needs nothing of what it is compared with: the cells run where that module cannot be imported."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
BUILT = {"01_patch_embedding": "wejepa.patches", "02_mask_sampling": "wejepa.masking", "03_pretraining": "wejepa.model"}
BLOCK = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            raise ModuleNotFoundError(f"{{name}} is taken away", name=name)

absent = Absent()
sys.meta_path.insert(0, absent)
"""


def imports(source: str, module: str) -> bool:
    """Whether a cell imports the module, or a part of it."""
    package, part = module.split(".")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module == module or (node.module == package and part in names(node))):
            return True
        if isinstance(node, ast.Import) and module in names(node):
            return True
    return False


def names(node) -> list[str]:
    return [alias.name for alias in node.names]


def cells_of(name: str) -> tuple[list[str], int]:
    """The code of a notebook's cells on its mocked parameters, exercises left out, and which cell first imports what was built."""
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    cells = []
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        if cell.cell_type == "code" and "exercise" not in tags:
            mock = cell.metadata.get("nbmake", {}).get("mock", {}) if "parameters" in tags else {}
            cells.append("\n".join([cell.source, *(f"{key} = {value!r}" for key, value in mock.items())]))
    first = next((i for i, source in enumerate(cells) if imports(source, BUILT[name])), None)
    assert first is not None, f"{name} is never compared with {BUILT[name]}"
    return cells, first


def execute(code: str, folder: Path) -> subprocess.CompletedProcess:
    (folder / "notebooks").mkdir(exist_ok=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "agg", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder / "notebooks", env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("name", BUILT)
def test_what_is_built_by_hand_needs_nothing_of_what_it_is_compared_with(name, tmp_path):
    cells, first = cells_of(name)
    by_hand = BLOCK.format(module=BUILT[name]) + "\n\n".join(cells[:first])
    done = execute(by_hand, tmp_path)
    assert done.returncode == 0, done.stderr
    assert sum(source.count("def ") for source in cells[:first]) >= 2, "nothing is built"
    taken_away = f"assert {BUILT[name]!r} not in sys.modules\nsys.meta_path.remove(absent)\n"
    compared = execute(by_hand + "\n" + taken_away + cells[first], tmp_path)
    assert compared.returncode == 0, compared.stderr
    assert any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(cells[first]))), "the comparison asserts nothing"


@pytest.mark.parametrize("name", BUILT)
def test_the_comparison_fails_where_the_module_is_taken_away(name, tmp_path):
    """Else the test above would pass on nothing."""
    cells, first = cells_of(name)
    done = execute(BLOCK.format(module=BUILT[name]) + cells[first], tmp_path)
    assert done.returncode == 1 and f"{BUILT[name]} is taken away" in done.stderr
