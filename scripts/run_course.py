"""Run the course: every notebook in order, as it is, on the real images that ship with the package.

    python scripts/run_course.py [--notebooks 00 03 ...]

Written to outputs/course/: the executed notebooks, their figures, and results.md, which is printed at the end. Stops at the
first notebook that fails, names its cell and error, keeps what was executed, and returns 1.
"""

import argparse
import ast
import base64
import os
import sys
import time
from pathlib import Path

import nbformat
import papermill
from IPython.core.inputtransformer2 import TransformerManager
from jupyter_client.manager import KernelManager

ROOT = Path(__file__).resolve().parent.parent
COURSE = ROOT / "outputs" / "course"


def tags(cell) -> list[str]:
    return cell.metadata.get("tags", [])


def claims(cell) -> int:
    """How many `assert` statements a cell runs; an unsolved exercise is skipped and claims nothing."""
    if cell.cell_type != "code" or "skip-execution" in tags(cell):
        return 0
    tree = ast.parse(TransformerManager().transform_cell(cell.source))  # %magic lines become calls
    return sum(isinstance(node, ast.Assert) for node in ast.walk(tree))


def run(path: Path) -> str | None:
    """Execute a notebook into COURSE, its printed lines shown live; what failed in it, if anything."""
    (COURSE / path.name).unlink(missing_ok=True)
    live = {"progress_bar": False, "stdout_file": sys.stdout, "stderr_file": sys.stderr}
    try:
        papermill.execute_notebook(path, COURSE / path.name, kernel_name="python3", cwd=path.parent, **live)
    except papermill.PapermillExecutionError as error:
        return f"cell [{error.exec_count}] `{error.source.strip().splitlines()[0]}`\n{error.ename}: {error.evalue}"
    except Exception as error:  # a kernel that died, a file that is no notebook: whatever papermill passes on
        return f"{type(error).__name__}: {error}"
    return None


def save_figures(notebook, name: str) -> int:
    """Every PNG among the outputs as figures/NAME-<k>.png; how many there are."""
    folder = COURSE / "figures"
    folder.mkdir(exist_ok=True)
    for old in folder.glob(f"{name}-*.png"):
        old.unlink()
    data = [o.data["image/png"] for cell in notebook.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
    for k, png in enumerate(data, start=1):
        (folder / f"{name}-{k}.png").write_bytes(base64.b64decode(png))
    return len(data)


def results(notebook) -> list[str]:
    """The outputs of the cells tagged `results`: Markdown as it is, plain text in a fence."""
    found = []
    for output in (o for cell in notebook.cells if "results" in tags(cell) for o in cell.get("outputs", [])):
        data = output.get("data", {})
        plain = output.get("text") or data.get("text/plain", "")
        found += [data["text/markdown"]] if "text/markdown" in data else [f"```\n{plain.rstrip()}\n```"] if plain else []
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--notebooks", nargs="+", metavar="NN", help="only these: numbers or names")
    wanted = parser.parse_args().notebooks
    paths = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    for name in wanted or []:
        if not any(name in (p.stem, p.stem[:2]) for p in paths):
            parser.error(f"no notebook {name!r}; there are: {', '.join(p.stem for p in paths)}")
    paths = [p for p in paths if not wanted or p.stem in wanted or p.stem[:2] in wanted]
    if not paths:
        parser.error("notebooks/ holds no notebooks")
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"  # else MPLBACKEND=Agg from outside swallows the figures
    kernel = KernelManager(kernel_name="python3").format_kernel_cmd()[0]
    if kernel != sys.executable:
        parser.error(f"the kernel 'python3' would run {kernel}, not {sys.executable}: remove that kernel (jupyter kernelspec list)")
    COURSE.mkdir(parents=True, exist_ok=True)
    report = COURSE / "results.md"
    report.unlink(missing_ok=True)
    rows, texts = ["| notebook | minutes | asserted claims | figures |", "|---|---|---|---|"], []
    for number, path in enumerate(paths, start=1):
        print(f"=== {path.stem} ({number} of {len(paths)})", flush=True)
        start = time.perf_counter()
        if problem := run(path):
            print(f"\nFAILED: {path.stem}, {problem}\nkept: {(COURSE / path.name).relative_to(ROOT)}", file=sys.stderr)
            return 1
        notebook = nbformat.read(COURSE / path.name, as_version=4)
        minutes, figures = (time.perf_counter() - start) / 60, save_figures(notebook, path.stem)
        rows.append(f"| {path.stem} | {minutes:.1f} | {sum(map(claims, notebook.cells))} | {figures} |")
        if text := results(notebook):
            texts.append("\n\n".join([f"## {path.stem}", *text]))
    report.write_text("\n\n".join(["# The course's results", "\n".join(rows), *texts]) + "\n", encoding="utf-8")
    print(f"\n=== {report.relative_to(ROOT)}\n\n{report.read_text(encoding='utf-8')}", end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
