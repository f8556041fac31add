"""Run notebooks on the embedded images and keep their outputs in place, so that a reader without a kernel sees the pictures.

    python scripts/render_notebooks.py [notebooks/00_quick_tour.ipynb ...]
    python scripts/render_notebooks.py --texts notebooks/00_quick_tour.ipynb    # put in alternative texts, run nothing

What differs from run to run without meaning is left out: timing metadata, widget state, progress bars, paths of this machine. Each code
cell's metadata gets the hash of the source that made its output; a test compares the two.

A code cell that shows pictures says in its metadata what they show, as `alt`: one sentence, or a list with one for each picture. It is
copied to the outputs' metadata, where nbconvert's classic template looks for it, and to the cell's `mystnb`, which the website reads.
JupyterLab 4.6 and nbconvert's default template show no alternative text of outputs, wherever it stands.
"""

import argparse
import base64
import hashlib
import io
import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
MAX_BYTES = 1_000_000
LARGE = 40_000  # bytes of a PNG, beyond which 256 colours have to do


def source_hash(source: str) -> str:
    """Names the source that a rendered output belongs to."""
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def render(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=None, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()
    keep(notebook, path)


def keep(notebook, path: Path) -> None:
    """Write an executed notebook with what of its outputs means something."""
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"], "language_info": {"name": "python"}}
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = joined(clean(output) for output in cell.outputs if keeps(output))
            cell.metadata["rendered"] = source_hash(cell.source)
            describe_pictures(cell)
            if "picture" in cell.metadata:  # one that the README shows
                png = next(output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {}))
                (ROOT / cell.metadata["picture"]).write_bytes(base64.b64decode(png))
    text = nbformat.writes(notebook)
    for place in (str(ROOT), str(Path.home())):
        text = text.replace(place, ".")
    if len(text) > MAX_BYTES:
        raise SystemExit(f"{path} is {len(text):,} bytes with its outputs, more than {MAX_BYTES:,}: draw smaller or fewer figures")
    path.write_text(text if text.endswith("\n") else text + "\n")


def pictures(cell) -> list:
    """The outputs of a code cell that are pictures."""
    return [output for output in cell.outputs if any(kind.startswith("image/") for kind in output.get("data", {}))]


def texts(cell) -> list[str]:
    """The alternative text of each of a code cell's pictures, as its metadata has it."""
    alt = cell.metadata.get("alt", [])
    return [alt] if isinstance(alt, str) else list(alt)


def describe_pictures(cell) -> None:
    """Copy alternative texts to where readers look for them; myst-nb has one for all pictures of a cell.

    Raises:
        SystemExit: there are more or fewer texts than pictures.
    """
    shown, alt = pictures(cell), texts(cell)
    if not alt:
        return
    if len(shown) != len(alt):
        raise SystemExit(f"cell {cell.get('id')} shows {len(shown)} pictures, its metadata.alt describes {len(alt)}: give each a text")
    for output, text in zip(shown, alt, strict=True):
        for kind in output.data:
            if kind.startswith("image/"):
                output.metadata[kind] = {**output.metadata.get(kind, {}), "alt": text}
    cell.metadata["mystnb"] = {"image": {"alt": " ".join(alt)}}


def smaller(png: str) -> str:
    """A PNG, base64, in 256 colours where it is large and that makes it smaller."""
    raw = base64.b64decode(png)
    if len(raw) <= LARGE:
        return png
    image, file = Image.open(io.BytesIO(raw)), io.BytesIO()
    few = image.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE)
    few.save(file, "png", optimize=True, dpi=image.info.get("dpi"))
    return base64.b64encode(file.getvalue()).decode() if len(file.getvalue()) < len(raw) else png


def keeps(output) -> bool:
    """Progress bars and live widgets are for those who watch; everything else stays."""
    return output.get("name") != "stderr" and "application/vnd.jupyter.widget-view+json" not in output.get("data", {})


def joined(outputs) -> list:
    """Printed lines that follow one another as one output."""
    result: list = []
    for output in outputs:
        if result and output.output_type == result[-1].output_type == "stream" and output.name == result[-1].name:
            result[-1].text += output.text
        else:
            result.append(output)
    return result


def clean(output):
    """Without the memory addresses that a plain repr shows, and without what an earlier run in the same folder makes a run say.

    A PIL image shows itself as PNG and as JPEG, of which one is enough.
    """
    if "text" in output:
        output.text = "".join(line for line in output.text.splitlines(True) if not line.startswith("what an earlier run left"))
    if "text/plain" in output.get("data", {}):
        output.data["text/plain"] = re.sub(r" at 0x[0-9a-f]+", "", output.data["text/plain"])
    if "image/png" in output.get("data", {}):
        output.data["image/png"] = smaller(output.data["image/png"])
        output.data.pop("image/jpeg", None)
    return output


def put_in_texts(path: Path) -> None:
    """Alternative texts of the cells' metadata to their outputs, as they are kept."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            describe_pictures(cell)
    text = nbformat.writes(notebook)
    path.write_text(text if text.endswith("\n") else text + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Run notebooks and keep their outputs in place.")
    parser.add_argument("notebooks", nargs="*", type=Path, default=sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")))
    parser.add_argument("--texts", action="store_true", help="put the alternative texts into the outputs that are there, and run nothing")
    args = parser.parse_args()
    for path in args.notebooks:
        print(f"{'describing' if args.texts else 'rendering'} {path}", flush=True)
        (put_in_texts if args.texts else render)(path.resolve())


if __name__ == "__main__":
    main()
