"""Malformed input at the public entry points: taken and right, or refused with the package's own error in one line."""

import copy
import dataclasses
import io
import json
import random
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ranks import STEPS, tiny_config

from benchmarks.faults import same
from wejepa.config import IJepaConfig, default_config
from wejepa.errors import CheckpointError, ConfigError, WejepaError
from wejepa.masking import sample_block_masks
from wejepa.train.checkpoints import load_checkpoint, load_model
from wejepa.train.finetune import FinetuneConfig
from wejepa.train.finetune import main as finetune
from wejepa.train.loop import Pretraining
from wejepa.train.pretrain import launch_pretraining
from wejepa.train.pretrain import main as pretrain

SECTIONS = default_config().to_dict()
quick = dict(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

numbers = st.one_of(
    st.integers(), st.floats(), st.sampled_from([0, 1, 2, 3, 4, 8, 16, 32, 64, 0.0, 0.5, 0.99, 1.0, -1, 1e-9, 1e30, True, False])
)
junk = st.recursive(
    st.one_of(st.none(), numbers, st.text(max_size=5), st.binary(max_size=3)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=2), st.tuples(inner, inner)),
    max_leaves=4,
)
names = st.one_of(st.sampled_from([name for settings in SECTIONS.values() for name in settings]), st.text(max_size=6))


def one_line(error: WejepaError) -> None:
    assert isinstance(error, WejepaError) and str(error) and "\n" not in str(error)


@st.composite
def malformed_configs(draw):
    """A config's dict with one to three settings, sections or the whole replaced by what does not belong there, or just might."""
    values = copy.deepcopy(SECTIONS)
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["value", "value", "value", "number", "pair", "name", "section", "whole"]))
        section = draw(st.sampled_from(sorted(SECTIONS)))
        if not isinstance(values, dict) or not isinstance(values.get(section, {}), dict):
            continue
        inside = values.setdefault(section, {})
        if kind == "value":
            inside[draw(st.sampled_from(sorted(SECTIONS[section])))] = draw(junk)
        elif kind == "number":
            inside[draw(st.sampled_from(sorted(SECTIONS[section])))] = draw(numbers)
        elif kind == "pair":
            inside[draw(st.sampled_from(sorted(SECTIONS["mask"])))] = [draw(numbers), draw(numbers)]
        elif kind == "name":
            inside[draw(names)] = draw(junk)
        elif kind == "section":
            values[draw(st.one_of(st.just(section), st.text(max_size=5)))] = draw(junk)
        else:
            values = draw(junk)
    return values


def check_accepted(cfg: IJepaConfig) -> None:
    """A config that was taken holds together: it survives the way to JSON and back, and its masks can be drawn."""
    plain = json.loads(json.dumps(cfg.to_dict(), allow_nan=False))
    assert IJepaConfig.from_dict(plain) == cfg
    for section, defaults in SECTIONS.items():
        for name, default in defaults.items():
            if default is not None:
                assert type(plain[section][name]) is type(default) or plain[section][name] is None, name
    rows, _ = cfg.grid_size
    assert rows * cfg.model.patch_size == cfg.model.img_size and cfg.model.embed_dim % cfg.model.num_heads == 0
    if rows <= 64:
        masks = sample_block_masks(2, cfg.grid_size, cfg.mask)
        for context, targets in zip(masks.context, masks.targets, strict=True):
            assert not set(context.tolist()) & set(targets.flatten().tolist())
    assert cfg.summary()


@pytest.mark.slow
@settings(max_examples=1500, **quick)
@given(malformed_configs())
def test_malformed_dicts(values):
    try:
        cfg = IJepaConfig.from_dict(values)
    except ConfigError as error:
        one_line(error)
    else:
        check_accepted(cfg)


@settings(max_examples=300, **quick)
@given(st.sampled_from(sorted(SECTIONS)), names, junk)
def test_malformed_assignments_leave_the_config_as_it_was(section, name, value):
    cfg = default_config()
    try:
        setattr(getattr(cfg, section), name, value)
    except ConfigError as error:
        one_line(error)
        assert cfg == default_config()
    else:
        assert name in {f.name for f in dataclasses.fields(getattr(cfg, section))}


