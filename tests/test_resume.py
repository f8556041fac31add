"""Whatever ends a run, it goes on to the weights that it would have had, and no checkpoint is lost."""

import math
import multiprocessing
import os
import resource
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import STEPS, tiny_config

from benchmarks import faults
from wejepa.config import IJepaConfig
from wejepa.data import MemoryImages
from wejepa.errors import CheckpointError, DataError, TrainingError
from wejepa.train import folder
from wejepa.train.callbacks import Monitor
from wejepa.train.checkpoints import load_checkpoint, save_checkpoint
from wejepa.train.folder import CheckpointFolder
from wejepa.train.interruption import RunInterrupted, RunStopped
from wejepa.train.loop import Pretraining
from wejepa.train.pretrain import launch_pretraining, main

HALF = STEPS // 2  # an epoch
USUAL = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


@pytest.fixture
def cfg(tmp_path) -> IJepaConfig:
    return tiny_config(tmp_path / "run")


@pytest.fixture(autouse=True)
def usual_handlers():
    """As in a terminal; a shell's background job ignores SIGINT."""
    before = {s: signal.signal(s, handler) for s, handler in USUAL.items()}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict:
    """The last state of a run that nothing disturbed."""
    return load_checkpoint(launch_pretraining(tiny_config(tmp_path_factory.mktemp("whole"))).checkpoint)


def assert_same(path: Path, whole: dict) -> None:
    state = load_checkpoint(path)
    for part in ("model", "moments", "step", "losses"):
        assert faults.same(state[part], whole[part]), part
    timeless = [[{k: v for k, v in e.items() if "second" not in k} for e in s["history"]] for s in (state, whole)]
    assert timeless[0] == timeless[1]


class Ended(Exception):
    pass


def end_after(cfg: IJepaConfig, step: int, how, resume=None) -> Pretraining:
    """Run, and let something befall the run right after a step."""
    run = Pretraining(cfg, resume)
    train_step = run.train_step

    def watched(images):
        loss = train_step(images)
        if run.step == step:
            how()
        return loss

    run.train_step = watched
    run.run()
    return run


def die():
    raise Ended


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------- at any step


@pytest.mark.parametrize("step", [1, 4, HALF - 1, HALF, HALF + 1, STEPS - 1])
def test_a_run_that_dies_after_any_step_resumes_to_the_same_state(cfg, whole, step):
    cfg.hardware.checkpoint_minutes = 1e-9
    with pytest.raises(Ended):
        end_after(cfg, step, die)
    torch.manual_seed(step)  # whatever was drawn in the meantime does not matter
    run = Pretraining(cfg, "auto")
    assert run.step == step - 1  # the step itself was not yet saved
    assert_same(run.run(), whole)


def test_without_minutes_only_epochs_write(cfg):
    cfg.hardware.checkpoint_minutes, cfg.hardware.checkpoint_every = 0.0, 1
    with pytest.raises(Ended):
        end_after(cfg, HALF + 3, die)
    assert names(Path(cfg.hardware.output_dir)) == ["latest.pt", "log.txt", "run.json", f"step_{HALF:08d}.pt"]


def test_minutes_are_counted_from_the_last_checkpoint(cfg, monkeypatch):
    from wejepa.train import loop

    now = [0.0]
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    cfg.hardware.checkpoint_minutes, cfg.hardware.keep_checkpoints = 2.0, 100

    def later():
        now[0] += 50.0

    run = Pretraining(cfg)
    train_step = run.train_step
    run.train_step = lambda images: (train_step(images), later())[0]
    run.run()
    assert [int(p.stem[5:]) for p in reversed(run.checkpoints.newest_first())] == [3, 6, 9, 12, 15, 18, STEPS]


# ---------------------------------------------------------------- signals


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", [3, HALF])
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(cfg, whole, signum, step):
    cfg.hardware.checkpoint_every = 100
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(RunInterrupted, match=f"{signal.Signals(signum).name} after step {step}; .*latest.pt holds it") as caught:
        end_after(cfg, step, lambda: os.kill(os.getpid(), signum))
    assert caught.value.signum == signum and load_checkpoint(caught.value.checkpoint)["step"] == step
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
    assert_same(launch_pretraining(cfg, resume="auto").checkpoint, whole)


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_a_sigint_after_a_signal_acts_at_once(cfg, first):
    def twice():
        os.kill(os.getpid(), first)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as caught:
        end_after(cfg, 3, twice)
    assert not isinstance(caught.value, RunInterrupted)
    assert not Path(cfg.hardware.output_dir, "latest.pt").exists()


