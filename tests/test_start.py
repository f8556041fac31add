"""A run that begins with weights from elsewhere: what it takes, what it draws anew, what it refuses, and how it is resumed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import STEPS, tiny_config
from test_own_parts import MeanPredictor, assert_same, own_model

from wejepa.config import IJepaConfig, adapt_config_for_backbone, default_config
from wejepa.errors import CheckpointError, ConfigError
from wejepa.interop import to_huggingface
from wejepa.model import IJEPA_base
from wejepa.patches import resize_positions, sincos_positions
from wejepa.presets import PRESETS
from wejepa.train.checkpoints import load_checkpoint, load_model, save_checkpoint, save_model
from wejepa.train.loop import Pretraining
from wejepa.train.pretrain import launch_pretraining, main


@pytest.fixture
def cfg(tmp_path) -> IJepaConfig:
    return tiny_config(tmp_path / "run")


def model_of(cfg: IJepaConfig, seed=7) -> IJEPA_base:
    """Weights that no run draws, and another student than teacher."""
    torch.manual_seed(seed)
    model = IJEPA_base(cfg)
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return model.eval()


def in_metas_layout(model: IJEPA_base, path: Path) -> Path:
    def named(part: torch.nn.Module, prefix: str = "") -> dict:
        names = {k: k.replace("mlp.0", "mlp.fc1").replace("mlp.2", "mlp.fc2") for k in part.state_dict()}
        return {"module." + (n if n == "mask_token" else prefix + n): part.state_dict()[k] for k, n in names.items()}

    parts = {"encoder": named(model.student_encoder), "target_encoder": named(model.teacher_encoder)}
    torch.save(parts | {"predictor": named(model.predictor, "predictor_"), "epoch": 300}, path)
    return path


def assert_taken(run: Pretraining, model: IJEPA_base, but: tuple[str, ...] = ()) -> None:
    found, given = run.model.state_dict(), model.state_dict()
    for name, value in found.items():
        assert torch.equal(value, given[name]) != name.startswith(but or "nothing"), name


# ---------------------------------------------------------------- what is taken


def test_a_checkpoint_of_ours_is_taken_whole(cfg, tmp_path, capsys):
    model = model_of(cfg)
    save_model(tmp_path / "ours.pt", model, source="a test")
    cfg.model.start_from = str(tmp_path / "ours.pt")
    run = Pretraining(cfg)
    assert run.step == 0 and not run.optimizer.state
    assert_taken(run, model)
    told = f"begins with {tmp_path / 'ours.pt'}: teacher taken as teacher, student as student, predictor as predictor\n"
    assert told in capsys.readouterr().out and told in (run.output / "log.txt").read_text()
    assert "begun from" in cfg.summary()


def test_metas_file_is_taken_whole_and_its_positions_resized(cfg, tmp_path, capsys):
    model = model_of(cfg)
    cfg.model.start_from = str(in_metas_layout(model, tmp_path / "metas.pth.tar"))
    assert_taken(Pretraining(cfg), model)
    assert "target_encoder taken as teacher, encoder as student, predictor as predictor\n" in capsys.readouterr().out
    cfg.model.img_size, cfg.hardware.output_dir = 24, str(tmp_path / "larger")
    run = Pretraining(cfg)
    assert_taken(run, model, but=tuple(name for name in model.state_dict() if name.endswith("pos_embed")))
    for part in ("student_encoder", "teacher_encoder", "predictor"):
        found, given = (getattr(m, part).pos_embed for m in (run.model, model))
        assert torch.equal(found, resize_positions(given, (4, 4), (6, 6)))
    assert "; positions resized from 4 x 4 to 6 x 6\n" in capsys.readouterr().out
    assert float(run.train_step(torch.randn(8, 1, 24, 24))) > 0


def test_of_hugging_faces_folder_both_encoders_and_a_predictor_of_the_seeds(cfg, tmp_path, capsys):
    pytest.importorskip("safetensors")
    model = model_of(cfg)
    to_huggingface(model, tmp_path / "folder")
    usual = Pretraining(cfg)
    cfg.model.start_from, cfg.hardware.output_dir = str(tmp_path / "folder"), str(tmp_path / "begun")
    run = Pretraining(cfg)
    for encoder in (run.model.student_encoder, run.model.teacher_encoder):
        assert all(torch.equal(value, model.teacher_encoder.state_dict()[name]) for name, value in encoder.state_dict().items())
    assert all(torch.equal(value, usual.model.predictor.state_dict()[name]) for name, value in run.model.predictor.state_dict().items())
    told = capsys.readouterr().out
    assert "context encoder) taken as teacher and student; the predictor is freshly initialised" in told and told.count("taken as") == 1


def test_a_predictor_of_the_runs_own_stays(cfg, tmp_path, capsys):
    usual = model_of(cfg)
    save_model(tmp_path / "ours.pt", usual, source="a test")
    cfg.model.start_from = str(tmp_path / "ours.pt")
    model = own_model(cfg)
    before = {name: value.clone() for name, value in model.predictor.state_dict().items()}
    run = Pretraining(cfg, model=model)
    assert isinstance(run.model.predictor, MeanPredictor) and run.model is model
    assert all(torch.equal(value, before[name]) for name, value in run.model.predictor.state_dict().items())
    assert all(torch.equal(value, usual.student_encoder.state_dict()[name]) for name, value in model.student_encoder.state_dict().items())
    assert "the predictor is the run's own MeanPredictor" in capsys.readouterr().out
    # And the other way round: from what was trained with another predictor, the encoders.
    checkpoint = run.run()
    other = tiny_config(tmp_path / "other")
    other.model.start_from = str(checkpoint)
    begun = Pretraining(other)
    assert torch.equal(begun.model.teacher_encoder.pos_embed, model.teacher_encoder.pos_embed)
    assert "the predictor is freshly initialised" in capsys.readouterr().out


def test_running_averages_are_taken_too(cfg, tmp_path):
    data, hardware = cfg.data, cfg.hardware
    cfg = adapt_config_for_backbone(default_config(), "mobilenet_v3_small")
    cfg.data, cfg.hardware = data, hardware
    model = model_of(cfg)
    for name, value in model.named_buffers():
        if value.is_floating_point():
            value.fill_(0.5 if "teacher" in name else 0.25)
    save_model(tmp_path / "ours.pt", model, source="a test")
    cfg.model.start_from = str(tmp_path / "ours.pt")
    assert_taken(Pretraining(cfg), model)


# ---------------------------------------------------------------- resuming


def test_a_run_so_begun_resumes_to_the_bit_without_the_file(cfg, tmp_path):
    file = in_metas_layout(model_of(cfg), tmp_path / "metas.pth.tar")
    cfg.model.start_from, cfg.hardware.checkpoint_every = str(file), 1
    whole = launch_pretraining(cfg)
    file.unlink()
    cfg.hardware.output_dir = str(tmp_path / "resumed")
    resumed = launch_pretraining(cfg, whole.checkpoint.with_name(f"step_{STEPS // 2:08d}.pt"))
    assert_same(resumed.checkpoint, whole.checkpoint)
    assert launch_pretraining(cfg, "auto").history == resumed.history
    with pytest.raises(CheckpointError, match="model.start_from: there is no file"):
        Pretraining(cfg)


def test_a_run_goes_on_only_from_the_weights_it_began_with(cfg, tmp_path):
    save_model(tmp_path / "ours.pt", model_of(cfg), source="a test")
    checkpoint = launch_pretraining(cfg).checkpoint
    cfg.model.start_from = str(tmp_path / "ours.pt")
    with pytest.raises(CheckpointError, match="was trained with model.start_from = None, this run says '.*ours.pt'"):
        Pretraining(cfg, checkpoint)


def test_a_finished_run_is_begun_anew_from_its_own_last_checkpoint_in_its_own_folder(cfg):
    first = launch_pretraining(cfg)
    cfg.model.start_from = str(first.checkpoint)
    run = Pretraining(cfg)
    assert_taken(run, first.model)
    assert (run.output / "earlier-1" / f"step_{STEPS:08d}.pt").exists()


def papers_way(cfg: IJepaConfig) -> IJepaConfig:
    """As the paper's preset trains, at the sizes of a test."""
    paper, cfg = PRESETS["ijepa_paper"], cfg.copy()
    for name in ("blockwise_prediction", "positions"):
        setattr(cfg.model, name, paper["model"][name])
    for name in ("weight_decay", "final_weight_decay", "weight_decay_schedule", "betas", "grad_clip_norm", "momentum_schedule"):
        setattr(cfg.optimizer, name, paper["optimizer"][name])
    cfg.optimizer.accumulation_steps, cfg.data.horizontal_flip = 2, False
    return cfg


