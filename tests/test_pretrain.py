"""A run repeats to the last digit, goes on after an interruption as if there had been none, and says what is wrong in one line."""

import copy
import json
import math

import pytest
import torch

from wejepa import devices
from wejepa.analysis.features import encode_images
from wejepa.config import DataConfig, HardwareConfig, IJepaConfig, MaskConfig, ModelConfig, OptimizerConfig, default_config, hf224_config
from wejepa.data import load_images, steps_per_epoch
from wejepa.errors import CheckpointError, ConfigError, DataError, TrainingError
from wejepa.train import callbacks, pretrain
from wejepa.train.callbacks import Monitor, OnEpoch
from wejepa.train.checkpoints import load_checkpoint, load_model
from wejepa.train.loop import Pretraining, parameter_groups
from wejepa.train.pretrain import expected_minutes, launch_pretraining, main

STEPS = 4  # in an epoch
KEYS = {"epoch", "step", "loss", "teacher_variance", "rankme", "knn", "images_per_second", "seconds"}


@pytest.fixture
def cfg(tmp_path) -> IJepaConfig:
    return IJepaConfig(
        data=DataConfig(use_fake_data=True, fake_data_size=32, train_batch_size=8, eval_batch_size=16),
        mask=MaskConfig(target_scale=(0.1, 0.2), num_target_blocks=2, context_share=0.3),
        model=ModelConfig(img_size=16, patch_size=4, in_chans=1, embed_dim=16, enc_depth=2, pred_depth=1, pred_dim=12, num_heads=2),
        optimizer=OptimizerConfig(epochs=3, warmup_epochs=1, base_learning_rate=5e-3, momentum_teacher=0.5, momentum_teacher_final=1.0),
        hardware=HardwareConfig(device="cpu", mixed_precision=False, checkpoint_every=1, output_dir=str(tmp_path / "run")),
    )


def losses(history) -> list[float]:
    return [entry["loss"] for entry in history]


