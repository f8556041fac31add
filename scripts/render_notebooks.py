"""Run notebooks on the embedded images and keep their outputs in place, so that a reader without a kernel sees the pictures.

    python scripts/render_notebooks.py [notebooks/00_quick_tour.ipynb ...]

What differs from run to run without meaning is left out: timing metadata, widget state, progress bars, paths of this machine. Each code
cell's metadata gets the hash of the source that made its output; a test compares the two.
"""

import base64
import hashlib
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
MAX_BYTES = 1_000_000


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
            if "picture" in cell.metadata:  # one that the README shows
                png = next(output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {}))
                (ROOT / cell.metadata["picture"]).write_bytes(base64.b64decode(png))
    text = nbformat.writes(notebook)
    for place in (str(ROOT), str(Path.home())):
        text = text.replace(place, ".")
    if len(text) > MAX_BYTES:
        raise SystemExit(f"{path} is {len(text):,} bytes with its outputs, more than {MAX_BYTES:,}: draw smaller or fewer figures")
    path.write_text(text if text.endswith("\n") else text + "\n")


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
    """Without the memory addresses that a plain repr shows, and without what an earlier run in the same folder makes a run say."""
    if "text" in output:
        output.text = "".join(line for line in output.text.splitlines(True) if not line.startswith("what an earlier run left"))
    if "text/plain" in output.get("data", {}):
        output.data["text/plain"] = re.sub(r" at 0x[0-9a-f]+", "", output.data["text/plain"])
    return output


if __name__ == "__main__":
    for name in sys.argv[1:] or sorted(map(str, (ROOT / "notebooks").glob("[0-9]*.ipynb"))):
        print(f"rendering {name}", flush=True)
        render(Path(name).resolve())
