"""torchvision's vision transformers as encoders.

Our `Encoder` is a ViT without the class token, so a backbone is that encoder at the classifier's sizes, with the classifier's weights if
`model.classification_pretrained` asks for them. The student still sees its context tokens only, and attention can be recorded.
"""

from __future__ import annotations

import torch
from torch import nn

from wejepa.errors import DataError
from wejepa.patches import resize_positions

__all__ = ["load_torchvision_weights"]

# In our names, in torchvision's; each holds for every block.
BLOCK = {
    "norm1": "ln_1",
    "attn.qkv": "self_attention.in_proj_",
    "attn.proj": "self_attention.out_proj",
    "norm2": "ln_2",
    "mlp.0": "mlp.0",
    "mlp.2": "mlp.3",
}


def load_torchvision_weights(encoder: nn.Module, name: str) -> None:
    """Load the weights that torchvision publishes for a vision transformer into an encoder of its sizes.

    Raises:
        DataError: they are not on this machine and could not be downloaded.
    """
    from torchvision.models import get_model

    try:
        classifier = get_model(name, weights="DEFAULT")
    except Exception as error:  # no network, a full disk, a damaged file: torchvision passes on whatever it met
        raise DataError(
            f"the weights of model.classification_backbone = {name!r} could not be downloaded ({error}): "
            f"go online once, or set model.classification_pretrained = false"
        ) from error
    copy_vit_weights(encoder, classifier)


@torch.no_grad()
def copy_vit_weights(encoder: nn.Module, classifier: nn.Module) -> None:
    """Copy a torchvision VisionTransformer's weights, all but its class token and head, resizing positions to the encoder's grid."""
    theirs = classifier.state_dict()
    side = round((theirs["encoder.pos_embedding"].shape[1] - 1) ** 0.5)
    ours = {"pos_embed": resize_positions(theirs["encoder.pos_embedding"][:, 1:], (side, side), encoder.grid_size)}
    pairs = {"patch_embed.proj": "conv_proj", "norm": "encoder.ln"}
    for i in range(len(encoder.blocks)):
        pairs |= {f"blocks.{i}.{our}": f"encoder.layers.encoder_layer_{i}.{their}" for our, their in BLOCK.items()}
    for our, their in pairs.items():
        for part in ("weight", "bias"):
            ours[f"{our}.{part}"] = theirs[f"{their}{part}" if their.endswith("_") else f"{their}.{part}"]
    encoder.load_state_dict(ours)
