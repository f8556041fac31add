"""A run on images, a model, a predictor and a loss of the caller's own, told by callbacks of the caller's own."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from ranks import STEPS, tiny_config
from torch import Tensor, nn

from wejepa.config import IJepaConfig
from wejepa.data import MemoryImages, load_images
from wejepa.errors import CheckpointError, ConfigError, DataError
from wejepa.model import IJEPA_base
from wejepa.train.callbacks import Callback
from wejepa.train.checkpoints import load_checkpoint, load_model
from wejepa.train.loop import Pretraining
from wejepa.train.pretrain import launch_pretraining

HALF = STEPS // 2  # an epoch


@pytest.fixture
def cfg(tmp_path) -> IJepaConfig:
    return tiny_config(tmp_path / "run")


class MeanPredictor(nn.Module):
    """From the mean of the context and the target's place."""

    def __init__(self, cfg: IJepaConfig):
        super().__init__()
        self.places = nn.Embedding(cfg.grid_size[0] * cfg.grid_size[1], cfg.model.embed_dim)
        self.proj = nn.Linear(cfg.model.embed_dim, cfg.model.embed_dim)

    def forward(self, context: Tensor, masks, grid_size) -> Tensor:
        return self.proj(context.mean(1)[:, None, None] + self.places(masks.targets))


def own_model(cfg: IJepaConfig) -> IJEPA_base:
    torch.manual_seed(5)
    model = IJEPA_base(cfg)
    model.predictor = MeanPredictor(cfg)
    return model


def cosine_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(predictions, targets, dim=-1).mean()


class Listener(Callback):
    def __init__(self):
        self.steps, self.losses, self.epochs = [], [], []

    def on_step(self, step, numbers):
        self.steps.append(step)
        self.losses.append(numbers["loss"])

    def on_epoch(self, entry):
        self.epochs.append(entry["epoch"])


def assert_same(path: Path, other: Path) -> None:
    """Two checkpoints hold the same weights, moments and losses, to the bit."""
    one, other = load_checkpoint(path), load_checkpoint(other)
    assert one["step"] == other["step"]
    assert [e["loss"] for e in one["history"]] == [e["loss"] for e in other["history"]]
    for name in ("model", *(kinds := one["moments"])):
        mine, theirs = (state["moments"][name] if name in kinds else state[name] for state in (one, other))
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[key]) for key, value in mine.items()), name


# ---------------------------------------------------------------- model, predictor, loss


def test_a_run_with_parts_of_its_own_is_told_of_and_resumes_to_the_bit(cfg, tmp_path):
    cfg.hardware.checkpoint_every = 1
    parts = {"loss": cosine_loss}
    heard = Listener()
    whole = launch_pretraining(cfg, model=own_model(cfg), callbacks=[heard], **parts)
    assert heard.steps == list(range(1, STEPS + 1)) and heard.epochs == [1, 2]
    assert heard.losses[0] == pytest.approx(1, abs=0.5) and heard.losses[-1] < 0.9 * heard.losses[0]
    state = load_checkpoint(whole.checkpoint)
    assert state["parts"] == {"predictor": "MeanPredictor", "loss": "cosine_loss"}
    half = whole.checkpoint.with_name(f"step_{HALF:08d}.pt")

    cfg.hardware.output_dir = str(tmp_path / "resumed")
    fresh = own_model(cfg)
    nn.init.zeros_(fresh.predictor.proj.weight)  # the checkpoint's weights count, not those that come with the model
    resumed = launch_pretraining(cfg, half, model=fresh, **parts)
    assert resumed.model is fresh
    assert_same(resumed.checkpoint, whole.checkpoint)

    # What reads a checkpoint without the predictor's code reads the encoders, and the whole of it loads where the code is.
    model = load_model(whole.checkpoint)
    assert model.predictor is None
    images = torch.randn(2, 1, 16, 16)
    assert torch.equal(model.encode(images), whole.model.encode(images))
    again = own_model(cfg)
    again.load_state_dict(state["model"])
    assert torch.equal(again.predictor.proj.weight, whole.model.predictor.proj.weight)


def test_a_model_handed_in_is_trained_in_place_from_its_own_weights(cfg):
    model = own_model(cfg).eval()
    before = copy.deepcopy(model.state_dict())
    run = Pretraining(cfg, model=model)
    assert run.model is model and model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    run.train_step(torch.randn(8, 1, 16, 16))
    assert not torch.equal(model.predictor.proj.weight, before["predictor.proj.weight"])


def test_the_usual_model_and_loss_handed_in_make_the_usual_run(cfg, tmp_path):
    usual = launch_pretraining(cfg)
    cfg.hardware.output_dir = str(tmp_path / "again")
    torch.manual_seed(cfg.hardware.seed)
    again = launch_pretraining(cfg, model=IJEPA_base(cfg), source=load_images(cfg))
    assert_same(again.checkpoint, usual.checkpoint)
    assert "parts" not in load_checkpoint(again.checkpoint)


