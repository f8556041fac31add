"""Let ten kinds of faults befall runs, resume each run, and compare its end with that of a run that nothing disturbed.

    python -m benchmarks.faults --faults 300

The runs are on one process and on two, without and with a process that decodes images. The faults are real ones: signals, a file system
without room, a folder without permission. Linux only; where no file system may be mounted, the one without room is left out, and said so.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import torch
from PIL import Image
from tqdm import tqdm

from wejepa.config import DataConfig, HardwareConfig, IJepaConfig, MaskConfig, ModelConfig, OptimizerConfig
from wejepa.train.checkpoints import load_checkpoint
from wejepa.train.folder import CheckpointFolder
from wejepa.train.loop import Pretraining
from wejepa.train.pretrain import main as pretrain

EPOCHS, STEPS = 3, 12  # with a checkpoint at the end of each epoch
A_STEP = 0.03  # seconds; with what comes at an epoch's end
PATIENCE = 120  # seconds
DONE, REFUSED, TERMINATED, KILLED, HUNG = 0, 2, 128 + signal.SIGTERM, -signal.SIGKILL, None  # exit codes
ROOM = "16m"  # of the file system that is filled
CONTEXT = multiprocessing.get_context("forkserver")
# Imported once, not in every process. PyTorch's first optimizer imports torch._dynamo, which takes longer than a run.
CONTEXT.set_forkserver_preload(["wejepa.train.loop", "torch._dynamo", "PIL.PngImagePlugin", "tqdm.auto", "psutil"])


class Cell(NamedTuple):
    """How many processes train, and how many decode images for each of them."""

    processes: int
    workers: int


CELLS = [Cell(processes, workers) for processes in (1, 2) for workers in (0, 1)]


def small_config(output: Path, images: Path, workers: int) -> IJepaConfig:
    """Three epochs of four steps."""
    return IJepaConfig(
        data=DataConfig(dataset="imagefolder", root=str(images), num_workers=workers, train_batch_size=8),
        mask=MaskConfig(num_target_blocks=2),
        model=ModelConfig(img_size=16, patch_size=4, embed_dim=32, enc_depth=2, pred_depth=1, pred_dim=32, num_heads=2),
        optimizer=OptimizerConfig(epochs=EPOCHS, warmup_epochs=0.5),
        hardware=HardwareConfig(device="cpu", checkpoint_every=1, checkpoint_minutes=0.0, output_dir=str(output)),
    )


def write_images(folder: Path) -> None:
    """As many as an epoch takes."""
    numbers = np.random.default_rng(0)
    for number in range(8 * STEPS // EPOCHS):
        path = folder / "train" / f"class {number % 2}" / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(numbers.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)


# ---------------------------------------------------------------- a run in processes of its own


class Run:
    """A run that goes on from what is in its folder.

    Args:
        folder: the run's output folder; outside of the folder that it is in, steps are counted and what is printed is kept.
        held_at: wait until this step is made. The run makes one more, and waits in its turn until `end` is called.
        name: tells the files from another run's.
    """

    def __init__(self, folder: Path, cell: Cell, images: Path, held_at: int | None = None, name: str = "run"):
        self.folder, self.cell, self.images = folder, cell, images
        self.config = folder.parent.with_name(f"{name}.json")
        self.steps, self.printed, self.go_on = (self.config.with_suffix(ending) for ending in (".steps", ".txt", ".go"))
        self.config.write_text(json.dumps(small_config(folder, images, cell.workers).to_dict()))
        self.go_on.unlink(missing_ok=True)
        self._told, theirs = CONTEXT.Pipe(duplex=False)
        CONTEXT.Process(target=launch, args=(self.config, cell.processes, held_at, theirs)).start()
        theirs.close()
        self.group, self.processes = self._told.recv()
        if held_at is not None and not (happened(lambda: held_at in self.made() or self._told.poll()) and held_at in self.made()):
            raise RuntimeError(f"the run in {folder} has not come to step {held_at}: {self.printed.read_text()}")

    def made(self) -> list[int]:
        """The steps that were made, also by runs of this name before; those that were made again as often as they were."""
        return [int(line) for line in self.steps.read_text().splitlines()] if self.steps.exists() else []

    def workers(self) -> list[int]:
        """The processes that decode images."""
        return [child.pid for process in self.processes for child in psutil.Process(process).children()]

    def end(self) -> list[int]:
        """The exit codes of its processes, once all have ended; processes that do not end are killed."""
        self.go_on.touch()
        if happened(self._told.poll):
            return self._told.recv()
        os.killpg(self.group, signal.SIGKILL)
        return [HUNG]


def happened(what: Callable[[], bool]) -> bool:
    """Wait until it has; False if it takes too long."""
    deadline = time.monotonic() + PATIENCE
    while not what() and time.monotonic() < deadline:
        time.sleep(0.0005)
    return what()


def launch(config: Path, processes: int, held_at: int | None, tell) -> None:
    """What a cluster's launcher does: start the processes, in a group of their own, wait, and tell their exit codes."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it has something to tell at the end
    obey_permissions()
    printed = os.open(config.with_suffix(".txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    with socket.socket() as some:
        some.bind(("127.0.0.1", 0))
        port = some.getsockname()[1]
    started = []
    for rank in range(processes):
        started.append(os.fork())
        if not started[-1]:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            if processes > 1:
                os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            os._exit(train(config, rank, held_at))
    tell.send((os.getpid(), started))
    tell.send([os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in started])


def obey_permissions() -> None:
    """Let a folder's permissions hold for root as well: the system call capset takes CAP_DAC_OVERRIDE away."""
    system, header, capabilities = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    system.capget(header, capabilities)
    capabilities[0] &= ~2
    system.capset(header, capabilities)


def train(config: Path, rank: int, held_at: int | None) -> int:
    """What each process does: the command line; the first one also counts the steps."""
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # for those that decode: any other imports torch in each of them
    os.environ["TQDM_DISABLE"] = "1"
    if rank == 0:
        count, step = os.open(config.with_suffix(".steps"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), Pretraining.train_step

        def counted(run: Pretraining, images: torch.Tensor) -> torch.Tensor:
            if held_at is not None and run.step == held_at + 1:
                happened(config.with_suffix(".go").exists)
            loss = step(run, images)
            os.write(count, f"{run.step}\n".encode())
            return loss

        Pretraining.train_step = counted
    try:
        return pretrain(["--config", str(config), "--resume", "auto"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


# ---------------------------------------------------------------- what may befall it


class Missed(Exception):
    """The moment was over before the fault came."""


def kill(run: Run) -> None:
    for process in run.processes:
        os.kill(process, signal.SIGKILL)


def terminate_group(run: Run) -> None:
    os.killpg(run.group, signal.SIGTERM)


def kill_a_worker(run: Run) -> None:
    os.kill(random.choice(run.workers()), signal.SIGKILL)


def kill_a_rank(run: Run) -> None:
    os.kill(random.choice(run.processes), signal.SIGKILL)


def fill_disk(run: Run) -> None:
    with contextlib.suppress(OSError), open(run.folder.parent / "filler", "wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))


def empty_disk(run: Run) -> None:
    (run.folder.parent / "filler").unlink()


def make_read_only(run: Run) -> None:
    run.folder.chmod(0o555)


def make_writable(run: Run) -> None:
    run.folder.chmod(0o755)


def truncate_newest(run: Run) -> None:
    newest = CheckpointFolder(run.folder).newest_first()[0]
    os.truncate(newest, random.randrange(newest.stat().st_size))


def flip_a_bit(run: Run) -> None:
    newest = CheckpointFolder(run.folder).newest_first()[0]
    with open(newest, "r+b") as file:
        file.seek(random.randrange(newest.stat().st_size))
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1 << random.randrange(8)]))


def start_a_second(run: Run) -> str | None:
    codes = Run(run.folder, run.cell, run.images, name="second").end()
    return None if set(codes) == {REFUSED} else f"the second run ended with {codes}"


def kill_while_writing(run: Run) -> None:
    written = run.folder / f"step_{max(run.made()) + 1:08d}.pt"
    happened(lambda: any(run.folder.glob(".step_*.tmp")) or written.exists())
    kill(run)


def see_that_it_was_writing(run: Run) -> None:
    if not any(run.folder.glob(".step_*.tmp")):
        raise Missed


def nothing(run: Run) -> None:
    pass


@dataclass(frozen=True)
class Kind:
    """A kind of fault.

    Attributes:
        name: in words.
        befall: lets it befall a run; returns what went wrong with that, if anything did.
        codes: the exit codes that the run's processes must end with then.
        again: the most steps that may have to be made again.
        afterwards: what is done before the run is resumed.
        after_steps: the fault comes in the step after one of these.
        somewhere: at any moment of that step and what follows it, not right at its beginning.
        cells: the runs it can befall.
        small_disk: the run's folder is on a file system with little room.
    """

    name: str
    befall: Callable[[Run], str | None]
    codes: set[int]
    again: int
    afterwards: Callable[[Run], None] = nothing
    after_steps: Sequence[int] = range(1, 9)
    somewhere: bool = True
    cells: Sequence[Cell] = tuple(CELLS)
    small_disk: bool = False


AN_EPOCH, LATE, BEFORE_A_CHECKPOINT = STEPS // EPOCHS, (9, 10), (3, 7)
WITH_WORKERS, OF_TWO = [cell for cell in CELLS if cell.workers], [cell for cell in CELLS if cell.processes == 2]
BEFORE_TWO_CHECKPOINTS = range(1, 7)  # the third one makes room for itself: the first one goes before it is written
KINDS = [
    Kind("SIGKILL of the run", kill, {KILLED}, AN_EPOCH),
    Kind("SIGTERM to the process group", terminate_group, {TERMINATED}, 0),
    Kind("a process that decodes killed", kill_a_worker, {REFUSED}, 0, cells=WITH_WORKERS),
    Kind("one of two ranks killed", kill_a_rank, {KILLED, REFUSED}, AN_EPOCH, cells=OF_TWO),
    Kind("the disk full", fill_disk, {REFUSED}, AN_EPOCH, empty_disk, BEFORE_TWO_CHECKPOINTS, small_disk=True),
    Kind("the folder made read-only", make_read_only, {REFUSED}, AN_EPOCH, make_writable),
    Kind("the newest checkpoint truncated", kill, {KILLED}, 2 * AN_EPOCH, truncate_newest, LATE),
    Kind("one bit of it flipped", kill, {KILLED}, 2 * AN_EPOCH, flip_a_bit, LATE),
    Kind("a second run started", start_a_second, {DONE}, 0),
    Kind(
        "killed while a checkpoint is written", kill_while_writing, {KILLED}, AN_EPOCH, see_that_it_was_writing, BEFORE_A_CHECKPOINT, False
    ),
]


# ---------------------------------------------------------------- all of them


@dataclass(frozen=True)
class Fault:
    """What came of one fault.

    Attributes:
        again: how many steps were made again.
        lost: the run could not be resumed to its end.
        identical: the resumed run's last state equals the undisturbed run's to the bit.
        wrong: what else was not as it should be, or None.
    """

    kind: Kind
    cell: Cell
    again: int
    lost: bool
    identical: bool
    wrong: str | None


def inject(count: int, seed: int = 0, kinds: Sequence[Kind] = tuple(KINDS)) -> Iterator[Fault]:
    """As many faults as `count` says, of the kinds in turn, and of the runs that each can befall in turn as well."""
    random.seed(seed)
    undisturbed: dict[Cell, dict] = {}
    with tempfile.TemporaryDirectory() as images:
        write_images(Path(images))
        for number in range(count):
            kind = kinds[number % len(kinds)]
            cell = kind.cells[(number // len(kinds) + number) % len(kind.cells)]
            if cell not in undisturbed:
                with place() as folder:
                    Run(folder, cell, Path(images)).end()
                    undisturbed[cell] = outcome(folder)
            fault = None
            while fault is None:
                with contextlib.suppress(Missed), place(kind.small_disk) as folder:
                    fault = resumed(kind, cell, folder, Path(images), undisturbed[cell])
            yield fault


def resumed(kind: Kind, cell: Cell, folder: Path, images: Path, undisturbed: dict) -> Fault:
    """Let a fault befall a run, resume it, and compare."""
    run = Run(folder, cell, images, held_at=random.choice(kind.after_steps))
    time.sleep(random.uniform(0, A_STEP) if kind.somewhere else 0)
    wrong = kind.befall(run)
    if set(codes := run.end()) != kind.codes:
        wrong = f"the run ended with {codes}"
    kind.afterwards(run)
    run = Run(folder, cell, images)
    codes, made = run.end(), run.made()
    lost = set(codes) != {DONE} or set(made) != set(range(1, STEPS + 1))
    identical, again = not lost and same(outcome(folder), undisturbed), len(made) - len(set(made))
    if not identical:
        wrong = "it did not end as the undisturbed run"
    elif again > kind.again:
        wrong = wrong or f"{again} steps were made again"
    return Fault(kind, cell, again, lost, identical, f"{wrong}: {run.printed.read_text()}" if wrong else None)


@contextlib.contextmanager
def place(small_disk: bool = False) -> Iterator[Path]:
    """A folder for a run, not there yet; on a file system of its own with little room, if asked for."""
    with tempfile.TemporaryDirectory() as around:
        disk = Path(around, "disk")
        disk.mkdir()
        if small_disk:
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", disk], check=True, capture_output=True)
        try:
            yield disk / "run"
        finally:
            if small_disk:
                subprocess.run(["umount", "--lazy", disk], check=True)


def possible(kinds: Sequence[Kind] = tuple(KINDS)) -> list[Kind]:
    """The kinds without those that this system does not let one bring about."""
    try:
        with place(small_disk=True):
            return list(kinds)
    except (OSError, subprocess.CalledProcessError):
        return [kind for kind in kinds if not kind.small_disk]


def outcome(folder: Path) -> dict:
    """What must not depend on the fault."""
    state = load_checkpoint(folder / "latest.pt")
    measured = [{name: value for name, value in epoch.items() if "second" not in name} for epoch in state["history"]]
    return {part: state[part] for part in ("model", "moments", "step", "losses")} | {"history": measured}


def same(one, other) -> bool:
    """Equality of nested dicts, lists, numbers and tensors, to the last digit; what is no number equals what is none."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        alike = isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) and (one.shape, one.dtype) == (other.shape, other.dtype)
        return alike and bool(((one == other) | ((one != one) & (other != other))).all())
    return one == other or (one != one and other != other)


def table(faults: Sequence[Fault]) -> str:
    """A row for each kind and number of processes."""
    lines = ["| fault | processes | times | steps made again, mean | most | identical | lost |", "|---|---:|---:|---:|---:|---:|---:|"]
    for kind in dict.fromkeys(fault.kind.name for fault in faults):
        for processes in (1, 2):
            group = [fault for fault in faults if fault.kind.name == kind and fault.cell.processes == processes]
            if group:
                again = [fault.again for fault in group]
                ends = (sum(fault.identical for fault in group), sum(fault.lost for fault in group))
                cells = (kind, processes, len(group), f"{sum(again) / len(again):.1f}", max(again), *ends)
                lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> int:
    """The command line; exit code 1 if anything was lost, differed, or ended with another exit code than it should."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description="Let faults befall runs, resume them, compare.")
    parser.add_argument("--faults", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    kinds = possible()
    for kind in KINDS:
        if kind not in kinds:
            print(f"left out, as this system does not let one bring it about: {kind.name}")
    faults = list(tqdm(inject(args.faults, args.seed, kinds), total=args.faults, desc="faults"))
    print(table(faults))
    wrong = [fault for fault in faults if fault.wrong]
    for fault in wrong:
        print(f"\n{fault.kind.name}, {fault.cell}: {fault.wrong}")
    print(f"\n{sum(fault.identical for fault in faults)} of {len(faults)} identical, {sum(fault.lost for fault in faults)} lost")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
