"""Each figure of merit against a case whose answer is known."""

import pytest
import torch

from wejepa.analysis.features import (
    POOLINGS,
    extract_backbone_features,
    extract_tokens,
    knn_accuracy,
    pool_tokens,
    rankme,
    run_tsne_projection,
    teacher_variance,
)
from wejepa.config import DataConfig, IJepaConfig, MaskConfig, ModelConfig, adapt_config_for_backbone, default_config
from wejepa.data import load_images
from wejepa.errors import ConfigError
from wejepa.model import IJEPA_base


def tiny_config() -> IJepaConfig:
    return IJepaConfig(
        data=DataConfig(use_fake_data=True, fake_data_size=24),
        mask=MaskConfig(target_scale=(0.1, 0.2), context_share=0.3),
        model=ModelConfig(img_size=16, patch_size=2, in_chans=1, embed_dim=16, enc_depth=2, pred_depth=1, pred_dim=8, num_heads=2),
    )


def seeded(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- pooling and extraction


def test_pooling_over_everything():
    tokens = seeded(3, 64, 5)
    torch.testing.assert_close(pool_tokens(tokens, (8, 8), "mean"), tokens.sum(1) / 64)


@pytest.mark.parametrize("grid", [(8, 8), (4, 12)])
def test_pooling_over_cells_keeps_where_things_are(grid):
    tokens = seeded(3, grid[0] * grid[1], 5)
    high, wide = grid[0] // 4, grid[1] // 4
    plane = tokens.view(3, *grid, 5)
    cells = [[plane[:, r * high : (r + 1) * high, c * wide : (c + 1) * wide].mean((1, 2)) for c in range(4)] for r in range(4)]
    by_hand = torch.stack([torch.stack(row, dim=-1) for row in cells], dim=-2)  # (B, D, 4, 4)
    pooled = pool_tokens(tokens, grid, "grid")
    assert pooled.shape == (3, 16 * 5)
    torch.testing.assert_close(pooled.view(3, 5, 4, 4), by_hand)


def test_an_unknown_pooling_is_refused():
    with pytest.raises(ConfigError, match=r"pooling = 'max'.*mean"):
        pool_tokens(seeded(1, 4, 2), (2, 2), "max")
    assert {"mean", "grid"} <= set(POOLINGS)


def test_tokens_come_without_a_graph_in_order_and_in_float32():
    weight = torch.ones(1, requires_grad=True)
    batches = seeded(7, 4, 3).split(3)
    tokens = extract_tokens(lambda x: (x * weight).bfloat16(), batches)
    assert tokens.dtype == torch.float32 and not tokens.requires_grad
    torch.testing.assert_close(tokens, torch.cat(batches), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("encoder", ["teacher", "student"])
@pytest.mark.parametrize("pooling", ["mean", "grid"])
def test_features_of_a_models_encoder(encoder, pooling):
    cfg = tiny_config()
    torch.manual_seed(0)
    model = IJEPA_base(cfg)
    model.teacher_encoder.pos_embed.data.add_(1)
    source = load_images(cfg)
    images = next(source.batches(torch.arange(24), 24))
    with torch.no_grad():
        expected = pool_tokens(model.encode(images, encoder=encoder), (8, 8), pooling)
    features = extract_backbone_features(model, source, encoder=encoder, pooling=pooling, batch_size=10)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    some = extract_backbone_features(model, source, torch.tensor([5, 2]), encoder=encoder, pooling=pooling)
    torch.testing.assert_close(some, expected[[5, 2]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backbone", ["vit", "resnet18"])
def test_features_of_images_of_another_size(backbone):
    cfg = tiny_config()
    if backbone != "vit":
        cfg = adapt_config_for_backbone(default_config(), backbone)
        cfg.data = DataConfig(use_fake_data=True, fake_data_size=24)
    larger = cfg.copy()
    larger.model.img_size *= 2
    torch.manual_seed(0)
    model, source = IJEPA_base(cfg), load_images(larger)
    grid = tuple(2 * n for n in cfg.grid_size)
    with torch.no_grad():
        tokens = model.eval().encode(next(source.batches(torch.arange(24), 24)))
    features = extract_backbone_features(model, source, pooling="grid", batch_size=10)
    torch.testing.assert_close(features, pool_tokens(tokens, grid, "grid"), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- nearest neighbours


def test_knn_agrees_with_votes_counted_by_hand():
    train_x, train_y, test_x, test_y = seeded(60, 6), torch.arange(60) % 4, seeded(25, 6, seed=1), torch.arange(25) % 4
    right = 0
    for x, y in zip(test_x, test_y, strict=True):
        cosine = (train_x @ x) / (train_x.norm(dim=1) * x.norm())
        votes = [0.0] * 4
        for i in cosine.argsort(descending=True)[:5].tolist():
            votes[int(train_y[i])] += float(torch.exp(cosine[i] / 0.07))
        right += votes.index(max(votes)) == int(y)
    assert knn_accuracy(train_x, train_y, test_x, test_y, k=5) == right / 25
    assert 0 < right < 25


def test_knn_on_clusters_and_on_noise():
    centres, y = 5 * seeded(10, 16), torch.arange(400) % 10
    train_x, test_x = centres[y] + seeded(400, 16), centres[y] + seeded(400, 16, seed=1)
    assert knn_accuracy(train_x, y, test_x, y) == 1.0
    assert knn_accuracy(1000 * train_x, y, test_x, y) == 1.0  # length does not matter, direction does
    assert knn_accuracy(train_x, y, test_x, (y + 1) % 10) == 0.0
    assert knn_accuracy(seeded(400, 16, seed=2), y, seeded(400, 16, seed=3), y) < 0.2


def test_knn_with_fewer_vectors_than_neighbours_and_more_than_one_portion():
    x, y = torch.eye(4), torch.arange(4)
    assert knn_accuracy(x, y, x, y, k=20) == 1.0
    assert knn_accuracy(x, y, x.repeat(600, 1), y.repeat(600)) == 1.0


# ---------------------------------------------------------------- collapse


def test_rankme_counts_directions():
    orthogonal = torch.linalg.qr(seeded(64, 16))[0]
    assert rankme(orthogonal) == pytest.approx(16, rel=0.01)
    assert rankme(orthogonal @ torch.diag(torch.tensor([1.0] * 5 + [0.0] * 11))) == pytest.approx(5, rel=0.01)
    assert rankme(torch.ones(64, 16)) == pytest.approx(1, abs=0.01)
    assert rankme(100 * orthogonal) == pytest.approx(rankme(orthogonal), rel=1e-3)


def test_rankme_of_known_singular_values():
    p = torch.tensor([0.5, 0.25, 0.25])
    assert rankme(torch.diag(p)) == pytest.approx(float(torch.exp(-(p * p.log()).sum())), rel=1e-3)


def test_teacher_variance_tells_content_from_position():
    content, position = seeded(200, 1, 32), seeded(1, 9, 32, seed=1)
    assert teacher_variance(position.expand(200, -1, -1)) == pytest.approx(0, abs=1e-6)  # collapse: all images alike
    assert teacher_variance(content.expand(-1, 9, -1)) == pytest.approx(1, abs=0.03)  # nothing but content
    assert 0.3 < teacher_variance(content + position) < 0.7
    assert teacher_variance(7 * content + 7 * position + 3) == pytest.approx(teacher_variance(content + position), rel=1e-3)


# ---------------------------------------------------------------- a picture of them


def test_tsne_keeps_clusters_together_and_repeats():
    y = torch.arange(60) % 3
    features = 10 * seeded(3, 8)[y] + 0.1 * seeded(60, 8, seed=1)
    plane = run_tsne_projection(features, perplexity=5.0)
    assert plane.shape == (60, 2) and plane.isfinite().all()
    distance = torch.cdist(plane, plane).fill_diagonal_(torch.inf)
    assert (y[distance.argmin(1)] == y).all()
    assert torch.equal(plane, run_tsne_projection(features, perplexity=5.0))


def test_tsne_of_few_points():
    assert run_tsne_projection(seeded(8, 4), perplexity=30.0).shape == (8, 2)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_features_are_the_teachers_tokens_pooled_in_one_line(pooling):
    cfg = IJepaConfig()
    model, images = IJEPA_base(cfg), torch.randn(3, 3, 48, 32)  # another size than the config's
    torch.nn.init.zeros_(model.student_encoder.norm.weight)
    features = model.features(images, pooling)
    assert torch.equal(features, pool_tokens(model.encode(images), (12, 8), pooling)) and not features.requires_grad and model.training
    assert features.shape == (3, {"mean": 64, "grid": 16 * 64}[pooling]) and features.std() > 0
    with pytest.raises(ConfigError, match="pooling = 'max'"):
        model.features(images, "max")