@settings(max_examples=300, **quick)
@given(st.one_of(st.text(max_size=30), st.builds("{}.{}={}".format, st.sampled_from(sorted(SECTIONS)), names, st.text(max_size=8))))
def test_malformed_overrides(text):
    stdout, stderr = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", stdout)
        patch.setattr("sys.stderr", stderr)
        code = pretrain(["--print-config", f"--set={text}"])
    if code == 0:
        check_accepted(IJepaConfig.from_dict(json.loads(stdout.getvalue())))
    else:
        assert code == 2 and stderr.getvalue().startswith("ConfigError: ") and not stdout.getvalue()


@settings(max_examples=100, **quick)
@given(content=st.one_of(st.binary(max_size=60), st.builds(lambda v: json.dumps(v, default=str).encode(), malformed_configs())))
def test_malformed_config_files(tmp_path, content):
    (tmp_path / "c.json").write_bytes(content)
    stdout, stderr = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", stdout)
        patch.setattr("sys.stderr", stderr)
        code = pretrain(["--config", str(tmp_path / "c.json"), "--print-config"])
    if code == 0:
        check_accepted(IJepaConfig.from_dict(json.loads(stdout.getvalue())))
    else:
        assert code == 2 and stderr.getvalue().startswith("ConfigError: ")


@settings(max_examples=150, **quick)
@given(st.sampled_from([f.name for f in dataclasses.fields(FinetuneConfig)]), junk)
def test_malformed_protocols_of_the_probe(name, value):
    cfg = FinetuneConfig()
    try:
        setattr(cfg, name, value)
    except ConfigError as error:
        one_line(error)
        assert cfg == FinetuneConfig()


@settings(max_examples=60, **quick)
@given(name=st.sampled_from([f.name for f in dataclasses.fields(FinetuneConfig)]), text=st.text(max_size=8))
def test_malformed_words_on_the_probes_command_line(name, text):
    with pytest.MonkeyPatch.context() as patch:
        stderr = io.StringIO()
        patch.setattr("sys.stderr", stderr)
        assert finetune([f"--set={name}={text}", "--set=checkpoint=/nowhere/latest.pt"]) == 2
    assert stderr.getvalue().split(":")[0] in ("ConfigError", "CheckpointError")


# ---------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run's config, the bytes of its last checkpoint, and its state."""
    cfg = tiny_config(tmp_path_factory.mktemp("finished") / "run")
    cfg.model.enc_depth = 1  # every tensor is read some thousand times
    path = launch_pretraining(cfg).checkpoint
    return cfg, path.read_bytes(), load_checkpoint(path)


def judge(cfg: IJepaConfig, path: Path, state: dict) -> bool:
    """Offer a file to all that read checkpoints: each refuses it with its own error, or has read what the sound one holds."""
    taken = []
    before = sorted(path.parent.iterdir())
    for read in (load_checkpoint, load_model):
        try:
            found = read(path)
        except CheckpointError as error:
            one_line(error)
            assert str(path) in str(error)
        else:
            weights = found["model"] if read is load_checkpoint else found.state_dict()
            taken.append(read is load_checkpoint or same(dict(weights), dict(state["model"])))
    cfg = cfg.copy()
    cfg.hardware.output_dir = str(path.parent / "resumed")
    try:
        run = Pretraining(cfg, resume=path)
    except CheckpointError as error:
        one_line(error)
        assert sorted(path.parent.iterdir()) == before  # a refusal leaves nothing behind
    else:
        now = run.state()
        taken.append(all(same(now[part], state[part]) for part in ("model", "moments", "step", "losses", "history")))
        for left in (path.parent / "resumed").iterdir():
            left.unlink()
        (path.parent / "resumed").rmdir()
    assert all(taken)
    return len(taken) == 3


def test_a_sound_checkpoint_is_taken_by_all(finished, tmp_path):
    cfg, content, state = finished
    (tmp_path / "x.pt").write_bytes(content)
    assert judge(cfg, tmp_path / "x.pt", state)


