"""torchvision's classifiers as encoders.

A vision transformer is our own `Encoder` at the classifier's sizes: its class token is left out, and the student drops what it must not
see. A convolutional network or a Swin transformer cannot drop patches, because each layer looks at the places around: `StageEncoder` blanks
their pixels instead, before the first layer. With `model.classification_pretrained` both start from torchvision's weights.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wejepa.config import IJepaConfig
from wejepa.errors import ConfigError, DataError
from wejepa.patches import resize_positions, take, token_grid

__all__ = ["StageEncoder", "load_torchvision_weights", "window_attention"]


class StageEncoder(nn.Module):
    """The layers of a convolutional network or Swin transformer up to one of its stages, whose places are the tokens, and a final norm.

    Where a vision transformer's student computes the context alone, this one computes the whole image with blanks, and costs as much.
    Batch normalisation, where the network has it, takes the statistics of what is before it: in the student those of masked images, in the
    teacher those of whole ones, in each of several processes or accumulated parts those of its own images. Stochastic depth is switched
    off, so that a step repeats.

    Args:
        cfg: `model.classification_backbone` names the network, `model.patch_size` the total stride at which it is left.

    Raises:
        DataError: torchvision's weights are asked for and not to be had.
    """

    def __init__(self, cfg: IJepaConfig):
        super().__init__()
        m = cfg.model
        self.name, self.patch_size, self.in_chans, self.embed_dim = m.classification_backbone, m.patch_size, m.in_chans, m.embed_dim
        self.grid_size = cfg.grid_size
        self.channels_last = self.name.startswith("swin")  # (B, H, W, D) where convolutions have (B, D, H, W)
        with torch.device("cpu"):  # a RegNet computes its sizes with tensors, and so cannot be made on "meta"
            self.blocks = stages(torchvision_classifier(self.name, m.classification_pretrained), self.patch_size, self.channels_last)
        self.norm = nn.LayerNorm(m.embed_dim, eps=1e-6)
        last = list(self.blocks)[-1] if self.channels_last else ()  # earlier stages have other grids
        self._recorders = [WindowRecorder() for _ in last]
        for block, recorder in zip(last, self._recorders, strict=True):
            block.attn.register_forward_hook(recorder)

    @property
    def attention_layers(self) -> list[WindowRecorder]:
        """What can record its attention: the layers of a Swin transformer's last stage.

        Raises:
            ConfigError: a convolutional network has none.
        """
        if not self._recorders:
            raise ConfigError(
                f"model.classification_backbone = {self.name!r} is a convolutional network and has no attention: take a transformer, "
                f"such as 'vit_b_16' or 'swin_t'"
            )
        return self._recorders

    def token_grid(self, images: Tensor) -> tuple[int, int]:
        """Patches down and across for images (B, C, height, width); refuses what the patch size does not divide."""
        return token_grid(images, self.patch_size, self.in_chans)

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """(B, C, height, width) -> (B, N, D); with `keep` (B, K) all other patches are blank, and the kept places are given: (B, K, D)."""
        grid = self.token_grid(images)
        if keep is not None:
            images = torch.where(self.pixels_of(keep, grid), images, 0)  # 0 is the mean of normalised pixels
        x = self.blocks(images)
        x = self.norm(x.flatten(1, 2) if self.channels_last else x.flatten(2).transpose(1, 2))  # (B, N, D)
        return x if keep is None else take(x, keep)

    def pixels_of(self, patches: Tensor, grid_size: tuple[int, int]) -> Tensor:
        """Which pixels belong to the patches (B, K) of a grid (H, W): (B, 1, height, width)."""
        chosen = torch.zeros(len(patches), grid_size[0] * grid_size[1], dtype=torch.bool, device=patches.device).scatter_(1, patches, True)
        chosen = chosen.view(-1, 1, *grid_size)
        return chosen.repeat_interleave(self.patch_size, 2).repeat_interleave(self.patch_size, 3)


def torchvision_classifier(name: str, pretrained: bool) -> nn.Module:
    """A classifier of torchvision's, with its published weights if asked for.

    Raises:
        DataError: they are not on this machine and could not be downloaded.
    """
    from torchvision.models import get_model

    if not pretrained:
        return get_model(name, weights=None)
    try:
        return get_model(name, weights="DEFAULT")
    except Exception as error:  # no network, a full disk, a damaged file: torchvision passes on whatever it met
        raise DataError(
            f"the weights of model.classification_backbone = {name!r} could not be downloaded ({error}): "
            f"go online once, or set model.classification_pretrained = false"
        ) from error


def stages(classifier: nn.Module, stride: int, channels_last: bool) -> nn.Sequential:
    """A classifier's layers, in order and by their names, as far as the total stride is `stride` at most."""
    from torchvision.ops import StochasticDepth

    if hasattr(classifier, "trunk_output"):  # RegNet
        parts = {"stem": classifier.stem, **dict(classifier.trunk_output.named_children())}
    elif hasattr(classifier, "features"):
        parts = dict(classifier.features.named_children())
    else:  # ResNet
        parts = {name: part for name, part in classifier.named_children() if name not in ("avgpool", "fc")}
    kept, side = nn.Sequential(), 64
    x = torch.zeros(1, 3, side, side)
    classifier.eval()
    for name, part in parts.items():
        with torch.no_grad():
            x = part(x)
        if side // x.shape[1 if channels_last else 2] > stride:
            break
        kept.add_module(name, part)
    for module in kept.modules():
        if isinstance(module, StochasticDepth):
            module.p = 0.0
    return kept.train()


