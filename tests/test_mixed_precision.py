"""float16 with a scaled loss: what overflows is left out, what goes on goes on to the bit; and numbers that are read a step late."""

import copy
import functools
import math
import os
import signal
from itertools import islice

import pytest
import torch
from ranks import STEPS, tiny_config

from wejepa import devices
from wejepa.config import IJepaConfig
from wejepa.errors import CheckpointError, TrainingError
from wejepa.train import loop
from wejepa.train.callbacks import Callback
from wejepa.train.checkpoints import MOMENTS, load_checkpoint, save_checkpoint
from wejepa.train.interruption import RunInterrupted, RunStopped
from wejepa.train.loop import Pretraining

HALF = STEPS // 2  # an epoch


@pytest.fixture
def cfg(tmp_path) -> IJepaConfig:
    cfg = tiny_config(tmp_path / "run")
    cfg.hardware.mixed_precision = True
    return cfg


@pytest.fixture
def float16(monkeypatch):
    """A CPU that is taken for a GPU without bfloat16: PyTorch has float16 and the scaler there as well."""

    def precision(device, mixed):
        return torch.float16 if mixed else torch.float32

    monkeypatch.setattr(devices, "precision", precision)
    monkeypatch.setattr(loop, "precision", precision)


@pytest.fixture
def overflowing(float16, monkeypatch):
    """A scale that begins too large, and grows again every three steps."""
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=2.0**24, growth_interval=3))


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for part in ("step", "losses", "scaler", "skipped"):
        assert one.get(part) == other.get(part), part
    assert [entry["loss"] for entry in one["history"]] == [entry["loss"] for entry in other["history"]]
    for a, b in ((one["model"], other["model"]), *((one["moments"][kind], other["moments"][kind]) for kind in MOMENTS)):
        assert all(torch.equal(value, b[name]) for name, value in a.items())


class Told(Callback):
    """Ends a run after a step of which it has been told."""

    def __init__(self, step: int, how):
        self.step, self.how, self.steps = step, how, []

    def on_step(self, step, numbers):
        self.steps.append((step, numbers["loss"]))
        if step == self.step:
            self.how()


class Ended(Exception):
    pass


def die():
    raise Ended


def finished(cfg, resume=None) -> dict:
    return load_checkpoint(Pretraining(cfg, resume).run())


# ---------------------------------------------------------------- float16


def test_float16_learns_what_float32_learns(cfg, float16, tmp_path):
    run, seen = Pretraining(cfg), set()
    run.model.student_encoder.blocks[0].attn.proj.register_forward_hook(lambda _, inputs, output: seen.add(output.dtype))
    half = load_checkpoint(run.run())
    assert torch.float16 in seen and all(value.dtype == torch.float32 for value in half["model"].values())
    assert half["scaler"]["scale"] == 2.0**16 and half["scaler"]["_growth_tracker"] == STEPS and "skipped" not in half
    cfg.hardware.mixed_precision, cfg.hardware.output_dir = False, str(tmp_path / "whole")
    whole = finished(cfg)
    assert not {"scaler", "skipped"} & whole.keys()
    for one, other in zip(half["history"], whole["history"], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-2)


def test_a_step_whose_gradient_overflows_changes_nothing_but_the_scale(cfg, float16, monkeypatch):
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=2.0**40))
    run = Pretraining(cfg)
    before = copy.deepcopy(run.model.state_dict())
    loss = run.train_step(torch.randn(8, 1, 16, 16))
    assert loss.isfinite() and run.step == 1 and run.scaler.get_scale() == 2.0**39
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())
    state = run.state()
    assert state["skipped"] == 1 and not any(m.any() for m in state["moments"]["exp_avg"].values())


def test_a_run_goes_on_after_steps_that_overflow_and_names_them(cfg, overflowing, capsys):
    state = finished(cfg)
    assert 2 < state["skipped"] < STEPS - 2 and all(math.isfinite(entry["loss"]) for entry in state["history"])
    assert capsys.readouterr().out.count("its gradient overflows float16 and changes no weights") == state["skipped"]


@pytest.mark.parametrize("step", [1, 7, HALF, STEPS - 3])
def test_a_run_in_float16_resumes_to_the_bit(cfg, overflowing, tmp_path, step):
    whole = finished(cfg)
    cfg.hardware.output_dir, cfg.hardware.checkpoint_minutes = str(tmp_path / "resumed"), 1e-9
    with pytest.raises(Ended):
        Pretraining(cfg, callbacks=[Told(step + 1, die)]).run()
    run = Pretraining(cfg, "auto")
    assert run.step == step
    assert_same(load_checkpoint(run.run()), whole)


def test_gradients_that_overflow_whatever_the_scale_end_the_run(cfg, float16, monkeypatch):
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=8 * loop.LEAST_SCALE))
    run = Pretraining(cfg)
    run.model.predictor.mask_token.register_hook(lambda gradient: gradient + math.inf)
    before = copy.deepcopy(run.model.state_dict())
    with pytest.raises(TrainingError, match=r"at step 2 the loss is 0\.\d+ and the gradient's norm (inf|nan)"):
        run.run()
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())


def test_a_loss_that_is_no_number_ends_a_run_in_float16_at_once(cfg, float16):
    run = Pretraining(cfg)
    run.model.predictor.mask_token.data.fill_(math.nan)
    with pytest.raises(TrainingError, match="at step 0 the loss is nan"):
        run.run()


def test_checkpoints_from_before_there_was_a_scaler_are_read(cfg, float16):
    state = finished(cfg)
    del state["scaler"]
    run = Pretraining(cfg)
    save_checkpoint(run.output / "old.pt", state)
    resumed = Pretraining(cfg, run.output / "old.pt")
    assert resumed.step == STEPS and resumed.scaler.get_scale() == 2.0**16


