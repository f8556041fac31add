"""In a real JupyterLab in a real browser: patches are clicked and chosen by key, masks are painted, and the pictures follow.

Needs a Chromium: skipped with a message where there is none, but not in continuous integration, which installs one.
"""

import os
from pathlib import Path

import nbformat
import pytest

from benchmarks.explorers import browser_page, explorer, find_chromium, jupyterlab, open_and_run, place_of, redrawn, stage

pytestmark = pytest.mark.slow

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
EXPLORERS = ("PatchExplorer(", "MaskExplorer(", "MaskPainter(", "TokenExplorer(")
WITH_EXPLORER = {path.name[:2]: path for path in sorted(NOTEBOOKS.glob("[0-9]*.ipynb")) if any(e in path.read_text() for e in EXPLORERS)}

assert set(WITH_EXPLORER) >= {"01", "02", "05", "07", "08"}, "a notebook has lost its explorer"


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The notebooks with explorers, on FakeData, in a folder that JupyterLab serves; its address and a page."""
    chromium = find_chromium()
    if chromium is None:
        message = "no Chromium found: install one (Debian: apt install chromium), or name it in $CHROMIUM"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    folder = tmp_path_factory.mktemp("lab")
    for path in WITH_EXPLORER.values():
        notebook = nbformat.read(path, as_version=4)
        (cell,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
        mock = cell.metadata["nbmake"]["mock"] | {"output_dir": str(folder / path.stem)}
        cell.source += "\n" + "\n".join(f"{name} = {value!r}" for name, value in mock.items())
        notebook.cells = [c for c in notebook.cells if "skip-execution" not in c.metadata.get("tags", [])]
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        nbformat.write(notebook, folder / path.name)
    broken = "import torch\nfrom wejepa.widgets import PatchExplorer\nexplorer = PatchExplorer(torch.rand(3, 16, 16))\n"
    broken += "explorer._draw = lambda: 1 / 0\nexplorer"
    notebook.cells = [nbformat.v4.new_code_cell(broken)]
    nbformat.write(notebook, folder / "broken.ipynb")
    with jupyterlab(folder) as address, browser_page(chromium) as page:
        page.failures = []  # of the browser's side; the kernel's are shown by the explorer itself
        page.on("pageerror", lambda error: page.failures.append(str(error)))
        yield address, page


@pytest.fixture(params=WITH_EXPLORER)
def notebook(request, lab):
    """The number of a notebook, and the page in which it has run."""
    address, page = lab
    open_and_run(page, address, WITH_EXPLORER[request.param].name)
    yield request.param, page
    assert page.locator(".wejepa-problem:visible").all_inner_texts() == [] and page.failures == []


def picture_of(root) -> str:
    """What the explorer's pictures look like."""
    return root.evaluate("root => [...root.querySelectorAll('.wejepa-stage canvas')].map(c => c.toDataURL()).join()")


def changes(page, root, act) -> None:
    """The picture is another one after the kernel has answered."""
    before = picture_of(root)
    with redrawn(page, root):
        act()
    assert picture_of(root) != before


def test_explorers_follow_mouse_and_keys(notebook):
    number, page = notebook
    names = {"Patch explorer": try_patches, "Mask explorer": try_settings, "Mask painter": try_painting, "Token explorer": try_tokens}
    found = [page.locator(".wejepa").nth(k).get_attribute("aria-label") for k in range(page.locator(".wejepa").count())]
    assert found, "the notebook shows no explorer"
    for k, name in enumerate(found):
        try_tab(page, explorer(page, k))
        names[name](page, explorer(page, k))
    expected = {"01": {"Patch explorer"}, "02": {"Mask explorer", "Mask painter"}}
    assert set(found) == expected.get(number, {"Token explorer"})


def test_an_exception_in_the_kernel_is_shown(lab):
    address, page = lab
    open_and_run(page, address, "broken.ipynb")
    root = explorer(page)
    stage(root).click()
    root.locator(".wejepa-problem:visible").wait_for()
    assert root.locator(".wejepa-problem").inner_text() == "ZeroDivisionError: division by zero"


FOCUS = """() => {
    const node = document.activeElement, root = node.closest('.wejepa');
    const shown = node.matches('input[type=radio]') ? node.nextElementSibling : node;
    const name = node.getAttribute('aria-label') || node.innerText || [...(node.labels || [])].map(l => l.innerText).join();
    return { inside: Boolean(root), name, outline: parseFloat(getComputedStyle(shown).outlineWidth), top: shown.getBoundingClientRect().top,
             drawn: getComputedStyle(shown).outlineStyle, stage: node.matches('.wejepa-stage') };
}"""