class WindowRecorder:
    """Keeps the attention of a layer of Swin's over the whole grid, (B, heads, N, N), when told to: a forward hook."""

    def __init__(self):
        self.record, self.recorded = False, None

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        if self.record:
            self.recorded = window_attention(layer, inputs[0].detach())


@torch.no_grad()
def window_attention(layer: nn.Module, x: Tensor) -> Tensor:
    """The weights with which a (shifted) window attention layer of torchvision's mixes the places of x (B, H, W, D).

    Places look at those in their own window only, so all else is zero. Where windows overhang the grid, torchvision lets places look at the
    padding too; that share is left out, and the rest scaled to it: every row sums to one.

    Returns:
        (B, heads, H * W, H * W), float32.
    """
    b, high, wide, dim = x.shape
    window, heads = layer.window_size, layer.num_heads
    full = [math.ceil(n / w) * w for n, w in zip((high, wide), window, strict=True)]
    shift = [0 if w >= n else s for n, w, s in zip(full, window, layer.shift_size, strict=True)]

    def in_windows(plane: Tensor) -> Tensor:  # (..., H', W') -> (..., windows, places of a window)
        plane = plane.roll((-shift[0], -shift[1]), (-2, -1))
        plane = plane.unflatten(-1, (-1, window[1])).unflatten(-3, (-1, window[0]))  # (..., rows, h, columns, w)
        return plane.transpose(-3, -2).flatten(-4, -3).flatten(-2)

    # Each place's number, the padding's being those beyond N; and of which of the pieces that shifting brings together it is.
    number = torch.full(full, high * wide, device=x.device)
    number[:high, :wide] = torch.arange(high * wide, device=x.device).view(high, wide)
    row, column = ((torch.arange(n, device=x.device) < s).long() for n, s in zip(full, shift, strict=True))
    number, piece = in_windows(number), in_windows(row[:, None] * 2 + column)  # (windows, n)

    padded = F.pad(x.flatten(1, 2), (0, 0, 0, 1))  # padding is zeros, before the projection
    bias = layer.qkv.bias
    if hasattr(layer, "logit_scale"):  # the second version: cosines, and no bias for the keys
        bias = torch.cat([bias[:dim], torch.zeros_like(bias[:dim]), bias[2 * dim :]])
    q, k, _ = F.linear(padded, layer.qkv.weight, bias)[:, number].unflatten(-1, (3, heads, -1)).permute(3, 0, 1, 4, 2, 5)
    if hasattr(layer, "logit_scale"):
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * layer.logit_scale.clamp(max=math.log(100.0)).exp()
    else:
        scores = q @ k.mT * (dim // heads) ** -0.5
    scores = scores + layer.get_relative_position_bias()  # (B, windows, heads, n, n)
    apart = (piece[:, None, :] != piece[:, :, None]) | (number[:, None, :] == high * wide)
    weights = scores.float().masked_fill(apart[:, None], -torch.inf).softmax(-1)

    n = high * wide + 1
    at = (number[:, :, None] * n + number[:, None, :]).flatten()  # (windows * n * n,)
    whole = torch.zeros(b, heads, n * n, device=x.device)
    whole[..., at] = weights.transpose(1, 2).flatten(2)
    return whole.view(b, heads, n, n)[..., :-1, :-1]


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
    copy_vit_weights(encoder, torchvision_classifier(name, pretrained=True))


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