def test_a_sigterm_that_comes_twice_counts_once(cfg, whole):
    """torchrun and timeout(1) send the trainer what its process group got already."""

    def twice():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(RunInterrupted, match="SIGTERM after step 3"):
        end_after(cfg, 3, twice)
    assert_same(launch_pretraining(cfg, resume="auto").checkpoint, whole)


def test_a_signal_in_the_last_step_ends_nothing(cfg, whole):
    run = end_after(cfg, STEPS, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert_same(run.checkpoints.latest, whole)


def test_a_signal_that_is_ignored_stays_ignored(cfg, whole):
    """As under nohup."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    run = end_after(cfg, 3, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert_same(run.checkpoints.latest, whole)


def test_a_run_in_a_thread_leaves_signals_alone(cfg, whole):
    runs = []
    thread = threading.Thread(target=lambda: runs.append(launch_pretraining(cfg)))
    thread.start()
    thread.join()
    assert_same(runs[0].checkpoint, whole)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_the_command_ends_with_the_signals_exit_code(cfg, tmp_path, capsys, monkeypatch, signum):
    step = Pretraining.train_step

    def watched(run, images):
        if run.step == 4:
            os.kill(os.getpid(), signum)
        return step(run, images)

    monkeypatch.setattr(Pretraining, "train_step", watched)
    settings = [f"{s}.{k}={v!r}".replace("'", '"') for s, vs in cfg.to_dict().items() for k, v in vs.items() if v is not None]
    arguments = [a for s in settings for a in ("--set", s.replace("=True", "=true").replace("=False", "=false"))]
    assert main(arguments) == 128 + signum
    assert "after step 5" in capsys.readouterr().err
    monkeypatch.undo()
    assert main([*arguments, "--resume", "auto"]) == 0


# ---------------------------------------------------------------- kills


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="takes capabilities away, mounts and reads /proc")
def test_runs_that_faults_of_ten_kinds_befall_end_with_identical_weights():
    """The short form of `python -m benchmarks.faults`."""
    kinds = faults.possible()
    for fault in faults.inject(len(kinds), seed=1, kinds=kinds):
        assert fault.identical and not fault.lost and fault.wrong is None, fault


@pytest.mark.parametrize("moment", ["torch.save", "os.fsync", "os.replace", "os.link"])
@pytest.mark.parametrize("nth", [1, 4])
def test_a_kill_at_each_stage_of_writing_loses_at_most_that_checkpoint(tmp_path, moment, nth):
    """A process that kills itself at the nth call of a function that writes."""
    module, name = (torch if moment.startswith("torch") else os), moment.partition(".")[2]

    def write_and_die():
        original, calls = getattr(module, name), []

        def deadly(*args, **kwargs):
            calls.append(1)
            if len(calls) == nth:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(module, name, deadly)
        folder = CheckpointFolder(tmp_path / "run")
        for step in range(1, 10):
            folder.save({"step": step, "weights": torch.full((1000,), float(step))})

    process = multiprocessing.get_context("fork").Process(target=write_and_die)  # eight that import torch would take half a minute
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    folder = CheckpointFolder(tmp_path / "run")
    for path in [*folder.newest_first(), folder.latest]:
        if path.exists():
            state = load_checkpoint(path)  # nothing unreadable, not even once
            assert (state["weights"] == state["step"]).all()
    if nth > 3:
        assert folder.newest_first()
    folder.begin()
    assert not list((tmp_path / "run").glob(".*")), "what the killed process was writing is cleared away"


# ---------------------------------------------------------------- which checkpoint


def test_the_newest_stay_and_every_so_many_epochs_for_good(cfg):
    cfg.optimizer.epochs = 7
    cfg.hardware.checkpoint_every, cfg.hardware.keep_checkpoints, cfg.hardware.keep_every = 1, 2, 3
    latest = launch_pretraining(cfg).checkpoint
    kept = [HALF * epoch for epoch in (3, 6, 7)]
    assert names(latest.parent) == ["latest.pt", "log.txt", "metrics.csv", "run.json", *(f"step_{step:08d}.pt" for step in kept)]
    assert latest.samefile(latest.with_name(f"step_{7 * HALF:08d}.pt"))
    cfg.hardware.output_dir, cfg.hardware.keep_checkpoints, cfg.hardware.keep_every = str(latest.parent.parent / "one"), 1, 0
    latest = launch_pretraining(cfg).checkpoint
    assert names(latest.parent) == ["latest.pt", "log.txt", "metrics.csv", "run.json", f"step_{7 * HALF:08d}.pt"]


def test_checkpoints_for_good_do_not_wait_for_the_others(cfg):
    cfg.hardware.checkpoint_every, cfg.hardware.keep_every = 100, 1
    latest = launch_pretraining(cfg).checkpoint
    assert f"step_{HALF:08d}.pt" in names(latest.parent)


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # one bit of one weight
    path.unlink()  # latest.pt is another name of the same file: leave no sound copy behind
    path.write_bytes(content)


def test_auto_passes_over_a_damaged_checkpoint_and_says_so(cfg, whole, capsys):
    cfg.hardware.checkpoint_every = 1
    latest = launch_pretraining(cfg).checkpoint
    newest = latest.with_name(f"step_{STEPS:08d}.pt")
    damage(newest)
    latest.unlink()
    capsys.readouterr()
    result = launch_pretraining(cfg, resume="auto")
    out = capsys.readouterr().out
    assert f"passed over: {newest} is truncated, damaged" in out and f"step_{HALF:08d}.pt at step {HALF}" in out
    assert "passed over" in (latest.parent / "log.txt").read_text()
    assert_same(result.checkpoint, whole)
    assert names(latest.parent / "earlier-1") == ["metrics.csv", newest.name]  # not lost, and not taken for good
    assert result.checkpoint.samefile(newest)


def test_auto_with_nothing_but_damage_is_refused(cfg):
    latest = launch_pretraining(cfg).checkpoint
    for path in [latest, *latest.parent.glob("step_*.pt")]:
        damage(path)
    before = names(latest.parent)
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints in .* can be resumed: .* is truncated, damaged"):
        launch_pretraining(cfg, resume="auto")
    assert names(latest.parent) == before


def test_a_lone_latest_is_resumed(cfg, whole):
    with pytest.raises(RunInterrupted):
        end_after(cfg, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    Path(cfg.hardware.output_dir, f"step_{5:08d}.pt").unlink()
    assert_same(launch_pretraining(cfg, resume="auto").checkpoint, whole)


def test_latest_that_is_older_than_a_newer_checkpoint_stays(cfg, whole):
    """A run killed between writing a checkpoint and naming it the latest."""
    cfg.hardware.checkpoint_every = 1
    latest = launch_pretraining(cfg).checkpoint
    latest.unlink()
    os.link(latest.with_name(f"step_{HALF:08d}.pt"), latest)
    run = Pretraining(cfg, resume=latest)
    assert run.step == load_checkpoint(latest)["step"] == HALF
    assert names(latest.parent / "earlier-1") == ["metrics.csv", f"step_{STEPS:08d}.pt"]
    run.run()
    assert_same(latest, whole)


def test_starting_afresh_moves_an_earlier_run_aside(cfg, whole, capsys):
    latest = launch_pretraining(cfg).checkpoint
    lines = (latest.parent / "log.txt").read_text()
    cfg.optimizer.epochs = 1
    for number in (1, 2):
        launch_pretraining(cfg)
        assert f"is now in {latest.parent / f'earlier-{number}'}" in capsys.readouterr().out
    assert names(latest.parent / "earlier-1") == ["log.txt", "metrics.csv", "run.json", f"step_{STEPS:08d}.pt"]
    assert_same(latest.parent / "earlier-1" / f"step_{STEPS:08d}.pt", whole)
    assert (latest.parent / "earlier-1" / "log.txt").read_text() == lines
    assert load_checkpoint(latest)["step"] == HALF
    assert names(latest.parent) == ["earlier-1", "earlier-2", "latest.pt", "log.txt", "metrics.csv", "run.json", f"step_{HALF:08d}.pt"]


def test_going_back_to_an_older_checkpoint_moves_the_newer_ones_aside(cfg, whole):
    cfg.hardware.checkpoint_every = 1
    latest = launch_pretraining(cfg).checkpoint
    half = latest.with_name(f"step_{HALF:08d}.pt")
    with pytest.raises(Ended):
        end_after(cfg, HALF + 2, die, resume=half)
    assert names(latest.parent) == ["earlier-1", "latest.pt", "log.txt", "metrics.csv", "run.json", half.name]
    assert latest.samefile(half)
    assert_same(launch_pretraining(cfg, resume="auto").checkpoint, whole)


def test_a_file_system_without_links_gets_copies(cfg, whole, monkeypatch):
    def refuse(*_):
        raise OSError("Operation not permitted")

    monkeypatch.setattr(folder.os, "link", refuse)
    cfg.hardware.checkpoint_every = 1
    with pytest.raises(Ended):
        end_after(cfg, HALF + 2, die)
    latest = launch_pretraining(cfg, resume="auto").checkpoint
    assert_same(latest, whole)
    assert not latest.samefile(latest.with_name(f"step_{STEPS:08d}.pt"))


# ---------------------------------------------------------------- what cannot go on


def test_a_gradient_that_is_no_number_stops_the_run_before_it_reaches_the_weights(cfg):
    """The loss can be finite when its gradient is not: the weights, and the checkpoint after them, must be spared."""
    run = Pretraining(cfg)
    cfg.optimizer.grad_clip_norm = run.cfg.optimizer.grad_clip_norm = 0.0  # also where nothing is clipped
    run.model.predictor.mask_token.register_hook(lambda gradient: gradient * math.nan)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    with pytest.raises(TrainingError, match=r"at step 0 the loss is 0\.\d+ and the gradient's norm nan"):
        run.run()
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())


def test_a_limit_of_nought_clips_nothing(cfg):
    cfg.optimizer.grad_clip_norm = 0.0
    run = Pretraining(cfg)
    run.model.predictor.mask_token.register_hook(lambda gradient: gradient + 100)
    run.train_step(torch.randn(8, 1, 16, 16))
    assert run.model.predictor.mask_token.grad.norm() > 100


def test_no_checkpoint_is_written_of_a_run_that_went_wrong(cfg):
    cfg.hardware.checkpoint_minutes = 1e-9

    def poison():
        run.model.predictor.mask_token.data.fill_(math.inf)

    run = Pretraining(cfg)
    train_step = run.train_step
    run.train_step = lambda images: poison() or train_step(images) if run.step == 4 else train_step(images)
    with pytest.raises(TrainingError, match="at step 4"):
        run.run()
    assert load_checkpoint(run.checkpoints.latest)["step"] == 4
    assert Pretraining(cfg, "auto").step == 4


def test_other_images_are_refused(cfg, tmp_path):
    launch_pretraining(cfg)
    path = Path(cfg.hardware.output_dir, f"step_{STEPS:08d}.pt")
    save_checkpoint(path, load_checkpoint(path) | {"images": "7 images"})
    with pytest.raises(CheckpointError, match=r"was trained on 7 images, data\.root now has 80 images"):
        launch_pretraining(cfg, resume=path)


@pytest.mark.parametrize("place", ["file/run", "file"])
def test_a_folder_that_cannot_be_written_is_refused_before_the_first_step(cfg, tmp_path, monkeypatch, place):
    (tmp_path / "file").write_text("")
    cfg.hardware.output_dir = str(tmp_path / place)
    monkeypatch.setattr(Pretraining, "train_step", lambda *_: pytest.fail("trained"))
    with pytest.raises(CheckpointError, match=r"cannot write to .*file.*: choose another hardware\.output_dir"):
        launch_pretraining(cfg)


def test_a_full_disk_leaves_the_checkpoints_that_are_there(cfg, whole):
    """The limit on a file's size stands for the full disk: the same call fails, in the middle of the file."""
    cfg.hardware.checkpoint_every = 1
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))

    try:
        with pytest.raises(CheckpointError, match=r"cannot write .*step_00000020\.pt .*: free some space"):
            end_after(cfg, HALF + 1, full)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    folder = Path(cfg.hardware.output_dir)
    assert names(folder) == ["latest.pt", "log.txt", "run.json", f"step_{HALF:08d}.pt"]
    assert_same(launch_pretraining(cfg, resume="auto").checkpoint, whole)