def test_the_papers_way_learns_and_resumes_to_the_bit(cfg, tmp_path):
    cfg = papers_way(cfg)
    cfg.hardware.checkpoint_every = 1
    whole = launch_pretraining(cfg)
    assert whole.history[1]["loss"] < whole.history[0]["loss"]
    assert torch.equal(whole.model.student_encoder.pos_embed, sincos_positions((4, 4), 16))
    cfg.hardware.output_dir = str(tmp_path / "resumed")
    assert_same(launch_pretraining(cfg, whole.checkpoint.with_name(f"step_{STEPS // 2:08d}.pt")).checkpoint, whole.checkpoint)
    assert load_model(whole.checkpoint).predictor.blockwise


def test_metas_positions_stay_fixed_where_the_config_says_so(cfg, tmp_path):
    model = model_of(cfg)
    cfg = papers_way(cfg)
    cfg.model.start_from = str(in_metas_layout(model, tmp_path / "metas.pth.tar"))
    trained = launch_pretraining(cfg).model
    for part in ("student_encoder", "teacher_encoder", "predictor"):
        assert torch.equal(getattr(trained, part).pos_embed, getattr(model, part).pos_embed)


def test_a_checkpoint_from_before_these_settings_goes_on(cfg, tmp_path):
    cfg.hardware.checkpoint_every = 1
    whole = launch_pretraining(cfg)
    half = whole.checkpoint.with_name(f"step_{STEPS // 2:08d}.pt")
    state = load_checkpoint(half)
    for section, names in {
        "model": ("start_from", "blockwise_prediction", "positions"),
        "optimizer": ("betas", "momentum_schedule", "weight_decay_schedule"),
    }.items():
        for name in names:
            del state["config"][section][name]
    save_checkpoint(tmp_path / "old.pt", {key: value for key, value in state.items() if key != "format"})
    cfg.hardware.output_dir = str(tmp_path / "resumed")
    assert_same(launch_pretraining(cfg, tmp_path / "old.pt").checkpoint, whole.checkpoint)
    assert not load_model(tmp_path / "old.pt").predictor.blockwise


