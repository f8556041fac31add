"""Several processes make the run that one would make; a process that dies ends the job, or the job goes on by itself."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks import STEPS, tiny_config, train, twelve_config

from wejepa.config import IJepaConfig
from wejepa.errors import CheckpointError, ConfigError
from wejepa.train.checkpoints import load_checkpoint
from wejepa.train.loop import Pretraining
from wejepa.train.ranks import Ranks

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "PYTHONPATH": str(HERE.parent)}


def relative_difference(one: list[float], other: list[float]) -> float:
    assert len(one) == len(other) > 0
    return max(abs(a - b) / abs(b) for a, b in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict:
    return train(tiny_config(tmp_path_factory.mktemp("alone")))


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> dict:
    """The runs of ranks.py on two processes, by name, and the folder they wrote to."""
    folder = tmp_path_factory.mktemp("together")
    started(2, str(folder))
    return {"folder": folder, **json.loads((folder / "results.json").read_text())}


def started(ranks: int, *arguments: str) -> None:
    command = [*TORCHRUN, "--standalone", f"--nproc-per-node={ranks}", str(HERE / "ranks.py"), *arguments]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- the same run


@pytest.mark.parametrize("name", ["plain", "accumulated", "sharded", "slowly written"])
def test_two_processes_with_half_the_batch_each_see_the_losses_of_one(alone, together, name):
    assert len(alone["losses"]) == STEPS
    assert relative_difference(together[name]["losses"], alone["losses"]) < 1e-5
    assert together[name]["same_weights"]
    torch.testing.assert_close(torch.tensor(together[name]["weights"]), torch.tensor(alone["weights"]), rtol=0, atol=5e-3)


def test_two_processes_make_the_run_of_one_by_muon(together, tmp_path):
    cfg = tiny_config(tmp_path)
    cfg.optimizer.kind = "muon"
    assert together["muon"]["same_weights"]
    assert relative_difference(together["muon"]["losses"], train(cfg)["losses"]) < 1e-5


def test_gradients_that_are_not_averaged_are_noticed(alone, together):
    """The comparison above has to fail on a run whose processes each go their own way."""
    assert relative_difference(together["broken"]["losses"], alone["losses"]) > 1e-2
    assert not together["broken"]["same_weights"]


def test_batch_statistics_are_of_each_processs_part_and_the_weights_one(together):
    """Other losses than on one process, as each normalises by its own images; but all processes make the same update, sharded or not."""
    runs = [together["batch normalised"], together["batch normalised and sharded"]]
    for run in runs:
        assert len(run["losses"]) == 4 and run["same_weights"] and run["every_process_knows_the_history"]
    assert relative_difference(runs[1]["losses"], runs[0]["losses"]) < 1e-4
    for name in ("batch normalised", "batch normalised and sharded"):
        buffers = load_checkpoint(together["folder"] / name / "latest.pt")["model"]
        assert buffers["teacher_encoder.blocks.0.1.num_batches_tracked"] == 4


def test_the_history_is_the_same_in_kind(alone, together):
    for name in ("plain", "sharded"):
        assert together[name]["every_process_knows_the_history"]
        for mine, one in zip(together[name]["history"], alone["history"], strict=True):
            assert mine.keys() == one.keys() and mine["step"] == one["step"]
            for key in ("loss", "teacher_variance", "rankme"):
                assert mine[key] == pytest.approx(one[key], rel=0.02)


def test_a_sharded_run_resumes_to_the_same_weights(together):
    half = STEPS // 2
    assert together["resumed sharded"]["losses"] == together["sharded"]["losses"][half:]
    assert together["resumed sharded"]["weights"] == together["sharded"]["weights"]


def test_sharded_weights_travel_in_bfloat16_and_are_kept_and_summed_in_float32(together, alone):
    run = together["sharded in bfloat16"]
    assert run["types"] == ["tokens torch.float32", "weights torch.bfloat16"] and run["same_weights"]
    assert 1e-6 < relative_difference(run["losses"], alone["losses"]) < 0.02
    state = load_checkpoint(together["folder"] / "sharded in bfloat16" / "latest.pt")
    assert all(value.dtype == torch.float32 for value in [*state["model"].values(), *state["moments"]["exp_avg"].values()])


def test_a_checkpoint_does_not_know_how_many_processes_wrote_it(together, alone):
    """Written by two processes that shared the weights, each its part, resumed by one that holds them all; and the other way round."""
    cfg = tiny_config(together["folder"] / "sharded")
    half = together["folder"] / "sharded" / f"step_{STEPS // 2:08d}.pt"
    assert sorted(p.name for p in half.iterdir()) == [".metadata", "__0_0.distcp", "__1_0.distcp", "manifest.json", "rest.pt"]
    cfg.hardware.output_dir = str(together["folder"] / "resumed alone")
    resumed = train(cfg, resume=half)
    assert relative_difference(resumed["losses"], alone["losses"][STEPS // 2 :]) < 1e-5
    assert relative_difference(together["sharded from a file"]["losses"], alone["losses"][STEPS // 2 :]) < 1e-5
    assert together["sharded from a file"]["same_weights"]


def test_three_processes_and_one_go_on_from_what_two_have_written(together):
    """Three divide no tensor of the model evenly."""
    started(3, str(together["folder"]), "twelve")
    three = json.loads((together["folder"] / "three.json").read_text())
    cfg = twelve_config(together["folder"] / "twelve on one")
    cfg.hardware.shard_model = False
    one = train(cfg, resume=together["folder"] / "twelve" / "step_00000003.pt")
    for other in (three, one):
        assert relative_difference(other["losses"], together["twelve"]["losses"][3:]) < 1e-5 and other["same_weights"]
    ours = [load_checkpoint(together["folder"] / name / "latest.pt") for name in ("twelve", "twelve on three", "twelve on one")]
    assert ours[0]["model"].keys() == ours[1]["model"].keys() == ours[2]["model"].keys()
    for name, value in ours[0]["model"].items():
        for other in ours[1:]:
            torch.testing.assert_close(other["model"][name], value, rtol=0, atol=5e-3)


def test_no_process_ever_holds_the_whole_state(together):
    assert together["never whole"] is True


def test_what_every_process_has_is_the_first_ones(together):
    assert all((value == 0).all() for value in load_checkpoint(together["folder"] / "unlike.pt")["model"].values())


def test_a_part_that_cannot_be_written_ends_the_job_on_every_process(together):
    for when in ("while the parts are written", "afterwards"):
        told = together["befallen"][when]
        assert len(told) == 2 and all("cannot write" in line and "No space left on device" in line for line in told), told
    assert together["befallen"]["left"] == ["log.txt", "run.json"]


def test_a_damaged_part_is_named_on_every_process_and_passed_over(together):
    newest = together["folder"] / "sharded" / f"step_{STEPS:08d}.pt"
    told = together["befallen"]["damaged"]
    assert len(told) == 2 and all(f"{newest / '__1_0.distcp'} is truncated, damaged" in line for line in told), told
    assert together["past the damaged one"]["losses"] == together["sharded"]["losses"][STEPS // 2 :]
    assert together["past the damaged one"]["weights"] == together["sharded"]["weights"]
    assert "passed over" in (newest.parent / "log.txt").read_text()
    with pytest.raises(CheckpointError, match="__1_0.distcp is truncated, damaged"):
        load_checkpoint(newest.parent / "earlier-2" / newest.name)


def test_accumulated_parts_make_the_step_of_the_whole_batch(alone, tmp_path):
    cfg = tiny_config(tmp_path)
    cfg.optimizer.accumulation_steps = 4
    assert relative_difference(train(cfg)["losses"], alone["losses"]) < 1e-5


@pytest.mark.parametrize(("batch", "parts", "wanted"), [(8, 3, 9), (6, 4, 8)])
def test_a_batch_that_does_not_divide_is_refused(tmp_path, batch, parts, wanted):
    cfg = tiny_config(tmp_path)
    cfg.data.train_batch_size, cfg.optimizer.accumulation_steps = batch, parts
    with pytest.raises(ConfigError, match=rf"train_batch_size = {batch} does not divide .*accumulation_steps = {parts}: take {wanted}"):
        Pretraining(cfg)


def test_sharding_a_single_process_is_refused(tmp_path):
    cfg = tiny_config(tmp_path)
    cfg.hardware.shard_model = True
    with pytest.raises(ConfigError, match=r"hardware\.shard_model = true needs several processes"):
        Pretraining(cfg)


# ---------------------------------------------------------------- from the command line, and what befalls it


def long_config(output: Path) -> IJepaConfig:
    """Some seconds on two processes, a checkpoint after every step."""
    cfg = tiny_config(output)
    cfg.optimizer.epochs, cfg.hardware.checkpoint_minutes = 12, 1e-9
    return cfg


def start(cfg: IJepaConfig, *options: str, name="job", resume=()) -> subprocess.Popen:
    """torchrun on two processes, or as the options say; its output goes to OUTPUT_DIR.NAME.txt."""
    output = Path(cfg.hardware.output_dir)
    output.parent.mkdir(parents=True, exist_ok=True)
    config = output.with_suffix(".json")
    config.write_text(json.dumps(cfg.to_dict()))
    command = [
        *TORCHRUN,
        *(options or ("--standalone", "--nproc-per-node=2")),
        "-m",
        "wejepa.train.pretrain",
        "--config",
        str(config),
        *resume,
    ]
    with open(output.with_suffix(f".{name}.txt"), "w") as log:
        return subprocess.Popen(command, env=ENVIRONMENT, stdout=log, stderr=subprocess.STDOUT)


def output_of(cfg: IJepaConfig, name="job") -> str:
    return Path(cfg.hardware.output_dir).with_suffix(f".{name}.txt").read_text()


def wait_for_step(cfg: IJepaConfig, job: subprocess.Popen, step: int) -> None:
    deadline = time.monotonic() + 60
    while not any(int(p.stem[5:]) >= step for p in Path(cfg.hardware.output_dir).glob("step_*.pt")):
        assert job.poll() is None and time.monotonic() < deadline, output_of(cfg)
        time.sleep(0.01)


def process_of(job: subprocess.Popen, rank: int) -> int:
    """The process id of a rank below torchrun's."""
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    (pid,) = [int(p) for p in children if f"\0RANK={rank}\0".encode() in Path(f"/proc/{p}/environ").read_bytes()]
    return pid


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict:
    """The last checkpoint of an undisturbed run on two processes."""
    cfg = long_config(tmp_path_factory.mktemp("undisturbed") / "run")
    job = start(cfg)
    assert job.wait(120) == 0, output_of(cfg)
    assert output_of(cfg).count("checkpoint ") == 1  # one process speaks
    return load_checkpoint(Path(cfg.hardware.output_dir) / "latest.pt")


