"""torchvision's classifiers as encoders: what they compute, what they may see, and that they train, stop and go on."""

import shutil
import zlib
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import VisionTransformer, get_model
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2
from torchvision.ops import StochasticDepth

from wejepa.analysis.attention import attention_rollout, record_attention
from wejepa.analysis.visualization import visualize_attention_scores
from wejepa.backbones import StageEncoder, copy_vit_weights, window_attention
from wejepa.config import ModelConfig, adapt_config_for_backbone, default_config, hf224_config
from wejepa.data import training_batches
from wejepa.errors import ConfigError, DataError
from wejepa.masking import sample_block_masks
from wejepa.model import Encoder, IJEPA_base
from wejepa.presets import BACKBONES, STAGE_WIDTHS, VIT_SIZES
from wejepa.train.checkpoints import load_model
from wejepa.train.classifier import Classifier, train_classifier
from wejepa.train.finetune import from_scratch, untrained
from wejepa.train.loop import Pretraining, parameter_groups

SWINS = [name for name in STAGE_WIDTHS if name.startswith("swin")]
CONVOLUTIONAL = [name for name in STAGE_WIDTHS if name not in SWINS]
B = 10


def backbone_config(name, img_size=64):
    """Two steps of ten noise images, at 64 x 64 or the smallest larger size that gives a grid of 4 x 4."""
    cfg = default_config()
    cfg.model.img_size = max(img_size, 4 * VIT_SIZES[name]["patch_size"]) if name in VIT_SIZES else img_size
    cfg = adapt_config_for_backbone(cfg, name)
    cfg.data.use_fake_data, cfg.data.fake_data_size, cfg.data.train_batch_size, cfg.data.eval_batch_size = True, 20, B, B
    o = cfg.optimizer
    o.epochs, o.warmup_epochs, o.momentum_teacher, o.momentum_teacher_final = 1, 0, 0.5, 0.5
    return cfg


def some_images(cfg, count=4):
    return torch.randn(count, 3, cfg.model.img_size, cfg.model.img_size, generator=torch.Generator().manual_seed(1))


def checksums(model):
    return {name: zlib.crc32(value.numpy().tobytes()) for name, value in model.state_dict().items()}


# ---------------------------------------------------------------- every backbone: two steps, stopped and gone on, and what it may see


HEAVY = ("vit_b_16", "vit_b_32", "vit_l_16", "swin_s", "convnext_small")
SHORTENED = ("vit_b_32", "vit_l_16")  # four layers stand for twelve and twenty-four, which are all alike; vit_b_16 has its twelve
NAMED = [name for name in BACKBONES if name != "vit_l_32"]  # it is vit_l_16 with other patches


def slow_where_heavy(names):
    return [pytest.param(name, marks=[pytest.mark.slow] if name in HEAVY else []) for name in names]


@pytest.fixture(scope="module", params=slow_where_heavy(NAMED))
def trained(request, tmp_path_factory):
    """A model of the checkpoint after one step, and the weights after a second one: of the run itself, and of one that was resumed."""
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        if request.param in SHORTENED:
            patch.setitem(VIT_SIZES, request.param, VIT_SIZES[request.param] | {"enc_depth": 4})
        return two_steps(request.param, folder)


def two_steps(name, folder):
    cfg = backbone_config(name)
    cfg.hardware.output_dir = str(folder)
    run = Pretraining(cfg)
    at_first = checksums(run.model)
    first, second = training_batches(run.source, cfg, 0)
    run.losses.append(float(run.train_step(first)))
    run.save()
    after_one = checksums(run.model)
    run.train_step(second)
    after_two = checksums(run.model)
    del run  # it and its optimizer's state can be a gigabyte
    resumed = Pretraining(cfg, resume="auto")
    assert resumed.step == 1
    resumed.train_step(second)
    after_resumed = checksums(resumed.model)
    del resumed
    model = load_model(folder / "latest.pt")
    shutil.rmtree(folder)
    return SimpleNamespace(
        name=name, cfg=cfg, model=model, states=[at_first, after_one, after_two], loaded=checksums(model), resumed=after_resumed
    )


