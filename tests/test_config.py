"""A config survives JSON exactly, and whatever cannot be meant is refused with the field, the value and the remedy."""

import dataclasses
import json
import math
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wejepa.config import IJepaConfig, MaskConfig, default_config, hf224_config, parse_override, photos96_config
from wejepa.config import settings as described
from wejepa.errors import ConfigError, WejepaError

PRESETS = (default_config, hf224_config, photos96_config)
QUICK = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def through_json(cfg: IJepaConfig) -> IJepaConfig:
    return IJepaConfig.from_dict(json.loads(json.dumps(cfg.to_dict())))


def refusal(values) -> str:
    """The message with which `from_dict` refuses these settings."""
    with pytest.raises(ConfigError) as caught:
        IJepaConfig.from_dict(values)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---------------------------------------------------------------- there and back


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_survive_json(preset):
    cfg = preset()
    assert through_json(cfg) == cfg
    assert through_json(cfg).to_dict() == cfg.to_dict()


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_valid(preset):
    preset().validate()


def test_presets_are_built_anew_each_time():
    one = default_config()
    one.optimizer.epochs += 1
    assert default_config() != one


def pairs(low: float, high: float):
    numbers = st.floats(low, high, allow_nan=False)
    return st.tuples(numbers, numbers).map(lambda pair: tuple(sorted(pair)))


@st.composite
def configs(draw) -> IJepaConfig:
    """Valid configs, drawn by construction over all five sections."""
    cfg = IJepaConfig()
    heads, patch = draw(st.integers(1, 8)), draw(st.integers(1, 16))
    cfg.model.num_heads, cfg.model.patch_size = heads, patch
    cfg.model.img_size = patch * draw(st.integers(3, 20))
    cfg.model.embed_dim, cfg.model.pred_dim = (heads * draw(st.integers(4, 64)) for _ in range(2))
    cfg.model.enc_depth, cfg.model.pred_depth = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    cfg.model.in_chans = draw(st.integers(1, 4))
    cfg.mask.context_share = draw(st.floats(0.05, 0.4))
    cfg.mask.target_scale = draw(pairs(0.05, 0.3))
    cfg.mask.target_aspect_ratio = draw(pairs(0.5, 2.0))
    cfg.mask.num_target_blocks = draw(st.integers(1, 8))
    cfg.data.dataset = draw(st.sampled_from(["cifar10", "imagefolder", "fashion_mnist_mini"]))
    cfg.data.root = draw(st.text(min_size=1, max_size=8))
    cfg.data.use_fake_data = draw(st.booleans())
    cfg.data.crop_scale = draw(pairs(0.02, 1.0))
    cfg.optimizer.epochs = draw(st.integers(1, 1000))
    cfg.optimizer.warmup_epochs = draw(st.floats(0, 1)) * cfg.optimizer.epochs
    cfg.optimizer.base_learning_rate = draw(st.floats(0, 1))
    cfg.optimizer.momentum_teacher, cfg.optimizer.momentum_teacher_final = draw(pairs(0.0, 1.0))
    cfg.hardware.seed = draw(st.integers(0, 2**31 - 1))
    cfg.hardware.mixed_precision = draw(st.booleans())
    cfg.hardware.output_dir = draw(st.text(min_size=1, max_size=8))
    return cfg


@QUICK
@given(configs())
def test_any_valid_config_survives_json(cfg):
    cfg.validate()
    back = through_json(cfg)
    assert back == cfg
    assert dataclasses.asdict(back) == dataclasses.asdict(cfg)  # types included: (0.1, 0.2) is a tuple again


def test_to_dict_holds_every_setting():
    expected = {s.name: {f.name for f in dataclasses.fields(getattr(IJepaConfig(), s.name))} for s in dataclasses.fields(IJepaConfig)}
    assert {section: set(settings) for section, settings in IJepaConfig().to_dict().items()} == expected
    assert set(expected) == {"data", "mask", "model", "optimizer", "hardware"}