def assert_same_run(cfg: IJepaConfig, expected: dict) -> None:
    found = load_checkpoint(Path(cfg.hardware.output_dir) / "latest.pt")
    assert [e["loss"] for e in found["history"]] == [e["loss"] for e in expected["history"]]
    assert all(torch.equal(value, expected["model"][name]) for name, value in found["model"].items())


needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the processes by Linux's /proc")


@needs_proc
def test_a_killed_rank_ends_the_job_and_is_named(tmp_path):
    cfg = long_config(tmp_path / "run")
    cfg.optimizer.epochs = 1000
    job = start(cfg)
    wait_for_step(cfg, job, 3)
    os.kill(process_of(job, rank=1), signal.SIGKILL)
    assert job.wait(60) != 0
    out = output_of(cfg)
    assert "rank      : 1" in out and "Signal 9" in out


@needs_proc
def test_a_restarted_job_goes_on_by_itself_to_the_same_weights(tmp_path, undisturbed):
    cfg = long_config(tmp_path / "run")
    job = start(cfg, "--standalone", "--nproc-per-node=2", "--max-restarts=1")
    wait_for_step(cfg, job, 15)
    os.kill(process_of(job, rank=1), signal.SIGKILL)
    assert job.wait(120) == 0, output_of(cfg)
    assert "going on from" in output_of(cfg)
    assert_same_run(cfg, undisturbed)


