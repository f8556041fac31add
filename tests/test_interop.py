"""Weights from elsewhere and to elsewhere: the same numbers on both sides, and an error that names what does not fit."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from wejepa.config import HardwareConfig, IJepaConfig, ModelConfig, adapt_config_for_backbone, default_config
from wejepa.errors import CheckpointError, ConfigError
from wejepa.interop import config_of_meta, export, from_huggingface, from_meta, main, to_huggingface
from wejepa.masking import Masks, sample_block_masks
from wejepa.model import IJEPA_base, Predictor
from wejepa.presets import PRESETS
from wejepa.train.checkpoints import load_model, save_model
from wejepa.train.classifier import Classifier
from wejepa.train.loop import Pretraining

pytest.importorskip("safetensors")


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def theirs_of(transformers, **sizes):
    """A random model of transformers', away from its initialisation: no bias is zero, no norm is the identity."""
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96, "patch_size": 14} | sizes
    torch.manual_seed(0)
    model = transformers.IJepaModel(transformers.IJepaConfig(image_size=224, **sizes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def small_model(seed=0, **sizes) -> IJEPA_base:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "enc_depth": 2, "pred_depth": 1, "pred_dim": 12, "num_heads": 3} | sizes
    torch.manual_seed(seed)
    model = IJEPA_base(IJepaConfig(model=ModelConfig(**sizes)))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))  # so that student and teacher differ
    return model.eval()


# ---------------------------------------------------------------- Hugging Face


@pytest.mark.parametrize("eps", [1e-12, 1e-6, 1e-3])
@pytest.mark.parametrize("as_folder", [False, True])
def test_hidden_states_are_those_of_transformers(transformers, tmp_path, eps, as_folder, capsys):
    theirs = theirs_of(transformers, layer_norm_eps=eps)
    if as_folder:
        theirs.save_pretrained(tmp_path)
    model = from_huggingface(tmp_path if as_folder else theirs)
    told = "its one encoder (in Meta's published weights the context encoder) taken as teacher and student; the predictor is freshly"
    assert told in capsys.readouterr().out
    for size in ((224, 224), (280, 168)):
        images = torch.randn(2, 3, *size)
        with torch.no_grad():
            expected = theirs(images, interpolate_pos_encoding=size != (224, 224)).last_hidden_state
            for encoder in ("teacher", "student"):
                assert float((model.encode(images, encoder) - expected).abs().max()) < 1e-5, (size, encoder)


@pytest.mark.parametrize("encoder", ["teacher", "student"])
def test_what_is_written_gives_transformers_the_same_numbers(transformers, tmp_path, encoder):
    model = small_model(norm_eps=1e-5, mlp_ratio=2.5)
    to_huggingface(model, tmp_path / "out", encoder)
    theirs, info = transformers.IJepaModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for side in (32, 48):
        images = torch.randn(2, 3, side, side)
        with torch.no_grad():
            found = theirs.eval()(images, interpolate_pos_encoding=side != 32).last_hidden_state
            assert float((model.encode(images, encoder) - found).abs().max()) < 1e-5
    back = from_huggingface(tmp_path / "out")
    for name, value in getattr(model, f"{encoder}_encoder").state_dict().items():
        assert torch.equal(back.teacher_encoder.state_dict()[name], value), name