def test_every_setting_explains_itself():
    for section in dataclasses.fields(IJepaConfig):
        for field in dataclasses.fields(getattr(IJepaConfig(), section.name)):
            assert len(field.metadata["help"]) > 10, f"{section.name}.{field.name}"


def test_what_is_left_out_keeps_its_default():
    cfg, expected = IJepaConfig.from_dict({"optimizer": {"epochs": 7}}), default_config()
    expected.optimizer.epochs = 7
    assert cfg == expected
    assert IJepaConfig.from_dict({}) == default_config()


def test_a_copy_is_independent():
    cfg = default_config()
    other = cfg.copy()
    other.model.enc_depth += 1
    assert cfg == default_config() != other


# ---------------------------------------------------------------- unknown names


@pytest.mark.parametrize(("section", "near"), [("optimiser", "optimizer"), ("mdel", "model"), ("masks", "mask"), ("Data", "data")])
def test_unknown_section_names_the_nearest(section, near):
    message = refusal({section: {}})
    assert repr(section) in message and f"did you mean {near!r}?" in message


@pytest.mark.parametrize(
    ("section", "name", "near"),
    [
        ("model", "embed_dims", "embed_dim"),
        ("model", "depth_enc", "enc_depth"),
        ("optimizer", "epoch", "epochs"),
        ("data", "batch_size", "eval_batch_size"),
        ("mask", "target_scales", "target_scale"),
        ("hardware", "sead", "seed"),
    ],
)
def test_unknown_setting_names_the_nearest(section, name, near):
    message = refusal({section: {name: 1}})
    assert f"{section}.{name}" in message and f"did you mean {near!r}?" in message


def test_unknown_setting_without_a_near_one_lists_them_all():
    message = refusal({"hardware": {"zzzzzz": 1}})
    for field in dataclasses.fields(IJepaConfig().hardware):
        assert field.name in message


def test_attributes_are_checked_as_well():
    cfg = IJepaConfig()
    with pytest.raises(ConfigError, match=r"model\.embed_dims .*did you mean 'embed_dim'\?"):
        cfg.model.embed_dims = 64
    with pytest.raises(ConfigError, match=r"optimizer\.epochs = 0 "):
        cfg.optimizer.epochs = 0
    with pytest.raises(ConfigError, match="optimiser .*did you mean 'optimizer'"):
        cfg.optimiser = cfg.optimizer
    with pytest.raises(ConfigError, match="mask: give a MaskConfig, not dict"):
        cfg.mask = {}
    with pytest.raises(ConfigError, match="mask: give a MaskConfig, not ModelConfig"):
        cfg.mask = cfg.model
    with pytest.raises(ConfigError, match=r"mask\.context_share"):
        MaskConfig(context_share=2.0)
    assert cfg == IJepaConfig()  # what is refused leaves no trace


@pytest.mark.parametrize("values", [None, [], "model", 3])
def test_a_config_is_a_dict(values):
    assert type(values).__name__ in refusal(values)


@pytest.mark.parametrize("settings", [None, [], "epochs", 3])
def test_a_section_is_a_dict(settings):
    message = refusal({"model": settings})
    assert "model" in message and type(settings).__name__ in message


# ---------------------------------------------------------------- wrong types and ranges


