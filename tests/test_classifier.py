"""A classifier trained as a whole: which layer learns at which rate, what is written and read, and what is refused."""

import math

import pytest
import torch
from ranks import tiny_config

from wejepa.config import IJepaConfig, adapt_config_for_backbone, default_config
from wejepa.data import MemoryImages, load_images
from wejepa.errors import CheckpointError
from wejepa.model import IJEPA_base
from wejepa.train.checkpoints import save_model
from wejepa.train.classifier import Classifier, layerwise_groups, train_classifier

CLASSES = ("stripes", "dots", "rings")


@pytest.fixture
def cfg(tmp_path) -> IJepaConfig:
    return tiny_config(tmp_path)


@pytest.fixture
def classifier(cfg) -> Classifier:
    torch.manual_seed(0)
    return Classifier(cfg, IJEPA_base(cfg).student_encoder, CLASSES)


@pytest.fixture
def source() -> MemoryImages:
    """Three patterns under noise."""
    generator = torch.Generator().manual_seed(1)
    patterns, labels = torch.randint(0, 200, (3, 1, 16, 16), generator=generator), torch.arange(60) % 3
    images = (patterns[labels] + torch.randint(0, 50, (60, 1, 16, 16), generator=generator)).to(torch.uint8)
    return MemoryImages(images, labels, CLASSES, img_size=16, in_chans=1, mean=(0.5,), std=(0.3,))


def train(classifier, source, **changes) -> None:
    train_classifier(classifier, source, torch.arange(60), **{"epochs": 1, "seed": 0, "learning_rate": 3e-3} | changes)


def test_scores_are_of_the_mean_token(classifier):
    images = torch.randn(5, 1, 16, 16)
    expected = classifier.encoder(images).mean(1) @ classifier.head.weight.T + classifier.head.bias
    torch.testing.assert_close(classifier(images), expected)
    assert classifier(images).shape == (5, 3)


def test_it_learns(classifier, source):
    before = (classifier.predict(source, torch.arange(60)) == source.labels).float().mean()
    train(classifier, source, epochs=6)
    after = (classifier.predict(source, torch.arange(60)) == source.labels).float().mean()
    assert after > 0.95 > before and not classifier.training


def test_training_repeats(cfg, source):
    weights = []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        classifier = Classifier(cfg, IJEPA_base(cfg).student_encoder, CLASSES)
        train(classifier, source, seed=seed)
        weights.append(classifier.head.weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_to_predict_changes_nothing(classifier, source):
    classifier.train()
    classifier.predict(source, torch.arange(9))
    assert classifier.training and all(p.grad is None for p in classifier.parameters())


# ---------------------------------------------------------------- rates


def test_a_layer_learns_the_slower_the_further_it_is_from_the_head(classifier):
    share = {id(p): group["share"] for group in layerwise_groups(classifier, 0.5) for p in group["params"]}
    found = {name: share[id(p)] for name, p in classifier.named_parameters()}
    assert len(found) == len(share)
    for name, value in found.items():
        block = {"encoder.blocks.1": 1, "encoder.blocks.0": 2}.get(name[:16])
        distance = 0 if name.startswith("head") else 1 if name.startswith("encoder.norm") else block or 3
        assert value == 0.5**distance, name


@pytest.mark.parametrize("name", ["resnet18", "swin_t"])
def test_stages_are_layers_too(name):
    cfg = adapt_config_for_backbone(default_config(), name)
    cfg.model.img_size, cfg.model.patch_size = 32, 8
    classifier = Classifier(cfg, IJEPA_base(cfg).student_encoder, CLASSES)
    groups = layerwise_groups(classifier, 0.5)
    assert sum(len(group["params"]) for group in groups) == len(list(classifier.parameters()))
    shares = {group["share"] for group in groups}
    assert max(shares) == 1 and min(shares) >= 0.5 ** (len(classifier.encoder.blocks) + 1) and len(shares) > 2


def test_matrices_of_the_encoder_decay_and_nothing_else(classifier):
    decays = {id(p): group["weight_decay"] for group in layerwise_groups(classifier, 0.5) for p in group["params"]}
    for name, p in classifier.named_parameters():
        matrix = p.dim() > 1 and name.endswith("weight") and "head" not in name
        assert decays[id(p)] == (0.05 if matrix else 0), name


def test_the_rate_rises_for_a_tenth_and_fades_along_a_cosine(classifier, source, monkeypatch):
    rates = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: rates.append({g["lr"] / g["share"] for g in self.param_groups}))
    classifier.cfg.data.train_batch_size = 10
    train(classifier, source, epochs=5, learning_rate=2e-3, layer_decay=0.5)
    steps = 30  # five epochs of six batches
    expected = [2e-3 * min(1, (step + 1) / 3) * (1 + math.cos(math.pi * step / steps)) / 2 for step in range(steps)]
    assert [sum(rate) / len(rate) for rate in rates] == pytest.approx(expected)
    assert all(max(rate) == pytest.approx(min(rate)) for rate in rates)


def test_smoothed_labels_spread_their_share(classifier, source, monkeypatch):
    targets, cross_entropy = [], torch.nn.functional.cross_entropy
    told = lambda scores, y, **options: targets.append(options) or cross_entropy(scores, y, **options)  # noqa: E731
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", told)
    train(classifier, source, label_smoothing=0.3)
    assert {t["label_smoothing"] for t in targets} == {0.3}


# ---------------------------------------------------------------- on disk


def test_what_is_written_is_read(classifier, source, tmp_path):
    train(classifier, source)
    classifier.save(tmp_path / "new" / "c.pt")
    read = Classifier.load(tmp_path / "new" / "c.pt")
    assert read.classes == CLASSES and read.cfg == classifier.cfg and not read.training
    assert all(torch.equal(value, read.state_dict()[name]) for name, value in classifier.state_dict().items())
    assert torch.equal(read.predict(source, torch.arange(60)), classifier.predict(source, torch.arange(60)))


def test_a_file_without_a_classifier_is_refused(cfg, tmp_path):
    save_model(tmp_path / "model.pt", IJEPA_base(cfg), "a test")
    with pytest.raises(CheckpointError, match="holds no classifier"):
        Classifier.load(tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        Classifier.load(tmp_path / "none.pt")


def test_weights_of_another_size_are_refused(classifier, tmp_path):
    classifier.cfg.model.embed_dim = 32
    classifier.save(tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match=r"is \(.*, not"):
        Classifier.load(tmp_path / "c.pt")


def test_images_are_taken_from_a_named_set(cfg):
    source = load_images(cfg)
    classifier = Classifier(cfg, IJEPA_base(cfg).student_encoder, source.classes)
    assert classifier.predict(source, torch.arange(20)).max() < len(source.classes)
