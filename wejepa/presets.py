"""What is set together: torchvision's backbones, whose sizes are fixed, and the presets that a run starts from.

A preset is what differs from the settings' defaults in `wejepa.config`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wejepa.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from wejepa.config import IJepaConfig, ModelConfig

__all__ = ["BACKBONES", "PRESETS", "STAGE_WIDTHS", "VIT_SIZES", "adapt_config_for_backbone", "check_backbone"]

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "default": {},
    "hf224": {
        "data": {
            "dataset": "imagefolder",
            "train_batch_size": 256,
            "eval_batch_size": 128,
            "num_workers": 8,
            "crop_scale": (0.3, 1.0),
        },
        "model": {
            "img_size": 224,
            "patch_size": 16,
            "embed_dim": 384,
            "enc_depth": 12,
            "pred_depth": 6,
            "pred_dim": 192,
            "num_heads": 6,
        },
        "optimizer": {
            "epochs": 300,
            "warmup_epochs": 15,
            "start_learning_rate": 2e-4,
            "base_learning_rate": 1e-3,
            "final_learning_rate": 1e-6,
            "weight_decay": 0.04,
            "final_weight_decay": 0.4,
            "momentum_teacher": 0.996,
        },
    },
    # Some 5,000 photographs in about half an hour on two CPU cores: the default recipe, at a size where photographs show something.
    "photos96": {
        "data": {"dataset": "imagefolder", "eval_batch_size": 250, "num_workers": 2, "crop_scale": (0.3, 1.0)},
        "model": {
            "img_size": 96,
            "patch_size": 8,
            "embed_dim": 128,
            "enc_depth": 6,
            "pred_depth": 3,
            "pred_dim": 64,
            "num_heads": 4,
        },
        "optimizer": {"epochs": 50, "warmup_epochs": 2, "base_learning_rate": 1e-3},
    },
    # ViT-H/14 as the paper trains it: the sizes of IN1K-vit.h.14-300e.pth.tar, so that model.start_from takes that file.
    "ijepa_paper": {
        "data": {
            "dataset": "imagefolder",
            "train_batch_size": 2048,
            "eval_batch_size": 128,
            "num_workers": 8,
            "crop_scale": (0.3, 1.0),
            "horizontal_flip": False,
        },
        "model": {
            "img_size": 224,
            "patch_size": 14,
            "embed_dim": 1280,
            "enc_depth": 32,
            "pred_depth": 12,
            "pred_dim": 384,
            "num_heads": 16,
            "blockwise_prediction": True,
            "positions": "sincos",
        },
        "optimizer": {
            "epochs": 300,
            "warmup_epochs": 15,
            "start_learning_rate": 1e-4,
            "base_learning_rate": 1e-3,
            "final_learning_rate": 1e-6,
            "weight_decay": 0.04,
            "final_weight_decay": 0.4,
            "weight_decay_schedule": "linear",
            "betas": (0.9, 0.999),
            "accumulation_steps": 16,
            "grad_clip_norm": 0.0,
            "momentum_teacher": 0.996,
            "momentum_schedule": "linear",
        },
    },
}

# torchvision's classifiers that serve as encoders. Vision transformers, and what they fix:
VIT_SIZES = {
    "vit_b_16": {"patch_size": 16, "embed_dim": 768, "enc_depth": 12, "num_heads": 12},
    "vit_b_32": {"patch_size": 32, "embed_dim": 768, "enc_depth": 12, "num_heads": 12},
    "vit_l_16": {"patch_size": 16, "embed_dim": 1024, "enc_depth": 24, "num_heads": 16},
    "vit_l_32": {"patch_size": 32, "embed_dim": 1024, "enc_depth": 24, "num_heads": 16},
}
# Networks of stages, and the channels at each total stride at which their features can be taken.
STAGE_WIDTHS = {
    "resnet18": {8: 128, 16: 256, 32: 512},
    "resnet50": {8: 512, 16: 1024, 32: 2048},
    "convnext_tiny": {8: 192, 16: 384, 32: 768},
    "convnext_small": {8: 192, 16: 384, 32: 768},
    "efficientnet_b0": {8: 40, 16: 112, 32: 1280},
    "regnet_y_400mf": {8: 104, 16: 208, 32: 440},
    "mobilenet_v3_small": {8: 24, 16: 48, 32: 576},
    "swin_t": {8: 192, 16: 384, 32: 768},
    "swin_s": {8: 192, 16: 384, 32: 768},
    "swin_v2_t": {8: 192, 16: 384, 32: 768},
}
BACKBONES = (*STAGE_WIDTHS, *VIT_SIZES)
SMALLEST_GRID = 4  # patches down and across that adapt_config_for_backbone leaves at least


def backbone_sizes(name: str, stride: int) -> dict[str, Any]:
    """The settings of `model` that a backbone fixes; `stride`, in pixels, says where a network of stages is left.

    Raises:
        ConfigError: the backbone is not known, or has no stage of that stride.
    """
    if name in VIT_SIZES:
        return {**VIT_SIZES[name], "in_chans": 3, "mlp_ratio": 4.0}
    if name not in STAGE_WIDTHS:
        raise ConfigError(f"model.classification_backbone = {name!r} is not known; {did_you_mean(name, list(BACKBONES))}")
    widths = STAGE_WIDTHS[name]
    if stride not in widths:
        raise ConfigError(
            f"model.patch_size = {stride} is no stage of model.classification_backbone = {name!r}: take {', '.join(map(str, widths))}, "
            f"or let adapt_config_for_backbone(cfg, {name!r}) choose"
        )
    return {"patch_size": stride, "embed_dim": widths[stride], "in_chans": 3}


def check_backbone(model: ModelConfig) -> None:
    """Refuse sizes at odds with the backbone, naming the setting and what would fit."""
    name = model.classification_backbone
    for setting, value in backbone_sizes(name, model.patch_size).items():
        if getattr(model, setting) != value:
            raise ConfigError(
                f"model.{setting} = {getattr(model, setting)} does not fit model.classification_backbone = {name!r}, "
                f"which has {value}: let adapt_config_for_backbone(cfg, {name!r}) set it"
            )


def adapt_config_for_backbone(cfg: IJepaConfig, name: str) -> IJepaConfig:
    """A copy of `cfg` whose encoder is a torchvision classifier.

    The image keeps its size if that makes a grid of at least 4 x 4 patches, and becomes 224 x 224 otherwise. For a vision transformer,
    patch size, width, depth and heads become the backbone's, and the predictor half as wide. For a network of stages the patch size is the
    largest total stride that leaves such a grid (224 -> 32, 64 -> 16, 32 -> 8), the width that stage's channels, and the predictor about
    half as wide, 384 at most as in the paper, with heads of 32.

    Raises:
        ConfigError: the backbone is not known, or `cfg.mask` does not fit the grid.
    """
    cfg = cfg.copy()
    m = cfg.model
    strides = [VIT_SIZES[name]["patch_size"]] if name in VIT_SIZES else sorted(STAGE_WIDTHS.get(name, ()), reverse=True)
    fitting = [stride for stride in strides if m.img_size % stride == 0 and m.img_size >= SMALLEST_GRID * stride]
    if not fitting:
        m.img_size = 224
    for setting, value in backbone_sizes(name, (fitting or strides or [0])[0]).items():
        setattr(m, setting, value)
    m.classification_backbone, m.pred_dim = name, m.embed_dim // 2
    if name in STAGE_WIDTHS:
        m.num_heads = max(1, min(384 // 32, m.embed_dim // 64))
        m.pred_dim = 32 * m.num_heads
    cfg.validate()
    return cfg