def test_the_log_keeps_what_was_printed(cfg, capsys):
    launch_pretraining(cfg)
    assert Path(cfg.hardware.output_dir, "log.txt").read_text() == capsys.readouterr().out


# ---------------------------------------------------------------- a folder of images


@pytest.fixture
def folder_cfg(cfg, tmp_path) -> IJepaConfig:
    """A run on forty small files, one of them damaged."""
    rng = np.random.default_rng(0)
    for number in range(40):
        path = tmp_path / "images" / "train" / f"class {number % 2}" / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:100])
    cfg.data.use_fake_data, cfg.data.dataset, cfg.data.root = False, "imagefolder", str(tmp_path / "images")
    cfg.hardware.checkpoint_every = 1
    return cfg


@pytest.mark.filterwarnings("ignore:.*passed over")
def test_a_folder_with_a_damaged_file_is_learnt_from_and_resumes_to_the_same_state(folder_cfg, tmp_path, capsys):
    expected = load_checkpoint(launch_pretraining(folder_cfg).checkpoint)
    line = f"passed over {tmp_path / 'images' / 'train' / 'class 1' / '39.png'}: "
    assert capsys.readouterr().out.count(line) == 1
    assert Path(folder_cfg.hardware.output_dir, "log.txt").read_text().count(line) == 1
    folder_cfg.hardware.output_dir, folder_cfg.data.num_workers = str(tmp_path / "resumed"), 2
    folder_cfg.hardware.checkpoint_minutes = 1e-9
    with pytest.raises(Ended):
        end_after(folder_cfg, 7, die)
    folder_cfg.data.num_workers = 0
    assert_same(launch_pretraining(folder_cfg, resume="auto").checkpoint, expected)


