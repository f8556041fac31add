"""Run what depends on numbers as other machines would: other processors, numbers of threads, precisions and versions of torch.

    python -m benchmarks.portable                # the table; `make portable` does the same
    python -m benchmarks.portable --shortest     # one row and the tests alone: continuous integration's part

Each row runs the tests that compute, and all notebooks on FakeData. The rows are chosen so that every two values of different columns meet
in some row. The oldest torch is the one that pyproject.toml allows; it gets an environment of its own, `.venv-oldest`, made on first use.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
import tomllib
import venv
from dataclasses import dataclass
from pathlib import Path

from benchmarks.processors import CAPABILITIES

ROOT = Path(__file__).resolve().parent.parent
OLDEST = ROOT / ".venv-oldest"
# The tests of what computes; the others are of words, files, processes and packaging.
COMPUTING = (
    "attention", "backbones", "checkpoints", "crops", "data", "devices", "ema", "features", "finetune", "interop", "masking", "model",
    "patches", "pretrain", "resume", "schedules", "widgets",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One machine to imitate.

    Attributes:
        capability: a key of `benchmarks.processors.CAPABILITIES`.
        threads: PyTorch's threads in each test process and kernel.
        mixed: whether bfloat16 may be used where the processor has it.
        torch: "newest", the one that is installed, or "oldest".
    """

    capability: str
    threads: int
    mixed: bool
    torch: str


ROWS = (
    Row("default", 1, False, "oldest"),
    Row("default", 2, True, "newest"),
    Row("avx2", 1, True, "newest"),
    Row("avx2", 2, False, "oldest"),
    Row("native", 1, True, "oldest"),
    Row("native", 2, False, "newest"),
)
SHORTEST = Row("default", 1, False, "newest")


def oldest_python() -> Path:
    """The interpreter of an environment with the oldest versions of torch and torchvision that pyproject.toml allows."""
    python = OLDEST / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not (OLDEST / ".installed").exists():
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        lowest = [re.sub(r">=([\d.]+).*", r"==\1.*", need) for need in project["dependencies"] if re.match(r"torch(vision)?>=", need)]
        pins = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not re.match(r"torch(vision)?==", line)]
        venv.create(OLDEST, with_pip=True)
        constraints = OLDEST / "constraints.txt"
        constraints.write_text("\n".join(pins) + "\n")
        print(f"installing {' and '.join(lowest)} into {OLDEST.name}: several minutes ...", flush=True)
        command = [python, "-m", "pip", "install", "-q", "-c", constraints, *lowest, "-e", f"{ROOT}[notebooks,test]"]
        subprocess.run(command, check=True)
        (OLDEST / ".installed").touch()
    return python


def run(row: Row, notebooks: bool) -> tuple[dict[str, int], list[str], float]:
    """Run a row: how many tests passed, failed and were skipped; what failed; and the minutes."""
    python = oldest_python() if row.torch == "oldest" else Path(sys.executable)
    tests = [path for name in COMPUTING if (path := ROOT / "tests" / f"test_{name}.py").exists()]
    extra = ["--nbmake", ROOT / "notebooks"] if notebooks else []
    command = [python, "-m", "pytest", "-n", "2", "-p", "no:cacheprovider", "-m", "not slow", *tests, *extra]
    environment = {"OMP_NUM_THREADS": str(row.threads), "WEJEPA_MIXED_PRECISION": str(int(row.mixed)), "GOMP_SPINCOUNT": "1000"}
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=os.environ | CAPABILITIES[row.capability] | environment, capture_output=True, text=True)
    last = done.stdout.rstrip().rpartition("\n")[2]
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|errors?|skipped)", last)}
    failed = [line for line in done.stdout.splitlines() if re.match(r"(FAILED|ERROR) ", line)]
    if done.returncode and not failed:
        failed = [f"pytest ended with exit code {done.returncode}: {last} {done.stderr[-500:]}"]
    return counts, failed, (time.perf_counter() - start) / 60


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.portable", description=__doc__.splitlines()[0])
    parser.add_argument("--shortest", action="store_true", help="one row, and the tests alone")
    args = parser.parse_args()
    rows = [SHORTEST] if args.shortest else ROWS
    problems = []
    print("| processor | threads | mixed precision | torch | passed | skipped | failed | minutes |\n|---|---:|---|---|---:|---:|---:|---:|")
    for row in rows:
        counts, failed, minutes = run(row, notebooks=not args.shortest)
        cells = (row.capability, row.threads, "on" if row.mixed else "off", row.torch, counts.get("passed", 0), counts.get("skipped", 0))
        print("| " + " | ".join(map(str, cells)) + f" | {len(failed)} | {minutes:.1f} |", flush=True)
        problems += [f"{row}: {line}" for line in failed]
    print("\n".join(["", *problems]) if problems else "\nall passed")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
