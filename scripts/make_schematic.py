"""Draw I-JEPA's schematic as an SVG, some parts of it highlighted if asked for.

    python scripts/make_schematic.py docs/schematic.svg
    python scripts/make_schematic.py teacher.svg --highlight teacher
    python scripts/make_schematic.py --notebooks        # notebooks/schematic-NN.svg, with what notebook NN is about

It follows the system's light or dark scheme; a page may set the colours by CSS on `svg.schematic`.
"""

import argparse
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("image", "patches", "context", "targets", "student", "teacher", "predictor", "loss", "stop-gradient", "moving-average")
STYLE = """
svg.schematic { --paper: #ffffff; --ink: #1f2328; --soft: #57606a; --line: #8c959f; --see: #0b5cad; --hide: #b3470a; --box: #f3f5f8; }
@media (prefers-color-scheme: dark) {
  svg.schematic { --paper: #0d1117; --ink: #e8eaed; --soft: #b4bac2; --line: #7b828b; --see: #79b8ff; --hide: #ffab70; --box: #22262c; }
}
.schematic text { font: 15px system-ui, sans-serif; fill: var(--ink); text-anchor: middle; }
.schematic .note { font-size: 13px; fill: var(--soft); }
.schematic .box { fill: var(--box); stroke: var(--line); stroke-width: 1.5; }
.schematic .cell { stroke: var(--paper); stroke-width: 1.5; }
.schematic .see { fill: var(--see); } .schematic .hide { fill: var(--hide); } .schematic .rest { fill: var(--line); opacity: 0.35; }
.schematic .arrow { fill: none; stroke: var(--ink); stroke-width: 1.8; marker-end: url(#tip); }
.schematic .dashed { stroke-dasharray: 6 5; }
.schematic .tip { fill: var(--ink); }
.schematic .dim { opacity: 0.35; }
.schematic .lit .box { stroke: var(--hide); stroke-width: 4; }
.schematic .lit text { font-weight: 700; }
.schematic .lit .box ~ .note { font-weight: 400; }
"""
# What each notebook is about; its drawing lies beside it, so that GitHub, Jupyter and the website all find it.
NOTEBOOKS = {
    "00": (),
    "01": ("patches",),
    "02": ("context", "targets"),
    "03": ("student", "teacher", "predictor", "loss", "stop-gradient", "moving-average"),
    "05": ("teacher", "predictor", "targets"),
    "06": ("predictor", "stop-gradient", "moving-average"),
    "07": ("student", "teacher"),
}
PAPER = '<rect width="940" height="330" fill="var(--paper)"/>'  # a viewer's own background may suit the other scheme
CONTEXT = {0, 1, 4, 5, 8, 12, 13, 16, 20, 21, 24}  # places on a grid of 5 x 5
TARGETS = {2, 3, 7, 9, 14, 17, 18, 22, 23}


def grid(x: float, y: float, kind: dict[str, set[int]], side: int = 20) -> str:
    """Patches on a grid of 5 x 5; places of no kind are left out."""
    cells = []
    for name, places in kind.items():
        for place in sorted(places):
            at = f'x="{x + place % 5 * side:g}" y="{y + place // 5 * side:g}" width="{side}" height="{side}"'
            cells.append(f'<rect class="cell {name}" {at}/>')
    return "".join(cells)


def box(x: float, y: float, text: str, note: str = "", width: int = 120) -> str:
    """A network: a rounded rectangle with its name."""
    lines = f'<text x="{x + width / 2:g}" y="{y + (26 if note else 33)}">{text}</text>'
    if note:
        lines += f'<text class="note" x="{x + width / 2:g}" y="{y + 44}">{note}</text>'
    return f'<rect class="box" x="{x}" y="{y}" width="{width}" height="56" rx="8"/>{lines}'


def arrow(path: str, dashed: bool = False) -> str:
    return f'<path class="arrow{" dashed" if dashed else ""}" d="{path}"/>'


def note(x: float, y: float, text: str) -> str:
    return f'<text class="note" x="{x}" y="{y}">{text}</text>'


def shapes() -> dict[str, str]:
    """The drawing of each part, arrows with the part that they lead to."""
    whole = {"rest": set(range(25)) - CONTEXT - TARGETS, "see": CONTEXT, "hide": TARGETS}
    shirt = '<path class="rest" style="opacity:.8" d="M38 128 l22 -16 h20 l22 16 -10 18 -8 -5 v39 h-28 v-39 l-8 5z"/>'
    return {
        "image": f'<rect class="box" x="20" y="96" width="100" height="100"/>{shirt}<text x="70" y="218">image</text>',
        "patches": arrow("M126 146 H156") + grid(164, 96, whole) + '<text x="214" y="218">patches</text>',
        "context": arrow("M270 122 C300 100 300 70 326 70")
        + grid(334, 20, {"see": CONTEXT})
        + '<text x="384" y="140">context: seen</text>',
        "student": arrow("M442 70 H470") + box(478, 42, "student", "trained"),
        "predictor": arrow("M604 70 H632") + box(640, 42, "predictor", "asked by position"),
        "teacher": arrow("M270 172 C300 196 310 246 466 246") + box(478, 218, "teacher", "sees everything"),
        "targets": arrow("M604 246 H672") + grid(640, 196, {"hide": TARGETS}) + '<text x="690" y="316">tokens at the targets</text>',
        "moving-average": arrow("M538 102 V210", True) + note(612, 152, "moving average") + note(612, 169, "of the student"),
        "stop-gradient": arrow("M746 246 H822", True) + note(786, 270, "stop-") + note(786, 285, "gradient"),
        "loss": arrow("M766 70 C800 70 840 90 858 122")
        + arrow("M824 246 C844 240 856 224 862 200")
        + box(804, 132, "loss", "how far apart?", 116),
    }


def schematic(*highlight: str) -> str:
    """The SVG; with names of parts these are framed and the others pale.

    Raises:
        ValueError: there is no such part.
    """
    for part in highlight:
        if part not in PARTS:
            raise ValueError(f"highlight = {part!r}: give one of {', '.join(PARTS)}")
    drawn = shapes()
    groups = []
    for part in PARTS:
        state = "" if not highlight else " lit" if part in highlight else " dim"
        groups.append(f'<g class="part{state}" id="schematic-{part}">{drawn[part]}</g>')
    title = "I-JEPA: a student sees the context, a teacher the whole image; a predictor tells the teacher's tokens at the hidden places"
    size = 'viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto"'
    tip = f'<marker id="tip" {size}><path class="tip" d="M0 0L8 4L0 8z"/></marker>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" class="schematic" viewBox="0 0 940 330" role="img" aria-label="{title}">'
    return "\n".join([head, f"<style>{STYLE}</style><defs>{tip}</defs>", PAPER, *groups, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw I-JEPA's schematic.")
    parser.add_argument("file", type=Path, nargs="?", help="where the drawing goes")
    parser.add_argument("--highlight", choices=PARTS, nargs="+", default=[])
    parser.add_argument("--notebooks", action="store_true", help="draw those of the notebooks")
    args = parser.parse_args()
    if args.file:
        args.file.write_text(schematic(*args.highlight), encoding="utf-8")
    if args.notebooks:
        for number, parts in NOTEBOOKS.items():
            (ROOT / "notebooks" / f"schematic-{number}.svg").write_text(schematic(*parts), encoding="utf-8")


if __name__ == "__main__":
    main()
