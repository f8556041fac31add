"""A run with worker processes loses nothing, whoever is sent which signal: it is resumed to the weights that it would have had."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image
from ranks import STEPS, tiny_config

from benchmarks import faults
from wejepa.config import IJepaConfig
from wejepa.train.checkpoints import load_checkpoint
from wejepa.train.pretrain import launch_pretraining

HERE = Path(__file__).parent
SCRIPT = str(HERE / "stopping.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "PYTHONPATH": str(HERE.parent)}

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "killpg"), reason="process groups are POSIX's")]


def config(folder: Path, output: Path, workers: int = 0) -> IJepaConfig:
    """Twenty steps, in two epochs, on the files of a folder."""
    cfg = tiny_config(output)
    cfg.data.use_fake_data, cfg.data.dataset, cfg.data.root, cfg.data.num_workers = False, "imagefolder", str(folder), workers
    cfg.hardware.checkpoint_minutes, cfg.hardware.checkpoint_every = 0.0, 100  # no checkpoint but the one that a stop writes
    return cfg


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(STEPS // 2 * 8):
        path = root / "train" / f"class {number % 2}" / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    return root


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory) -> dict:
    return load_checkpoint(launch_pretraining(config(folder, tmp_path_factory.mktemp("undisturbed"))).checkpoint)


class Started:
    """A run in a process group of its own, some steps into its training; or just when its first worker is being started."""

    def __init__(self, folder: Path, output: Path, method: str, launcher=(sys.executable,), starting: bool = False):
        file = output.with_suffix(".json")
        file.write_text(json.dumps(config(folder, output, workers=1).to_dict()))
        command = [*launcher, SCRIPT, method, "0.1", "--config", str(file)]
        self.process = subprocess.Popen(
            command,
            env=ENVIRONMENT,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # as in a terminal; a shell's background job ignores it
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.output, self.seen = output, set()
        self.workers = self._wait_for(is_being_started if starting else is_worker, launcher)
        time.sleep(0 if starting else 0.5)

    def _wait_for(self, kind, launcher) -> list[psutil.Process]:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and self.process.poll() is None:
            if len(found := [p for p in self.everyone() if kind(p)]) == 1 + (launcher is TORCHRUN):
                return found
            time.sleep(0.02)
        raise AssertionError(self.process.communicate()[0])

    def everyone(self) -> set[psutil.Process]:
        """It and all that it has started, in their own turn too, and torchrun's in groups of their own."""
        with contextlib.suppress(psutil.Error):
            root = psutil.Process(self.process.pid)
            self.seen |= {root, *root.children(recursive=True)}
        return self.seen

    def end(self) -> tuple[int, str]:
        """The exit code and what was printed, when all of them are gone."""
        self.everyone()
        text, _ = self.process.communicate(timeout=60)
        _, rest = psutil.wait_procs(self.seen, timeout=15)
        assert not [p for p in rest if p.status() != psutil.STATUS_ZOMBIE], text
        return self.process.returncode, text


def is_worker(process: psutil.Process) -> bool:
    """PyTorch names the thread that decodes."""
    try:
        return Path(f"/proc/{process.pid}/comm").read_text().startswith("pt_data_worker")
    except OSError:
        return False


def is_being_started(process: psutil.Process) -> bool:
    """A process that multiprocessing spawns and that has yet to import torch."""
    try:
        return "spawn_main" in " ".join(process.cmdline())
    except psutil.Error:
        return False


def assert_resumes(started: Started, folder: Path, undisturbed: dict) -> None:
    """From a checkpoint somewhere in the run, to the weights, moments and losses of the run that nothing disturbed."""
    step = load_checkpoint(started.output / "latest.pt")["step"]
    assert 0 < step < STEPS
    state = load_checkpoint(launch_pretraining(config(folder, started.output), resume="auto").checkpoint)
    for part in ("model", "moments", "step", "losses"):
        assert faults.same(state[part], undisturbed[part]), part
    assert [entry["loss"] for entry in state["history"]] == [entry["loss"] for entry in undisturbed["history"]]
    assert [entry["rankme"] for entry in state["history"]] == [entry["rankme"] for entry in undisturbed["history"]]