# ---------------------------------------------------------------- what is refused


def refusal(cfg: IJepaConfig, error=CheckpointError) -> str:
    """The line of a refusal that has touched nothing: neither a folder that is not there nor a run that is."""
    folder = Path(cfg.hardware.output_dir)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(error) as refused:
        Pretraining(cfg)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_weights_that_do_not_fit_are_refused_with_what_would(cfg, tmp_path, capsys):
    file = in_metas_layout(model_of(cfg), tmp_path / "metas.pth.tar")
    cfg.model.start_from = str(file)
    for name, value in {"embed_dim": 32, "enc_depth": 3, "norm_eps": 1e-5, "mlp_ratio": 2.0}.items():
        other = cfg.copy()
        setattr(other.model, name, value)
        message = refusal(other)
        found = getattr(cfg.model, name)
        assert message.startswith(f"model.start_from: {file} has ") and f"{name} {found}" in message
        assert f"this run needs {name} {value}" in message and f"--set model.{name}={found}" in message
    for name, value in {"pred_dim": 24, "pred_depth": 2, "pred_mlp_ratio": 2.0}.items():
        other = cfg.copy()
        setattr(other.model, name, value)
        assert f"--set model.{name}=" in (message := refusal(other)) and "convert it to a folder, which leaves its predictor out" in message
    published = cfg.copy()
    published.model.embed_dim = 192
    assert "from a width of 16: give it, for model.start_from as model.num_heads beside model.embed_dim = 16" in refusal(
        published, ConfigError
    )
    two = cfg.copy()
    two.model.embed_dim, two.model.patch_size = 32, 2
    assert "has patch_size 4, embed_dim 16, this run needs patch_size 2, embed_dim 32: " in refusal(two)
    # From the shell, beside a run that is there already.
    launch_pretraining(tiny_config(cfg.hardware.output_dir))
    refusal(two)
    capsys.readouterr()
    (tmp_path / "two.json").write_text(json.dumps(two.to_dict()))
    assert main(["--config", str(tmp_path / "two.json")]) == 2
    assert capsys.readouterr().err.startswith("CheckpointError: model.start_from: ")


def test_heads_of_a_checkpoint_that_tells_them_must_be_the_configs(cfg, tmp_path):
    save_model(tmp_path / "ours.pt", model_of(cfg), source="a test")
    cfg.model.start_from, cfg.model.num_heads = str(tmp_path / "ours.pt"), 4
    assert "has num_heads 2, this run needs num_heads 4" in refusal(cfg)