@pytest.mark.parametrize("parts", [{}, {"loss": cosine_loss}, {"model": own_model}])
def test_other_parts_than_the_checkpoints_are_refused(cfg, parts):
    cfg.optimizer.epochs = 1
    Pretraining(cfg, model=own_model(cfg), loss=cosine_loss).run()
    parts = {name: part(cfg) if name == "model" else part for name, part in parts.items()}
    with pytest.raises(
        CheckpointError, match="was trained with predictor MeanPredictor, loss cosine_loss, this run has .*the same predictor"
    ):
        Pretraining(cfg, Path(cfg.hardware.output_dir) / "latest.pt", **parts)


def refusal(cfg: IJepaConfig, **parts) -> str:
    with pytest.raises((ConfigError, DataError)) as caught:
        Pretraining(cfg, **parts)
    assert not Path(cfg.hardware.output_dir).exists() and "\n" not in str(caught.value)
    return str(caught.value)


def test_what_does_not_fit_is_refused_before_anything_is_written(cfg):
    other = cfg.copy()
    other.model.embed_dim = 32
    assert "model.embed_dim is 16 in the config and 32 in the model" in refusal(cfg, model=IJEPA_base(other))
    assert "give an IJEPA_base, not Linear" in refusal(cfg, model=nn.Linear(2, 2))
    assert "give wejepa.data.as_source(dataset, cfg)" in refusal(cfg, source=[torch.zeros(1, 16, 16)] * 10)
    shape = {"img_size": 32, "in_chans": 1, "mean": (0.5,), "std": (0.3,)}
    large = MemoryImages(torch.zeros(9, 1, 32, 32, dtype=torch.uint8), torch.zeros(9, dtype=torch.long), ("",), **shape)
    assert "it gives images torch.float32 (1, 32, 32), model.in_chans and model.img_size need torch.float32 (1, 16, 16)" in refusal(
        cfg, source=large
    )


def test_a_predictor_or_a_loss_of_another_shape_is_refused_at_the_first_step(cfg):
    model = own_model(cfg)
    model.predictor.proj = nn.Linear(16, 1)
    with pytest.raises(ConfigError, match=r"predictor: it gives \(8, 2, \d, 1\) for targets \(8, 2, \d, 16\)"):
        Pretraining(cfg, model=model).train_step(torch.randn(8, 1, 16, 16))
    with pytest.raises(ConfigError, match=r"loss: it gives \(8, 2, \d, 16\); take the mean"):
        Pretraining(cfg, loss=lambda p, t: (p - t) ** 2).train_step(torch.randn(8, 1, 16, 16))


# ---------------------------------------------------------------- several processes

ON_TWO = """
import json, os, sys
sys.path.insert(0, {tests!r})
import torch, torch.distributed as dist
from ranks import tiny_config, train
from test_own_parts import IJEPA_base, MeanPredictor, Pretraining, cosine_loss, own_model
from wejepa.data import load_images
from wejepa.errors import DataError
cfg = tiny_config({folder!r})
run = Pretraining(cfg)  # joins the other process
rank = run.ranks.rank
model = own_model(cfg)
if rank:
    torch.nn.init.zeros_(model.predictor.proj.weight)  # the first process's weights count
results = {{}}
for sharded in (False, True):
    cfg = tiny_config({folder!r} + f"/{{sharded}}")
    cfg.hardware.shard_model = sharded
    results[f"sharded {{sharded}}"] = train(cfg, model=own_model(cfg) if not rank else model, source=load_images(cfg), loss=cosine_loss)
cfg.data.fake_data_size -= 8 * rank
try:
    Pretraining(cfg, source=load_images(cfg))
except DataError as error:
    results["refused"] = str(error)
if rank == 0:
    open({folder!r} + "/results.json", "w").write(json.dumps(results))
run.ranks.leave()
os._exit(0)
"""


@pytest.mark.slow
def test_two_processes_make_the_run_of_one_with_parts_of_its_own(cfg, tmp_path):
    script = tmp_path / "on_two.py"
    script.write_text(ON_TWO.format(tests=str(Path(__file__).parent), folder=str(tmp_path)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    heard = Listener()
    Pretraining(cfg, model=own_model(cfg), loss=cosine_loss, callbacks=[heard]).run()
    for name in ("sharded False", "sharded True"):
        assert results[name]["same_weights"]
        torch.testing.assert_close(torch.tensor(results[name]["losses"]), torch.tensor(heard.losses), rtol=1e-5, atol=0)
    assert "the processes of the run have different ones, 72 images and 80 images" in results["refused"]