@pytest.mark.parametrize(
    ("section", "name", "value", "remedy"),
    [
        ("optimizer", "epochs", True, "a whole number"),
        ("optimizer", "epochs", "5", "a whole number"),
        ("optimizer", "epochs", 2.5, "a whole number"),
        ("optimizer", "epochs", math.nan, "a whole number"),
        ("optimizer", "epochs", math.inf, "a whole number"),
        ("optimizer", "epochs", None, "a whole number"),
        ("optimizer", "epochs", [3], "a whole number"),
        ("optimizer", "epochs", 0, "1 or more"),
        ("optimizer", "epochs", -3, "1 or more"),
        ("optimizer", "base_learning_rate", "1e-3", "a number"),
        ("optimizer", "base_learning_rate", False, "a number"),
        ("optimizer", "base_learning_rate", math.nan, "a finite number"),
        ("optimizer", "base_learning_rate", math.inf, "a finite number"),
        ("optimizer", "base_learning_rate", -math.inf, "a finite number"),
        ("optimizer", "base_learning_rate", -0.1, "from 0 to 10"),
        ("optimizer", "momentum_teacher", 1.01, "from 0 to 1"),
        ("optimizer", "grad_clip_norm", -1, "0 or more"),
        ("hardware", "mixed_precision", 1, "true or false"),
        ("hardware", "mixed_precision", "yes", "true or false"),
        ("hardware", "seed", -1, "from 0 to"),
        ("hardware", "device", 0, "a name in quotes"),
        ("hardware", "device", "", "a name in quotes"),
        ("data", "dataset", None, "a name in quotes"),
        ("data", "use_fake_data", None, "true or false"),
        ("data", "crop_scale", 0.5, "two numbers"),
        ("data", "crop_scale", [0.5], "two numbers"),
        ("data", "crop_scale", [0.1, 0.2, 0.3], "two numbers"),
        ("data", "crop_scale", "ab", "two numbers"),
        ("data", "crop_scale", ["a", "b"], "a number"),
        ("data", "crop_scale", [0.1, 1.5], "from 0.01 to 1"),
        ("data", "crop_scale", [math.nan, 1.0], "a finite number"),
        ("data", "crop_scale", [0.9, 0.2], "swap"),
        ("mask", "target_scale", [0.2, 0.1], "swap"),
        ("mask", "target_scale", [0.0, 0.1], "from 0.001 to 1"),
        ("mask", "context_scale", [0.5, 1.5], "from 0.01 to 1"),
        ("mask", "target_aspect_ratio", [1.5, 0.5], "swap"),
        ("mask", "target_aspect_ratio", [0.0, 1.0], "from 0.1 to 10"),
        ("mask", "num_target_blocks", 0, "from 1 to"),
        ("mask", "context_share", 1.0, "from 0.01 to 0.99"),
        ("model", "classification_backbone", 50, "null"),
        ("model", "patch_size", 0, "from 1 to"),
        ("model", "positions", "learned", "'learnt' or 'sincos'"),
        ("model", "start_from", "", "null"),
        ("optimizer", "momentum_schedule", "step", "'cosine' or 'linear'"),
        ("optimizer", "weight_decay_schedule", 1, "a name in quotes"),
        ("optimizer", "betas", [0.9, 1.0], "from 0 to 0.99999"),
    ],
)
def test_wrong_type_or_range(section, name, value, remedy):
    message = refusal({section: {name: value}})
    shown = value[1] if value in ([0.1, 1.5], [0.9, 1.0]) else value
    assert f"{section}.{name}" in message
    assert remedy in message
    if not (isinstance(shown, list) and ("number" in remedy or "from" in remedy)):  # of a pair, the faulty number is shown
        assert repr(shown) in message


def test_a_refused_pair_shows_the_faulty_number():
    assert "1.5" in refusal({"mask": {"context_scale": [0.5, 1.5]}})
    assert "'b'" in refusal({"mask": {"context_scale": [0.5, "b"]}})


def test_whole_numbers_serve_as_numbers_and_keep_the_fields_type():
    cfg = IJepaConfig.from_dict({"optimizer": {"epochs": 5.0, "warmup_epochs": 0, "grad_clip_norm": 2}})
    assert (cfg.optimizer.epochs, cfg.optimizer.warmup_epochs, cfg.optimizer.grad_clip_norm) == (5, 0.0, 2.0)
    cfg.data.crop_scale = [1, 1]
    assert cfg.data.crop_scale == (1.0, 1.0) and all(type(v) is float for v in cfg.data.crop_scale)
    assert type(cfg.optimizer.epochs) is int and type(cfg.optimizer.grad_clip_norm) is float


def test_bounds_themselves_are_allowed():
    cfg = IJepaConfig()
    cfg.optimizer.momentum_teacher = cfg.optimizer.momentum_teacher_final = 1
    cfg.mask.context_share = 0.99
    cfg.hardware.seed = 2**31 - 1
    cfg.optimizer.epochs = cfg.optimizer.warmup_epochs = 1
    assert cfg.optimizer.warmup_epochs == 1.0