def test_two_steps_and_a_resumed_run_end_with_identical_weights(trained):
    at_first, after_one, after_two = trained.states
    assert trained.loaded == after_one
    assert trained.resumed == after_two
    for before, after in ((at_first, after_one), (after_one, after_two)):
        for part in ("student_encoder", "teacher_encoder", "predictor"):
            assert any(before[k] != after[k] for k in before if k.startswith(part)), part


def test_features_are_a_token_a_patch(trained):
    assert trained.cfg.grid_size == (4, 4)
    for encoder in ("teacher", "student"):
        with torch.no_grad():
            tokens = trained.model.encode(some_images(trained.cfg, 2), encoder)
        assert tokens.shape == (2, 16, trained.cfg.model.embed_dim) and tokens.isfinite().all()
    assert not torch.equal(tokens[0], tokens[1])


def test_no_pixel_outside_the_context_reaches_the_student(trained):
    """In training as in evaluation: the gradient there is exactly zero, and other pixels there change no prediction."""
    model, cfg = trained.model, trained.cfg
    images = some_images(cfg)
    masks = sample_block_masks(len(images), (4, 4), cfg.mask, torch.Generator().manual_seed(2))
    patch = cfg.model.patch_size
    seen = torch.zeros(len(images), 16, dtype=torch.bool).scatter_(1, masks.context, True).view(-1, 4, 4)
    seen = seen.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, None].expand_as(images)
    for mode in (True, False):
        model.train(mode)
        x = images.clone().requires_grad_()
        tokens = model.student_encoder(x, keep=masks.context)
        assert tokens.shape == (*masks.context.shape, cfg.model.embed_dim)
        (gradient,) = torch.autograd.grad((tokens * torch.randn_like(tokens)).sum(), x)
        assert (gradient[~seen] == 0).all()
        assert ((gradient * seen) != 0).flatten(1).any(1).all()  # each image's own context does
        with torch.no_grad():
            whole = model.student_encoder(images)
            predictions, _ = model(images, masks)
            others, _ = model(torch.where(seen, images, 5), masks)
        assert whole.shape == (len(images), 16, cfg.model.embed_dim)
        assert torch.equal(predictions, others)


def test_attention_is_recorded_or_refused(trained):
    model, images = trained.model, some_images(trained.cfg, 2)
    if trained.name in CONVOLUTIONAL:
        with pytest.raises(ConfigError, match=f"'{trained.name}' is a convolutional network and has no attention: take a transformer"):
            record_attention(model, images)
        with pytest.raises(ConfigError, match="convolutional"):
            model.get_recorded_attentions()
        return
    for encoder in ("teacher", "student"):
        weights = record_attention(model, images, encoder)
        for layer in weights:
            assert layer.shape == (2, weights[0].shape[1], 16, 16) and (layer >= 0).all()
            torch.testing.assert_close(layer.sum(-1), torch.ones(layer.shape[:3]))
    depth = {"swin_t": 6, "swin_s": 18, "swin_v2_t": 6}.get(trained.name, trained.cfg.model.enc_depth)
    assert len(weights) == depth
    torch.testing.assert_close(attention_rollout(weights).sum(-1), torch.ones(2, 16))
    figure = visualize_attention_scores(images[0], [layer[0] for layer in weights[:3]], (4, 4), query=5)
    assert len(figure.axes) == 5  # the image, three layers, the colour bar


# ---------------------------------------------------------------- vision transformers


def small_pair(img_size=32):
    """A torchvision ViT of random weights, its class token and positions included, and an encoder of its sizes."""
    torch.manual_seed(0)
    classifier = VisionTransformer(image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=128, num_classes=5).eval()
    cfg = default_config()
    cfg.model = ModelConfig(img_size=img_size, patch_size=8, embed_dim=32, enc_depth=2, num_heads=4, pred_dim=16)
    return classifier, Encoder(cfg)


