"""Attention, rollout, token colours and prediction errors are what their formulas say."""

import pytest
import torch
import torch.nn.functional as F

from wejepa.analysis import attention
from wejepa.analysis.attention import (
    attention_rollout,
    imagine,
    mutual_matches,
    nearest_tokens,
    predict_hidden,
    prediction_errors,
    record_attention,
    token_colours,
    token_similarity,
)
from wejepa.config import IJepaConfig, MaskConfig, ModelConfig
from wejepa.errors import ConfigError
from wejepa.masking import Masks, sample_block_masks
from wejepa.model import IJEPA_base

GRID, N = (4, 4), 16


@pytest.fixture
def model() -> IJEPA_base:
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "enc_depth": 3, "pred_depth": 1, "pred_dim": 12, "num_heads": 2}
    model = IJEPA_base(IJepaConfig(model=ModelConfig(in_chans=1, **sizes), mask=MaskConfig(target_scale=(0.1, 0.2), context_share=0.3)))
    with torch.no_grad():
        for p in model.student_encoder.parameters():
            p.add_(0.1 * torch.randn_like(p))  # so that student and teacher differ
    return model.eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(5, 1, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("encoder", ["teacher", "student"])
def test_recorded_weights_reproduce_the_forward_pass(model, images, encoder):
    """The first layer's weights, applied by hand, give the first block's output."""
    weights = record_attention(model, images, encoder)
    assert [w.shape for w in weights] == [(5, 2, N, N)] * 3
    net = model.student_encoder if encoder == "student" else model.teacher_encoder
    block, x = net.blocks[0], net.tokens(images)
    _, _, v = block.attn.qkv(block.norm1(x)).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    mixed = block.attn.proj((weights[0] @ v).transpose(1, 2).flatten(2))
    y = x + mixed
    torch.testing.assert_close(block(x), y + block.mlp(block.norm2(y)))


def test_recording_is_switched_off_again(model, images):
    record_attention(model, images)
    with pytest.raises(RuntimeError, match="enable_attention_recording"):
        model.get_recorded_attentions()
    with pytest.raises(ConfigError):
        record_attention(model, images, "pupil")
    model.encode(images)
    with pytest.raises(RuntimeError):
        model.get_recorded_attentions()


def test_rollout_multiplies_the_layers(model, images):
    weights = record_attention(model, images)
    total = attention_rollout(weights)
    assert total.shape == (5, N, N)
    torch.testing.assert_close(total.sum(-1), torch.ones(5, N))
    half = [(w.mean(1) + torch.eye(N)) / 2 for w in weights]
    torch.testing.assert_close(total, half[2] @ half[1] @ half[0])


def test_rollout_of_layers_that_look_at_themselves_is_the_identity():
    eye = torch.eye(N).expand(2, 3, N, N)
    torch.testing.assert_close(attention_rollout([eye, eye]), torch.eye(N).expand(2, N, N))
    with pytest.raises(ConfigError, match="one layer or more"):
        attention_rollout([])


def test_colours_are_the_first_three_components():
    """Tokens on three known axes of falling variance: each channel follows one of them."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(20, N, 3, generator=generator) * torch.tensor([9.0, 3.0, 1.0])
    axes, _ = torch.linalg.qr(torch.randn(12, 3, generator=generator))
    colours = token_colours(scores @ axes.T + 5, GRID)
    assert colours.shape == (20, 4, 4, 3) and colours.min() == 0 and colours.max() == 1
    flat = colours.reshape(-1, 3)
    for k in range(3):
        correlation = torch.corrcoef(torch.stack([flat[:, k], scores.reshape(-1, 3)[:, k]]))[0, 1]
        assert abs(correlation) > 0.98, k
    assert torch.equal(colours, token_colours(scores @ axes.T + 5, GRID))


@pytest.mark.parametrize("shape", [(2, N, 2), (2, N - 1, 8)])
def test_tokens_that_make_no_picture_are_refused(shape):
    with pytest.raises(ConfigError, match="give .B, 16, D."):
        token_colours(torch.zeros(shape), GRID)


def test_prediction_errors_are_the_losses_patch_by_patch(model, images):
    """With one mask a draw, averaged by hand."""
    cfg = model.cfg.mask
    errors = prediction_errors(model, images, cfg, samples=3, generator=torch.Generator().manual_seed(2))
    generator, found = torch.Generator().manual_seed(2), [[[] for _ in range(N)] for _ in images]
    for _ in range(3):
        masks = sample_block_masks(5, GRID, cfg, generator)
        with torch.no_grad():
            predictions, targets = model(images, masks)
        loss = F.smooth_l1_loss(predictions, targets, reduction="none").mean(-1)
        for b in range(5):
            for m, block in enumerate(masks.targets[b]):
                for t, place in enumerate(block.tolist()):
                    found[b][place].append(loss[b, m, t])
    for b in range(5):
        for place in range(N):
            value = errors[b].flatten()[place]
            if found[b][place]:
                torch.testing.assert_close(value, torch.stack(found[b][place]).mean())
            else:
                assert value.isnan()


def test_more_samples_reach_every_patch(model, images):
    assert prediction_errors(model, images, model.cfg.mask, samples=64, generator=torch.Generator().manual_seed(0)).isfinite().all()


def test_similarity_forgets_what_all_tokens_share():
    tokens, others = torch.randn(6, 8), torch.randn(9, 8)
    found = token_similarity(tokens, others)
    torch.testing.assert_close(found, token_similarity(tokens + 100, others + 100), atol=1e-3, rtol=1e-3)
    mean = torch.cat([tokens, others]).mean(0)
    torch.testing.assert_close(found[2, 3], F.cosine_similarity(tokens[2] - mean, others[3] - mean, dim=0))
    torch.testing.assert_close(token_similarity(tokens, tokens).diagonal(), torch.ones(6))
    with pytest.raises(ConfigError, match="same D"):
        token_similarity(tokens, others[:, :7])


def test_matches_are_mutual_and_the_best_comes_first():
    similarity = torch.tensor([[0.5, 0.9, 0.1], [0.2, 0.8, 0.3], [0.7, 0.1, 0.0], [0.1, 0.2, 0.6]])
    assert mutual_matches(similarity).tolist() == [[0, 1], [2, 0], [3, 2]]  # row 1 prefers column 1, which prefers row 0


def test_what_is_hidden_is_predicted_as_in_the_loss(model, images):
    context = torch.tensor([9, 0, 5])
    places, predictions, targets, errors = predict_hidden(model, images[:1], context)
    assert places.tolist() == [p for p in range(N) if p not in (0, 5, 9)]
    with torch.no_grad():
        expected = model(images[:1], Masks(context.sort().values[None], places[None, None]))
    torch.testing.assert_close(predictions, expected[0][0, 0])
    torch.testing.assert_close(targets, expected[1][0, 0])
    torch.testing.assert_close(errors.mean(), F.smooth_l1_loss(*expected))
    assert len(predict_hidden(model, images[:1], torch.tensor([], dtype=torch.long)).places) == N
    for wrong in ([0, 0], [N], [-1], range(N)):
        with pytest.raises(ConfigError, match="context"):
            predict_hidden(model, images[:1], torch.tensor(list(wrong)))


def test_nearest_tokens_are_nearest_however_few_fit_into_memory(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    queries, tokens = torch.randn(50, 6, generator=generator), 3 * torch.randn(200, 6, generator=generator)
    nearest = torch.cdist(queries, tokens).argmin(1)
    assert torch.equal(nearest_tokens(queries, tokens), nearest)
    monkeypatch.setattr(attention, "AT_ONCE", 450)  # two queries at a time
    assert torch.equal(nearest_tokens(queries, tokens), nearest)
    monkeypatch.setattr(attention, "AT_ONCE", 1)
    assert torch.equal(nearest_tokens(queries, tokens), nearest)


def test_imagined_patches_are_those_of_the_nearest_tokens(model, images):
    """Patch by patch, by hand, blocks that overlap included."""
    gallery = torch.randn(7, 1, 16, 16, generator=torch.Generator().manual_seed(3))
    masks = sample_block_masks(5, GRID, model.cfg.mask, torch.Generator().manual_seed(2))
    imagined = imagine(model, images, masks, gallery, batch_size=3)
    with torch.no_grad():
        predictions, _ = model(images, masks)
        tokens = F.layer_norm(model.encode(gallery), (16,)).flatten(0, 1)
    pixels = [gallery[i, :, 4 * r : 4 * r + 4, 4 * c : 4 * c + 4] for i in range(7) for r in range(4) for c in range(4)]
    overlaps = 0
    for b in range(5):
        for place in range(N):
            row, col = 4 * (place // 4), 4 * (place % 4)
            found = imagined[b, :, row : row + 4, col : col + 4]
            asked = [predictions[b, m, t] for m in range(4) for t in range(masks.targets.shape[2]) if masks.targets[b, m, t] == place]
            overlaps += len(asked) > 1
            if place in masks.context[b]:
                assert torch.equal(found, images[b, :, row : row + 4, col : col + 4])
            elif asked:
                assert torch.equal(found, pixels[int(torch.cdist(torch.stack(asked).mean(0)[None], tokens).argmin())])
            else:
                assert found.isnan().all()
    assert overlaps, "no two blocks overlap here"


def test_what_is_in_the_gallery_is_found_there(model, images):
    """A predictor that knows the answer gets the very patches."""
    masks = sample_block_masks(5, GRID, model.cfg.mask, torch.Generator().manual_seed(2))
    model.forward = lambda images, masks: 2 * (IJEPA_base.forward(model, images, masks)[1],)
    imagined = imagine(model, images, masks, torch.cat([torch.randn(2, 1, 16, 16), images]))
    known = imagined.isfinite()
    assert torch.equal(imagined[known], images[known])