def assert_equal_states(one, other, where="state"):
    """Bitwise equality of nested states."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal_states(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for i, pair in enumerate(zip(one, other, strict=True)):
            assert_equal_states(*pair, f"{where}.{i}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif where.rsplit(".", 1)[-1] not in ("seconds", "images_per_second", "output_dir"):
        assert one == other, where


# ---------------------------------------------------------------- a whole run


def test_a_run_leaves_a_checkpoint_and_a_history(cfg, capsys):
    result = launch_pretraining(cfg)
    assert [entry["epoch"] for entry in result.history] == [1, 2, 3]
    assert [entry["step"] for entry in result.history] == [STEPS, 2 * STEPS, 3 * STEPS]
    for entry in result.history:
        assert entry.keys() >= KEYS
        assert all(math.isfinite(entry[key]) for key in KEYS)
        assert entry["images_per_second"] == pytest.approx(32 / entry["seconds"])
        assert entry["teacher_variance"] > 0 and 1 <= entry["rankme"] <= 17 and 0 <= entry["knn"] <= 1
    state = load_checkpoint(result.checkpoint)
    assert state["step"] == 3 * STEPS and losses(state["history"]) == losses(result.history)
    assert not result.model.training
    assert_equal_states(load_model(result.checkpoint).state_dict(), result.model.state_dict())
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 1 + 3  # a heading and one line an epoch
    for entry, line in zip(result.history, lines[1:], strict=True):
        assert f"{entry['loss']:.4f}" in line


def test_the_history_survives_json(cfg):
    cfg.optimizer.epochs = 1
    history = launch_pretraining(cfg).history
    assert json.loads(json.dumps(history)) == history


def test_the_config_handed_in_is_left_alone(cfg):
    before = cfg.copy()
    cfg.optimizer.epochs = before.optimizer.epochs = 1
    launch_pretraining(cfg)
    assert cfg == before


def test_the_same_seed_gives_the_same_run_to_the_last_digit(cfg, tmp_path):
    one = launch_pretraining(cfg)
    torch.rand(7)  # whatever else is drawn in the meantime does not matter
    cfg.hardware.output_dir = str(tmp_path / "again")
    again = launch_pretraining(cfg)
    assert losses(one.history) == losses(again.history)
    assert_equal_states(load_checkpoint(one.checkpoint), load_checkpoint(again.checkpoint))
    cfg.hardware.seed = 1
    other = launch_pretraining(cfg)
    assert all(a != b for a, b in zip(losses(one.history), losses(other.history), strict=True))


def test_the_loss_falls_where_the_targets_stand_still(cfg):
    """With a teacher that never moves this is plain regression, so the loss says whether gradients arrive."""
    cfg.optimizer = OptimizerConfig(epochs=25, warmup_epochs=1, base_learning_rate=5e-3, momentum_teacher=1.0, momentum_teacher_final=1.0)
    cfg.hardware.checkpoint_every = 100
    history = launch_pretraining(cfg).history
    assert sum(losses(history)[-3:]) / 3 < 0.75 * losses(history)[0]


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_where_it_is_native_and_float32_elsewhere(cfg, monkeypatch, native):
    monkeypatch.delenv("WEJEPA_MIXED_PRECISION", raising=False)
    monkeypatch.setattr(devices, "computes_bfloat16", lambda device: native)
    cfg.hardware.mixed_precision, cfg.optimizer.epochs = True, 2
    run, seen = Pretraining(cfg), set()
    run.model.student_encoder.blocks[0].attn.proj.register_forward_hook(lambda _, inputs, output: seen.add(output.dtype))
    run.run()
    assert seen == {torch.bfloat16 if native else torch.float32}
    assert all(math.isfinite(loss) for loss in losses(run.history))
    assert all(p.dtype == torch.float32 for p in run.model.parameters())


def test_bfloat16_can_be_declined(cfg, monkeypatch):
    monkeypatch.setattr(devices, "computes_bfloat16", lambda device: True)
    run, seen = Pretraining(cfg), set()
    run.model.student_encoder.blocks[0].attn.proj.register_forward_hook(lambda _, inputs, output: seen.add(output.dtype))
    run.train_step(torch.randn(8, 1, 16, 16))
    assert seen == {torch.float32}


# ---------------------------------------------------------------- one step


def test_weights_decay_and_nothing_else_does(cfg):
    model = Pretraining(cfg).model
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {group["decays"]: [names[id(p)] for p in group["params"]] for group in parameter_groups(model)}
    listed = groups[True] + groups[False]
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sorted(listed) == sorted(trained)  # each in exactly one group
    assert not any(name.startswith("teacher_encoder") for name in listed)
    for name in trained:
        plain = name.endswith("bias") or "norm" in name or "pos_embed" in name or "mask_token" in name
        assert name in groups[not plain], name
    for name in (
        "student_encoder.pos_embed",
        "predictor.mask_token",
        "student_encoder.norm.weight",
        "student_encoder.patch_embed.proj.bias",
    ):
        assert name in groups[False]
    for name in ("student_encoder.patch_embed.proj.weight", "student_encoder.blocks.0.attn.qkv.weight", "predictor.proj.weight"):
        assert name in groups[True]


def test_the_optimizer_follows_the_schedule(cfg):
    cfg.optimizer.weight_decay, cfg.optimizer.final_weight_decay = 0.1, 0.5
    run, images = Pretraining(cfg), torch.randn(8, 1, 16, 16)
    for step in range(6):
        run.train_step(images)
        now = run.schedule(step)
        for group in run.optimizer.param_groups:
            assert group["lr"] == now.learning_rate
            assert group["weight_decay"] == (now.weight_decay if group["decays"] else 0)
    assert run.step == 6


def test_the_optimizer_remembers_ten_gradients_and_twenty_squares(cfg):
    """Their moments after one step are a tenth of the gradient and a twentieth of its square, not PyTorch's thousandth."""
    run = Pretraining(cfg)
    run.train_step(torch.randn(8, 1, 16, 16))
    for group in run.optimizer.param_groups:
        for p in group["params"]:
            torch.testing.assert_close(run.optimizer.state[p]["exp_avg"], 0.1 * p.grad)
            torch.testing.assert_close(run.optimizer.state[p]["exp_avg_sq"], 0.05 * p.grad**2)


