"""How far each numeric assertion of the notebooks is from failing, over seeds and processors.

    python -m benchmarks.margins run --seeds 0 1 2 3 4 --capabilities native avx2    # hours; each notebook's result is kept at once
    python -m benchmarks.margins table                                              # of everything that was kept so far

A notebook is run on the real images with every comparison inside an `assert` replaced by one that writes down both sides and goes on.
The margin is the distance to the threshold, positive where the assertion holds. Its spread is its standard deviation over the runs; a claim
whose mean margin is under three of them is not one. Results are one small JSON file for each notebook, seed and processor, so that long
runs can be made in parts and on several machines.

"avx2" and "default" make PyTorch and oneDNN compute as on an older processor, in float32 where that one has no bfloat16.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import nbformat

from benchmarks.processors import CAPABILITIES

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "margins"
NOTEBOOKS = ("01", "02", "03", "00", "04", "05", "07", "06", "08", "09")  # 03 trains the model that others take
OPERATORS = {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="}
DEVIATIONS = 3  # a margin of fewer standard deviations is no claim

# The first cell of an instrumented notebook. Everything it defines begins with an underscore, so that it meets no name of the notebook's.
RECORDER = '''
import torch as _torch

_margins = {}


def _note(key, left, right, sign, slack=0.0):
    """Keep the smallest distance between the two sides of a comparison, over all times it is made and all elements."""
    distance = _torch.as_tensor(right, dtype=_torch.float64) - _torch.as_tensor(left, dtype=_torch.float64)
    margin = sign * distance + slack
    if margin.numel() == 0:
        return
    worst = int(margin.argmin())
    value = float(margin.flatten()[worst])
    if key not in _margins or value < _margins[key][0] or value != value:
        sides = (_torch.as_tensor(s, dtype=_torch.float64).expand(margin.shape).flatten()[worst].item() for s in (left, right))
        _margins[key] = [value, *sides]


def _compare(key, left, right, operator):
    """`left OPERATOR right`, written down."""
    held = {"<": lambda a, b: a < b, "<=": lambda a, b: a <= b, ">": lambda a, b: a > b, ">=": lambda a, b: a >= b}[operator](left, right)
    if not isinstance(held, (bool, _torch.Tensor)) and not hasattr(held, "dtype"):
        return held  # sets
    try:
        _note(key, left, right, 1 if operator[0] == "<" else -1)
    except (TypeError, ValueError, RuntimeError):
        pass  # no numbers
    return held


def _allclose(key, one, other, rtol=1e-5, atol=1e-8, equal_nan=False):
    """`torch.allclose`, written down as the largest difference against what is allowed there."""
    a, b = (t.detach().double().cpu().flatten() for t in _torch.broadcast_tensors(one, other))
    known = ~(a.isnan() & b.isnan()) if equal_nan else _torch.ones_like(a, dtype=_torch.bool)
    _note(key, (a - b).abs()[known], (atol + rtol * b.abs())[known], 1)
    return _torch.allclose(one, other, rtol=rtol, atol=atol, equal_nan=equal_nan)
'''


class Instrument(ast.NodeTransformer):
    """Replaces the comparisons inside the assertions of a cell, and lets it go on where one fails.

    Attributes:
        texts: for each comparison its source.
    """

    def __init__(self, cell: int):
        self.cell, self.texts, self.inside = cell, {}, False

    def visit_Assert(self, node: ast.Assert) -> ast.stmt:
        self.inside = True
        test = self.visit(node.test)
        self.inside = False
        return ast.copy_location(ast.Expr(test), node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.expr:
        if self.inside and isinstance(node.op, ast.Not):
            return node  # what must not hold has no threshold to keep away from
        return self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        if not self.inside or not all(type(op) in OPERATORS for op in node.ops):
            return self.generic_visit(node)
        sides = [node.left, *node.comparators]
        calls = []
        for left, op, right in zip(sides, node.ops, sides[1:], strict=False):
            text = f"{ast.unparse(left)} {OPERATORS[type(op)]} {ast.unparse(right)}"
            calls.append(self._call("_compare", text, [left, right, ast.Constant(OPERATORS[type(op)])]))
        return calls[0] if len(calls) == 1 else ast.BoolOp(ast.And(), calls)

    def visit_Call(self, node: ast.Call) -> ast.expr:
        if self.inside and ast.unparse(node.func) == "torch.allclose":
            return self._call("_allclose", ast.unparse(node), node.args, node.keywords)
        return self.generic_visit(node)

    def _call(self, function: str, text: str, arguments: list[ast.expr], keywords=()) -> ast.Call:
        key = f"{self.cell}.{len(self.texts)}"
        self.texts[key] = text
        return ast.Call(ast.Name(function, ast.Load()), [ast.Constant(key), *arguments], list(keywords))


def instrumented(notebook) -> tuple[list, dict[str, str]]:
    """The cells of a notebook with its comparisons written down, its exercises left out; and each comparison's source."""
    cells, texts = [nbformat.v4.new_code_cell(RECORDER)], {}
    for number, cell in enumerate(notebook.cells):
        tags = cell.metadata.get("tags", [])
        if cell.cell_type != "code" or "skip-execution" in tags:
            continue
        if "parameters" in tags:
            cells.append(cell)
            continue
        instrument = Instrument(number)
        tree = ast.fix_missing_locations(instrument.visit(ast.parse(cell.source)))
        texts |= instrument.texts
        cells.append(nbformat.v4.new_code_cell(ast.unparse(tree)))
    cells.append(nbformat.v4.new_code_cell("import json as _json\nprint('MARGINS ' + _json.dumps(_margins))"))
    return cells, texts