def kill_workers() -> None:
    for process in multiprocessing.active_children():
        process.kill()
        process.join()


@pytest.mark.filterwarnings("ignore:.*passed over", "ignore:.*this process decodes the rest")
@pytest.mark.parametrize("step", [2, 5])  # 5 is an epoch's last one
def test_a_worker_that_dies_in_the_middle_of_a_step_ends_the_run_with_a_checkpoint(folder_cfg, tmp_path, step):
    folder_cfg.hardware.checkpoint_every = 100
    expected = load_checkpoint(launch_pretraining(folder_cfg).checkpoint)
    folder_cfg.hardware.output_dir, folder_cfg.data.num_workers = str(tmp_path / "resumed"), 1
    with pytest.raises(RunStopped, match=rf"lower data\.num_workers = 1, .*latest\.pt holds step {step}: go on with") as caught:
        end_after(folder_cfg, step, kill_workers)
    assert isinstance(caught.value, DataError) and "\n" not in str(caught.value)
    assert_same(launch_pretraining(folder_cfg, resume="auto").checkpoint, expected)


@pytest.mark.filterwarnings("ignore:.*passed over", "ignore:.*this process decodes the rest")
def test_a_worker_that_dies_while_the_monitor_measures_ends_the_run_after_that(folder_cfg, tmp_path, monkeypatch):
    folder_cfg.hardware.checkpoint_every = 100
    expected = load_checkpoint(launch_pretraining(folder_cfg).checkpoint)
    folder_cfg.hardware.output_dir, folder_cfg.data.num_workers = str(tmp_path / "resumed"), 1
    with monkeypatch.context() as patch:
        patch.setattr(Monitor, "__call__", lambda self, measure=Monitor.__call__: kill_workers() or measure(self))
        with pytest.raises(RunStopped, match=r"holds step 5: go on with resume='auto'"):
            launch_pretraining(folder_cfg)
    assert_same(launch_pretraining(folder_cfg, resume="auto").checkpoint, expected)


