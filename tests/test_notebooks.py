"""The notebooks' contract: they have the course's form, their outputs are of this source. nbmake runs them, see notebooks/conftest.py."""

import ast
import importlib.util
import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
pytestmark = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def tags(cell) -> list[str]:
    return cell.metadata.get("tags", [])


def load_render_script():
    spec = importlib.util.spec_from_file_location("render_notebooks", ROOT / "scripts" / "render_notebooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parameters(notebook):
    cells = [c for c in notebook.cells if "parameters" in tags(c)]
    assert len(cells) == 1, "one cell is tagged parameters"
    return cells[0]


def test_header_says_what_to_expect(path):
    first = read(path).cells[0]
    assert first.cell_type == "markdown"
    order = ["# ", "**Claim.**", "**You will learn**", "**Before this**", "**Runtime**", "**Paper**", "**Open it**"]
    places = [first.source.find(part) for part in order]
    assert -1 not in places, f"missing: {[p for p, at in zip(order, places, strict=True) if at < 0]}"
    assert places == sorted(places), "the header's parts are out of order"


def test_parameters_are_literals_with_type_and_comment(path):
    notebook = read(path)
    cell = parameters(notebook)
    assert notebook.cells.index(cell) == 1, "the parameters come right after the header"
    names = {}
    for line in cell.source.splitlines():
        node = ast.parse(line).body[0]
        assert isinstance(node, ast.AnnAssign), f"write `name: type = value`: {line}"
        assert "#" in line, f"say what it is: {line}"
        names[node.target.id] = ast.literal_eval(node.value)  # raises where a parameter is derived from another
    mock = cell.metadata["nbmake"]["mock"]
    assert set(mock) <= set(names), f"mocked but not a parameter: {set(mock) - set(names)}"
    for name, value in mock.items():
        assert type(value) is type(names[name]), f"{name} is mocked by another type"


def test_no_shell_magic(path):
    for cell in read(path).cells:
        if cell.cell_type == "code":
            assert not re.search(r"^\s*[!%]", cell.source, re.M), "shell escapes and magics hide failure: use subprocess.run(check=True)"


def test_claims_table_and_exercises(path):
    notebook = read(path)
    text = "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    assert "## What we checked" in text and "## Exercises" in text and "## Next" in text
    assert sum("exercise" in tags(c) for c in notebook.cells) == 4


def test_outputs_belong_to_this_source(path):
    """A committed output was made by the source above it, on the real images; `make render` makes them anew."""
    source_hash = load_render_script().source_hash
    for i, cell in enumerate(read(path).cells):
        if cell.cell_type == "code":
            assert cell.metadata.get("rendered") == source_hash(cell.source), f"cell {i}: its output is of other source; run `make render`"


def test_outputs_are_fit_to_commit(path):
    text = path.read_text()
    assert len(text) < 1_000_000
    for unwanted in ("application/vnd.jupyter.widget", '"execution": {', "/home/", "/root/", "/tmp/", "0%|"):
        assert unwanted not in text, f"{unwanted!r} is in the committed notebook"


def test_pictures_have_alternative_text(path):
    """In the outputs' metadata, and in the cell's for the website, which has one text for all pictures of a cell."""
    script, remedy = load_render_script(), "run scripts/render_notebooks.py --texts"
    for cell in read(path).cells:
        if cell.cell_type != "code" or not (shown := script.pictures(cell)):
            continue
        i = cell.id
        texts = script.texts(cell)
        assert len(texts) == len(shown), f"cell {i} shows {len(shown)} pictures, metadata.alt describes {len(texts)}"
        for output, text in zip(shown, texts, strict=True):
            assert len(text) >= 40 and text.endswith("."), f"cell {i}: say in a sentence what the picture shows: {text!r}"
            kinds = [kind for kind in output.data if kind.startswith("image/")]
            assert [output.metadata[kind]["alt"] for kind in kinds] == [text] * len(kinds), f"cell {i}: {remedy}"
        assert cell.metadata["mystnb"]["image"]["alt"] == " ".join(texts), f"cell {i}: {remedy}"