def measure(path: Path, parameters: dict, environment: dict[str, str]) -> dict:
    """Run an instrumented notebook: for each comparison its source, margin and both sides."""
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    (cell,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    cell.source += "\n" + "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    notebook.cells, texts = instrumented(notebook)
    if path.stem.startswith("00"):  # its run is 03's to the bit, so it is not made again
        for c in notebook.cells:
            c.source = c.source.replace("launch_pretraining(cfg)", "launch_pretraining(cfg, resume='auto')")
    start = time.perf_counter()
    client = NotebookClient(notebook, timeout=None, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}})
    client.execute(env=os.environ | {"OMP_NUM_THREADS": "1"} | environment)
    printed = "".join(o.get("text", "") for o in notebook.cells[-1].outputs)
    found = json.loads(printed.partition("MARGINS ")[2])
    rows = [{"text": texts[key], "cell": key, "margin": m, "left": a, "right": b} for key, (m, a, b) in found.items()]
    return {"seconds": round(time.perf_counter() - start), "margins": rows}


def run(args) -> int:
    """Measure what is not yet kept, notebook by notebook."""
    RESULTS.mkdir(exist_ok=True)
    work = args.work or Path(tempfile.mkdtemp())
    for seed in args.seeds:
        for capability in args.capabilities:
            for number in args.notebooks:
                (path,) = (ROOT / "notebooks").glob(f"{number}_*.ipynb")
                kept = RESULTS / f"{path.stem[:2]}-{capability}-{seed}.json"
                if kept.exists() and not args.again:
                    continue
                shared = "pretrained" if number in ("00", "03", "04", "05", "07") else path.stem
                folder = work / f"{capability}-{seed}" / shared
                print(f"{path.stem}, seed {seed}, {capability} ...", flush=True)
                result = measure(path, {"seed": seed, "output_dir": str(folder)}, CAPABILITIES[capability])
                kept.write_text(json.dumps({"notebook": path.stem, "seed": seed, "capability": capability, **result}, indent=1) + "\n")
                bad = [row for row in result["margins"] if not row["margin"] >= 0]
                print(f"  {result['seconds']} s, {len(result['margins'])} comparisons, {len(bad)} fail", flush=True)
                for row in bad:
                    print(f"  FAILS {row['text']}: {row['left']:.4g} against {row['right']:.4g}", flush=True)
    return 0