@settings(max_examples=150, **quick)
@given(seed=st.integers(0, 2**32), kind=st.sampled_from(["flip", "flip", "cut", "splice", "zero", "repeat"]))
def test_checkpoints_with_damaged_bytes(finished, tmp_path, seed, kind):
    cfg, content, state = finished
    rng, damaged = random.Random(seed), bytearray(content)
    at = rng.choice([rng.randrange(len(damaged)), max(0, len(damaged) - 1 - rng.randrange(5000)), rng.randrange(3000)])
    if kind == "flip":
        for _ in range(rng.choice([1, 1, 3])):
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        damaged[at] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del damaged[at:]
    elif kind == "splice":
        del damaged[at : at + rng.randrange(1, 100)]
    elif kind == "zero":
        damaged[at : at + 512] = bytes(len(damaged[at : at + 512]))
    else:
        damaged[at:at] = damaged[at : at + 64]
    (tmp_path / "x.pt").write_bytes(damaged)
    judge(cfg, tmp_path / "x.pt", state)


values = st.one_of(
    st.none(), st.integers(-3, 100), st.floats(allow_nan=True), st.text(max_size=4), st.just([]), st.just({}), st.just([1, 2]),
    st.just({"a": 1}), st.builds(torch.zeros, st.sampled_from([(), (1,), (16,), (16, 16)])),
    st.builds(lambda: torch.full((16,), float("nan"))), st.builds(lambda: torch.zeros(16, dtype=torch.int64)),
)  # fmt: skip


@pytest.mark.slow
@settings(max_examples=150, **quick)
@given(data=st.data())
def test_checkpoints_whose_content_was_changed(finished, tmp_path, data):
    """A key removed, renamed or given another value, at any depth."""
    cfg, _, original = finished
    state = copy.deepcopy(original)
    parent, depth = state, data.draw(st.integers(0, 3))
    key = data.draw(st.sampled_from(sorted(parent)))
    for _ in range(depth):
        child = parent[key]
        if isinstance(child, dict) and child:
            parent, key = child, data.draw(st.sampled_from(sorted(child)))
        elif isinstance(child, list) and child:
            parent, key = child, data.draw(st.integers(0, len(child) - 1))
    how = data.draw(st.sampled_from(["remove", "rename", "replace", "replace", "add"]))
    if how == "remove":
        del parent[key]
    elif how == "rename" and isinstance(parent, dict):
        parent[f"{key}_"] = parent.pop(key)
    elif how == "add" and isinstance(parent, dict):
        parent["surplus"] = data.draw(values)
    else:
        parent[key] = data.draw(values)
    torch.save(state, tmp_path / "x.pt")
    judge(cfg, tmp_path / "x.pt", state)


def test_a_checkpoint_of_a_run_that_is_elsewhere(finished, tmp_path):
    """As many steps as the run has not, and a history of another length."""
    cfg, _, state = finished
    for change in ({"step": 0}, {"step": STEPS + 1}, {"step": -1}, {"history": []}, {"losses": [0.5]}, {"step": STEPS - 1}, {"step": True}):
        torch.save(state | change, tmp_path / "x.pt")
        with pytest.raises(CheckpointError, match="is no whole training state"):
            Pretraining(cfg, resume=tmp_path / "x.pt")


def test_tensors_where_none_belong_are_refused(finished, tmp_path):
    cfg, _, state = finished
    several = torch.full((16,), float("nan"))
    for section, name, value in (
        ("data", "train_batch_size", several),
        ("data", "crop_scale", [several, 1.0]),
        ("mask", "num_target_blocks", {}),
    ):
        config = copy.deepcopy(state["config"])
        config[section][name] = value
        torch.save(state | {"config": config}, tmp_path / "x.pt")
        with pytest.raises(CheckpointError, match=rf"was trained with {section}\.{name} = "):
            Pretraining(cfg, resume=tmp_path / "x.pt")
    torch.save(state | {"skipped": several}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="is no whole training state: skipped = "):
        Pretraining(cfg, resume=tmp_path / "x.pt")
