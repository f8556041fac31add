"""In a real JupyterLab in a real browser a slider moves by keyboard and the picture changes.

Needs a Chromium: skipped with a message where there is none, but not in continuous integration, which installs one.
"""

import os
from pathlib import Path

import nbformat
import pytest

from benchmarks.explorers import browser_page, explorer, find_chromium, jupyterlab, open_and_run, press

pytestmark = pytest.mark.slow

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
WITH_EXPLORER = sorted(p for p in NOTEBOOKS.glob("[0-9]*.ipynb") if "Explorer(" in p.read_text())


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The notebooks with explorers, on FakeData, in a folder that JupyterLab serves; its address and a page."""
    chromium = find_chromium()
    if chromium is None:
        message = "no Chromium found: install one (Debian: apt install chromium), or name it in $CHROMIUM"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    folder = tmp_path_factory.mktemp("lab")
    for path in WITH_EXPLORER:
        notebook = nbformat.read(path, as_version=4)
        (cell,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
        mock = cell.metadata["nbmake"]["mock"] | {"output_dir": str(folder / path.stem)}
        cell.source += "\n" + "\n".join(f"{name} = {value!r}" for name, value in mock.items())
        notebook.cells = [c for c in notebook.cells if "skip-execution" not in c.metadata.get("tags", [])]
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        nbformat.write(notebook, folder / path.name)
    with jupyterlab(folder) as address, browser_page(chromium) as page:
        yield address, page


@pytest.mark.parametrize("name", [path.name for path in WITH_EXPLORER])
def test_a_slider_moves_by_keyboard_and_the_picture_changes(lab, name):
    address, page = lab
    open_and_run(page, address, name)
    image, handles = explorer(page)
    assert handles.count() >= 1
    shown = image.get_attribute("src")
    for key in ("ArrowRight", "ArrowLeft"):
        before, shown = shown, press(page, image, handles.last, key)
        assert shown != before
    # A callback that fails in the kernel leaves a message in the log console, not an output; so ask the picture itself.
    assert image.evaluate("image => image.complete && image.naturalWidth > 200")
