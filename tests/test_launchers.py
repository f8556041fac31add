"""Processes that another launcher than torchrun starts make one run, or are refused by the name of the variable."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from ranks import tiny_config

from wejepa.errors import ConfigError
from wejepa.train.checkpoints import load_checkpoint
from wejepa.train.launchers import Launch, launched
from wejepa.train.loop import Pretraining

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}
OF_TWO = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
SRUN = {
    "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1", "SLURM_JOB_ID": "1234567", "SLURM_STEP_ID": "0",
}  # fmt: skip


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


# ---------------------------------------------------------------- what the variables say


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (OF_TWO, Launch(1, 2, 1, "node1", 29500, False)),
        ({k: v for k, v in OF_TWO.items() if k != "LOCAL_RANK"}, Launch(1, 2, None, "node1", 29500, False)),
        ({**OF_TWO, **SRUN, "TORCHELASTIC_RUN_ID": "a"}, Launch(1, 2, 1, "node1", 29500, True)),
        ({**OF_TWO, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "a"}, Launch(0, 1, 0, "node1", 29500, True)),
        (SRUN, Launch(3, 4, 1, "gpu07", 10_000 + 1234567 % 20_000, False)),
        ({**SRUN, "MASTER_PORT": "4000", "MASTER_ADDR": "here"}, Launch(3, 4, 1, "here", 4000, False)),
        ({**SRUN, "WORLD_SIZE": "4"}, Launch(3, 4, 1, "gpu07", 10_000 + 1234567 % 20_000, False)),
        # srun starts one process a node, and that one starts several
        ({**SRUN, **OF_TWO, "WORLD_SIZE": "8", "RANK": "7"}, Launch(7, 8, 1, "node1", 29500, False)),
        # alone
        ({}, None),
        ({"WORLD_SIZE": "1"}, None),
        ({"WORLD_SIZE": "1", "RANK": "0"}, None),
        ({"MASTER_ADDR": "here", "MASTER_PORT": "4000"}, None),
        ({**SRUN, "WORLD_SIZE": "1"}, None),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        # a plain sbatch script, and a salloc shell, of a job with four tasks
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_NODELIST": "gpu[07-08]"}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "gpu[07-08]"}, None),
    ],
)  # fmt: skip
def test_the_environment_tells_how_a_process_was_started(environment, expected):
    assert launched(environment) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": None}, "RANK is not set, but WORLD_SIZE = 2"),
        ({"WORLD_SIZE": None}, "WORLD_SIZE is not set, but RANK = 1"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not set"),
        ({"MASTER_PORT": " "}, "MASTER_PORT is not set"),
        ({"RANK": "2"}, "RANK = '2' is no whole number from 0 to 1, as WORLD_SIZE = 2"),
        ({"RANK": "-1"}, "RANK = '-1' is no whole number"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE = 'two' is no whole number from 1 up"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE = '0' is no whole number from 1 up"),
        ({"WORLD_SIZE": "1"}, "RANK = '1' is no whole number from 0 to 0"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK = '2' is no whole number from 0 to 1"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT = '70000' is no whole number from 1 to 65535"),
        ({**SRUN, "RANK": None}, "WORLD_SIZE = 2, but srun started SLURM_STEP_NUM_TASKS = 4"),
    ],
)
def test_variables_that_do_not_fit_together_are_refused_by_name(changes, message, tmp_path, monkeypatch):
    for name, value in {**OF_TWO, **changes}.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        Pretraining(tiny_config(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu7", "gpu7"), ("gpu[07-09,12],login1", "gpu07"), ("a,b[1-2]", "a"), ("r[0-1]n[3,5]-ib", "r0n3-ib"), ("tux[5]", "tux5")],
)
def test_the_first_node_of_slurms_short_form(nodes, first):
    assert launched({**SRUN, "SLURM_STEP_NODELIST": nodes}).address == first


def test_two_steps_of_a_job_meet_at_different_ports():
    first, second = (launched({**SRUN, "SLURM_STEP_ID": step}) for step in "01")
    assert first.port != second.port and replace(first, port=0) == replace(second, port=0)


# ---------------------------------------------------------------- two processes


def start(folder: Path, environment: dict[str, str], cfg=None, *arguments: str) -> subprocess.Popen:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps((cfg or tiny_config(folder / "run")).to_dict()))
    command = [sys.executable, "-m", "wejepa.train.pretrain", "--config", str(folder / "config.json"), *arguments]
    return subprocess.Popen(command, env=ENVIRONMENT | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def of_a_launcher(rank: int, port: str) -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def of_slurm(rank: int, port: str) -> dict[str, str]:
    return {**SRUN, "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_STEP_NODELIST": "localhost",
            "SLURM_JOB_ID": port}  # fmt: skip


@pytest.fixture(scope="module")
def by_torchrun(tmp_path_factory) -> dict:
    """The last checkpoint of torchrun's two processes."""
    folder = tmp_path_factory.mktemp("torchrun")
    (folder / "config.json").write_text(json.dumps(tiny_config(folder / "run").to_dict()))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "wejepa.train.pretrain"]
    subprocess.run([sys.executable, *command, "--config", folder / "config.json"], env=ENVIRONMENT, check=True, capture_output=True)
    return load_checkpoint(folder / "run" / "latest.pt")


