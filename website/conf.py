"""How the website is built: `make site`, or `sphinx-build website website/_build/html`. Nothing is fetched, and no notebook is run."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from first_cell import BRANCH  # noqa: E402
from latex2mathml.converter import convert  # noqa: E402
from make_live_data import write_live  # noqa: E402
from make_schematic import schematic  # noqa: E402

FACTS = json.loads((ROOT / "wejepa" / "assets" / "fashion.json").read_text())
REPOSITORY = os.environ.get("GITHUB_REPOSITORY", "")  # owner/name, which only a published site knows

project, author, copyright = "wejepa", "the wejepa authors", "the wejepa authors, MIT"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath", "substitution", "deflist"]
myst_heading_anchors = 4
nb_execution_mode = "off"
nb_ipywidgets_js = {}  # they would come from elsewhere; explorers are shown as pictures
exclude_patterns = ["_build", "_live"]
default_role = "code"
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
napoleon_use_rtype = False
suppress_warnings = ["misc.highlighting_failure", "ref.python"]  # a class that two modules show under one name

html_theme = "furo"
html_title = "wejepa"
html_static_path = ["static", "_live"]
(HERE / "_live").mkdir(exist_ok=True)  # Sphinx looks for it before it is filled
html_css_files = ["live.css"]
html_favicon = "static/favicon.svg"
html_copy_source = False
html_show_sphinx = False
html_math_renderer = "mathml"
html_theme_options = {"top_of_page_buttons": []}
pygments_style = "a11y-high-contrast-light"
pygments_dark_style = "a11y-high-contrast-dark"

percent = {
    f"{row}_{reading}": f"{100 * value:.1f}\N{NO-BREAK SPACE}%"
    for row, readings in FACTS["accuracy"].items()
    for reading, value in readings.items()
}
myst_substitutions = percent | {"epochs": FACTS["history"][-1]["epoch"]}


def loss_curves() -> str:
    """The shipped model's own run as an SVG: loss and k-NN accuracy over the epochs."""
    history = FACTS["history"]
    width, last = 640, history[-1]["epoch"]
    parts = []
    for k, (name, title) in enumerate((("loss", "loss"), ("knn", "k-NN accuracy"))):
        values = [line[name] for line in history]
        low, high, top = min(values), max(values), 30 + 150 * k
        points = " ".join(f"{60 + i / (last - 1) * 560:.1f},{top + 100 - (v - low) / (high - low) * 100:.1f}" for i, v in enumerate(values))
        parts.append(f'<text x="60" y="{top - 10}">{title}</text><text x="52" y="{top + 6}" text-anchor="end">{high:.2f}</text>')
        parts.append(f'<text x="52" y="{top + 104}" text-anchor="end">{low:.2f}</text><polyline points="{points}" class="live-curve"/>')
    parts.append(f'<text x="60" y="310">epoch 1</text><text x="620" y="310" text-anchor="end">epoch {last}</text>')
    label = f"Loss and k-NN accuracy of {last} epochs: the loss falls, rises, and falls again while the accuracy rises"
    style = "<style>.curves text{font:14px system-ui,sans-serif;fill:currentColor}</style>"
    return f'<svg class="curves" viewBox="0 0 {width} 320" role="img" aria-label="{label}">{style}{"".join(parts)}</svg>'


def prepare(app) -> None:
    """Copies of the notebooks, whose links lead to pages of the site, and the live pages' data."""
    folder = HERE / "notebooks"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        for cell in notebook["cells"]:
            if cell["cell_type"] == "markdown":
                text = "".join(cell["source"])
                text = re.sub(r"\]\(\.\./README\.md(#[^)]*)?\)", "](../howto/index.md)", text)
                cell["source"] = text.replace("](../benchmarks/README.md", "](../benchmarks.md").replace("](../website/", "](../")
            for output in cell.get("outputs", []):
                output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
        (folder / path.name).write_text(json.dumps(notebook), encoding="utf-8")
    for path in (ROOT / "notebooks").glob("schematic-*.svg"):
        shutil.copy(path, folder)
    write_live(HERE / "_live")


def fill_in(app, docname: str, source: list[str]) -> None:
    """Drawings where a page asks for them, `<!-- schematic -->`, `<!-- schematic: teacher -->`, `<!-- loss curves -->`; links of the site.

    On GitHub a page's links lead to files of the repository, here to pages of the site.
    """

    def drawn(match: re.Match) -> str:
        picture = loss_curves() if match[1] == "loss curves" else schematic(*filter(None, [match[2]]))
        hint = '<p class="wide-hint">The drawing is wider than the screen: scroll it sideways.</p>'  # seen on narrow screens only
        return f'```{{raw}} html\n{hint}<div class="wide" tabindex="0">{picture.strip()}</div>\n```'

    up = "../" * docname.count("/")  # to the site's root; in the repository the root lies one folder further up
    for file, page in (("benchmarks/README.md", "benchmarks.md"), ("notebooks/", "notebooks/")):
        source[0] = source[0].replace(f"](../{up}{file}", f"]({up}{page}")
    source[0] = re.sub(r"<!-- (schematic|loss curves)(?:: ([a-z-]+))? -->", drawn, source[0])


def captions(app, pagename: str, templatename: str, context: dict, doctree) -> None:
    """The navigation's captions are headings without a level, which no screen reader can place."""
    tree = "furo_navigation_tree"
    if tree in context:
        context[tree] = context[tree].replace('role="heading"', 'role="heading" aria-level="2"')


def reachable(app, pagename: str, templatename: str, context: dict, doctree) -> None:
    """Wide code, tables and formulas scroll sideways, so the keyboard must reach them."""
    if "body" in context:
        context["body"] = re.sub(
            r'<pre>|<div class="(?:table|math)-wrapper[^"]*"',
            lambda m: m[0].rstrip(">") + ' tabindex="0"' + ">" * (m[0] == "<pre>"),
            context["body"],
        )


def launch_line(app, pagename: str, templatename: str, context: dict, doctree) -> None:
    """Links that open a notebook elsewhere, with a first cell that installs what is missing, where the site knows its repository.

    They lead to the branch `launch`, which the workflow that publishes the site writes with scripts/first_cell.py.
    """
    if REPOSITORY and pagename.startswith("notebooks/") and "body" in context:
        file = f"{REPOSITORY}/blob/{BRANCH}/{pagename}.ipynb"
        links = {
            "Colab": f"https://colab.research.google.com/github/{file}",
            "Kaggle": f"https://kaggle.com/kernels/welcome?src=https://github.com/{file}",
            "Binder": f"https://mybinder.org/v2/gh/{REPOSITORY}/{BRANCH}?labpath={pagename}.ipynb",
        }
        line = " · ".join(f'<a href="{url}">{name}</a>' for name, url in links.items())
        context["body"] = f'<p class="launch">Run this notebook: {line}</p>' + context["body"]


def mathml(self, node) -> None:
    from docutils import nodes

    block = node.tagname == "math_block"
    text = convert(node.astext(), display="block" if block else "inline")
    self.body.append(f"<div class='math'>{text}</div>" if block else text)
    raise nodes.SkipNode


def setup(app) -> None:
    app.add_html_math_renderer("mathml", (mathml, None), (mathml, None))
    app.connect("builder-inited", prepare)
    app.connect("source-read", fill_in)
    app.connect("html-page-context", launch_line)
    app.connect("html-page-context", reachable)
    app.connect("html-page-context", captions, priority=900)  # after the theme has made the tree