def try_tab(page, root):
    """Tab goes through all that can be chosen and then to the pictures; what has the focus is seen to have it, and has a name."""
    root.locator("input:not([type=radio]), input:checked, button, select, .wejepa-stage[tabindex]").locator("visible=true").first.focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Shift+Tab")  # back to the first, by key: a browser shows the focus of those who use keys
    stops = []
    for _ in range(40):
        stop = page.evaluate(FOCUS)
        if not stop["inside"] or stop in stops:
            break
        stops.append(stop)
        page.keyboard.press("Tab")
    assert len(stops) >= 2
    for stop in stops:
        assert stop["name"].strip() and stop["drawn"] != "none" and stop["outline"] >= 2, stop
    kinds = [stop["stage"] for stop in stops]
    assert kinds == sorted(kinds), "pictures come after what is chosen"


def try_patches(page, root):
    changes(page, root, lambda: page.mouse.click(*place_of(stage(root), (16, 16), (2, 3))))
    assert page.evaluate("document.activeElement.className").startswith("wejepa-stage")
    changes(page, root, lambda: page.keyboard.press("ArrowDown"))
    root.locator("input[type=range]").first.focus()
    changes(page, root, lambda: page.keyboard.press("ArrowLeft"))


def try_settings(page, root):
    sliders = root.locator("input[type=range]")
    assert root.locator(".wejepa-help").count() >= 7, "a setting is not explained where it stands"
    sliders.last.focus()
    for key in ("ArrowRight", "ArrowLeft"):
        changes(page, root, lambda key=key: page.keyboard.press(key))


def try_painting(page, root):
    def shown() -> str:
        return root.locator(".wejepa-caption").inner_text()

    grid = (8, 8)
    for name in ("upper half", "hide all"):
        with redrawn(page, root):
            root.get_by_role("button", name=name).click()
    assert shown().startswith("The student sees 0 of 64")
    # By mouse: one stroke over four patches, then one patch hidden again.
    page.mouse.move(*place_of(stage(root), grid, (2, 1)))
    page.mouse.down()
    page.mouse.move(*place_of(stage(root), grid, (2, 4)))
    page.mouse.up()
    page.wait_for_function("root => root.innerText.includes('sees 4 of 64')", arg=root.element_handle())
    drawn = int(root.get_attribute("data-drawn"))
    changes(page, root, lambda: page.mouse.click(*place_of(stage(root), grid, (2, 2))))
    assert shown().startswith("The student sees 3 of 64")
    page.wait_for_timeout(300)
    assert int(root.get_attribute("data-drawn")) == drawn + 1, "the kernel answered one click twice"
    # By keyboard: from the button to the picture by Tab, then one patch, then one more beside it.
    root.get_by_role("button", name="hide all").focus()
    with redrawn(page, root):
        page.keyboard.press("Enter")
    for _ in range(3):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.classList.contains('wejepa-paints')"):
            break
    else:
        raise AssertionError("Tab does not reach the picture")
    page.keyboard.press("ArrowDown")
    changes(page, root, lambda: page.keyboard.press("Space"))
    changes(page, root, lambda: page.keyboard.press("Shift+ArrowRight"))
    assert shown().startswith("The student sees 2 of 64")
    assert "seen" in root.locator(".wejepa-spoken").inner_text()
    # By touch: what a finger does.
    changes(page, root, lambda: touch(page, stage(root), grid, (5, 5)))
    assert shown().startswith("The student sees 3 of 64")


def touch(page, picture, grid, patch):
    x, y = place_of(picture, grid, patch)
    picture.evaluate(
        """(node, [x, y]) => {
            node.setPointerCapture = () => {};  // an event that no finger made has no pointer to be captured
            const finger = { clientX: x, clientY: y, pointerType: 'touch', pointerId: 7, bubbles: true, button: 0 };
            for (const kind of ['pointerdown', 'pointerup']) node.dispatchEvent(new PointerEvent(kind, finger));
        }""",
        [x, y],
    )


def try_tokens(page, root):
    grid = (8, 8)

    def shown(frame: str = "aria-label") -> str:
        return stage(root).get_attribute(frame)

    # By mouse: pointing is enough, a click pins.
    changes(page, root, lambda: page.mouse.move(*place_of(stage(root), grid, (1, 1))))
    changes(page, root, lambda: page.mouse.click(*place_of(stage(root), grid, (2, 6))))
    page.wait_for_function("root => root.classList.contains('wejepa-pinned')", arg=root.element_handle())
    page.mouse.move(1, 1)
    before = picture_of(root)
    page.mouse.move(*place_of(stage(root), grid, (6, 6)))
    page.wait_for_timeout(300)
    page.mouse.move(1, 1)
    assert picture_of(root) == before, "a pinned patch follows the pointer"
    # By keyboard: arrows move the pinned patch too, Enter lets go of it.
    stage(root).focus()
    place = shown()
    changes(page, root, lambda: page.keyboard.press("ArrowDown"))
    assert shown() != place
    page.keyboard.press("Enter")
    page.wait_for_function("root => !root.classList.contains('wejepa-pinned')", arg=root.element_handle())
    # The modes are a group of radio buttons, which arrows move through.
    modes = root.get_by_role("radio", checked=True).first
    modes.focus()
    changes(page, root, lambda: page.keyboard.press("ArrowLeft"))
    assert root.locator(".wejepa-caption").inner_text()
