"""How long an explorer takes from click or key to changed picture, in JupyterLab in a real browser, and what 500 updates leave behind.

    python -m benchmarks.explorers
    python -m benchmarks.explorers --live      # the website's live pages instead, and the bytes that they load

Needs playwright (`pip install playwright`) and a Chromium: the one named by $CHROMIUM, or found as chromium, chromium-browser or
google-chrome.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import http.server
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import nbformat

SETUP = """import torch
import wejepa
from wejepa.data import load_images
from wejepa.model import IJEPA_base
from wejepa.widgets import MaskExplorer, MaskPainter, PatchExplorer, TokenExplorer

model = wejepa.load_pretrained("fashion")
cfg = model.cfg
images = next(load_images(cfg, "test").batches(torch.arange(8), 8))
stock = next(load_images(cfg, "train").batches(torch.arange(300), 300))
encoders = {"trained": model, "untrained": IJEPA_base(cfg).eval()}"""
TWO = "explorer = TokenExplorer(encoders, images)\nexplorer.mode, explorer.second = 'similarity', 1\nexplorer"
# What is shown, and what is done to it: a patch clicked on, or a key pressed on a picture or a slider.
CASES = {
    "PatchExplorer: a patch": ("PatchExplorer(images[0])", "click"),
    "PatchExplorer: the patch size": ("PatchExplorer(images[0])", "slider"),
    "MaskExplorer: a setting": ("MaskExplorer(cfg, images[1])", "slider"),
    "MaskPainter: a patch": ("MaskPainter(model, images, stock)", "click"),
    "TokenExplorer: attention, a patch": ("TokenExplorer(encoders, images)", "click"),
    "TokenExplorer: attention, arrow key": ("TokenExplorer(encoders, images)", "key"),
    "TokenExplorer: similarity in two images": (TWO, "click"),
    "TokenExplorer: nearest patches": ("explorer = TokenExplorer(encoders, images)\nexplorer.mode = 'nearest'\nexplorer", "click"),
}

ERROR = '.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.error"]'

# Before it has a kernel JupyterLab shows "idle" as well.
READY = """() => {
    const kernel = document.querySelector('.jp-Toolbar-kernelName'), state = document.querySelector('.jp-Notebook-ExecutionIndicator');
    return kernel && state && kernel.innerText.trim() !== 'No Kernel' && state.dataset.status === 'idle';
}"""

# Updates are timed in the page: from the event to the first frame after the new picture has been drawn.
WATCH = """(root) => {
    window.waits = [];
    let begun = null;
    for (const kind of ['keydown', 'pointerdown'])
        document.addEventListener(kind, () => { begun = performance.now(); }, true);
    new MutationObserver(() => requestAnimationFrame(() => {
        if (begun !== null) { window.waits.push(performance.now() - begun); begun = null; }
    })).observe(root, { attributes: true, attributeFilter: ['data-drawn'] });
}"""


def find_chromium() -> str | None:
    """The path of a Chromium on this machine, or None."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return os.environ.get("CHROMIUM") or next((path for path in map(shutil.which, names) if path), None)


@contextlib.contextmanager
def jupyterlab(folder: Path) -> Iterator[str]:
    """JupyterLab on this machine only, with a folder as its root; gives its address with a token."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = {"ip": "127.0.0.1", "port": port, "port_retries": 0, "root_dir": folder, "open_browser": False, "allow_root": True}
    command = [sys.executable, "-m", "jupyterlab", *(f"--ServerApp.{k}={v}" for k, v in options.items()), "--IdentityProvider.token=test"]
    environment = {**os.environ, "JUPYTER_CONFIG_DIR": str(folder / ".config"), "JUPYTER_DATA_DIR": str(folder / ".data")}
    environment |= {"JUPYTER_RUNTIME_DIR": str(folder / ".runtime"), "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    log = open(folder / "jupyter.log", "w")  # noqa: SIM115  the server writes to it until it ends
    server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 60
    try:
        while True:
            try:
                urllib.request.urlopen(f"{address}/api", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                if server.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"JupyterLab did not start: {(folder / 'jupyter.log').read_text()[-2000:]}") from None
                time.sleep(0.1)
        yield address
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
        log.close()


@contextlib.contextmanager
def browser_page(chromium: str):
    """A page of a headless browser, large enough for a notebook."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--enable-precise-memory-info", "--disable-dev-shm-usage"]
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        try:
            yield browser.new_page(viewport={"width": 1500, "height": 1300})
        finally:
            browser.close()


