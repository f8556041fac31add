"""The website: its JavaScript computes what torch computes, it builds without a warning, nothing leaves it, and no link is dead.

Needs a Chromium, and for the built site the packages of the extra `site`: skipped with the reason where they are absent.
"""

import functools
import http.server
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest
import torch

from benchmarks.explorers import browser_page, find_chromium
from wejepa import load_images, load_pretrained
from wejepa.analysis.attention import record_attention
from wejepa.config import MaskConfig
from wejepa.masking import Masks, sample_block_masks

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "scripts"))
from make_live_data import write_live  # noqa: E402
from make_schematic import NOTEBOOKS, PARTS, schematic  # noqa: E402

CODE = ("core", "masks")
LIVE = ("live/paint", "live/patch", "live/masks", "live/replay")
# axe takes seconds for a page and half a minute for the reference, so it looks at each kind of page once.
LOOKED_AT = ("index", *LIVE, "glossary", "howto/failing", "notebooks/02_mask_sampling")

COMPUTE = """async ([images, contexts, targets]) => {
    const file = await wejepa.load("weights"), model = wejepa.model(file.tensors, 2);
    return JSON.stringify(images.map((image, i) => {
        const attentions = [], x = Float32Array.from(image), seen = contexts[i];
        const teacher = model.teacher.encode(x, {attentions});
        const student = model.student.encode(x, {keep: seen});
        const predicted = model.predictor.predict(student, seen, targets[i]);
        return [teacher, student, predicted, ...attentions].map((values) => [...values]);
    }));
}"""  # as text: playwright hands numbers over one by one
COVER = """([batches, size, bugs]) => {
    const settings = {targetScale: [.15, .2], targetAspect: [.75, 1.5], contextScale: [.85, 1], contextAspect: [1, 1],
        blocks: 4, share: .33};
    const rand = wejepa.masks.random(3), asked = Array(64).fill(0), shown = Array(64).fill(0);
    for (let k = 0; k < batches; k++) {
        const {context, targets} = wejepa.masks.sample(size, 8, settings, rand, bugs);
        context.forEach((places) => places.forEach((p) => shown[p]++));
        targets.forEach((blocks) => new Set(blocks.flat()).forEach((p) => asked[p]++));
    }
    return [asked, shown].map((counts) => counts.map((n) => n / batches / size));
}"""


class Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def browser():
    """A page of a browser, which all tests take turns with: playwright runs once in a process."""
    found = find_chromium()
    if found is None:
        message = "no Chromium found: install one (Debian: apt install chromium), or name it in $CHROMIUM"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    with browser_page(found) as page:
        yield page


@pytest.fixture(scope="module")
def serve():
    """A function that serves a folder on this machine and gives its address."""
    servers = []

    def start(folder: Path) -> str:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Silent, directory=folder))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/"

    yield start
    for server in servers:
        server.shutdown()