def test_the_student_has_memory_of_its_own_and_the_file_stays(transformers, tmp_path):
    theirs_of(transformers).save_pretrained(tmp_path)
    model = from_huggingface(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    teacher = {k: v.clone() for k, v in model.teacher_encoder.state_dict().items()}
    with torch.no_grad():
        for p in model.student_encoder.parameters():
            p.zero_()
    assert all(torch.equal(v, teacher[k]) for k, v in model.teacher_encoder.state_dict().items())
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert all(p.requires_grad for p in model.student_encoder.parameters())
    assert not any(p.requires_grad for p in model.teacher_encoder.parameters())


def test_half_precision_becomes_single(transformers, tmp_path):
    theirs_of(transformers).to(torch.bfloat16).save_pretrained(tmp_path)
    assert {v.dtype for v in from_huggingface(tmp_path).state_dict().values()} == {torch.float32}


KEY = "encoder.layer.1.attention.attention.key.weight"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.pop(KEY), f"{KEY} is missing; take"),
        (lambda t: t.update({"encoder.layer.1.x": t.pop(KEY)}), f"{KEY} is missing, and 1 more"),
        (lambda t: t.update({KEY: t[KEY][:-1].clone()}), rf"{KEY} is \(47, 48\), not \(48, 48\)"),
        (lambda t: t.update({"pooler.dense.weight": t[KEY].clone()}), "pooler.dense.weight is unexpected"),
    ],
)
def test_a_folder_with_other_keys_is_refused_by_name(transformers, tmp_path, change, told):
    from safetensors.torch import load_file, save_file

    theirs_of(transformers).save_pretrained(tmp_path)
    tensors = {k: v.clone() for k, v in load_file(tmp_path / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=told):
        from_huggingface(tmp_path)


@pytest.mark.parametrize("wrong", [{"hidden_act": "relu"}, {"qkv_bias": False}, {"model_type": "vit"}])
def test_a_variant_is_refused(transformers, tmp_path, wrong):
    theirs_of(transformers).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | wrong))
    with pytest.raises(CheckpointError, match=f"{next(iter(wrong))} is {next(iter(wrong.values()))!r}"):
        from_huggingface(tmp_path)


