"""Kill runs with SIGKILL at random moments, resume each, and compare its final weights with those of a run that was left alone.

    python -m benchmarks.faults --kills 20

A checkpoint is written after every step, so that many of the kills fall into the writing of one.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from wejepa.config import DataConfig, HardwareConfig, IJepaConfig, MaskConfig, ModelConfig, OptimizerConfig
from wejepa.errors import CheckpointError
from wejepa.train.checkpoints import load_checkpoint
from wejepa.train.folder import CheckpointFolder
from wejepa.train.pretrain import launch_pretraining

EPOCHS, STEPS = 3, 60


@dataclass(frozen=True)
class Fault:
    """What one kill met and what came of it.

    Attributes:
        writing: a checkpoint was being written.
        step: the newest readable checkpoint's, 0 if there was none.
        latest_readable: latest.pt was readable, or not there yet.
        identical: the resumed run's final weights and losses equal the undisturbed run's to the bit.
    """

    writing: bool
    step: int
    latest_readable: bool
    identical: bool


def small_config(output: Path) -> IJepaConfig:
    """Three epochs of twenty steps, each with a checkpoint."""
    return IJepaConfig(
        data=DataConfig(use_fake_data=True, fake_data_size=8 * STEPS // EPOCHS, train_batch_size=8),
        mask=MaskConfig(num_target_blocks=2),
        model=ModelConfig(img_size=16, patch_size=4, embed_dim=32, enc_depth=2, pred_depth=1, pred_dim=32, num_heads=2),
        optimizer=OptimizerConfig(epochs=EPOCHS, warmup_epochs=0.5),
        hardware=HardwareConfig(device="cpu", checkpoint_minutes=1e-9, output_dir=str(output)),
    )


def train(values: dict) -> None:
    """What each killed process does."""
    torch.set_num_threads(1)
    with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        launch_pretraining(IJepaConfig.from_dict(values), resume="auto")


def inject(kills: int, seed: int, folder: Path) -> list[Fault]:
    """Kill as many runs as `kills` says, once each, somewhere in a step drawn from all of them, and resume them to the end."""
    os.environ |= {"TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore::UserWarning:multiprocessing.resource_tracker"}  # killed, they leak locks
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["wejepa.train.loop"])  # torch is imported once, not in every process

    def run(name: str, until: int = STEPS, delay: float | None = None) -> None:
        """Train to the end; or until the checkpoint of a step is there, and so many seconds more, and then no further."""
        process = context.Process(target=train, args=(small_config(folder / name).to_dict(),))
        process.start()
        if delay is None:
            process.join()
            if process.exitcode:
                raise RuntimeError(f"the run {name} ended with exit code {process.exitcode}")
            return
        while process.is_alive() and not (folder / name / f"step_{until:08d}.pt").exists():
            pass  # sleeping would miss the moment
        time.sleep(delay)
        process.kill()
        process.join()

    run("undisturbed")
    expected = outcome(folder / "undisturbed")
    a_step = load_checkpoint(folder / "undisturbed" / "latest.pt")["history"][-1]["seconds"] / (STEPS / EPOCHS)
    rng, faults = random.Random(seed), []
    for number in range(kills):
        name = f"killed-{number}"
        run(name, until=rng.randint(1, STEPS - 1), delay=rng.uniform(0, a_step))
        writing = any((folder / name).glob(".*.tmp"))
        step, readable = newest(folder / name)
        run(name)
        faults.append(Fault(writing, step, readable, same(outcome(folder / name), expected)))
    return faults


def outcome(folder: Path) -> dict:
    """What must not depend on the kill."""
    state = load_checkpoint(folder / "latest.pt")
    return {"model": state["model"], "moments": state["moments"], "step": state["step"], "losses": [e["loss"] for e in state["history"]]}


def newest(folder: Path) -> tuple[int, bool]:
    """The newest readable checkpoint's step, and whether latest.pt can be read where it is there."""
    readable = {}
    for path in [*CheckpointFolder(folder).newest_first(), folder / "latest.pt"]:
        if path.exists():
            try:
                readable[path.name] = load_checkpoint(path)["step"]
            except CheckpointError:
                readable[path.name] = -1
    return max(readable.values(), default=0), readable.get("latest.pt", 0) >= 0


def same(one, other) -> bool:
    """Equality to the bit of nested dicts, lists, numbers and tensors."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def main() -> int:
    """The command line; exit code 1 if any run came out different."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description="Kill runs, resume them, compare.")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        faults = inject(args.kills, args.seed, Path(folder))
    print("| killed while writing | newest step | latest.pt readable | final weights identical |\n|---|---:|---|---|")
    words = {True: "yes", False: "no"}
    for fault in faults:
        cells = (words[fault.writing], fault.step, words[fault.latest_readable], words[fault.identical])
        print("| " + " | ".join(map(str, cells)) + " |")
    good = sum(fault.identical and fault.latest_readable for fault in faults)
    print(f"\n{good} of {len(faults)} identical; {sum(fault.writing for fault in faults)} killed while writing")
    return int(good != len(faults))


if __name__ == "__main__":
    sys.exit(main())