def test_copied_encoder_computes_what_torchvision_computes():
    classifier, encoder = small_pair()
    for p in encoder.parameters():  # nothing that the copy should set may be right by chance
        torch.nn.init.normal_(p)
    copy_vit_weights(encoder, classifier)
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        x = classifier._process_input(images) + classifier.encoder.pos_embedding[:, 1:]
        expected = classifier.encoder.ln(classifier.encoder.layers(x))
        assert torch.allclose(encoder(images), expected, atol=1e-5)


def test_positions_follow_the_grid():
    classifier, encoder = small_pair(img_size=64)
    copy_vit_weights(encoder, classifier)
    assert encoder(torch.randn(1, 3, 64, 64)).shape == (1, 64, 32)


@pytest.mark.parametrize("name", VIT_SIZES)
def test_sizes_of_transformers_are_torchvisions(name):
    with torch.device("meta"):
        theirs = get_model(name, weights=None)
    found = {"patch_size": theirs.patch_size, "embed_dim": theirs.hidden_dim, "enc_depth": len(theirs.encoder.layers)}
    found["num_heads"] = theirs.encoder.layers[0].num_heads
    assert found == VIT_SIZES[name]
    assert theirs.encoder.layers[0].mlp[0].out_features == 4 * theirs.hidden_dim


# ---------------------------------------------------------------- networks of stages


@pytest.mark.parametrize("name", slow_where_heavy(STAGE_WIDTHS))
def test_stages_compute_what_torchvision_computes(name):
    """Each place of the classifier's own last feature map, layer-normalised, is the token of that row and column."""
    cfg = backbone_config(name, img_size=128)
    assert cfg.model.patch_size == 32
    torch.manual_seed(0)
    encoder = StageEncoder(cfg).eval()
    theirs = get_model(name, weights=None).eval()
    seen, last = [], {"resnet": "layer4", "regnet": "trunk_output"}.get(name[:6], "features")
    for key, part in encoder.blocks.named_children():  # the same weights on both sides
        body = theirs if name.startswith("resnet") or key == "stem" else theirs.get_submodule(last)
        body.get_submodule(key).load_state_dict(part.state_dict())
    theirs.get_submodule(last).register_forward_hook(lambda module, inputs, output: seen.append(output))
    images = torch.randn(2, 3, 128, 192)
    with torch.no_grad():
        tokens = encoder(images)
        theirs(images)
    for row in range(4):
        for column in range(6):
            at = seen[0][:, row, column] if name in SWINS else seen[0][:, :, row, column]
            torch.testing.assert_close(tokens[:, row * 6 + column], F.layer_norm(at, at.shape[-1:], eps=1e-6), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", slow_where_heavy(STAGE_WIDTHS))
def test_each_stride_has_the_tables_width_and_builds_no_more(name):
    sizes = []
    for stride, width in STAGE_WIDTHS[name].items():
        cfg = default_config()
        cfg.model.img_size = 4 * stride
        cfg = adapt_config_for_backbone(cfg, name)
        encoder = StageEncoder(cfg)
        assert (cfg.model.patch_size, cfg.model.embed_dim) == (stride, width)
        assert encoder(torch.randn(2, 3, 4 * stride, 4 * stride)).shape == (2, 16, width)
        assert not [m.p for m in encoder.modules() if isinstance(m, StochasticDepth) and m.p]
        sizes.append(sum(p.numel() for p in encoder.parameters()))
    assert sizes[0] < sizes[1] < sizes[2]


@pytest.mark.parametrize("kind", [ShiftedWindowAttention, ShiftedWindowAttentionV2])
@pytest.mark.parametrize(("grid", "shift"), [((7, 7), 2), ((8, 8), 2), ((8, 8), 0), ((12, 4), 2), ((4, 4), 2), ((3, 6), 2)])
def test_window_attention_is_the_one_that_was_used(kind, grid, shift):
    """The recorded weights over the whole grid, applied to the values, give the layer's output; rows sum to one."""
    torch.manual_seed(0)
    layer = kind(12, [4, 4], [shift, shift], 3)
    for p in layer.parameters():
        nn.init.normal_(p, std=0.5)
    x = torch.randn(2, *grid, 12)
    n = grid[0] * grid[1]
    weights = window_attention(layer, x)
    assert weights.shape == (2, 3, n, n)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, n))
    if grid[0] % 4 or grid[1] % 4:  # there torchvision's places look at the padding as well
        assert (weights == 0).any()
        return
    assert (weights == 0).any() == (n > 16)
    v = F.linear(x.flatten(1, 2), layer.qkv.weight, layer.qkv.bias)[..., 24:].unflatten(-1, (3, 4)).transpose(1, 2)
    mixed = layer.proj((weights @ v).transpose(1, 2).flatten(2)).view_as(x)
    torch.testing.assert_close(mixed, layer(x), rtol=1e-4, atol=1e-4)