def test_a_folder_that_is_none_is_refused(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="there is no folder nowhere"):
        from_huggingface("nowhere")
    with pytest.raises(CheckpointError, match="config.json cannot be read"):
        from_huggingface(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "ijepa"}')
    with pytest.raises(CheckpointError, match=r"holds no \.safetensors"):
        from_huggingface(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0not json")
    with pytest.raises(CheckpointError, match="truncated, damaged"):
        from_huggingface(tmp_path)


def test_a_name_on_the_hub_that_cannot_be_had(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(CheckpointError, match="facebook/ijepa_vith14_1k .* could not be downloaded .no route to host.: go online once"):
        from_huggingface("facebook/ijepa_vith14_1k")


@pytest.mark.parametrize(
    "name",
    ["./ijepa", "../ijepa", "/nowhere/ijepa", "~/ijepa", "here/ijepa", "here/../ijepa", "x.pt", "runs/x.pt", "runs/model.safetensors"],
)
def test_the_hub_is_never_asked_for_a_path(tmp_path, monkeypatch, capsys, name):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "snapshot_download", lambda *args, **kwargs: pytest.fail(f"the hub was asked for {name}"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(CheckpointError, match=f"there is no folder {name}: give one with config.json"):
        from_huggingface(name)
    assert main(["convert", name, str(tmp_path / "out.pt")]) == 2
    assert "CheckpointError: " in capsys.readouterr().err


# ---------------------------------------------------------------- Meta

# Width, hidden width, heads and depth of the encoder, patch size, depth of the predictor: those published, made small.
META = {"ViT-H/14": (160, 640, 16, 2, 14, 2), "ViT-g/16": (176, 768, 16, 2, 16, 1)}  # an eighth as wide
NARROW, GRID = 48, 4


def block_shapes(prefix: str, width: int, hidden: int, depth: int) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for i in range(depth):
        shapes |= {f"{prefix}.{i}.{norm}.{part}": (width,) for norm in ("norm1", "norm2") for part in ("weight", "bias")}
        for name, rows, columns in (
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.fc1", hidden, width),
            ("mlp.fc2", width, hidden),
        ):
            shapes |= {f"{prefix}.{i}.{name}.weight": (rows, columns), f"{prefix}.{i}.{name}.bias": (rows,)}
    return shapes


def published_shapes(name: str) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Keys and shapes of an encoder and of a predictor, in Meta's layout."""
    width, hidden, _, depth, patch, pred_depth = META[name]
    encoder = {"pos_embed": (1, GRID**2, width), "patch_embed.proj.weight": (width, 3, patch, patch), "patch_embed.proj.bias": (width,)}
    encoder |= block_shapes("blocks", width, hidden, depth) | {"norm.weight": (width,), "norm.bias": (width,)}
    predictor = {"mask_token": (1, 1, NARROW), "predictor_pos_embed": (1, GRID**2, NARROW)}
    predictor |= {"predictor_embed.weight": (NARROW, width), "predictor_embed.bias": (NARROW,)}
    predictor |= block_shapes("predictor_blocks", NARROW, 4 * NARROW, pred_depth)
    predictor |= {"predictor_norm.weight": (NARROW,), "predictor_norm.bias": (NARROW,)}
    predictor |= {"predictor_proj.weight": (width, NARROW), "predictor_proj.bias": (width,)}
    return encoder, predictor


def synthetic(name: str, prefix: str = "module.") -> dict:
    """A checkpoint with random weights and all that Meta's hold beside them."""
    generator = torch.Generator().manual_seed(0)
    encoder, predictor = published_shapes(name)
    parts = {"encoder": encoder, "predictor": predictor, "target_encoder": encoder}
    state = {part: {prefix + k: 0.2 * torch.randn(s, generator=generator) for k, s in shapes.items()} for part, shapes in parts.items()}
    moments = {"state": {0: {"exp_avg": torch.zeros(1000)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]}
    return state | {
        "opt": moments,
        "scaler": {"scale": 65536.0},
        "epoch": 300,
        "loss": 0.1,
        "batch_size": 128,
        "world_size": 16,
        "lr": 1e-3,
    }


def written(tmp_path: Path, state: dict) -> Path:
    torch.save(state, tmp_path / "checkpoint.pth.tar")
    return tmp_path / "checkpoint.pth.tar"


@pytest.mark.parametrize("name", META)
@pytest.mark.parametrize("prefix", ["module.", ""])
def test_metas_layout_is_read_whole(tmp_path, name, prefix, capsys):
    state = synthetic(name, prefix)
    width, _, heads, depth, patch, pred_depth = META[name]
    model = from_meta(written(tmp_path, state), num_heads=heads)
    assert "target_encoder taken as teacher, encoder as student, predictor as predictor" in capsys.readouterr().out
    m = model.cfg.model
    assert (m.embed_dim, m.num_heads, m.enc_depth, m.patch_size, m.img_size) == (width, heads, depth, patch, GRID * patch)
    assert (m.pred_dim, m.pred_depth) == (NARROW, pred_depth)
    assert model.predictor.blocks[0].mlp[0].out_features == 4 * NARROW
    # No key is missing or unexpected: every tensor of theirs is one of ours, and the other way round.
    for part, ours in (("encoder", model.student_encoder), ("target_encoder", model.teacher_encoder), ("predictor", model.predictor)):
        mine = ours.state_dict()
        assert len(mine) == len(state[part])
        for key, value in state[part].items():
            key = key.removeprefix(prefix).replace("mlp.fc1", "mlp.0").replace("mlp.fc2", "mlp.2").removeprefix("predictor_")
            assert torch.equal(mine[key], value), key
    with torch.no_grad():
        assert model.encode(torch.randn(2, 3, 4 * patch, 4 * patch)).shape == (2, 16, width)


def test_the_papers_preset_has_the_sizes_of_metas_file(monkeypatch):
    """Of IN1K-vit.h.14-300e.pth.tar: 1280 wide, 32 blocks, 16 heads, 16 x 16 patches of 14; the predictor 384 wide, 12 blocks."""
    monkeypatch.setitem(META, "whole", (1280, 5120, 16, 32, 14, 12))
    monkeypatch.setattr(sys.modules[__name__], "NARROW", 384)
    monkeypatch.setattr(sys.modules[__name__], "GRID", 16)
    cfg = IJepaConfig.from_dict(PRESETS["ijepa_paper"])
    model = IJEPA_base.without_weights(cfg)
    for part, shapes in zip((model.teacher_encoder, model.predictor), published_shapes("whole"), strict=True):
        assert sorted(tuple(value.shape) for value in part.state_dict().values()) == sorted(shapes.values())
    found, wanted = (values["model"] for values in (cfg.to_dict(), from_metas_shapes().to_dict()))
    assert found | {"pred_mlp_ratio": 4.0} == wanted


def from_metas_shapes() -> IJepaConfig:
    encoder, predictor = ({k: torch.empty(s, device="meta") for k, s in shapes.items()} for shapes in published_shapes("whole"))
    return config_of_meta({"encoder": encoder, "target_encoder": encoder, "predictor": predictor}, None, Path("whole"))


def test_the_context_encoder_can_be_the_teacher(tmp_path, capsys):
    path = written(tmp_path, synthetic("ViT-H/14"))
    model = from_meta(path, encoder="encoder", num_heads=16)
    assert "encoder taken as teacher" in capsys.readouterr().out
    student = model.student_encoder.state_dict()
    for name, value in model.teacher_encoder.state_dict().items():
        assert torch.equal(value, student[name]) and value.data_ptr() != student[name].data_ptr()
    with pytest.raises(ConfigError, match="encoder = 'teacher': give 'target_encoder' or 'encoder'"):
        from_meta(path, encoder="teacher", num_heads=16)


def by_the_papers_equations(weights: dict, heads: int, context: torch.Tensor, masks: Masks) -> torch.Tensor:
    """What the predictor of I-JEPA, section 3, predicts for each target block on its own: (B, M, Nt, D), from Meta's tensors.

    A narrow vision transformer takes the context's representations, projected and with their positions, and a mask token with the position
    of each patch of one block; what it makes of the mask tokens is projected back.
    """
    w = {name.removeprefix("module.").removeprefix("predictor_"): value.double() for name, value in weights.items()}

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("oi,...i->...o", w[f"{name}.weight"], x) + w[f"{name}.bias"]

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    def attention(name: str, x: torch.Tensor) -> torch.Tensor:
        q, k, v = linear(f"{name}.qkv", x).chunk(3, dim=-1)
        answers = []
        for own in torch.arange(x.shape[-1]).chunk(heads):
            scores = torch.einsum("nd,md->nm", q[:, own], k[:, own]) / len(own) ** 0.5
            answers.append((scores.exp() / scores.exp().sum(-1, keepdim=True)) @ v[:, own])
        return linear(f"{name}.proj", torch.cat(answers, dim=-1))

    def gelu(x: torch.Tensor) -> torch.Tensor:
        return x * 0.5 * (1 + torch.erf(x / 2**0.5))

    def block(image: int, number: int) -> torch.Tensor:
        places, asked = masks.context[image], masks.targets[image, number]
        x = torch.cat([linear("embed", context[image]) + w["pos_embed"][0, places], w["mask_token"][0] + w["pos_embed"][0, asked]])
        for i in range(len({name.split(".")[1] for name in w if name.startswith("blocks.")})):
            x = x + attention(f"blocks.{i}.attn", norm(f"blocks.{i}.norm1", x))
            x = x + linear(f"blocks.{i}.mlp.fc2", gelu(linear(f"blocks.{i}.mlp.fc1", norm(f"blocks.{i}.norm2", x))))
        return linear("proj", norm("norm", x)[len(places) :])

    images, blocks, _ = masks.targets.shape
    return torch.stack([torch.stack([block(b, m) for m in range(blocks)]) for b in range(images)])


@pytest.mark.parametrize("name", META)
def test_metas_predictor_predicts_as_the_paper_says(tmp_path, name):
    width, _, heads, _, _, _ = META[name]
    state = synthetic(name)
    model = from_meta(written(tmp_path, state), num_heads=heads)
    assert model.cfg.model.blockwise_prediction and "pos_embed" not in dict(model.predictor.named_parameters())
    masks = sample_block_masks(3, (GRID, GRID), model.cfg.mask, torch.Generator().manual_seed(0))
    context = torch.randn(3, masks.context.shape[1], width, generator=torch.Generator().manual_seed(1))
    expected = by_the_papers_equations(state["predictor"], heads, context.double(), masks)
    with torch.no_grad():
        found = model.predictor(context, masks)
        assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5
        model.predictor.blockwise = False  # what other blocks are asked for too makes a difference
        assert float((model.predictor(context, masks) - expected).norm() / expected.norm()) > 0.01


def every_key(name: str) -> list[tuple[str, str]]:
    encoder, predictor = published_shapes(name)
    return [*(("encoder", k) for k in encoder), *(("target_encoder", k) for k in encoder), *(("predictor", k) for k in predictor)]


@pytest.mark.parametrize("how", ["removed", "renamed", "reshaped"])
def test_any_key_that_differs_is_named(tmp_path, monkeypatch, how):
    whole = synthetic("ViT-g/16")
    path = written(tmp_path, whole)
    for part, key in every_key("ViT-g/16"):
        state = whole | {part: dict(whole[part])}
        value = state[part]["module." + key]
        if how == "reshaped":
            state[part]["module." + key] = torch.cat([value, value[-1:]])
        else:
            state[part].pop("module." + key)
        if how == "renamed":
            state[part]["module." + key + "_x"] = value
        monkeypatch.setattr(torch, "load", lambda *args, state=state, **kwargs: state)  # not 150 files
        with pytest.raises(CheckpointError) as refused:
            from_meta(path, num_heads=16)
        assert key in str(refused.value), (part, key)


def test_a_whole_part_that_is_missing_is_named(tmp_path):
    for part in ("encoder", "target_encoder", "predictor"):
        state = synthetic("ViT-H/14")
        state.pop(part)
        with pytest.raises(CheckpointError, match=f"has no part '{part}'"):
            from_meta(written(tmp_path, state), num_heads=16)


def test_heads_of_an_unpublished_width_must_be_given(tmp_path):
    with pytest.raises(ConfigError, match="num_heads cannot be told from a width of 160: give it"):
        from_meta(written(tmp_path, synthetic("ViT-H/14")))
    with pytest.raises(CheckpointError, match="sizes that wejepa does not take .*num_heads = 7"):
        from_meta(written(tmp_path, synthetic("ViT-H/14")), num_heads=7)


def test_files_that_are_none_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="there is no file"):
        from_meta(tmp_path / "none.pth.tar")
    (tmp_path / "text.pth.tar").write_text("not a checkpoint")
    with pytest.raises(CheckpointError, match="truncated, damaged or no checkpoint"):
        from_meta(tmp_path / "text.pth.tar")
    path = written(tmp_path, synthetic("ViT-H/14") | {"opt": Predictor})  # code, which is never run
    with pytest.raises(CheckpointError, match="truncated, damaged or no checkpoint"):
        from_meta(path)


@pytest.mark.slow
def test_reading_does_not_take_twice_the_files_size(tmp_path):
    """In a fresh process: what its memory grows by, at its highest, over the weights' size. The file's optimizer state is larger still."""
    code = """
import sys, torch
from wejepa.interop import from_huggingface, from_meta
from wejepa.config import IJepaConfig, ModelConfig
from wejepa.model import IJEPA_base
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
import safetensors.torch
IJEPA_base(IJepaConfig()).encode(torch.zeros(1, 3, 32, 32))  # what any first use loads
open("/proc/self/clear_refs", "w").write("5")
before = status("VmHWM")
model = from_meta(sys.argv[2], num_heads=16) if sys.argv[1] == "meta" else from_huggingface(sys.argv[2])
encoder, predictor = (sum(p.nbytes for p in part.parameters()) for part in (model.teacher_encoder, model.predictor))
print((status("VmHWM") - before - predictor) / encoder)
"""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("measures memory as Linux tells it")
    model = small_model(img_size=64, patch_size=16, embed_dim=1024, enc_depth=8, num_heads=16, pred_dim=64)
    to_huggingface(model, tmp_path / "folder")
    part = {"pos_embed": model.student_encoder.pos_embed.detach()}
    for name, value in model.student_encoder.state_dict().items():
        part["module." + name.replace("mlp.0", "mlp.fc1").replace("mlp.2", "mlp.fc2")] = value
    part.pop("pos_embed")
    predictor = {
        ("" if k == "mask_token" else "predictor_") + k.replace("mlp.0", "mlp.fc1").replace("mlp.2", "mlp.fc2"): v
        for k, v in model.predictor.state_dict().items()
    }
    torch.save({"encoder": part, "target_encoder": part, "predictor": predictor, "opt": torch.zeros(60_000_000)}, tmp_path / "big.pth.tar")
    for kind, path in (("meta", tmp_path / "big.pth.tar"), ("huggingface", tmp_path / "folder")):
        out = subprocess.run([sys.executable, "-c", code, kind, str(path)], check=True, capture_output=True, text=True).stdout
        assert float(out.splitlines()[-1]) < 1.5, kind


# ---------------------------------------------------------------- export


@pytest.mark.parametrize("ending", ["safetensors", "pt2", "onnx"])
@pytest.mark.parametrize("encoder", ["teacher", "student"])
def test_an_export_gives_the_same_numbers(tmp_path, ending, encoder):
    if ending == "onnx":
        pytest.importorskip("onnxscript")
        runtime = pytest.importorskip("onnxruntime")
    model, path = small_model(), tmp_path / f"out.{ending}"
    assert export(model, path, encoder) == path
    images = torch.randn(5, 3, 32, 32)  # another batch than it was exported with
    with torch.no_grad():
        expected = model.encode(images, encoder)
    if ending == "safetensors":
        from safetensors.torch import load_file

        other = small_model(seed=1)
        other.teacher_encoder.load_state_dict(load_file(path))
        found = other.encode(images)
    elif ending == "pt2":
        found = torch.export.load(path).module()(images)
    else:
        session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
        found = torch.from_numpy(session.run(["tokens"], {"images": images.numpy()})[0])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ending", ["safetensors", "pt2", "onnx"])
def test_an_exported_classifier_gives_the_same_scores(tmp_path, ending):
    if ending == "onnx":
        pytest.importorskip("onnxscript")
        runtime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = small_model()
    classifier = Classifier(model.cfg, model.teacher_encoder, ("cat", "dog")).eval()
    path, images = export(classifier, tmp_path / f"out.{ending}"), torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        expected = classifier(images)
    if ending == "safetensors":
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            assert json.loads(file.metadata()["classes"]) == ["cat", "dog"]
            assert torch.equal(file.get_tensor("head.weight"), classifier.head.weight)
        return
    if ending == "pt2":
        found = torch.export.load(path).module()(images)
    else:
        session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
        found = torch.from_numpy(session.run(["scores"], {"images": images.numpy()})[0])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_classifier_has_no_folder_for_transformers(tmp_path):
    model = small_model()
    with pytest.raises(ConfigError, match=r"give an ending of .* for a classifier"):
        export(Classifier(model.cfg, model.teacher_encoder, ("cat", "dog")), tmp_path / "folder")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "endings"), [("resnet18", ("safetensors", "pt2", "onnx")), ("swin_t", ("pt2",))])
def test_networks_of_stages_are_exported_as_programs(tmp_path, name, endings):
    cfg = default_config()
    cfg.model.img_size = 64
    model = IJEPA_base(adapt_config_for_backbone(cfg, name)).eval()
    for ending in endings:
        export(model, tmp_path / f"out.{ending}")
    with pytest.raises(ConfigError, match=f"'{name}' is no I-JEPA encoder"):
        export(model, tmp_path / "folder")


def test_an_export_that_is_read_back_differently_is_refused(tmp_path, monkeypatch):
    import safetensors.torch

    real = safetensors.torch.load_file
    monkeypatch.setattr("safetensors.torch.load_file", lambda path: {k: v + 1e-3 for k, v in real(path).items()})
    with pytest.raises(CheckpointError, match="is read back differently"):
        export(small_model(), tmp_path / "out.safetensors")
    for other in (lambda v: v * math.nan, lambda v: v.flatten()[:1], lambda v: v.flatten()):  # neither more nor less; broadcast; reshaped
        monkeypatch.setattr("safetensors.torch.load_file", lambda path, other=other: {k: other(v) for k, v in real(path).items()})
        with pytest.raises(CheckpointError, match="is read back differently"):
            export(small_model(), tmp_path / "out.safetensors")


def test_weights_that_are_no_numbers_are_not_exported(tmp_path):
    model = small_model()
    model.teacher_encoder.norm.weight.data[0] = math.nan
    for name in ("out.safetensors", "out.pt2"):
        with pytest.raises(CheckpointError, match="is read back differently"):
            export(model, tmp_path / name)


@pytest.mark.parametrize("name", ["encoder_v1.0", "encoder", "made_before.onnx"])
def test_a_folder_is_written_whatever_dots_are_in_its_name(tmp_path, name):
    if name == "made_before.onnx":
        (tmp_path / name).mkdir()
    export(small_model(), tmp_path / name)
    assert (tmp_path / name / "config.json").is_file()


def test_exports_that_cannot_be_made_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"give an ending of \.safetensors, \.pt2 or \.onnx"):
        export(small_model(), tmp_path / "out.pkl")
    with pytest.raises(ConfigError, match="give 'teacher' or 'student'"):
        export(small_model(), tmp_path / "out.pt2", "predictor")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        export(small_model(), tmp_path / "file" / "out.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ConfigError, match=r"safetensors is not installed .* pip install 'wejepa\[interop\]'"):
        export(small_model(), tmp_path / "out.safetensors")


# ---------------------------------------------------------------- our own checkpoints, and the command


def test_a_converted_checkpoint_is_a_checkpoint(tmp_path):
    model = from_meta(written(tmp_path, synthetic("ViT-H/14")), num_heads=16)
    save_model(tmp_path / "out.pt", model, source="a test")
    back = load_model(tmp_path / "out.pt")
    assert back.cfg == model.cfg
    assert all(torch.equal(v, back.state_dict()[k]) for k, v in model.state_dict().items())


def test_no_run_goes_on_from_a_converted_checkpoint(tmp_path):
    model = small_model()
    save_model(tmp_path / "out.pt", model, source="somewhere")
    cfg = model.cfg.copy()
    cfg.data.use_fake_data, cfg.hardware = True, HardwareConfig(output_dir=str(tmp_path / "run"))
    with pytest.raises(CheckpointError, match="holds weights alone, from somewhere: load_model reads it"):
        Pretraining(cfg, resume=tmp_path / "out.pt")


def test_the_command_converts(transformers, tmp_path, capsys):
    theirs = theirs_of(transformers)
    theirs.save_pretrained(tmp_path / "hub")
    assert main(["convert", str(tmp_path / "hub"), str(tmp_path / "a.pt")]) == 0
    assert main(["convert", str(tmp_path / "a.pt"), str(tmp_path / "back"), "--encoder", "student"]) == 0
    assert f"written: {tmp_path / 'back'}" in capsys.readouterr().out
    again = transformers.IJepaModel.from_pretrained(tmp_path / "back")
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in theirs.state_dict().items())
    assert main(["convert", str(written(tmp_path, synthetic("ViT-H/14"))), str(tmp_path / "b.pt"), "--num-heads", "16"]) == 0
    assert load_model(tmp_path / "b.pt").cfg.model.embed_dim == 160


def test_the_commands_refusals_are_one_line_and_exit_code_2(tmp_path, capsys):
    assert main(["convert", str(tmp_path / "none.pth.tar"), str(tmp_path / "a.pt")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("CheckpointError: there is no file") and error.count("\n") == 1


def test_importing_needs_no_extra():
    code = "import sys, wejepa.interop; print([m for m in ('transformers', 'safetensors', 'onnx', 'datasets') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"
