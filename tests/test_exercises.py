"""An exercise's check tells a wrong solution from a right one: each folded solution is made wrong in one place, and its cell must fail.

A mutant is the solution with one sign flipped, one statement left out, one function emptied or the like; see `changes`. A mutant that
passes must be named in SURVIVORS, with the reason.
"""

import ast
import copy
import importlib.util
import inspect
import json
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from nbmake.nb_run import NotebookRun

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
spec = importlib.util.spec_from_file_location("notebooks_conftest", ROOT / "notebooks" / "conftest.py")
solving = importlib.util.module_from_spec(spec)
spec.loader.exec_module(solving)

# The mutants that pass: under their notebook and exercise, the line that is wrong and why it passes.
# "same": it gives the same answer, or as good a one. "weak": the exercise's check should be stricter.
SURVIVORS = {
    "00_quick_tour.hidden_too_late": {
        "return tokens.gather(1, context[..., None].expand(-1, -1, tokens.shape[1]))": "same: 64 tokens of width 64",
    },
    "01_patch_embedding.forget_places": {
        "return positions.mean(1, keepdim=False).expand_as(positions)": "same: the one image's mean, broadcast",
    },
    "04_linear_probing.nearest_centroid": {
        "middle, spread = (train_x.sum(0), train_x.std(0) + 1e-06)": "same: no shift changes a distance",
        "middle, spread = (train_x.mean(0), train_x.std(0) - 1e-06)": "same: the deviations are far from 0",
    },
    "08_your_own_images.whitened": {
        "u, _, _ = torch.linalg.svd(centred, full_matrices=True)": "same: the first k columns are those",
    },
}

OPERATORS = [
    (ast.Add, ast.Sub),
    (ast.Mult, ast.Div),
    (ast.Lt, ast.Gt),
    (ast.LtE, ast.GtE),
    (ast.Eq, ast.NotEq),
    (ast.Is, ast.IsNot),
    (ast.In, ast.NotIn),
    (ast.And, ast.Or),
]
NAMES = [
    ("max", "min"),
    ("amax", "amin"),
    ("argmax", "argmin"),
    ("maximum", "minimum"),
    ("any", "all"),
    ("mean", "sum"),
    ("var", "std"),
    ("sin", "cos"),
    ("exp", "log"),
    ("ones", "zeros"),
]
SWAPPED = {one: other for pair in OPERATORS + NAMES for one, other in (pair, pair[::-1])}
SWAPPED |= {ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult}
LEFT_OUT = {"abs", "clamp", "detach", "flip", "sort", "sqrt", "square", "t", "transpose"}  # methods; `x.abs()` becomes `x`


def changes(node: ast.AST) -> Iterator[ast.AST]:
    """What stands in the node's place to make the program wrong."""

    def swapped(operator: ast.AST) -> list[ast.AST]:
        return [SWAPPED[type(operator)]()] if type(operator) in SWAPPED else []

    match node:
        case ast.FunctionDef():
            yield changed(node, body=[ast.Return(ast.Constant(None))])
        case ast.BinOp(op=ast.MatMult()):
            yield changed(node, left=node.right, right=node.left)
        case ast.BinOp() | ast.AugAssign() | ast.BoolOp():
            yield from (changed(node, op=new) for new in swapped(node.op))
        case ast.Compare():
            for i, operator in enumerate(node.ops):
                yield from (changed(node, ops=[*node.ops[:i], new, *node.ops[i + 1 :]]) for new in swapped(operator))
        case ast.UnaryOp(op=ast.USub() | ast.Not()):
            yield node.operand
        case ast.IfExp():
            yield changed(node, body=node.orelse, orelse=node.body)
        case ast.Constant(value=bool()):
            yield ast.Constant(not node.value)
        case ast.Constant(value=int()) if node.value < 10:
            yield ast.Constant(node.value - 1 if node.value else 1)
        case ast.Slice() if node.lower or node.upper:
            yield changed(node, lower=node.upper, upper=node.lower)
        case ast.Name() if node.id in SWAPPED:
            yield changed(node, id=SWAPPED[node.id])
        case ast.Attribute() if node.attr in SWAPPED:
            yield changed(node, attr=SWAPPED[node.attr])
        case ast.Call(func=ast.Attribute(attr=name)) if name in LEFT_OUT:
            yield node.func.value
    if isinstance(node, ast.Expr | ast.Assign | ast.AugAssign | ast.For | ast.If) and not is_docstring(node):
        yield ast.Pass()


def changed(node: ast.AST, **fields) -> ast.AST:
    new = copy.copy(node)
    for name, value in fields.items():
        setattr(new, name, value)
    return new