def test_the_optimizers_memory_is_the_configs(cfg):
    cfg.optimizer.betas = (0.5, 0.75)
    run = Pretraining(cfg)
    run.train_step(torch.randn(8, 1, 16, 16))
    moments = run.optimizer.state[p := run.model.predictor.proj.weight]
    torch.testing.assert_close(moments["exp_avg"], 0.5 * p.grad)
    torch.testing.assert_close(moments["exp_avg_sq"], 0.25 * p.grad**2)


def test_the_teacher_follows_with_the_schedules_momentum(cfg):
    run, images = Pretraining(cfg), torch.randn(8, 1, 16, 16)
    for step in range(5):
        momentum = run.schedule(step).momentum
        before = {k: v.clone() for k, v in run.model.teacher_encoder.named_parameters()}
        was = {k: v.detach().clone() for k, v in run.model.student_encoder.named_parameters()}
        run.train_step(images)
        for name, p in run.model.student_encoder.named_parameters():
            expected = momentum * before[name].double() + (1 - momentum) * p.detach().double()
            torch.testing.assert_close(run.model.get_parameter(f"teacher_encoder.{name}").double(), expected, rtol=0, atol=1e-6)
            assert not torch.equal(p, was[name]), name  # every parameter of the student is trained
    assert run.schedule(4).momentum > run.schedule(0).momentum == 0.5


def test_only_the_teacher_stands_still_at_a_momentum_of_one(cfg):
    cfg.optimizer.momentum_teacher = 1.0
    run = Pretraining(cfg)
    before = copy.deepcopy(run.model.state_dict())
    run.train_step(torch.randn(8, 1, 16, 16))
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("teacher_encoder"), name


def test_gradients_are_clipped_as_a_whole(cfg, monkeypatch):
    norms = []

    def step(self, *_):
        norms.append(float(torch.stack([p.grad.norm() for g in self.param_groups for p in g["params"]]).norm()))

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    images = torch.randn(8, 1, 16, 16)
    for limit in (1e-3, 0.0):
        cfg.optimizer.grad_clip_norm = limit
        Pretraining(cfg).train_step(images)
    assert norms[0] == pytest.approx(1e-3, rel=0.01) and norms[1] > 2e-3


def test_a_loss_that_is_no_number_stops_the_run(cfg):
    run = Pretraining(cfg)
    images = torch.randn(8, 1, 16, 16)
    run.train_step(images)
    with torch.no_grad():
        run.model.predictor.mask_token.fill_(math.nan)
    before = copy.deepcopy(run.model.state_dict())
    with pytest.raises(TrainingError, match=r"at step 1 the loss is nan .* below optimizer\.base_learning_rate = 0\.005") as caught:
        run.train_step(images)
    assert "\n" not in str(caught.value) and str(run.output) in str(caught.value)
    assert run.step == 1
    for name, value in run.model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)  # the student and the teacher were spared


def test_monitoring_looks_at_the_teacher_and_changes_nothing(cfg):
    run = Pretraining(cfg)
    before = copy.deepcopy(run.state())
    first = run.monitor()
    assert first.keys() == {"teacher_variance", "rankme", "knn"} and run.monitor() == first
    assert_equal_states(run.state(), before)
    with torch.no_grad():
        run.model.teacher_encoder.patch_embed.proj.weight.zero_()  # every image looks the same to this teacher
    collapsed = run.monitor()
    assert first["teacher_variance"] > 0.01 and first["rankme"] > 1.1
    assert collapsed["teacher_variance"] == pytest.approx(0, abs=1e-9) and collapsed["rankme"] == pytest.approx(1, abs=0.01)