# ---------------------------------------------------------------- values that do not go together


def test_patch_must_divide_the_image_and_the_remedy_works():
    message = refusal({"model": {"img_size": 32, "patch_size": 5}})
    assert "model.patch_size = 5" in message and "model.img_size = 32" in message
    assert "patch_size 4" in message and "img_size 30" in message
    IJepaConfig.from_dict({"model": {"img_size": 32, "patch_size": 4}})
    IJepaConfig.from_dict({"model": {"img_size": 30, "patch_size": 5}})


@pytest.mark.parametrize("name", ["embed_dim", "pred_dim"])
def test_heads_must_divide_the_widths_and_the_remedy_works(name):
    widths = {"embed_dim": 60, "pred_dim": 60}
    message = refusal({"model": {**widths, name: 64, "num_heads": 6}})
    assert "model.num_heads = 6" in message and f"model.{name} = 64" in message
    assert "num_heads 4" in message and f"{name} 66" in message
    IJepaConfig.from_dict({"model": {**widths, name: 64, "num_heads": 4}})
    IJepaConfig.from_dict({"model": {**widths, name: 66, "num_heads": 6}})


def test_published_weights_need_a_backbone():
    message = refusal({"model": {"classification_pretrained": True, "classification_backbone": None}})
    assert "model.classification_pretrained = true" in message and "model.classification_backbone" in message


def test_warmup_longer_than_the_run():
    message = refusal({"optimizer": {"epochs": 3, "warmup_epochs": 4}})
    assert "optimizer.warmup_epochs = 4" in message and "optimizer.epochs = 3" in message


def test_momentum_must_not_fall():
    message = refusal({"optimizer": {"momentum_teacher": 0.9, "momentum_teacher_final": 0.8}})
    assert "optimizer.momentum_teacher = 0.9" in message and "0.8" in message and "swap" in message


def test_targets_that_leave_the_context_no_room():
    message = refusal({"mask": {"target_scale": [0.3, 0.8], "target_aspect_ratio": [1, 1], "context_share": 0.5}})
    assert "mask.target_scale = [0.3, 0.8]" in message and "take at most 0.50" in message
    IJepaConfig.from_dict({"mask": {"target_scale": [0.3, 0.5], "target_aspect_ratio": [1, 1], "context_share": 0.5}})


@pytest.mark.parametrize("ratio", [[0.1, 1.0], [1.0, 10.0]])
def test_blocks_longer_than_the_grid(ratio):
    message = refusal({"mask": {"target_scale": [0.2, 0.4], "target_aspect_ratio": ratio, "context_share": 0.3}})
    assert "mask.target_aspect_ratio" in message and "8 x 8" in message and "mask.target_scale of at most 0.10" in message
    IJepaConfig.from_dict({"mask": {"target_scale": [0.05, 0.1], "target_aspect_ratio": ratio, "context_share": 0.3}})


def test_a_context_block_longer_than_the_grid():
    message = refusal({"mask": {"context_scale": [0.9, 1.0], "context_aspect_ratio": [0.5, 1.0]}})
    assert "mask.context_aspect_ratio = [0.5, 1.0]" in message and "mask.context_scale of at most 0.50" in message


@pytest.mark.parametrize("size", [(4, 4), (8, 8)])
def test_one_patch_is_no_grid(size):
    message = refusal({"model": {"img_size": size[0], "patch_size": size[1]}})
    assert "1 x 1" in message and "model.img_size" in message and "model.patch_size" in message


def test_validate_checks_what_was_set_attribute_by_attribute():
    cfg = IJepaConfig()
    cfg.model.img_size, cfg.model.patch_size = 32, 7
    with pytest.raises(ConfigError, match="does not divide"):
        cfg.validate()


def test_errors_can_be_caught_as_one():
    with pytest.raises(WejepaError):
        IJepaConfig.from_dict({"model": {"img_size": 1}})
    assert issubclass(WejepaError, ValueError)


# ---------------------------------------------------------------- reading and printing