def test_what_is_no_weights_is_refused(cfg, tmp_path):
    for name, told in {
        "none.pt": "there is no checkpoint",
        "none.pth.tar": "there is no file",
        "./none/there": "there is no folder ./none/there",  # and the hub is not asked for it
        "nowhere": "there is no folder nowhere",
    }.items():
        cfg.model.start_from = name
        assert refusal(cfg).startswith("model.start_from: ") and told in refusal(cfg)
    (tmp_path / "text.safetensors").write_text("no weights")
    cfg.model.start_from = str(tmp_path / "text.safetensors")
    assert "not a wejepa checkpoint" in refusal(cfg)
    model = model_of(cfg)
    model.student_encoder.norm.weight.data[0] = torch.nan
    cfg.model.start_from = str(in_metas_layout(model, tmp_path / "metas.pth.tar"))
    assert "numbers that are not finite, in student_encoder.norm.weight" in refusal(cfg)


def test_one_thing_says_what_a_run_begins_with(cfg):
    cfg = adapt_config_for_backbone(default_config(), "resnet18")
    cfg.model.classification_pretrained, cfg.model.start_from = True, "ours.pt"
    with pytest.raises(ConfigError, match="model.classification_pretrained = true and model.start_from = 'ours.pt' both say"):
        cfg.validate()


# ---------------------------------------------------------------- from the shell, and on several processes


def test_the_command_line_begins_with_weights(cfg, tmp_path, capsys):
    save_model(tmp_path / "ours.pt", model_of(cfg), source="a test")
    (tmp_path / "tiny.json").write_text(json.dumps(cfg.to_dict()))
    assert main(["--config", str(tmp_path / "tiny.json"), "--set", f"model.start_from={tmp_path / 'ours.pt'}"]) == 0
    assert f"begins with {tmp_path / 'ours.pt'}: " in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "run" / "latest.pt")["config"]["model"]["start_from"] == str(tmp_path / "ours.pt")


def test_the_how_tos_command_begins_with_metas_file(capsys):
    """The same from Python is one of the eleven tasks, see test_readme.py."""
    page = (Path(__file__).parent.parent / "website" / "howto" / "weights.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^python -m wejepa.train.pretrain (--preset .*)$", page, flags=re.MULTILINE)
    assert main([*command.split(), "--print-config"]) == 0
    printed = json.loads(capsys.readouterr().out)["model"]
    assert printed["start_from"] == "IN1K-vit.h.14-300e.pth.tar" and printed["positions"] == "sincos"


ON_TWO = """
import json, os, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from ranks import STEPS, tiny_config, train
from test_start import papers_way
from wejepa.errors import CheckpointError
from wejepa.train.loop import Pretraining
results = {{}}
for sharded in (False, True):
    cfg = papers_way(tiny_config({folder!r} + f"/{{sharded}}"))
    cfg.hardware.shard_model, cfg.model.start_from, cfg.hardware.checkpoint_every = sharded, {file!r}, 1
    run = Pretraining(cfg)
    run.checkpoints.lock.release()
    results[f"sharded {{sharded}}"] = train(cfg)
run.ranks.once(lambda: Path({file!r}).rename({file!r} + ".gone"))
results["resumed"] = train(cfg, Path(cfg.hardware.output_dir) / f"step_{{STEPS // 2:08d}}.pt")  # the sharded one, without the file
run.ranks.once(lambda: Path({file!r} + ".gone").rename({file!r}))
cfg.model.embed_dim = 32
try:
    Pretraining(cfg)
except CheckpointError as error:
    results["refused"] = run.ranks.gather(str(error))
if run.ranks.first:
    Path({folder!r} + "/results.json").write_text(json.dumps(results))
run.ranks.leave()
os._exit(0)
"""


@pytest.mark.slow
def test_two_processes_begin_with_the_same_weights_sharded_or_not(cfg, tmp_path):
    """And keep fixed positions fixed, which are no weights that could be sharded; and the sharded one goes on without the file."""
    file = in_metas_layout(model_of(cfg), tmp_path / "metas.pth.tar")
    script = tmp_path / "on_two.py"
    script.write_text(ON_TWO.format(tests=str(Path(__file__).parent), folder=str(tmp_path), file=str(file)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("begins with") == 4  # once a run
    results = json.loads((tmp_path / "results.json").read_text())
    cfg = papers_way(cfg)
    cfg.model.start_from = str(file)
    losses = []
    run = Pretraining(cfg)
    step = run.train_step
    run.train_step = lambda images: losses.append(step(images)) or losses[-1]
    run.run()
    for name in ("sharded False", "sharded True"):
        assert results[name]["same_weights"]
        torch.testing.assert_close(torch.tensor(results[name]["losses"]), torch.tensor(losses).float(), rtol=1e-5, atol=0)
    assert results["resumed"]["weights"] == results["sharded True"]["weights"]
    assert results["resumed"]["losses"] == results["sharded True"]["losses"][STEPS // 2 :]
    assert len(results["refused"]) == 2 and all("this run needs embed_dim 32" in each for each in results["refused"])