def test_the_monitor_asks_other_images_than_vote_and_draws_all_of_them_at_random(cfg, monkeypatch):
    """An image that votes for itself is always right; and a folder is sorted by class, so its first images may all be of one."""
    asked = []
    monkeypatch.setattr(callbacks, "knn_accuracy", lambda *parts: asked.append(parts) or 0.0)
    cfg.data.fake_data_size = 3000
    run = Pretraining(cfg)
    run.source.labels = torch.arange(3000)  # each image has a name of its own
    run.monitor()
    ((voters_x, voters, queries_x, queries),) = asked
    assert (len(voters), len(queries)) == (1000, 500)
    drawn = torch.cat([voters, queries])
    assert len(drawn.unique()) == 1500
    for some in (voters, queries):
        assert 0.4 < (some < 1500).float().mean() < 0.6
    tokens = encode_images(run.model, run.source, drawn, run.cfg)
    torch.testing.assert_close(torch.cat([voters_x, queries_x]), tokens.mean(1))


# ---------------------------------------------------------------- interruptions


class Interrupted(Exception):
    pass


def interrupt(cfg: IJepaConfig, in_epoch: int, resume=None) -> None:
    """Run until the given epoch is over but not yet saved."""

    def report(entry):
        if entry["epoch"] == in_epoch:
            raise Interrupted

    with pytest.raises(Interrupted):
        Pretraining(cfg, resume, callbacks=[OnEpoch(report)]).run()


@pytest.mark.parametrize("by_name", [True, False])
def test_a_resumed_run_equals_an_uninterrupted_one(cfg, tmp_path, by_name):
    whole = launch_pretraining(cfg)
    cfg.hardware.output_dir = str(tmp_path / "interrupted")
    interrupt(cfg, in_epoch=2)
    path = tmp_path / "interrupted" / whole.checkpoint.name
    assert load_checkpoint(path)["step"] == STEPS
    torch.manual_seed(12345)
    resumed = launch_pretraining(cfg, resume=str(path) if by_name else "auto")
    assert losses(resumed.history) == losses(whole.history)
    assert_equal_states(load_checkpoint(resumed.checkpoint), load_checkpoint(whole.checkpoint))


def test_a_run_can_be_interrupted_twice(cfg, tmp_path):
    whole = launch_pretraining(cfg)
    cfg.hardware.output_dir = str(tmp_path / "interrupted")
    interrupt(cfg, in_epoch=2)
    interrupt(cfg, in_epoch=3, resume="auto")
    assert losses(launch_pretraining(cfg, resume="auto").history) == losses(whole.history)


def test_checkpoints_come_when_the_config_says(cfg):
    cfg.hardware.checkpoint_every = 2
    path = Pretraining(cfg).output / "latest.pt"
    interrupt(cfg, in_epoch=2)
    assert not path.exists()
    interrupt(cfg, in_epoch=3)
    assert load_checkpoint(path)["step"] == 2 * STEPS
    cfg.hardware.checkpoint_every = 100
    assert load_checkpoint(launch_pretraining(cfg).checkpoint)["step"] == 3 * STEPS  # the last epoch always


def test_auto_with_nothing_to_resume_starts_afresh(cfg, tmp_path):
    fresh = launch_pretraining(cfg)
    cfg.hardware.output_dir = str(tmp_path / "elsewhere")
    assert losses(launch_pretraining(cfg, resume="auto").history) == losses(fresh.history)


def test_a_finished_run_has_nothing_left_to_do(cfg, capsys):
    done = launch_pretraining(cfg)
    again = launch_pretraining(cfg, resume="auto")
    assert again.history == done.history and again.checkpoint == done.checkpoint
    assert_equal_states(again.model.state_dict(), done.model.state_dict())


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("optimizer", "base_learning_rate", 1e-3),
        ("optimizer", "epochs", 4),
        ("model", "embed_dim", 32),
        ("mask", "num_target_blocks", 3),
        ("data", "train_batch_size", 16),
    ],
)
def test_resuming_with_other_settings_is_refused(cfg, section, name, value):
    interrupt(cfg, in_epoch=2)
    before = getattr(getattr(cfg, section), name)
    setattr(getattr(cfg, section), name, value)
    with pytest.raises(CheckpointError, match=rf"{section}\.{name} = {before}, this run says {value}"):
        launch_pretraining(cfg, resume="auto")


