"""The promises of the model: what the student may see, what the teacher may learn, what the predictor may know."""

import pytest
import torch
import torch.nn.functional as F

from wejepa.config import DataConfig, IJepaConfig, MaskConfig, ModelConfig
from wejepa.errors import ConfigError
from wejepa.masking import Masks, sample_block_masks
from wejepa.model import IJEPA_base, ijepa_loss
from wejepa.patches import resize_positions, sincos_positions

B, D, HEADS, DEPTH, GRID = 3, 24, 3, 2, (6, 6)


def tiny_config(**model) -> IJepaConfig:
    sizes = {
        "img_size": 24,
        "patch_size": 4,
        "in_chans": 3,
        "embed_dim": D,
        "enc_depth": DEPTH,
        "pred_depth": 2,
        "pred_dim": 12,
        "num_heads": HEADS,
    }
    return IJepaConfig(
        data=DataConfig(use_fake_data=True),
        mask=MaskConfig(target_scale=(0.1, 0.2), target_aspect_ratio=(0.75, 1.5), num_target_blocks=3, context_share=0.3),
        model=ModelConfig(**sizes | model),
    )


@pytest.fixture
def cfg() -> IJepaConfig:
    return tiny_config()


@pytest.fixture
def model(cfg) -> IJEPA_base:
    """A model away from its initialisation: no bias is zero, and student and teacher differ everywhere."""
    torch.manual_seed(0)
    model = IJEPA_base(cfg)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(B, 3, 24, 24, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def masks(cfg) -> Masks:
    return sample_block_masks(B, GRID, cfg.mask, torch.Generator().manual_seed(2))


def patch_of_pixels(index: torch.Tensor) -> torch.Tensor:
    """Which pixels belong to the patches of each row of indices: (B, K) -> bool (B, 24, 24)."""
    patches = torch.zeros(len(index), 36, dtype=torch.bool).scatter_(1, index, True).view(-1, *GRID)
    return patches.repeat_interleave(4, 1).repeat_interleave(4, 2)


def touched(gradient: torch.Tensor) -> torch.Tensor:
    """Pixels with any gradient: (B, C, 24, 24) -> bool (B, 24, 24)."""
    return (gradient != 0).any(1)


def rolled(masks: Masks) -> Masks:
    """Other targets of the same shape under the same context: each image is asked for those of the next one."""
    return Masks(masks.context, masks.targets.roll(1, 0))


# ---------------------------------------------------------------- shapes


def test_shapes(model, images, masks, cfg):
    predictions, targets = model(images, masks)
    assert predictions.shape == targets.shape == (*masks.targets.shape, D)
    assert masks.targets.shape[:2] == (B, 3)
    for encoder in ("teacher", "student"):
        assert model.encode(images, encoder=encoder).shape == (B, 36, D)
    assert model.student_encoder(images, keep=masks.context).shape == (B, masks.context.shape[1], D)
    assert torch.equal(model.encode(images), model.teacher_encoder(images))  # the teacher, as in the paper
    assert not torch.equal(model.encode(images, "teacher"), model.encode(images, "student"))


def test_an_unknown_encoder_is_refused(model, images):
    with pytest.raises(ConfigError, match="encoder = 'techer': give 'teacher' or 'student'"):
        model.encode(images, encoder="techer")


def test_a_config_that_does_not_hold_together_is_refused(cfg):
    cfg.model.num_heads = 5
    with pytest.raises(ConfigError, match=r"model\.num_heads = 5"):
        IJEPA_base(cfg)


def test_the_model_keeps_a_config_of_its_own(cfg):
    model = IJEPA_base(cfg)
    cfg.model.embed_dim = 48
    assert model.cfg.model.embed_dim == D


def test_images_with_other_channels_are_refused(model, masks):
    with pytest.raises(ConfigError, match=r"model\.in_chans"):
        model(torch.zeros(B, 1, 24, 24), masks)


def test_one_channel():
    model = IJEPA_base(tiny_config(in_chans=1))
    assert model.encode(torch.randn(2, 1, 24, 24)).shape == (2, 36, D)


def test_initialisation_follows_torchs_seed(cfg):
    def state(seed):
        torch.manual_seed(seed)
        return IJEPA_base(cfg).state_dict()

    one, again, other = state(0), state(0), state(1)
    assert all(torch.equal(one[k], again[k]) for k in one)
    assert not torch.equal(one["student_encoder.pos_embed"], other["student_encoder.pos_embed"])


def test_the_teacher_begins_as_the_student_in_memory_of_its_own(cfg):
    model = IJEPA_base(cfg)
    teacher = dict(model.teacher_encoder.named_parameters())
    for name, p in model.student_encoder.named_parameters():
        assert torch.equal(p, teacher[name]) and p.data_ptr() != teacher[name].data_ptr()


def test_the_initial_tokens_tell_images_apart(cfg):
    """With positions that drown the content, I-JEPA learns to predict positions: the loss falls and nothing is learnt."""
    torch.manual_seed(0)
    encoder = IJEPA_base(cfg).student_encoder
    tokens = encoder.tokens(torch.randn(64, 3, 24, 24))  # (B, N, D)
    between_images, between_places = tokens.var(0).mean(), tokens.mean(0).var(0).mean()
    assert between_images > 0.2 * between_places


# ---------------------------------------------------------------- the student sees the context alone


def test_pixels_outside_the_context_have_no_gradient(model, images, masks):
    images.requires_grad_()
    tokens = model.student_encoder(images, keep=masks.context)
    (tokens * torch.randn_like(tokens)).sum().backward()
    assert torch.equal(touched(images.grad), patch_of_pixels(masks.context))  # exactly zero outside, non-zero in every pixel inside


def test_predictions_depend_on_the_contexts_pixels_alone(model, images, masks):
    predictions, _ = model(images.requires_grad_(), masks)
    (predictions * torch.randn_like(predictions)).sum().backward()
    assert torch.equal(touched(images.grad), patch_of_pixels(masks.context))


def test_targets_pixels_do_not_change_predictions(model, images, masks):
    """The same, without autograd's word: other pixels outside the context, the same predictions, other targets."""
    predictions, targets = model(images, masks)
    inside = patch_of_pixels(masks.context)[:, None]
    others, other_targets = model(torch.where(inside, images, torch.randn_like(images)), masks)
    assert torch.equal(predictions, others)
    assert not torch.isclose(targets, other_targets).all(-1).any()


def test_dropped_tokens_cost_nothing(model, images, masks):
    lengths = []
    for block in model.student_encoder.blocks:
        block.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape))
    model(images, masks)
    assert lengths == [(B, masks.context.shape[1], D)] * DEPTH