@pytest.fixture(scope="module")
def code(tmp_path_factory, browser, serve):
    """A page with the site's code and data, without Sphinx."""
    folder = tmp_path_factory.mktemp("code")
    shutil.copytree(ROOT / "website" / "static", folder, dirs_exist_ok=True)
    write_live(folder)
    scripts = "".join(f'<script src="{name}.js"></script>' for name in CODE)
    (folder / "page.html").write_text(f"<!doctype html><title>code</title>{scripts}")
    browser.goto(serve(folder) + "page.html")
    return browser


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site. A warning fails the build."""
    missing = [name for name in ("sphinx", "furo", "myst_nb", "latex2mathml") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"no {missing[0]}: pip install -e '.[site]'")
    folder = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-W",
        "--keep-going",
        "-d",
        folder / "doctrees",
        "-b",
        "html",
        ROOT / "website",
        folder / "html",
    ]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    return folder / "html"


def test_javascript_computes_what_torch_computes_on_twenty_images(code):
    model = load_pretrained("fashion")
    images = next(load_images(model.cfg, "test").batches(torch.arange(20), 20))
    masks = sample_block_masks(20, model.cfg.grid_size, model.cfg.mask, torch.Generator().manual_seed(0))
    hidden = torch.stack([torch.tensor([p for p in range(64) if p not in set(row)]) for row in masks.context.tolist()])  # (20, 43)
    asked = Masks(masks.context, hidden[:, None])
    with torch.no_grad():
        teacher, student = model.encode(images), model.student_encoder(images, keep=masks.context)
        predictions, _ = model(images, asked)
    expected = [teacher, student, predictions, *record_attention(model, images)]
    given = [images.flatten(1).tolist(), masks.context.tolist(), hidden.tolist()]
    found = json.loads(code.evaluate(COMPUTE, given))
    for i, parts in enumerate(found):
        assert len(parts) == len(expected)
        for ours, theirs in zip(parts, expected, strict=True):
            assert (torch.tensor(ours) - theirs[i].flatten()).abs().max() < 1e-4


def test_javascript_draws_masks_as_often_as_torch_does(code):
    asked, shown = (torch.tensor(counts) for counts in code.evaluate(COVER, [1200, 32, {}]))
    generator, theirs = torch.Generator().manual_seed(0), torch.zeros(2, 64)
    for _ in range(600):
        masks = sample_block_masks(32, (8, 8), MaskConfig(), generator)
        for kind, places in enumerate((masks.targets.flatten(1), masks.context)):
            theirs[kind] += torch.zeros(32, 64).scatter_(1, places, 1.0).sum(0) / (600 * 32)
    assert (asked - theirs[0]).abs().max() < 0.05 and (shown - theirs[1]).abs().max() < 0.05
    assert shown.sum().item() == pytest.approx(21)
    asked, shown = (torch.tensor(counts).view(8, 8) for counts in code.evaluate(COVER, [100, 64, {"exclusive": True, "cut": True}]))
    assert asked[-1].max() == 0 and asked[:, -1].max() == 0 and asked[0, :-1].min() > 0
    assert shown[:4].sum() > 1.5 * shown[4:].sum()


def test_schematic_has_every_part_and_highlights_one():
    assert (ROOT / "docs" / "schematic.svg").read_text(encoding="utf-8") == schematic()
    for part in PARTS:
        assert f'class="part lit" id="schematic-{part}"' in schematic(part) and schematic(part).count('class="part dim"') == len(PARTS) - 1
    with pytest.raises(ValueError, match="give one of image"):
        schematic("techer")
    for number, parts in NOTEBOOKS.items():
        assert (ROOT / "notebooks" / f"schematic-{number}.svg").read_text(encoding="utf-8") == schematic(*parts)


@pytest.mark.parametrize("repository", ["", "owner/name"])
def test_launch_links_are_there_where_the_repository_is_known(monkeypatch, repository):
    pytest.importorskip("latex2mathml", reason="no latex2mathml: pip install -e '.[site]'")
    monkeypatch.setenv("GITHUB_REPOSITORY", repository)
    spec = importlib.util.spec_from_file_location("site_conf", ROOT / "website" / "conf.py")
    conf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conf)
    context = {"body": "text"}
    conf.launch_line(None, "notebooks/02_mask_sampling", "", context, None)
    found = re.findall(r'href="([^"]+)"', context["body"])
    file = "owner/name/blob/launch/notebooks/02_mask_sampling.ipynb"
    expected = [
        f"https://colab.research.google.com/github/{file}",
        f"https://kaggle.com/kernels/welcome?src=https://github.com/{file}",
        "https://mybinder.org/v2/gh/owner/name/launch?labpath=notebooks/02_mask_sampling.ipynb",
    ]
    assert found == (expected if repository else [])  # no link that leads nowhere


class Page(HTMLParser):
    """The links of a page, and what can be linked to in it."""

    def __init__(self, file: Path):
        super().__init__()
        self.links, self.ids = [], set()
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.ids |= {values[name] for name in ("id", "name") if values.get(name)}
        self.links += [values[name] for name in ("href", "src") if values.get(name)]


def test_every_internal_link_resolves(site):
    pages = {file.resolve(): Page(file) for file in site.rglob("*.html")}
    dead = []
    for file, page in pages.items():
        for link in page.links:
            if re.match(r"[a-z]+:", link):
                continue
            path, anchor = urldefrag(link)
            target = (file.parent / unquote(path.split("?")[0])).resolve() if path else file
            found = target in pages if target.suffix == ".html" else target.exists()
            if not found or (anchor and target in pages and unquote(anchor) not in pages[target].ids):
                dead.append(f"{file.relative_to(site.resolve())}: {link}")
    assert len(pages) > 20 and dead == []
    assert len(re.findall("<h2>", (site / "howto" / "failing.html").read_text(encoding="utf-8"))) == 7  # a drawing ends where it should


def test_no_request_leaves_the_site_and_axe_finds_nothing_serious(site, browser, serve):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="no axe-playwright-python: pip install -e '.[site]'").Axe()
    address = serve(site)
    names = sorted(file.relative_to(site).with_suffix("").as_posix() for file in site.rglob("*.html"))
    assert set(LIVE) < set(names)
    outside, serious, wide, errors = [], [], [], []
    page = browser
    page.on("request", lambda request: request.url.startswith((address, "data:", "blob:")) or outside.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.set_viewport_size({"width": 375, "height": 800})
    for name in names:
        page.emulate_media(color_scheme="light")
        page.goto(f"{address}{name}.html")
        if name == "index" or name in LIVE:
            page.wait_for_selector("[data-ready]")
        if page.evaluate("document.documentElement.scrollWidth > innerWidth"):
            wide.append(name)
        for scheme in ("light", "dark") if name in LOOKED_AT else ():
            page.emulate_media(color_scheme=scheme)
            violations = axe.run(page).response["violations"]
            serious += [(name, scheme, v["id"], v["nodes"][0]["target"]) for v in violations if v["impact"] in ("serious", "critical")]
    assert (outside, errors, wide, serious) == ([], [], [], [])


def test_live_pages_and_search_work_from_a_folder_and_by_keyboard(site, browser):
    page = browser
    page.goto((site / "live" / "paint.html").as_uri())
    page.wait_for_selector("[data-ready]")
    line, board = page.locator(".live-line").first, page.locator(".live-board")
    before = line.inner_text()
    board.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Space")
    page.wait_for_function("before => document.querySelector('.live-line').innerText !== before", arg=before)
    box = board.bounding_box()
    before = line.inner_text()
    page.mouse.move(box["x"] + 5, box["y"] + 5)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.4, box["y"] + 5, steps=8)
    page.mouse.up()
    page.wait_for_function("before => document.querySelector('.live-line').innerText !== before", arg=before)
    assert "29 of 64" in line.inner_text() or "28 of 64" in line.inner_text() or "30 of 64" in line.inner_text()
    page.goto((site / "search.html").as_uri() + "?q=predictor")
    page.wait_for_selector("ul.search li a")
