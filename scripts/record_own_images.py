"""Make the trainings that notebook 08 shows as recorded, by the notebook itself.

    python scripts/record_own_images.py 0    # seeds; some 29 minutes of one core each

Writes wejepa/assets/own_images.json and prints its SHA-256 for wejepa/data/embedded.py. What is in outputs/own_images/trained_SEED.json
already is not made again.
"""

import hashlib
import json
import sys
from pathlib import Path

import papermill
import torch

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "wejepa" / "assets" / "own_images.json"


def main(seeds: list[int]) -> None:
    results = []
    for seed in seeds:
        result = ROOT / "outputs" / "own_images" / f"trained_{seed}.json"
        if not result.exists():
            notebook, folder = ROOT / "notebooks" / "08_your_own_images.ipynb", f"../outputs/own_images/seed_{seed}"
            executed = ROOT / "outputs" / "own_images" / f"08_{seed}.ipynb"
            executed.parent.mkdir(parents=True, exist_ok=True)
            papermill.execute_notebook(
                notebook,
                executed,
                parameters={"train": True, "seed": seed, "output_dir": folder},
                cwd=notebook.parent,
                progress_bar=False,
            )
            (notebook.parent / folder / result.name).rename(result)
        results.append(json.loads(result.read_text()))
    made = f"seed {', '.join(map(str, seeds))}, by scripts/record_own_images.py, PyTorch {torch.__version__.partition('+')[0]}, CPU"
    FILE.write_text(json.dumps({"made": made, "seeds": results}, separators=(",", ":")) + "\n")
    print(f"{FILE.name}: {FILE.stat().st_size:,} bytes, SHA-256 {hashlib.sha256(FILE.read_bytes()).hexdigest()}")


if __name__ == "__main__":
    main([int(text) for text in sys.argv[1:]] or [0])