def is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def slots(node: ast.AST) -> Iterator[tuple[ast.AST | list, str | int, ast.AST]]:
    """Each node below but type hints and `strict=`, after the place that holds it: an object's attribute, or a list's item."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns") or (isinstance(node, ast.keyword) and node.arg == "strict"):
            continue
        for holder, key, child in [(value, i, v) for i, v in enumerate(value)] if isinstance(value, list) else [(node, field, value)]:
            if isinstance(child, ast.AST):
                yield holder, key, child
                yield from slots(child)


def put(holder: ast.AST | list, key: str | int, node: ast.AST) -> None:
    if isinstance(holder, list):
        holder[key] = node
    else:
        setattr(holder, key, node)


def mutants(solution: str) -> dict[str, str]:
    """The solution made wrong in one place, for each such place, under the line that is wrong."""
    tree = ast.parse(solution)
    right = ast.unparse(tree).splitlines()
    found = {}
    for holder, key, node in list(slots(tree)):
        for wrong in changes(node):
            put(holder, key, wrong)
            program = ast.unparse(tree)
            if isinstance(wrong, ast.Pass):
                name = "without " + ast.unparse(node).splitlines()[0]
            elif isinstance(wrong, ast.FunctionDef):
                name = f"{wrong.name} emptied"
            else:
                name = next(new.strip() for old, new in zip(right, program.splitlines(), strict=True) if old != new)
            found[name] = program
        put(holder, key, node)
    return found


def run_all(programs: dict[str, str], file: str, names: dict) -> None:
    """In the notebook: runs each program with the names so far, and writes to the file how it failed, if it did."""
    import contextlib
    import io
    import json
    import signal
    import sys
    from pathlib import Path

    import torch

    def too_long(*_):
        raise TimeoutError

    outcomes = {}
    before = signal.signal(signal.SIGALRM, too_long)
    for name, program in programs.items():
        torch.manual_seed(0)
        signal.alarm(60)
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                exec(program, dict(names))
            outcomes[name] = None
        except Exception as error:
            outcomes[name] = repr(error)
        finally:
            signal.alarm(0)
        if "matplotlib.pyplot" in sys.modules:
            sys.modules["matplotlib.pyplot"].close("all")
    signal.signal(signal.SIGALRM, before)
    Path(file).write_text(json.dumps(outcomes))


def test_a_mutant_is_wrong_in_one_place():
    right = "def largest(x: int):\n    best = max(x, key=abs)\n    return best + 2 if best > 0 else -1"
    assert list(mutants(right)) == [
        "largest emptied",
        "without best = max(x, key=abs)",
        "best = min(x, key=abs)",
        "return -1 if best > 0 else best + 2",
        "return best + 2 if best < 0 else -1",
        "return best + 2 if best > 1 else -1",
        "return best - 2 if best > 0 else -1",
        "return best + 1 if best > 0 else -1",
        "return best + 2 if best > 0 else 1",
        "return best + 2 if best > 0 else -0",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_solution_wrong_in_one_place_fails(path, tmp_path, monkeypatch):
    tried = {}

    def trial(exercise: str, solution: str, check: str) -> str:
        right = f"{solution}\n\n{check}"
        programs = {"right": right}
        programs |= {name: f"{wrong}\n\n{check}" for name, wrong in mutants(solution).items()}
        programs |= {"right again": right}  # no mutant may spoil what later cells use
        name = next(name for statement in ast.parse(solution).body for name in solving.names_of(statement))
        tried[name] = tmp_path / f"{name}.json"
        return f"{inspect.getsource(run_all)}\n\nrun_all({programs!r}, {str(tried[name])!r}, globals())"

    notebook = nbformat.read(path, as_version=4)
    notebook.cells = solving.with_exercises_solved(notebook.cells, trial)
    written = tmp_path / "notebooks" / path.name
    written.parent.mkdir()
    nbformat.write(notebook, written)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    done = NotebookRun(written, 300).execute()
    assert done.error is None, done.error.trace

    passed, told = [], []
    for exercise, file in tried.items():
        outcomes = json.loads(file.read_text())
        for right in ("right", "right again"):
            assert outcomes.pop(right) is None, f"{exercise}: the solution fails"
        survivors = [name for name, error in outcomes.items() if error is None]
        named = SURVIVORS.get(f"{path.stem}.{exercise}", {})
        passed += [f"{exercise}: {name}" for name in survivors if name not in named]
        told += [f"{exercise}: {len(outcomes) - len(survivors)} of {len(outcomes)} mutants fail"]
        told += [f"  to leave out of SURVIVORS, since it does not pass: {name}" for name in named if name not in survivors]
    gone = [key for key in SURVIVORS if key.startswith(f"{path.stem}.") and key.removeprefix(f"{path.stem}.") not in tried]
    told += [f"to leave out of SURVIVORS, since there is no such exercise: {key}" for key in gone]
    print("\n".join(told))
    assert not passed, f"these mutants of {path.stem} pass:\n" + "\n".join(passed)
