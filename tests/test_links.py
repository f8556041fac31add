"""Every local link of what people read leads to a file that is there, and to a heading that is in it."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")]
TEXTS += [path for folder in ("howto", "live") for path in sorted((ROOT / "website" / folder).glob("*.md"))]
TEXTS += [ROOT / "website" / "glossary.md"]
TEXTS += sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))


def prose(path: Path) -> str:
    """What is Markdown in the file, without code."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """The headings as GitHub names them: in small letters, without punctuation, with hyphens for spaces; repeated ones are numbered."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} (.+?)\s*$", prose(path), flags=re.MULTILINE):
        words = re.sub(r"\]\([^)]*\)", "]", heading)
        anchor = name = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
        number = 0
        while anchor in found:
            number += 1
            anchor = f"{name}-{number}"
        found.add(anchor)
    return found


def links(text: str) -> list[str]:
    """Where the text points to within the repository: links, images, references and HTML."""
    text = re.sub(r"(`+)(?!`).+?\1", lambda code: "`code`", text)
    found = re.findall(r"\]\(\s*<?([^)\s>]+)", text) + re.findall(r"^\[[^\]]+\]:\s*(\S+)", text, flags=re.MULTILINE)
    found += re.findall(r"(?:src|href)=[\"']([^\"']+)", text)
    return [link for link in found if not re.match(r"[a-z]+:", link)]


def problem(link: str, path: Path) -> str | None:
    """What is wrong with a link of the file, if anything."""
    target, _, anchor = link.partition("#")
    file = (path.parent / target).resolve() if target else path
    if not file.exists():
        return f"{link}: there is no such file"
    if ROOT not in (file, *file.parents):
        return f"{link}: it is outside of the repository"
    if anchor and anchor not in anchors(file):
        return f"{link}: {file.name} has no such heading"
    return None


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_local_link_leads_somewhere(path):
    assert [found for link in links(prose(path)) if (found := problem(link, path))] == []


def test_links_are_found():
    """Else the test above would pass on nothing."""
    assert len(links(prose(ROOT / "README.md"))) > 15
    text = "[a](b.md#c-d), ![e](f.png), `[no](code)`, <img src='g.png'>\n[h]: i.md\n[web](https://x)"
    assert links(text) == ["b.md#c-d", "f.png", "i.md", "g.png"]


def test_a_link_to_nothing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("# One & two\n\n## `Code` ([x](y))\n\n## Same\n\n## Same\n\n```\n# no heading\n```\n")
    assert anchors(page) == {"one--two", "code-x", "same", "same-1"}
    assert problem("#same-1", page) is None and problem("page.md#one--two", page) is None
    assert problem("#no-heading", page) == "#no-heading: page.md has no such heading"
    assert problem("gone.md", page) == "gone.md: there is no such file"
    assert problem("..", page) == "..: it is outside of the repository"