def test_the_student_equals_a_computation_by_hand(model, images, masks):
    """Each image on its own: its context patches alone, a matrix product, their positions, the blocks, the norm."""
    student = model.student_encoder
    by_hand = []
    for image, keep in zip(images, masks.context, strict=True):
        patches = F.unfold(image[None], kernel_size=4, stride=4)[0].T[keep]  # (Nc, C * 4 * 4)
        x = patches @ student.patch_embed.proj.weight.flatten(1).T + student.patch_embed.proj.bias + student.pos_embed[0, keep]
        x = x[None]
        for block in student.blocks:
            x = block(x)
        by_hand.append(student.norm(x)[0])
    torch.testing.assert_close(student(images, keep=masks.context), torch.stack(by_hand), rtol=1e-4, atol=1e-5)


def test_the_order_of_the_kept_patches_is_the_order_of_the_tokens(model, images, masks):
    there = model.student_encoder(images, keep=masks.context)
    back = model.student_encoder(images, keep=masks.context.flip(1))
    torch.testing.assert_close(back.flip(1), there, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- the teacher


def test_targets_are_the_normalised_tokens_of_the_teacher_on_the_whole_image(model, images, masks):
    _, targets = model(images, masks)
    whole = model.teacher_encoder(images)
    for b in range(B):
        for m in range(3):
            chosen = whole[b, masks.targets[b, m]]
            centred = chosen - chosen.mean(-1, keepdim=True)
            expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
            torch.testing.assert_close(targets[b, m], expected, rtol=1e-4, atol=1e-5)


def test_targets_are_layer_normalised(model, images, masks):
    with torch.no_grad():
        model.teacher_encoder.norm.weight.mul_(3).add_(1)  # what the teacher itself ends in does not matter
        model.teacher_encoder.norm.bias.add_(2)
    _, targets = model(images, masks)
    torch.testing.assert_close(targets.mean(-1), torch.zeros(targets.shape[:-1]), rtol=0, atol=1e-5)
    torch.testing.assert_close(targets.var(-1, unbiased=False), torch.ones(targets.shape[:-1]), rtol=0, atol=1e-3)


def test_the_teacher_gets_no_gradient(model, images, masks):
    predictions, targets = model(images.requires_grad_(), masks)  # not even where the images would ask for one
    assert not targets.requires_grad and targets.grad_fn is None and predictions.requires_grad
    ijepa_loss(predictions, targets).backward()
    for name, p in model.teacher_encoder.named_parameters():
        assert p.grad is None and not p.requires_grad, name


def test_the_student_and_the_predictor_get_a_gradient_everywhere(model, images, masks):
    ijepa_loss(*model(images, masks)).backward()
    for part in (model.student_encoder, model.predictor):
        for name, p in part.named_parameters():
            assert p.grad is not None and p.grad.abs().sum() > 0 and p.grad.isfinite().all(), name


def test_the_students_gradient_comes_through_the_context_alone(model, images, masks):
    """A position embedding outside the context of every image has no gradient, one inside has."""
    ijepa_loss(*model(images, masks)).backward()
    seen = torch.zeros(36, dtype=torch.bool).index_fill_(0, masks.context.flatten(), True)
    assert 0 < seen.sum() < 36
    assert torch.equal((model.student_encoder.pos_embed.grad[0] != 0).any(-1), seen)


def test_the_loss_is_smooth_l1():
    predictions, targets = torch.tensor([0.0, 0.5, 3.0]).view(1, 1, 1, 3), torch.zeros(1, 1, 1, 3)
    torch.testing.assert_close(ijepa_loss(predictions, targets), torch.tensor((0 + 0.5 * 0.25 + 2.5) / 3))


# ---------------------------------------------------------------- the predictor


def test_predictions_depend_on_where_the_target_is(model, images, masks):
    predictions, _ = model(images, masks)
    elsewhere, _ = model(images, rolled(masks))
    moved = masks.targets != masks.targets.roll(1, 0)
    assert moved.any()
    assert not torch.isclose(predictions[moved], elsewhere[moved], atol=1e-5).all(-1).any()


def test_each_prediction_belongs_to_its_own_target(model, images, masks):
    """Asked for the blocks in another order, the predictor answers in that order."""
    order = [2, 0, 1]
    predictions, targets = model(images, masks)
    reordered, reordered_targets = model(images, Masks(masks.context, masks.targets[:, order]))
    torch.testing.assert_close(reordered, predictions[:, order], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(reordered_targets, targets[:, order], rtol=1e-4, atol=1e-5)


def test_predictions_depend_on_where_the_context_is(model, images, masks):
    context = model.student_encoder(images, keep=masks.context)
    here = model.predictor(context, masks)
    there = model.predictor(context, Masks(masks.context.flip(1), masks.targets))
    assert not torch.allclose(here, there, atol=1e-4)


def test_images_of_a_batch_do_not_mix(model, images, masks):
    together, targets = model(images, masks)
    for b in range(B):
        alone, target = model(images[b : b + 1], Masks(masks.context[b : b + 1], masks.targets[b : b + 1]))
        torch.testing.assert_close(alone[0], together[b], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(target[0], targets[b], rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- attention


@pytest.mark.parametrize("encoder", ["teacher", "student"])
def test_recorded_attention(model, images, encoder):
    before = model.encode(images, encoder)
    model.enable_attention_recording(True)
    during = model.encode(images, encoder)
    recorded = model.get_recorded_attentions(encoder)
    torch.testing.assert_close(during, before, rtol=1e-4, atol=1e-5)  # in float32 by another kernel
    assert [tuple(weights.shape) for weights in recorded] == [(B, HEADS, 36, 36)] * DEPTH
    for weights in recorded:
        assert weights.dtype == torch.float32 and not weights.requires_grad
        assert (weights >= 0).all()
        torch.testing.assert_close(weights.sum(-1), torch.ones(B, HEADS, 36), rtol=0, atol=1e-5)
    assert not torch.equal(recorded[0], recorded[1])


def test_recorded_attention_is_the_one_that_was_used(model, images):
    """Softmax of the scaled products of queries and keys, from the first block's own weights."""
    model.enable_attention_recording(True)
    model.encode(images, "teacher")
    teacher = model.teacher_encoder
    attention = teacher.blocks[0].attn
    q, k, _ = attention.qkv(teacher.blocks[0].norm1(teacher.tokens(images))).chunk(3, dim=-1)
    q, k = (x.view(B, 36, HEADS, D // HEADS).transpose(1, 2) for x in (q, k))
    expected = (q @ k.transpose(-2, -1) / (D // HEADS) ** 0.5).softmax(-1)
    torch.testing.assert_close(model.get_recorded_attentions("teacher")[0], expected, rtol=1e-4, atol=1e-5)


def test_recorded_attention_is_that_of_the_last_pass(model, images, masks):
    model.enable_attention_recording(True)
    model.encode(images, "student")
    model(images, masks)
    context = masks.context.shape[1]
    assert model.get_recorded_attentions("student")[0].shape == (B, HEADS, context, context)
    assert model.get_recorded_attentions()[0].shape == (B, HEADS, 36, 36)  # the teacher, by default


def test_what_was_not_recorded_cannot_be_had(model, images):
    with pytest.raises(RuntimeError, match=r"enable_attention_recording\(True\)"):
        model.get_recorded_attentions()
    model.encode(images)
    with pytest.raises(RuntimeError, match="teacher"):
        model.get_recorded_attentions()
    model.enable_attention_recording(True)
    model.encode(images, "teacher")
    with pytest.raises(RuntimeError, match="student"):
        model.get_recorded_attentions("student")
    model.enable_attention_recording(False)
    with pytest.raises(RuntimeError):
        model.get_recorded_attentions("teacher")
    model.encode(images, "teacher")
    with pytest.raises(RuntimeError):
        model.get_recorded_attentions("teacher")
    with pytest.raises(ConfigError, match="'predictor'"):
        model.get_recorded_attentions("predictor")


# ---------------------------------------------------------------- other sizes, other precision


@pytest.mark.parametrize("size", [(32, 32), (16, 16), (24, 40)])
def test_images_of_another_size(model, cfg, size):
    grid = (size[0] // 4, size[1] // 4)
    images = torch.randn(2, 3, *size, requires_grad=True)
    assert model.encode(images).shape == (2, grid[0] * grid[1], D)
    masks = sample_block_masks(2, grid, cfg.mask, torch.Generator().manual_seed(0))
    predictions, targets = model(images, masks)
    assert predictions.shape == targets.shape == (*masks.targets.shape, D)
    predictions.square().sum().backward()
    seen = torch.zeros(2, grid[0] * grid[1], dtype=torch.bool).scatter_(1, masks.context, True).view(2, *grid)
    assert torch.equal(touched(images.grad), seen.repeat_interleave(4, 1).repeat_interleave(4, 2))


def test_an_image_that_the_patch_does_not_divide_is_refused(model):
    with pytest.raises(ConfigError, match="26 x 24"):
        model.encode(torch.zeros(1, 3, 26, 24))


def test_the_weights_are_complete(model, cfg, images, masks):
    state = model.state_dict()
    for part in ("student_encoder", "teacher_encoder"):
        assert {f"{part}.pos_embed", f"{part}.patch_embed.proj.weight", f"{part}.patch_embed.proj.bias"} <= state.keys()
    torch.manual_seed(99)
    other = IJEPA_base(cfg)
    assert not torch.equal(other.encode(images), model.encode(images))
    other.load_state_dict(state)
    for one, two in zip(model(images, masks), other(images, masks), strict=True):
        assert torch.equal(one, two)


def test_bfloat16_stays_close_to_float32(model, images, masks):
    predictions, targets = model(images, masks)
    with torch.autocast("cpu", torch.bfloat16):
        fast_predictions, fast_targets = model(images, masks)
        loss = ijepa_loss(fast_predictions, fast_targets)
    assert loss.dtype == fast_targets.dtype == torch.float32
    for fast, exact in ((fast_predictions, predictions), (fast_targets, targets)):
        assert fast.isfinite().all()
        assert (fast.float() - exact).norm() / exact.norm() < 0.03
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_bfloat16_recording_still_sums_to_one(model, images):
    with torch.autocast("cpu", torch.bfloat16):
        before = model.encode(images)
        model.enable_attention_recording(True)
        during = model.encode(images)
    assert torch.equal(before, during)
    for weights in model.get_recorded_attentions():
        torch.testing.assert_close(weights.sum(-1), torch.ones(B, HEADS, 36), rtol=0, atol=0.02)


# ---------------------------------------------------------------- faster, and still the same


def plain_attention(attention, x, skip=0):
    """The paper's formula, in float32 or in what autocast makes of it."""
    q, k, v = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4).float()
    weights = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)
    return attention.proj((weights @ v).transpose(1, 2).flatten(2)[:, skip:])


@pytest.mark.parametrize("tokens", [10, 58, 70])
@pytest.mark.parametrize("skip", [0, 4])
def test_attention_is_the_plain_formula(model, tokens, skip):
    attention, x = model.teacher_encoder.blocks[0].attn, torch.randn(B, tokens, D)
    expected = plain_attention(attention, x, skip)
    torch.testing.assert_close(attention(x, skip), expected, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        fast = attention(x, skip)
    assert fast.dtype == torch.bfloat16
    assert (fast.float() - expected).norm() / expected.norm() < 0.02


def test_the_gradient_is_that_of_the_plain_formula(model):
    attention, x = model.student_encoder.blocks[0].attn, torch.randn(B, 58, D, requires_grad=True)
    expected = torch.autograd.grad(plain_attention(attention, x).square().sum(), [x, *attention.parameters()])
    for found, wanted in zip(torch.autograd.grad(attention(x).square().sum(), [x, *attention.parameters()]), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        loss = attention(x).float().square().sum()
    for found, wanted in zip(torch.autograd.grad(loss, [x, *attention.parameters()]), expected, strict=True):
        assert (found - wanted).norm() / wanted.norm() < 0.04


def test_the_predictors_last_block_loses_nothing(model, images, masks):
    """As if it had answered the context as well, and the answers were thrown away."""
    predictor, context = model.predictor, model.student_encoder(images, keep=masks.context)
    seen = predictor.embed(context) + predictor.pos_embed[0, masks.context]
    asked = predictor.mask_token + predictor.pos_embed[0, masks.targets.flatten(1)]
    x = torch.cat([seen, asked], 1)
    for block in predictor.blocks:
        x = block(x)
    expected = predictor.proj(predictor.norm(x[:, context.shape[1] :])).view(*masks.targets.shape, D)
    torch.testing.assert_close(predictor(context, masks), expected, rtol=1e-4, atol=1e-5)


def test_fixed_positions_are_no_weights(images, masks):
    model = IJEPA_base(tiny_config(positions="sincos"))
    names = [name for name in model.state_dict() if name.endswith("pos_embed")]
    assert len(names) == 3 and not set(names) & {name for name, _ in model.named_parameters()}
    assert torch.equal(model.student_encoder.pos_embed, sincos_positions(GRID, D))
    assert torch.equal(model.predictor.pos_embed, sincos_positions(GRID, 12))
    ijepa_loss(*model(images, masks)).backward()
    model.momentum_update(0.5)
    assert torch.equal(model.teacher_encoder.pos_embed, sincos_positions(GRID, D))
    larger = torch.randn(2, 3, 32, 24)
    resized = resize_positions(sincos_positions(GRID, D), GRID, (8, 6))
    torch.testing.assert_close(model.teacher_encoder.tokens(larger), model.teacher_encoder.patch_embed(larger) + resized)


def test_widths_for_sines_and_cosines():
    for name, width, heads, wanted in (("embed_dim", 18, 3, 24), ("pred_dim", 15, 3, 24), ("pred_dim", 10, 2, 12)):
        sizes = {"embed_dim": 24, "pred_dim": 12, name: width, "num_heads": heads}
        tiny_config(**sizes).validate()
        with pytest.raises(ConfigError, match=f"model.{name} = {width} does not divide by 4, .*: take {wanted}, or positions 'learnt'"):
            tiny_config(**sizes, positions="sincos").validate()


def test_a_block_of_its_own_is_predicted_as_if_it_were_the_only_one(model, images, masks):
    predictor, context = model.predictor, model.student_encoder(images, keep=masks.context)
    predictor.blockwise = True
    together = predictor(context, masks)
    for m in range(masks.targets.shape[1]):
        alone = predictor(context, Masks(masks.context, masks.targets[:, m : m + 1]))
        torch.testing.assert_close(together[:, m : m + 1], alone, rtol=1e-4, atol=1e-5)


def test_a_run_may_predict_each_block_on_its_own(images, masks):
    model = IJEPA_base(tiny_config(blockwise_prediction=True))
    predictions, targets = model(images, masks)
    assert model.predictor.blockwise and predictions.shape == targets.shape
    ijepa_loss(predictions, targets).backward()
    assert all(p.grad is not None for part in (model.student_encoder, model.predictor) for p in part.parameters())