DEADLY = """
import os, signal, sys
from pathlib import Path
from wejepa.train.loop import Pretraining
from wejepa.train.pretrain import main

step = Pretraining.train_step

def watched(run, images):
    marker = run.output.with_name("killed")
    if run.ranks.rank == 1 and run.step == 11 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if run.ranks.first:
        with open(run.output.with_name("steps"), "a") as file:
            file.write(f"{run.step} ")
    return step(run, images)

Pretraining.train_step = watched
code = main(sys.argv[1:])
sys.stdout.flush()
os._exit(code)
"""


def test_a_restarted_job_goes_on_from_its_newest_checkpoint_not_from_where_it_was_told_to_begin(tmp_path):
    """The folder holds newer checkpoints of another job, which are not this one's; those that it writes itself are."""
    cfg = tiny_config(tmp_path / "run")
    cfg.hardware.checkpoint_minutes, cfg.hardware.keep_checkpoints = 1e-9, 100
    train(cfg)
    shutil.copy(tmp_path / "run" / "latest.pt", tmp_path / "whole.pt")
    (tmp_path / "deadly.py").write_text(DEADLY)
    (tmp_path / "config.json").write_text(json.dumps(cfg.to_dict()))
    arguments = ["--config", tmp_path / "config.json", "--resume", tmp_path / "run" / "step_00000004.pt"]
    options = ["--standalone", "--nproc-per-node=2", "--max-restarts=2", tmp_path / "deadly.py", *arguments]
    done = subprocess.run([*TORCHRUN, *map(str, options)], env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    steps = [int(number) for number in (tmp_path / "steps").read_text().split()]
    begun_anew = steps.index(11, steps.index(11) + 1) if steps.count(11) > 1 else steps.index(11)
    assert steps[:begun_anew] in ([*range(4, 11)], [*range(4, 12)]) and steps[begun_anew:] == [*range(11, STEPS)]
    assert "step_00000004.pt at step 4" in done.stdout and "step_00000011.pt at step 11" in done.stdout
    assert [path.name for path in (tmp_path / "run").glob("earlier-*")] == ["earlier-1"]
    losses = [[e["loss"] for e in load_checkpoint(path)["history"]] for path in (tmp_path / "run" / "latest.pt", tmp_path / "whole.pt")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)  # those before were one process's, which adds up in another order


@pytest.mark.parametrize(("written_by", "elsewhere", "expected"), [("this", False, 20), ("another", False, 10), ("this", True, 10)])
def test_after_a_restart_only_the_jobs_own_checkpoints_count(tmp_path, monkeypatch, written_by, elsewhere, expected):
    cfg = tiny_config(tmp_path / "run")
    cfg.hardware.checkpoint_every = 1
    monkeypatch.setattr(Ranks, "join", lambda device: Ranks(0, 1, device, job=written_by))
    train(cfg)
    path = tmp_path / "run" / f"step_{STEPS // 2:08d}.pt"
    if elsewhere:  # the job has begun here, and died before its first checkpoint
        for name in ("latest.pt", f"step_{STEPS:08d}.pt"):
            (tmp_path / "run" / name).unlink()
        path = path.rename(tmp_path / "elsewhere.pt")
    monkeypatch.setattr(Ranks, "join", lambda device: Ranks(0, 1, device, job="this", restarted=True))
    assert Pretraining(cfg, resume=path).step == expected


def test_a_job_that_is_told_to_stop_can_be_resumed(tmp_path, undisturbed):
    cfg = long_config(tmp_path / "run")
    cfg.hardware.checkpoint_minutes = 0.0  # only the signal writes one
    cfg.hardware.checkpoint_every = 100
    job = start(cfg, "--standalone", "--nproc-per-node=2")
    log, deadline = Path(cfg.hardware.output_dir) / "log.txt", time.monotonic() + 60
    while not log.exists() or len(log.read_text().splitlines()) < 2:  # the first epoch's line
        assert job.poll() is None and time.monotonic() < deadline, output_of(cfg)
        time.sleep(0.01)
    job.send_signal(signal.SIGTERM)
    assert job.wait(60) != 0
    assert "SIGTERM after step" in output_of(cfg)
    state = load_checkpoint(Path(cfg.hardware.output_dir) / "latest.pt")
    assert 0 < state["step"] < 120
    cfg.hardware.checkpoint_minutes = 1e-9
    job = start(cfg, name="resumed", resume=("--resume", "auto"))
    assert job.wait(120) == 0
    assert_same_run(cfg, undisturbed)


def test_two_machines_make_the_run_of_one(tmp_path, undisturbed):
    """Two torchruns that meet at an address, as on two machines with a common file system."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    cfg = long_config(tmp_path / "run")
    common = ("--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=1")
    jobs = [start(cfg, *common, name=f"node{node}") for node in (0, 1)]
    for node, job in enumerate(jobs):
        assert job.wait(120) == 0, output_of(cfg, f"node{node}")
    assert_same_run(cfg, undisturbed)


def test_a_refusal_is_told_with_its_rank(tmp_path):
    cfg = long_config(tmp_path / "run")
    cfg.data.train_batch_size = 9
    job = start(cfg)
    assert job.wait(60) != 0
    assert "[rank 0] ConfigError: data.train_batch_size = 9 does not divide by 2 processes" in output_of(cfg)