@dataclass(frozen=True)
class Claim:
    """A comparison over all runs that were kept.

    Attributes:
        notebook, cell, text: where it stands and what it says.
        margins: its margin in each run.
        sides: both sides' means.
    """

    notebook: str
    cell: str
    text: str
    margins: list[float]
    sides: tuple[float, float]

    @property
    def deviations(self) -> float:
        """The mean margin in standard deviations of its spread; infinite where nothing varies, minus that where a side is no number."""
        if any(math.isnan(margin) for margin in self.margins):
            return float("-inf")
        spread = statistics.stdev(self.margins) if len(self.margins) > 1 else 0.0
        mean = statistics.mean(self.margins)
        return mean / spread if spread else (float("inf") if mean >= 0 else float("-inf"))


def asserted() -> dict[str, set[str]]:
    """For each notebook the sources of the comparisons that it asserts now."""
    paths = (ROOT / "notebooks").glob("[0-9]*.ipynb")
    return {path.stem: set(instrumented(nbformat.read(path, as_version=4))[1].values()) for path in paths}


def claims(folder: Path = RESULTS, current: dict[str, set[str]] | None = None) -> list[Claim]:
    """Everything that was kept, merged: a comparison is known by its notebook and source. Those not in `current` are left out, if given."""
    found: dict[tuple[str, str], list] = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        closest: dict[str, dict] = {}  # where one run makes the same comparison in several places
        for row in result["margins"]:
            if row["text"] not in closest or row["margin"] < closest[row["text"]]["margin"]:
                closest[row["text"]] = row
        for text, row in closest.items():
            if current is not None and text not in current.get(result["notebook"], ()):
                continue  # of an earlier version of the notebook
            found.setdefault((result["notebook"], text), []).append(row)
    return [
        Claim(
            notebook,
            rows[-1]["cell"],
            text,
            [row["margin"] for row in rows],
            (statistics.mean(row["left"] for row in rows), statistics.mean(row["right"] for row in rows)),
        )
        for (notebook, text), rows in found.items()
    ]


def table(args) -> int:
    """Print the claims, the closest to their threshold first; exit code 1 where one is no claim."""
    found = sorted(claims(current=asserted()), key=lambda claim: claim.deviations)
    print("| notebook | assertion | runs | left | right | smallest margin | deviations |\n|---|---|---:|---:|---:|---:|---:|")
    for claim in found:
        if claim.deviations <= args.under:
            text = claim.text.replace("|", "\\|")
            left, right = claim.sides
            number = f"{claim.deviations:.1f}" if abs(claim.deviations) < 1e6 else "-"
            row = (claim.notebook[:2], f"`{text}`", len(claim.margins), f"{left:.4g}", f"{right:.4g}", f"{min(claim.margins):.3g}", number)
            print("| " + " | ".join(map(str, row)) + " |")
    weak = [claim for claim in found if claim.deviations < DEVIATIONS]
    print(f"\n{len(found)} comparisons, {len(weak)} under {DEVIATIONS} standard deviations")
    return int(bool(weak))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.margins", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="run instrumented notebooks and keep what was found")
    runner.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    runner.add_argument("--capabilities", nargs="+", choices=CAPABILITIES, default=["native", "avx2"])
    runner.add_argument("--notebooks", nargs="+", choices=NOTEBOOKS, default=NOTEBOOKS, metavar="NN")
    runner.add_argument("--work", type=Path, help="folder for the runs' checkpoints, to go on after an interruption")
    runner.add_argument("--again", action="store_true", help="also what is kept already")
    runner.set_defaults(function=run)
    shower = commands.add_parser("table", help="the table of all that was kept")
    shower.add_argument("--under", type=float, default=float("inf"), help="only claims of fewer standard deviations")
    shower.set_defaults(function=table)
    args = parser.parse_args()
    return args.function(args)


if __name__ == "__main__":
    sys.exit(main())