def test_a_run_in_float16_goes_on_in_float32(cfg, overflowing):
    cfg.hardware.checkpoint_every = 1
    finished(cfg)
    half = Pretraining(cfg, resume=Pretraining(cfg, "auto").output / f"step_{HALF:08d}.pt")
    skipped = half.state()["skipped"]
    cfg.hardware.mixed_precision = False
    run = Pretraining(cfg, "auto")
    assert run.step == HALF and {int(s["step"]) for s in run.optimizer.state.values()} == {HALF - skipped}
    state = load_checkpoint(run.run())
    assert state["skipped"] == skipped > 0 and "scaler" not in state


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("scaler", None),
        ("scaler", {"scale": 65536.0}),
        ("scaler", {"scale": math.nan}),
        ("scaler", {"scale": 0.0}),
        ("scaler", {"scale": "large"}),
        ("scaler", {"_growth_tracker": -1}),
        ("scaler", {"else": 1.0}),
        ("skipped", -1),
        ("skipped", STEPS + 1),
        ("skipped", "many"),
    ],
)
def test_a_damaged_scaler_is_refused(cfg, float16, name, value):
    state = finished(cfg)
    if isinstance(value, dict) and value != {"scale": 65536.0}:
        value = state["scaler"] | value
    path = Pretraining(cfg, "auto").output / "damaged.pt"
    save_checkpoint(path, state | {name: value})
    with pytest.raises(CheckpointError, match=rf"damaged\.pt is no whole training state: {name} = "):
        Pretraining(cfg, path)


# ---------------------------------------------------------------- read a step late, as on an accelerator


def late(cfg, *arguments, **more) -> Pretraining:
    run = Pretraining(cfg, *arguments, **more)
    run.late = 1
    return run


def test_numbers_that_are_read_late_are_the_same_numbers(cfg, tmp_path):
    runs, told = [], []
    for number, make in enumerate((Pretraining, late)):
        cfg.hardware.output_dir = str(tmp_path / str(number))
        told.append(Told(0, die))
        runs.append(load_checkpoint(make(cfg, callbacks=[told[-1]]).run()))
    assert_same(*runs)
    assert told[0].steps == told[1].steps and [step for step, _ in told[0].steps] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("step", [3, HALF - 1, HALF, STEPS - 1])
def test_a_signal_that_is_heard_late_loses_no_step(cfg, tmp_path, step):
    whole = finished(cfg)
    cfg.hardware.output_dir, cfg.hardware.checkpoint_every = str(tmp_path / "stopped"), 100
    run = late(cfg)
    train_step = run.train_step
    run.train_step = lambda images: (train_step(images), run.step == step and os.kill(os.getpid(), signal.SIGTERM))[0]
    if step == STEPS - 1:  # the last step is under way before anyone hears of it
        run.run()
    else:
        with pytest.raises(RunInterrupted):
            run.run()
        state = load_checkpoint(run.checkpoints.latest)
        assert state["step"] == (step if step == HALF else step + 1) and len(state["losses"]) == state["step"] % HALF
    assert_same(finished(cfg, "auto"), whole)


def test_minutes_that_are_over_are_heard_late(cfg, tmp_path):
    whole = finished(cfg)
    cfg.hardware.output_dir, cfg.hardware.checkpoint_minutes = str(tmp_path / "often"), 1e-9
    cfg.hardware.keep_checkpoints = 100
    run = late(cfg)
    run.run()
    assert [int(p.stem[5:]) for p in reversed(run.checkpoints.newest_first())] == [2, 4, 6, 8, 10, 12, 14, 16, 18, 20]
    assert_same(load_checkpoint(run.checkpoints.latest), whole)


@pytest.mark.parametrize("mixed", [False, True])
def test_what_is_no_number_reaches_no_weights_before_it_is_read(cfg, float16, mixed):
    """A gradient, and a loss whose gradient is fine: the update is left out on the device, and the teacher stands still."""
    cfg.hardware.mixed_precision = mixed
    for number in (math.nan, math.inf):
        for broken in ("gradient", "loss"):
            run = late(cfg)
            if broken == "gradient":
                run.model.predictor.mask_token.register_hook(lambda gradient, number=number: gradient * number)
            else:
                loss = run.loss
                run.loss = lambda *given, loss=loss, number=number: loss(*given) + number
            run.model.student_encoder.pos_embed.data.add_(1)  # so that the teacher has something to follow
            before = copy.deepcopy(run.model.state_dict())
            run.train_step(torch.randn(8, 1, 16, 16))
            assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items()), (number, broken)
            if broken == "loss" or not mixed:
                with pytest.raises(TrainingError, match="at step 0 the loss is"):
                    run._check(0, *run._numbers.tolist())


def test_a_loss_that_is_no_number_is_told_of_a_step_later(cfg):
    run = late(cfg)
    before = copy.deepcopy(run.model.state_dict())
    run.model.predictor.mask_token.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(TrainingError, match=r"at step 0 the loss is 0\.\d+ and the gradient's norm nan"):
        run.run()
    assert run.step == 2 and all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())
    assert not run.checkpoints.latest.exists()


@pytest.mark.parametrize("make", [Pretraining, late])
def test_a_batch_that_cannot_be_had_ends_the_run_after_the_last_one_that_can(cfg, monkeypatch, make):
    def four(*arguments, batches=loop.training_batches, **more):
        yield from islice(batches(*arguments, **more), 4)
        raise OSError("the disk is gone")

    monkeypatch.setattr(loop, "training_batches", four)
    run = make(cfg)
    with pytest.raises(RunStopped, match="the disk is gone"):
        run.run()
    state = load_checkpoint(run.checkpoints.latest)
    assert state["step"] == len(state["losses"]) == 4