def test_summary_tells_the_tokens_and_the_rest():
    cfg = IJepaConfig.from_dict(
        {
            "model": {"img_size": 48, "patch_size": 4, "embed_dim": 24, "num_heads": 2, "pred_dim": 16, "enc_depth": 3},
            "optimizer": {"epochs": 17},
            "data": {"dataset": "cifar10"},
        }
    )
    text = cfg.summary()
    assert "12 x 12 = 144 patches" in text
    assert f"{cfg.mask.num_context_patches((12, 12))} context patches" in text
    for part in ("cifar10", "width 24", "17 epochs", "48 x 48"):
        assert part in text
    cfg.data.use_fake_data = True
    assert "FakeData" in cfg.summary() and "cifar10" not in cfg.summary()


def test_grid_size():
    cfg = IJepaConfig()
    cfg.model.img_size, cfg.model.patch_size = 48, 8
    assert cfg.grid_size == (6, 6)


def test_the_number_of_context_patches_is_the_share():
    assert MaskConfig(context_share=0.25).num_context_patches((8, 8)) == 16
    assert MaskConfig(context_share=0.01).num_context_patches((2, 2)) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optimizer.epochs=5", ("optimizer", "epochs", 5)),
        ("optimizer.base_learning_rate=1e-3", ("optimizer", "base_learning_rate", 1e-3)),
        ("data.dataset=cifar10", ("data", "dataset", "cifar10")),
        ('data.dataset="cifar10"', ("data", "dataset", "cifar10")),
        ("data.root=/a=b/c.d", ("data", "root", "/a=b/c.d")),
        ("mask.target_scale=[0.1, 0.2]", ("mask", "target_scale", [0.1, 0.2])),
        ("hardware.mixed_precision=true", ("hardware", "mixed_precision", True)),
        ("hardware.mixed_precision=False", ("hardware", "mixed_precision", False)),
        ("model.classification_backbone=null", ("model", "classification_backbone", None)),
        ("model.classification_backbone=None", ("model", "classification_backbone", None)),
        (" model.embed_dim = 64", ("model", "embed_dim", 64)),
    ],
)
def test_parse_override(text, expected):
    parsed = parse_override(text)
    assert parsed == expected and type(parsed[2]) is type(expected[2])


@pytest.mark.parametrize("text", ["", "epochs=5", "optimizer.epochs", "optimizer.=5", ".epochs=5", "=5"])
def test_parse_override_refuses_what_names_no_setting(text):
    with pytest.raises(ConfigError, match=r"section\.field=value") as caught:
        parse_override(text)
    assert repr(text) in str(caught.value)


def test_every_setting_is_told_with_default_range_and_help():
    told = described()
    assert list(told) == [f"{section}.{name}" for section, values in default_config().to_dict().items() for name in values]
    assert told["optimizer.epochs"] == "passes over the training images (default 30; 1 or more)"
    assert told["data.crop_scale"].endswith("(default [0.8, 1.0]; 0.01 to 1)")
    assert told["model.classification_backbone"].endswith("(default null; a name or null)")
    assert told["data.horizontal_flip"].endswith("(default true; true or false)")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("optimizer.epoch=3", "did you mean 'epochs'? optimizer.epochs: passes over the training images (default 30; 1 or more)"),
        ("data.epochs=3", "did you mean optimizer.epochs? passes over"),
        ("data.mirror=true", "did you mean data.horizontal_flip? mirror every second training image"),
        ("optimizer.zzz=1", "known: accumulation_steps, "),
    ],
)
def test_an_unknown_setting_is_answered_from_the_help_texts(text, told):
    section, name, value = parse_override(text)
    with pytest.raises(ConfigError) as caught:
        IJepaConfig.from_dict({section: {name: value}})
    assert told in str(caught.value)


def test_a_setting_without_its_section_is_answered_with_it():
    with pytest.raises(ConfigError, match="such as data.num_workers=5"):
        parse_override("num_workers=3")


def test_a_config_is_read_without_torch():
    code = "import sys, wejepa.config, wejepa.train.pretrain; print([m for m in ('torch', 'numpy', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
