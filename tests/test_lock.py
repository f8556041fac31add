"""Two runs do not train in one folder: the second is refused, and the first goes on undisturbed."""

import errno
import gc
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from ranks import STEPS, tiny_config

from wejepa.errors import CheckpointError
from wejepa.train import lock
from wejepa.train.checkpoints import load_checkpoint
from wejepa.train.lock import LOCK, FolderLock
from wejepa.train.loop import Pretraining
from wejepa.train.pretrain import launch_pretraining, main

ABOUT = {"process": 7, "host": "here", "since": "now", "run": "data.dataset = 'emoji', 3 epochs"}
HOLD = """
import sys
from pathlib import Path
from wejepa.train.lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
lock.take({"process": 7, "host": "here", "since": "now", "run": "data.dataset = 'emoji', 3 epochs"})
print("held", flush=True)
sys.stdin.read()
lock.release()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds tmp_path/run until its standard input is closed."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], env=environment, **pipes) as process:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.stdin.close()


def in_a_fork(function) -> int:
    """The exit code of a forked process that calls the function: 0 if it is refused, 1 if not."""
    pid = os.fork()
    if pid == 0:
        try:
            function()
        except CheckpointError:
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_second_process_is_refused_and_told_who_is_there(holder, tmp_path):
    before = files(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"run is in use by process 7 on here since now \(data\.dataset = 'emoji', 3 epochs\): wait"):
        Pretraining(tiny_config(tmp_path / "run"))
    assert files(tmp_path / "run") == before


def test_the_command_ends_with_exit_code_2_and_one_line(holder, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config(tmp_path / "run").to_dict()))
    for resume in ([], ["--resume", "auto"]):
        assert main(["--config", str(tmp_path / "config.json"), *resume]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_a_lock_dies_with_its_holder(holder, tmp_path):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "run" / LOCK).exists()
    launch_pretraining(tiny_config(tmp_path / "run"))
    assert not (tmp_path / "run" / LOCK).exists()


def test_a_folder_is_free_as_soon_as_it_is_let_go_of(holder, tmp_path):
    holder.stdin.close()
    holder.wait()
    assert not (tmp_path / "run").exists()  # nothing was written into the folder that it made
    FolderLock(tmp_path / "run").take(ABOUT)


def test_the_run_that_is_there_is_not_disturbed(tmp_path):
    """A run on a folder while another process tries to begin there, twice."""
    cfg = tiny_config(tmp_path / "run")
    cfg.hardware.checkpoint_minutes = 1e-9
    run = Pretraining(cfg)
    step = run.train_step

    def watched(images):
        if run.step in (3, STEPS - 2):
            assert in_a_fork(lambda: FolderLock(tmp_path / "run").take(ABOUT)) == 0
        return step(images)

    run.train_step = watched
    state = load_checkpoint(run.run())
    whole = load_checkpoint(launch_pretraining(tiny_config(tmp_path / "whole")).checkpoint)
    assert state["step"] == STEPS and all(torch.equal(value, whole["model"][name]) for name, value in state["model"].items())
    assert not list((tmp_path / "run").glob("earlier-*"))


def test_a_forked_process_does_not_hold_it_and_cannot_let_go_of_it(tmp_path):
    held = FolderLock(tmp_path / "run")
    held.take(ABOUT)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:  # an orphan, as a decoding worker would be
        os.close(writer)
        held.release()
        os.read(reader, 1)
        os._exit(0)
    assert in_a_fork(lambda: FolderLock(tmp_path / "run").take(ABOUT)) == 0
    held.release()
    assert in_a_fork(lambda: FolderLock(tmp_path / "run").take(ABOUT)) == 1, "free, though the orphan lives"
    os.close(writer)
    os.waitpid(pid, 0)


def test_one_process_may_open_a_folder_again(tmp_path):
    """In a notebook, a run that was stopped may still be there when the next one begins."""
    cfg = tiny_config(tmp_path / "run")
    first = Pretraining(cfg)
    second = Pretraining(cfg, "auto")
    del first
    gc.collect()
    assert in_a_fork(lambda: FolderLock(tmp_path / "run").take(ABOUT)) == 0, "the second still holds it"
    del second
    gc.collect()
    assert in_a_fork(lambda: FolderLock(tmp_path / "run").take(ABOUT)) == 1


def test_it_is_let_go_of_when_a_run_fails(tmp_path):
    cfg = tiny_config(tmp_path / "run")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        Pretraining(cfg, resume=tmp_path / "none.pt")
    assert not (tmp_path / "run").exists()
    run = Pretraining(cfg)
    run.train_step = None
    with pytest.raises(TypeError):
        run.run()
    assert in_a_fork(lambda: FolderLock(tmp_path / "run").take(ABOUT)) == 1


def test_a_run_that_was_stopped_may_go_on_unless_another_one_has_begun_since(tmp_path):
    cfg = tiny_config(tmp_path / "run")
    run, thief = Pretraining(cfg), Pretraining(tiny_config(tmp_path / "other"))
    for each in (run, thief):
        each.callbacks.append(type("Stop", (), {"on_step": staticmethod(lambda step, _: 1 / (step - 3))})())
        with pytest.raises(ZeroDivisionError):
            each.run()
        each.callbacks.clear()
    run.run()  # in the same process, from where it was
    assert run.step == STEPS
    launch_pretraining(tiny_config(tmp_path / "other"))
    with pytest.raises(CheckpointError, match=r"another run has begun in .*other since"):
        thief.run()


def test_a_lock_file_that_is_taken_away_between_two_calls_is_made_anew(tmp_path, monkeypatch):
    calls = []

    def late(number):
        calls.append(number)
        if len(calls) == 1:
            (tmp_path / LOCK).unlink()  # what the holder does as it lets go

    monkeypatch.setattr(lock, "_lock", late)
    FolderLock(tmp_path).take(ABOUT)
    assert len(calls) == 2 and (tmp_path / LOCK).exists()


def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch, capsys):
    def refuse(_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock, "_lock", refuse)
    launch_pretraining(tiny_config(tmp_path / "run"))
    assert "without locks (No locks available): see that no second run uses it" in capsys.readouterr().out


def test_threads_of_one_process_share_one_handle(tmp_path):
    locks = [FolderLock(tmp_path) for _ in range(8)]
    threads = [threading.Thread(target=each.take, args=(ABOUT,)) for each in locks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(each._handle) for each in locks}) == 1 and locks[0]._handle.users == 8


def test_the_folder_says_which_run_it_belongs_to(tmp_path):
    cfg = tiny_config(tmp_path / "run")
    launch_pretraining(cfg)
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert about["config"] == json.loads(json.dumps(cfg.to_dict())) and about["process"] == os.getpid()
    cfg.optimizer.epochs = 1
    launch_pretraining(cfg)
    assert json.loads((tmp_path / "run" / "earlier-1" / "run.json").read_text()) == about
    assert json.loads((tmp_path / "run" / "run.json").read_text())["config"]["optimizer"]["epochs"] == 1