@pytest.mark.parametrize("step", [0, 3, HALF])
def test_whatever_keeps_a_run_from_its_images_ends_it_with_a_checkpoint(cfg, whole, monkeypatch, step):
    def broken(self, index, crops, device, augmented=MemoryImages.augmented):
        for number, batch in enumerate(augmented(self, index, crops, device)):
            if number == step:
                raise TypeError("a fault\nof whatever kind")
            yield batch
        if step == HALF:  # an epoch has no batch of this number
            raise TypeError("a fault\nof whatever kind")

    with monkeypatch.context() as patch:
        patch.setattr(MemoryImages, "augmented", broken)
        with pytest.raises(RunStopped, match="^TypeError: a fault of whatever kind" + (f"; .*holds step {step}" if step else "$")):
            launch_pretraining(cfg)
    assert Path(cfg.hardware.output_dir, "latest.pt").exists() == bool(step)
    assert_same(launch_pretraining(cfg, resume="auto").checkpoint, whole)


def test_a_checkpoint_from_before_a_setting_counts_as_its_default(cfg, whole):
    """Settings that came later do not keep a run from going on, unless it changes them."""
    run = Pretraining(cfg)
    state = whole | {"config": {k: dict(v) for k, v in whole["config"].items()}}
    for name in ("classification_frozen", "norm_eps", "pred_mlp_ratio"):
        del state["config"]["model"][name]
    save_checkpoint(run.output / "step_00000020.pt", state)
    assert Pretraining(cfg, resume="auto").step == STEPS
    cfg.model.norm_eps = 1e-5
    with pytest.raises(CheckpointError, match=r"trained with model.norm_eps = 1e-06, this run says 1e-05"):
        Pretraining(cfg, resume=run.output / "step_00000020.pt")