def open_and_run(page, address: str, name: str, seconds: float = 120) -> None:
    """Open a notebook in JupyterLab, run all its cells, and wait until the kernel is idle again.

    Raises:
        RuntimeError: a cell shows an error, or the run does not come to its end.
    """
    from playwright.sync_api import TimeoutError

    page.goto(f"{address}/lab/tree/{name}?token=test&reset")
    page.wait_for_selector(".jp-NotebookPanel-toolbar", timeout=60_000)
    page.wait_for_function(READY, timeout=60_000)
    prompts = "[...document.querySelectorAll('.jp-CodeCell .jp-InputArea-prompt')].map(p => p.textContent)"
    if any(re.search("[0-9]", text) for text in page.evaluate(prompts)):
        raise ValueError(f"{name} has cells that are numbered already: set their execution_count to None, or nobody sees them run")
    deadline = time.monotonic() + seconds
    while not all(re.search("[0-9]", text) for text in page.evaluate(prompts)):
        if time.monotonic() > deadline:
            raise RuntimeError(f"{name} has not run to its end in {seconds:.0f} s: {page.evaluate(prompts)}")
        with contextlib.suppress(TimeoutError):  # a menu that is clicked while JupyterLab still settles does nothing, or asks which kernel
            if page.locator(".jp-Dialog").count():
                page.keyboard.press("Escape")  # to accept would start another kernel, and lose what the first one shows
                page.wait_for_timeout(500)
            page.wait_for_function(READY, timeout=10_000)
            page.click('.lm-MenuBar-itemLabel:text-is("Run")', timeout=5_000)
            page.click('.lm-Menu-itemLabel:text-is("Run All Cells")', timeout=5_000)
            page.wait_for_function(f"() => {prompts}.some(t => /[0-9*]/.test(t))", timeout=5_000)
            page.wait_for_function(f"() => !{prompts}.some(t => t.includes('*'))", timeout=1000 * seconds)
            if page.locator(ERROR).count():
                break
    page.wait_for_function(READY, timeout=1000 * seconds)
    errors = page.locator(ERROR)
    if errors.count():
        raise RuntimeError(f"{name}: {errors.first.inner_text()[-1500:]}")


def explorer(page, number: int = 0):
    """The page's explorer number `number`."""
    root = page.locator(".wejepa").nth(number)
    root.wait_for(timeout=30_000)
    root.scroll_into_view_if_needed()
    return root


def stage(root, number: int = 0):
    """An explorer's picture number `number`, which takes clicks and keys."""
    return root.locator(".wejepa-stage").nth(number)


def place_of(picture, grid_size: tuple[int, int], patch: tuple[int, int]) -> tuple[float, float]:
    """Where on the page the middle of a patch is."""
    picture.scroll_into_view_if_needed()
    box = picture.bounding_box()
    return box["x"] + (patch[1] + 0.5) / grid_size[1] * box["width"], box["y"] + (patch[0] + 0.5) / grid_size[0] * box["height"]


@contextlib.contextmanager
def redrawn(page, root, seconds: float = 20) -> Iterator[None]:
    """Waits at its end until the explorer has drawn what the kernel answered to what was done meanwhile."""
    before = root.get_attribute("data-drawn")
    yield
    page.wait_for_function("([root, before]) => root.dataset.drawn !== before", arg=[root.element_handle(), before], timeout=1000 * seconds)


def kernel_bytes() -> int:
    """Resident memory of the kernels on this machine that this process's server started."""
    import psutil

    processes = psutil.Process().children(recursive=True)
    return sum(p.memory_info().rss for p in processes if "ipykernel_launcher" in " ".join(p.cmdline()))


def doing(page, root, how: str):
    """A function of a number that changes what the explorer shows: by a click on a patch, or by a key on a picture or slider."""
    if how == "click":
        picture, grid_size = stage(root), (8, 8)
        page.mouse.click(*place_of(picture, grid_size, (0, 0)))  # pinned, so that moving the pointer changes nothing
        page.wait_for_timeout(500)
        places = [place_of(picture, grid_size, patch) for patch in ((2, 3), (4, 5))]
        return lambda k: page.mouse.click(*places[k % 2])
    (stage(root) if how == "key" else root.locator("input[type=range]:visible").last).focus()
    return lambda k: page.keyboard.press("ArrowLeft" if k % 2 else "ArrowRight")


def measure(moves: int, endurance: int) -> None:
    """Print, for each case, the median and spread of the wait, and the growth of memory."""
    chromium = find_chromium()
    if chromium is None:
        raise SystemExit("no Chromium found: install one (Debian: apt install chromium), or name it in $CHROMIUM")
    columns = ("explorer", "updates", "median, ms", "90 % below, ms", "slowest, ms", "median without a pause, ms")
    print("| " + " | ".join((*columns, f"kernel memory after {endurance} more", "page memory")) + " |\n|---|" + "---:|" * 7)
    for name, (expression, how) in CASES.items():
        with tempfile.TemporaryDirectory() as folder, jupyterlab(Path(folder)) as address, browser_page(chromium) as page:
            notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in (SETUP, expression)])
            notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
            nbformat.write(notebook, Path(folder) / "explorer.ipynb")
            open_and_run(page, address, "explorer.ipynb")
            root = explorer(page)
            change = doing(page, root, how)
            root.evaluate(WATCH)

            def move(count, pause=0.0, root=root, change=change, page=page):
                """The waits of so many moves, in ms, the shortest first."""
                page.evaluate("window.waits = []")
                for k in range(count):
                    with redrawn(page, root):
                        change(k)
                    time.sleep(pause)
                return sorted(page.evaluate("window.waits"))

            waits = move(moves, pause=0.1)  # a reader looks at a picture before asking for the next
            rushed = move(moves)
            before = kernel_bytes(), page.evaluate("performance.memory.usedJSHeapSize")
            move(endurance)
            after = kernel_bytes(), page.evaluate("performance.memory.usedJSHeapSize")
            grown = [f"{(b - a) / 2**20:+.1f} MiB" for a, b in zip(before, after, strict=True)]
            cells = (name, len(waits), f"{statistics.median(waits):.0f}", f"{waits[int(0.9 * len(waits))]:.0f}", f"{waits[-1]:.0f}")
            cells += (f"{statistics.median(rushed):.0f}", *grown)
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)