def test_where_windows_overhang_the_grid_places_look_at_places_only():
    """The share of a window's places, rescaled: by hand for one window that is larger than the grid."""
    torch.manual_seed(0)
    layer = ShiftedWindowAttention(8, [4, 4], [0, 0], 2)
    x = torch.randn(1, 3, 3, 8)
    q, k, _ = layer.qkv(F.pad(x, (0, 0, 0, 1, 0, 1)).flatten(1, 2)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    used = (q @ k.mT / 2 + layer.get_relative_position_bias()).softmax(-1)
    inside = torch.tensor([4 * r + c for r in range(3) for c in range(3)])
    used = used[:, :, inside][..., inside]
    assert (used.sum(-1) < 0.99).all()
    torch.testing.assert_close(window_attention(layer, x), used / used.sum(-1, keepdim=True))


def test_the_explorer_shows_a_swins_last_stage():
    from wejepa.widgets import TokenExplorer

    cfg = backbone_config("swin_t", img_size=32)
    explorer = TokenExplorer({"swin": IJEPA_base(cfg).eval()}, some_images(cfg, 1))
    assert explorer.depths == {"swin": (2, 6)}  # layers and heads of that stage
    assert explorer.values["swin", 0].shape == (4, 4)
    explorer.render()


def test_the_explorer_shows_all_but_attention_of_a_convolutional_network():
    from wejepa.widgets import TokenExplorer

    cfg = backbone_config("resnet18")
    explorer = TokenExplorer({"resnet": IJEPA_base(cfg).eval()}, some_images(cfg, 1))
    assert explorer.mode == "similarity" and "attention" not in dict(explorer.controls[0]["options"])
    for mode, _ in explorer.controls[0]["options"]:
        explorer.mode = mode
        assert explorer.view["problem"] == ""


# ---------------------------------------------------------------- batch statistics


@pytest.fixture
def resnet():
    torch.manual_seed(0)
    cfg = backbone_config("resnet18", img_size=32)
    return IJEPA_base(cfg), some_images(cfg, 6), sample_block_masks(6, (4, 4), cfg.mask, torch.Generator().manual_seed(0))


def test_the_teachers_statistics_are_of_whole_images_and_stay_its_own(resnet):
    model, images, masks = resnet
    model(images, masks)
    of_whole = model.teacher_encoder.blocks.conv1(images).mean((0, 2, 3))
    torch.testing.assert_close(model.teacher_encoder.blocks.bn1.running_mean, 0.1 * of_whole)
    blanked = torch.where(model.student_encoder.pixels_of(masks.context, (4, 4)), images, 0)
    of_masked = model.student_encoder.blocks.conv1(blanked).mean((0, 2, 3))
    torch.testing.assert_close(model.student_encoder.blocks.bn1.running_mean, 0.1 * of_masked)
    assert not torch.allclose(of_whole, of_masked, atol=1e-3)
    before = {k: v.clone() for k, v in model.teacher_encoder.named_buffers()}
    model.momentum_update(0.5)
    assert all(torch.equal(v, before[k]) for k, v in model.teacher_encoder.named_buffers())


def test_looking_changes_nothing(resnet):
    model, images, masks = resnet
    model(images, masks)
    before = checksums(model)
    alone = model.encode(images[:1])
    torch.testing.assert_close(model.encode(images)[:1], alone, rtol=1e-4, atol=1e-4)  # no statistics of the batch
    model.encode(images, "student")
    assert checksums(model) == before
    assert all(module.training for module in model.modules())


def test_monitoring_changes_no_statistics(tmp_path):
    cfg = backbone_config("resnet18", img_size=32)
    cfg.hardware.output_dir = str(tmp_path)
    run = Pretraining(cfg)
    run.train_step(next(training_batches(run.source, cfg, 0)))
    before = checksums(run.model)
    run.monitor()
    assert checksums(run.model) == before


# ---------------------------------------------------------------- frozen, pretrained, trained with labels


@pytest.mark.parametrize("name", ["resnet18", "swin_t"])
def test_frozen_the_predictor_alone_learns(name, tmp_path):
    cfg = backbone_config(name, img_size=32)
    cfg.model.classification_frozen = True
    cfg.optimizer.momentum_teacher, cfg.optimizer.momentum_teacher_final = 0.3, 0.7  # an average of equal numbers may differ in a bit
    cfg.hardware.output_dir = str(tmp_path)
    run = Pretraining(cfg)
    before = checksums(run.model)
    run.run()
    after = checksums(run.model)
    changed = {k.split(".")[0] for k in before if before[k] != after[k]}
    assert changed == {"predictor"}
    assert checksums(Pretraining(cfg, resume="auto").model) == after == checksums(load_model(tmp_path / "latest.pt"))


def test_only_a_backbone_is_frozen():
    cfg = default_config()
    cfg.model.classification_frozen = True
    with pytest.raises(ConfigError, match="classification_frozen = true needs model.classification_backbone"):
        cfg.validate()


def published(monkeypatch, **weights):
    """torchvision as if online: `get_model` gives these state dicts as the published weights."""

    def get(name, weights=None, published=weights):
        model = get_model(name, weights=None)
        if weights == "DEFAULT":
            model.load_state_dict(published[name])
        return model

    monkeypatch.setattr("torchvision.models.get_model", get)


def test_pretrained_weights_are_taken_and_a_baseline_does_without(monkeypatch):
    torch.manual_seed(5)
    theirs = get_model("resnet18", weights=None).state_dict()
    theirs["bn1.running_mean"] += 3
    published(monkeypatch, resnet18=theirs)
    cfg = backbone_config("resnet18")
    cfg.model.classification_pretrained = True
    model = IJEPA_base(cfg)
    for encoder in (model.student_encoder, model.teacher_encoder):
        for name, value in encoder.blocks.state_dict().items():
            assert torch.equal(value, theirs[name]), name
    random = untrained(cfg).student_encoder.blocks
    assert not torch.equal(random.conv1.weight, theirs["conv1.weight"])


def test_a_checkpoint_of_a_pretrained_start_is_loaded_offline(monkeypatch, tmp_path):
    cfg = backbone_config("resnet18", img_size=32)
    cfg.model.classification_pretrained = True
    cfg.hardware.output_dir = str(tmp_path)
    published(monkeypatch, resnet18=get_model("resnet18", weights=None).state_dict())
    run = Pretraining(cfg)
    run.run()
    monkeypatch.setattr("torchvision.models.get_model", lambda name, weights=None: get_model(name, weights=offline(weights)))
    model = load_model(tmp_path / "latest.pt")
    assert checksums(model) == checksums(run.model) and model.cfg == cfg


def offline(weights):
    if weights is not None:
        raise OSError("no route to host")


@pytest.mark.parametrize("name", ["vit_b_16", "resnet18", "swin_t"])
def test_weights_that_cannot_be_had_are_one_clear_error(monkeypatch, name):
    monkeypatch.setattr("torchvision.models.get_model", lambda name, weights=None: get_model(name, weights=offline(weights)))
    cfg = adapt_config_for_backbone(default_config(), name)
    cfg.model.classification_pretrained = True
    with pytest.raises(DataError, match="classification_pretrained = false"):
        IJEPA_base(cfg)


def test_training_with_labels_unfreezes_and_leaves_usable_statistics():
    from wejepa.data import load_images

    cfg = backbone_config("resnet18", img_size=32)
    cfg.model.classification_frozen = True
    source = load_images(cfg)
    torch.manual_seed(0)
    classifier = Classifier(from_scratch(cfg), IJEPA_base(cfg).student_encoder, source.classes)
    train_classifier(classifier, source, torch.arange(20), epochs=2, seed=0, learning_rate=1e-3)
    trained, fresh = classifier.encoder, untrained(cfg).student_encoder
    assert not torch.equal(trained.blocks.conv1.weight, fresh.blocks.conv1.weight)
    assert trained.blocks.bn1.num_batches_tracked == 4


def test_scales_and_position_tables_do_not_decay():
    for name in ("convnext_tiny", "swin_t", "swin_v2_t"):
        encoder = StageEncoder(backbone_config(name, img_size=32))
        decaying = {id(p) for group in parameter_groups(encoder) if group["decays"] for p in group["params"]}
        for key, p in encoder.named_parameters():
            special = key.endswith(("bias", "layer_scale", "logit_scale", "position_bias_table")) or p.dim() == 1
            assert (id(p) in decaying) == (not special), key


# ---------------------------------------------------------------- configs


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("size", [32, 64, 224, 30])
def test_adapted_config_fits_and_leaves_the_original(name, size):
    cfg = default_config()
    cfg.model.img_size = size
    before = cfg.to_dict()
    adapted = adapt_config_for_backbone(cfg, name)
    adapted.validate()
    assert cfg.to_dict() == before
    m = adapted.model
    assert m.classification_backbone == name
    assert min(adapted.grid_size) >= 4
    assert type(adapted).from_dict(adapted.to_dict()) == adapted
    if name in VIT_SIZES:
        assert m.patch_size == int(name.rsplit("_", 1)[1])
    else:
        assert (m.img_size, m.patch_size) == {32: (32, 8), 64: (64, 16), 224: (224, 32), 30: (224, 32)}[size]
        assert m.pred_dim <= 384


@pytest.mark.parametrize("name", BACKBONES)
def test_the_large_preset_takes_any_backbone(name):
    cfg = adapt_config_for_backbone(hf224_config(), name)
    assert cfg.model.img_size == 224 and cfg.grid_size[0] in (7, 14)
    assert f"encoder    {name}" in cfg.summary()


def test_unknown_backbone_names_the_nearest():
    for wrong, nearest in (("vit_b16", "vit_b_16"), ("resnet_18", "resnet18"), ("convnext_tinny", "convnext_tiny")):
        with pytest.raises(ConfigError, match=f"did you mean '{nearest}'"):
            adapt_config_for_backbone(default_config(), wrong)


@pytest.mark.parametrize(
    ("name", "setting", "value", "told"),
    [
        ("vit_b_16", "enc_depth", 3, "enc_depth = 3 .* has 12: let adapt_config_for_backbone"),
        ("resnet18", "patch_size", 4, "patch_size = 4 is no stage of .*'resnet18': take 8, 16, 32, or let adapt_config_for_backbone"),
        ("swin_t", "embed_dim", 96, "embed_dim = 96 .* has 192: let adapt_config_for_backbone"),
        ("regnet_y_400mf", "in_chans", 1, "in_chans = 1 .* has 3: let adapt_config_for_backbone"),
        ("resnet18", "num_heads", 5, "num_heads = 5 does not divide model.pred_dim = 64: take num_heads 4"),
    ],
)
def test_sizes_at_odds_with_the_backbone_are_refused(name, setting, value, told):
    cfg = default_config()
    cfg.model.img_size = 64 if name == "vit_b_16" else 32
    cfg = adapt_config_for_backbone(cfg, name)
    setattr(cfg.model, setting, value)
    with pytest.raises(ConfigError, match=told):
        cfg.validate()


def test_images_that_the_stride_does_not_divide_are_refused():
    encoder = StageEncoder(backbone_config("resnet18", img_size=32))
    with pytest.raises(ConfigError, match="resize it to 32 x 40"):
        encoder(torch.zeros(1, 3, 36, 40))