def test_resuming_with_another_seed_is_refused(cfg):
    interrupt(cfg, in_epoch=2)
    cfg.hardware.seed = 1
    with pytest.raises(CheckpointError, match=r"hardware\.seed"):
        launch_pretraining(cfg, resume="auto")


def test_what_does_not_change_the_result_may_change(cfg, tmp_path):
    interrupt(cfg, in_epoch=2)
    cfg.data.eval_batch_size, cfg.data.root, cfg.hardware.checkpoint_every = 7, str(tmp_path), 2
    assert len(launch_pretraining(cfg, resume="auto").history) == 3


def test_resuming_from_nothing_is_refused(cfg, tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint"):
        launch_pretraining(cfg, resume=str(tmp_path / "none.pt"))


# ---------------------------------------------------------------- refusals before anything is done


def test_a_config_that_does_not_hold_together_is_refused(cfg):
    cfg.model.patch_size = 5
    with pytest.raises(ConfigError, match=r"model\.patch_size = 5"):
        launch_pretraining(cfg)


def test_a_batch_larger_than_the_set_is_refused(cfg):
    cfg.data.train_batch_size = 33
    with pytest.raises(DataError, match=r"data\.train_batch_size = 33"):
        launch_pretraining(cfg)


@pytest.mark.parametrize("device", ["quantum", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(cfg, device):
    cfg.hardware.device = device
    with pytest.raises(ConfigError, match=rf"hardware\.device = '{device}'"):
        launch_pretraining(cfg)


# ---------------------------------------------------------------- the command line


def printed_config(capsys, *arguments: str) -> IJepaConfig:
    assert main([*arguments, "--print-config"]) == 0
    return IJepaConfig.from_dict(json.loads(capsys.readouterr().out))


def refused(capsys, *arguments: str) -> str:
    """The one line on standard error with which the command refuses."""
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.err.endswith("\n")
    return captured.err


def test_the_config_is_printed_as_json(capsys):
    assert printed_config(capsys) == default_config()
    assert printed_config(capsys, "--preset", "hf224") == hf224_config()
    assert printed_config(capsys, "--preset", "ijepa_paper").model.blockwise_prediction


def test_single_settings(capsys):
    expected = default_config()
    expected.optimizer.epochs, expected.data.dataset, expected.mask.target_scale = 7, "cifar10", (0.1, 0.15)
    arguments = ("--set", "optimizer.epochs=7", "--set", "data.dataset=cifar10", "--set", "mask.target_scale=[0.1, 0.15]")
    assert printed_config(capsys, *arguments) == expected


def test_a_file_of_settings_overlays_the_preset_and_is_overlaid_by_single_ones(capsys, tmp_path):
    file = tmp_path / "my.json"
    file.write_text(json.dumps({"optimizer": {"epochs": 30, "weight_decay": 0.1}}))
    expected = hf224_config()
    expected.optimizer.epochs, expected.optimizer.weight_decay = 31, 0.1
    assert printed_config(capsys, "--preset", "hf224", "--config", str(file), "--set", "optimizer.epochs=31") == expected


def test_what_is_printed_can_be_read_again(capsys, tmp_path):
    assert main(["--set", "model.embed_dim=48", "--print-config"]) == 0
    (tmp_path / "my.json").write_text(capsys.readouterr().out)
    assert printed_config(capsys, "--config", str(tmp_path / "my.json")).model.embed_dim == 48


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("optimizer.epoch=3", "did you mean 'epochs'?"),
        ("optimiser.epochs=3", "did you mean 'optimizer'?"),
        ("optimizer.epochs=three", "optimizer.epochs = 'three'"),
        ("optimizer.epochs", "section.field=value"),
        ("model.patch_size=5", "model.patch_size = 5"),
    ],
)
def test_a_wrong_setting_is_one_line_and_exit_code_2(capsys, argument, named):
    message = refused(capsys, "--set", argument)
    assert message.startswith("ConfigError: ") and named in message


@pytest.mark.parametrize("content", ["{", "", "no json", "[1, 2]", '{"model": 3}', '{"model": {"embed": 3}}'])
def test_a_wrong_file_is_one_line_and_exit_code_2(capsys, tmp_path, content):
    file = tmp_path / "my.json"
    file.write_text(content)
    assert refused(capsys, "--config", str(file)).startswith("ConfigError: ")


def test_a_file_that_is_not_there_is_named(capsys, tmp_path):
    assert str(tmp_path / "none.json") in refused(capsys, "--config", str(tmp_path / "none.json"))


def command(cfg: IJepaConfig, tmp_path, *arguments: str) -> list[str]:
    (tmp_path / "cli.json").write_text(json.dumps(cfg.to_dict()))
    return ["--config", str(tmp_path / "cli.json"), *arguments]


def test_a_run_from_the_command_line_equals_one_from_python(cfg, tmp_path, capsys):
    expected = launch_pretraining(cfg)
    capsys.readouterr()
    assert main(command(cfg, tmp_path, "--set", f"hardware.output_dir={tmp_path / 'cli'}")) == 0
    out = capsys.readouterr().out
    state = load_checkpoint(tmp_path / "cli" / expected.checkpoint.name)
    assert losses(state["history"]) == losses(expected.history)
    assert "4 x 4 = 16 patches" in out and str(tmp_path / "cli" / expected.checkpoint.name) in out


def test_resuming_from_the_command_line(cfg, tmp_path, capsys):
    whole = losses(launch_pretraining(cfg).history)
    cfg.hardware.output_dir = str(tmp_path / "interrupted")
    interrupt(cfg, in_epoch=3)
    assert main(command(cfg, tmp_path, "--resume", "auto")) == 0
    assert losses(load_checkpoint(tmp_path / "interrupted" / "latest.pt")["history"]) == whole


def test_errors_of_a_run_are_one_line_and_exit_code_2(cfg, tmp_path, capsys):
    assert "no checkpoint" in refused(capsys, *command(cfg, tmp_path, "--resume", str(tmp_path / "none.pt")))
    assert "DataError" in refused(capsys, *command(cfg, tmp_path, "--set", "data.train_batch_size=33"))


def test_a_finished_run_resumed_into_another_folder_leaves_a_checkpoint_there(cfg, tmp_path):
    done = launch_pretraining(cfg)
    cfg.hardware.output_dir = str(tmp_path / "elsewhere")
    assert launch_pretraining(cfg, resume=done.checkpoint).checkpoint.exists()


def test_the_expected_minutes_are_those_of_the_steps_to_come(cfg, monkeypatch, tmp_path):
    """A step of two seconds and a measurement of one, by a clock that they alone move."""
    now = [0.0]
    monkeypatch.setattr(pretrain.time, "perf_counter", lambda: now[0])
    step, monitor = Pretraining.train_step, Monitor.__call__

    def slow_step(run, images):
        now[0] += 2.0
        return step(run, images)

    def slow_monitor(self):
        now[0] += 1.0
        return monitor(self)

    monkeypatch.setattr(Pretraining, "train_step", slow_step)
    monkeypatch.setattr(Monitor, "__call__", slow_monitor)
    cfg.hardware.output_dir = str(tmp_path / "untouched")
    epochs, steps = cfg.optimizer.epochs, steps_per_epoch(load_images(cfg), cfg)
    assert expected_minutes(cfg, steps=2) == pytest.approx(epochs * (2 * steps + 1) / 60)
    assert not (tmp_path / "untouched").exists()