# ---------------------------------------------------------------- the website's live pages

# By page: its scripts, and what is moved: a board by arrow keys and space, or a slider.
LIVE = {
    "paint": (("core", "masks", "ui", "paint"), ".live-painted", ("ArrowRight", " ")),
    "patch": (("core", "masks", "ui", "patch"), ".live-board", ("ArrowRight", "ArrowDown")),
    "masks": (("core", "masks", "ui", "maskpage"), "input[type=range]", None),
    "replay": (("core", "masks", "ui", "replay"), "input[type=range]", None),
}
SITE = Path(__file__).resolve().parent.parent / "website"

# From an event to the moment after the frame that shows what it changed.
MOVE = """async ([selector, keys, count]) => {
    const element = document.querySelector(selector), waits = [];
    for (let k = 0; k < count; k++) {
        const began = performance.now();
        if (keys) element.dispatchEvent(new KeyboardEvent("keydown", {key: keys[k % keys.length], bubbles: true, cancelable: true}));
        else {
            element.value = Number(element.value) + (k % 2 ? -1 : 1);
            element.dispatchEvent(new Event("input", {bubbles: true}));
        }
        await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
        waits.push(performance.now() - began);
        await new Promise((done) => setTimeout(done, 30));
    }
    return waits.sort((a, b) => a - b);
}"""


def write_live_pages(folder: Path) -> None:
    """The live pages alone, without what Sphinx puts around them: `folder`/paint.html and so on, with all that they load."""
    sys.path.append(str(SITE.parent / "scripts"))
    from make_live_data import write_live

    shutil.copytree(SITE / "static", folder, dirs_exist_ok=True)
    write_live(folder)
    colours = "--color-foreground-primary:#111;--color-foreground-secondary:#444;--color-foreground-muted:#666;--color-brand-primary:#04d"
    for name, (scripts, *_) in LIVE.items():
        page = [
            '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
            f'<title>{name}</title><link rel="stylesheet" href="live.css"><style>:root{{{colours}}}</style></head>',
            f'<body><main><h1>{name}</h1><div data-live="{name}"></div><p style="margin-top:60rem">The end.</p></main>',
            *(f'<script src="{script}.js"></script>' for script in scripts),
            "</body></html>",
        ]
        (folder / f"{name}.html").write_text("".join(page))


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a server on this machine that gives the files of a folder."""

    class Silent(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Silent, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()


def live_waits(page, address: str, name: str, moves: int) -> tuple[list[float], int]:
    """The waits of so many moves on a live page, in ms, the shortest first, and the bytes that the page loaded."""
    loaded: list[int] = []
    page.on("response", lambda response: loaded.append(len(response.body())))
    page.goto(f"{address}{name}.html")
    page.wait_for_selector("[data-full], [data-counted='20032']" if name in ("paint", "masks") else "[data-ready]", timeout=60_000)
    _, selector, keys = LIVE[name]
    return page.evaluate(MOVE, [selector, keys, moves]), sum(loaded)


def measure_live(moves: int) -> None:
    """Print, for each live page, the median and spread of the wait, and what it loads."""
    chromium = find_chromium()
    if chromium is None:
        raise SystemExit("no Chromium found: install one (Debian: apt install chromium), or name it in $CHROMIUM")
    print("| page | moves | median, ms | 90 % below, ms | slowest, ms | loads, MB |\n|---|" + "---:|" * 5)
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(None):
            write_live_pages(Path(folder))
        for name in LIVE:
            with served(Path(folder)) as address, browser_page(chromium) as page:
                waits, loaded = live_waits(page, address, name, moves)
                cells = (f"{wait:.0f}" for wait in (statistics.median(waits), waits[int(0.9 * len(waits))], waits[-1]))
                print("| " + " | ".join([name, str(len(waits)), *cells, f"{loaded / 1e6:.1f}"]) + " |", flush=True)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.explorers", description="Time the explorers in a browser.")
    parser.add_argument("--moves", type=int, default=50)
    parser.add_argument("--endurance", type=int, default=500)
    parser.add_argument("--live", action="store_true", help="the website's live pages instead")
    args = parser.parse_args()
    measure_live(args.moves) if args.live else measure(args.moves, args.endurance)
    return 0


if __name__ == "__main__":
    sys.exit(main())