@pytest.mark.parametrize(("method", "starting"), [("fork", False), ("forkserver", False), ("spawn", True)])
def test_sigterm_to_the_group_loses_nothing(folder, undisturbed, tmp_path, method, starting):
    started = Started(folder, tmp_path / "run", method, starting=starting)
    os.killpg(started.process.pid, signal.SIGTERM)
    code, text = started.end()
    assert code == 143 and "interrupted: SIGTERM after step" in text and "Traceback" not in text, text
    assert_resumes(started, folder, undisturbed)


def test_sigint_to_the_group_loses_nothing(folder, undisturbed, tmp_path):
    started = Started(folder, tmp_path / "run", "fork")
    os.killpg(started.process.pid, signal.SIGINT)
    code, text = started.end()
    assert code == 130 and "Traceback" not in text, text
    assert_resumes(started, folder, undisturbed)


@pytest.mark.skipif(shutil.which("timeout") is None, reason="no timeout(1)")
def test_timeout_loses_nothing(folder, undisturbed, tmp_path):
    """It signals its child and then the group, so the trainer twice: as when the time is up, here when it is itself told to end."""
    launcher = ("timeout", "-s", "TERM", "--preserve-status", "100", sys.executable)
    started = Started(folder, tmp_path / "run", "fork", launcher)
    started.process.terminate()
    code, text = started.end()
    assert code == 143 and "interrupted: SIGTERM after step" in text, text
    assert_resumes(started, folder, undisturbed)


def run_to_the_end(*arguments: str) -> None:
    command = [*TORCHRUN, SCRIPT, "fork", "0", *arguments]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


def test_sigterm_to_torchrun_and_all_that_it_started_loses_nothing(folder, tmp_path):
    """The trainers are signalled twice here too. Two processes add up gradients in another order than one: theirs is the run to equal."""
    started = Started(folder, tmp_path / "run", "fork", TORCHRUN)
    for process in started.everyone():
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, text = started.end()  # torchrun's own exit code tells only that it was signalled
    assert all(f"rank {rank} ends with 143" in text for rank in range(2)), text
    assert 0 < load_checkpoint(started.output / "latest.pt")["step"] < STEPS
    run_to_the_end("--config", str(tmp_path / "run.json"), "--resume", "auto")
    run_to_the_end("--config", str(tmp_path / "run.json"), "--set", f"hardware.output_dir={tmp_path / 'whole'}")
    states = [load_checkpoint(tmp_path / name / "latest.pt") for name in ("run", "whole")]
    for part in ("model", "moments", "step", "losses"):
        assert faults.same(states[0][part], states[1][part]), part


def test_a_worker_that_is_killed_ends_the_run_with_a_checkpoint(folder, undisturbed, tmp_path):
    started = Started(folder, tmp_path / "run", "fork")
    started.workers[0].kill()
    code, text = started.end()
    last = text.strip().splitlines()[-2]
    assert code == 2 and last.startswith("RunStopped: a process that decodes images died") and "go on with resume='auto'" in last, text
    assert "Traceback" not in text
    assert_resumes(started, folder, undisturbed)


def test_a_worker_that_is_killed_ends_all_processes_of_the_run(folder, tmp_path):
    started = Started(folder, tmp_path / "run", "fork", TORCHRUN)
    started.workers[-1].kill()
    _, text = started.end()
    assert all(f"rank {rank} ends with 2" in text for rank in range(2)), text
    assert text.count("RunStopped: a process that decodes images died") == 2, text
    step = load_checkpoint(started.output / "latest.pt")["step"]
    assert 0 < step < STEPS and f"holds step {step}: go on" in text


def test_a_trainer_that_is_killed_leaves_no_workers_behind(folder, tmp_path):
    started = Started(folder, tmp_path / "run", "fork")
    started.process.kill()
    assert started.end()[0] == -signal.SIGKILL


def test_workers_end_with_the_process_that_started_them(folder, tmp_path):
    """Also where the source lives to the end of the program, as in a notebook."""
    (tmp_path / "run.json").write_text(json.dumps(config(folder, tmp_path / "run", workers=1).to_dict()))
    code = f"""
import json
from wejepa.config import IJepaConfig
from wejepa.data import load_images
source = load_images(IJepaConfig.from_dict(json.load(open({str(tmp_path / "run.json")!r}))))
next(source.batches(source.labels[:8], 4))
print(len(__import__("multiprocessing").active_children()))
"""
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, "1"), done.stderr
