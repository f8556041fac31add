"""torchvision's vision transformers as encoders."""

import pytest
import torch
from torchvision.models import VisionTransformer

from wejepa.backbones import copy_vit_weights
from wejepa.config import BACKBONES, ModelConfig, adapt_config_for_backbone, default_config
from wejepa.errors import ConfigError, DataError
from wejepa.model import Encoder, IJEPA_base


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


@pytest.mark.parametrize("name", BACKBONES)
def test_adapted_config_fits_and_leaves_the_original(name):
    cfg = default_config()
    before = cfg.to_dict()
    adapted = adapt_config_for_backbone(cfg, name)
    adapted.validate()
    assert cfg.to_dict() == before
    assert adapted.model.classification_backbone == name
    assert adapted.model.patch_size == int(name.rsplit("_", 1)[1])
    assert min(adapted.grid_size) >= 4
    assert type(adapted).from_dict(adapted.to_dict()) == adapted


def test_sizes_are_torchvisions():
    from torchvision.models import vit_b_16

    with torch.device("meta"):
        theirs = {k: v.shape for k, v in vit_b_16().state_dict().items()}
        ours = Encoder(adapt_config_for_backbone(default_config(), "vit_b_16")).state_dict()
    assert ours["patch_embed.proj.weight"].shape == theirs["conv_proj.weight"]
    assert ours["blocks.11.mlp.0.weight"].shape == theirs["encoder.layers.encoder_layer_11.mlp.0.weight"]
    assert ours["pos_embed"].shape[1] == theirs["encoder.pos_embedding"][1] - 1


def test_unknown_backbone_names_the_nearest():
    with pytest.raises(ConfigError, match="vit_b_16"):
        adapt_config_for_backbone(default_config(), "vit_b16")


def test_sizes_at_odds_with_the_backbone_are_refused():
    cfg = adapt_config_for_backbone(default_config(), "vit_b_16")
    cfg.model.enc_depth = 3
    with pytest.raises(ConfigError, match="enc_depth = 3 .* adapt_config_for_backbone"):
        cfg.validate()


def test_weights_that_cannot_be_had_are_one_clear_error(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.models.get_model", offline)
    cfg = adapt_config_for_backbone(default_config(), "vit_b_16")
    cfg.model.classification_pretrained = True
    with pytest.raises(DataError, match="classification_pretrained = false"):
        IJEPA_base.from_config(cfg)