@pytest.mark.parametrize("variables", [of_a_launcher, of_slurm])
def test_two_processes_with_a_launchers_variables_are_one_run(tmp_path, by_torchrun, variables):
    port = free_port()
    jobs = [start(tmp_path, variables(rank, port)) for rank in (0, 1)]
    (out, err), (quiet, other_err) = (job.communicate(timeout=60) for job in jobs)
    assert [job.returncode for job in jobs] == [0, 0], err + other_err
    assert out.count("checkpoint ") == 1 and "waiting for 2 processes at " in out and quiet == ""  # one process speaks
    state = load_checkpoint(tmp_path / "run" / "latest.pt")
    assert [e["loss"] for e in state["history"]] == [e["loss"] for e in by_torchrun["history"]]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "latest.pt",
        "log.txt",
        "metrics.csv",
        "run.json",
        "step_00000020.pt",
    ]


def test_a_refusal_reaches_every_process(tmp_path):
    """The folder is in use, which only the first process finds out: both end with exit code 2 and that line, none waits."""
    run = Pretraining(tiny_config(tmp_path / "run"))
    port = free_port()
    jobs = [start(tmp_path, of_a_launcher(rank, port), None, "--resume", "auto") for rank in (0, 1)]
    for rank, job in enumerate(jobs):
        _, err = job.communicate(timeout=60)
        assert job.returncode == 2 and f"[rank {rank}] CheckpointError: " in err and f"in use by process {os.getpid()}" in err
    assert run.checkpoints.newest_first() == []


def test_a_rank_that_is_given_twice_is_refused(tmp_path):
    port = free_port()
    jobs = [start(tmp_path, of_a_launcher(0, port)) for _ in (0, 1)]
    while all(job.poll() is None for job in jobs):
        time.sleep(0.02)
    refused = next(job for job in jobs if job.poll() is not None)
    for job in jobs:
        if job is not refused:
            job.kill()  # it waits for the one that would have another number
        _, err = job.communicate()
        if job is refused:
            assert job.returncode == 2 and "each with a RANK of its own" in err
            assert err.count("ConfigError") == 1


def test_a_process_whose_other_dies_ends_with_one_line(tmp_path):
    cfg = tiny_config(tmp_path / "run")
    cfg.optimizer.epochs, cfg.hardware.checkpoint_minutes = 10_000, 1e-9
    port = free_port()
    jobs = [start(tmp_path, of_a_launcher(rank, port), cfg) for rank in (0, 1)]
    while not (tmp_path / "run" / "latest.pt").exists():
        assert jobs[0].poll() is None
    jobs[1].send_signal(signal.SIGKILL)
    _, err = jobs[0].communicate(timeout=60)
    assert jobs[0].returncode == 2 and "another process of the run has ended" in err.splitlines()[-1]
    jobs[1].communicate()


# ---------------------------------------------------------------- what one process of a machine does for all

LOADING = """
import sys, time
from pathlib import Path
import torch
from ranks import tiny_config
from wejepa.data import FolderImages, load_images
from wejepa.errors import DataError
from wejepa.train import loop
from wejepa.train.ranks import Ranks

folder, ranks = Path(sys.argv[1]), Ranks.join(torch.device("cpu"))
cfg = tiny_config(folder / "run")

def counted(cfg, split):
    calls.append(time.time())
    if failing:
        raise DataError("no such images") if failing == "data" else KeyError("a slip")
    time.sleep(0.3 if ranks.first else 0)
    calls.append(time.time())
    if not in_memory:
        shape = {"num_workers": 0, "max_unreadable_share": 0.0, "img_size": 16, "in_chans": 1, "mean": (0.5,), "std": (0.5,)}
        return FolderImages(folder, [folder / "a.png", folder / "b.png"], torch.tensor([0, 1]), ("a", "b"), **shape)
    return load_images(cfg, split)

loop.load_images = counted
for in_memory in (True, False):
    calls, failing = [], ""
    source = loop.load_once_per_node(cfg, ranks)
    print(in_memory, len(calls), len(source), *calls, sep="|")
for failing in ("data" if ranks.first else "", "" if ranks.first else "data", "slip" if ranks.first else ""):
    in_memory = True
    try:
        loop.load_once_per_node(cfg, ranks)
    except Exception as error:
        print(type(error).__name__, error, sep="|")
ranks.leave()
"""


def test_one_process_of_a_machine_downloads_and_lists_and_its_failure_is_everyones(tmp_path):
    port = free_port()
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", LOADING, tmp_path], env=ENVIRONMENT | of_a_launcher(rank, port), stdout=subprocess.PIPE, text=True
        )
        for rank in (0, 1)
    ]
    told = [[line.split("|") for line in job.communicate(timeout=60)[0].splitlines() if "waiting" not in line] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0]
    first, second = told
    assert first[0][:3] == second[0][:3] == ["True", "2", "80"]
    assert float(second[0][3]) >= float(first[0][4]), "the second reads what the first has put there"
    assert first[1][:3] == ["False", "2", "2"] and second[1] == ["False", "0", "2"], "the list is handed on"
    assert first[2] == second[2] == ["DataError", "no such images"]
    assert first[3] == second[3] == ["DataError", "no such images"]
    assert first[4] == ["KeyError", "'a slip'"] and second[4] == ["RuntimeError", "rank 0: KeyError: 'a slip'"]
