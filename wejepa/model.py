"""I-JEPA in one file: a student sees the context, a teacher the whole image, a predictor fills in the targets (I-JEPA, section 3).

context tokens   s = student(x)[context]           only those patches enter the student
targets          t = LayerNorm(teacher(x))[target] no gradient; the teacher is the student's moving average
prediction       p = predictor(s, positions of the target)
loss             smooth-L1(p, t), averaged over targets and features
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wejepa.backbones import StageEncoder, load_torchvision_weights
from wejepa.config import IJepaConfig
from wejepa.ema import update_teacher
from wejepa.errors import ConfigError
from wejepa.kernels import Linear
from wejepa.masking import Masks
from wejepa.patches import PatchEmbed, add_positions, pool_tokens, resize_positions, take
from wejepa.presets import STAGE_WIDTHS

__all__ = ["Encoder", "IJEPA_base", "IJepaLoss", "PatchEmbed", "Predictor", "ijepa_loss"]


class Attention(nn.Module):
    """Multi-head self-attention that can keep the weights it used."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)
        self.record = False
        self.recorded: Tensor | None = None  # (B, heads, N, N)

    def forward(self, x: Tensor, skip: int = 0) -> Tensor:
        """Tokens (B, N, D) attend to one another; the first `skip` are attended to, but get no answer: (B, N - skip, D)."""
        b, n, d = x.shape
        qkv = self.qkv(x).view(b, n, 3, self.num_heads, d // self.num_heads).permute(2, 0, 3, 1, 4)  # (3, B, heads, N, d)
        if self.record or (x.device.type == "cpu" and qkv.dtype == torch.bfloat16):
            # PyTorch's fused bfloat16 attention is several times slower backwards on a CPU than these three lines of the textbook.
            q, k, v = qkv.contiguous()  # one copy here, or each product below makes its own
            weights = (q[:, :, skip:] * (d // self.num_heads) ** -0.5) @ k.transpose(-2, -1)
            # In bfloat16 the softmax of rows under 64 keys is not vectorised, and costs up to three times as much as in float32.
            weights = (weights.float() if n < 64 else weights).softmax(dim=-1)
            if self.record:
                self.recorded = weights.detach().float()
            out = weights.to(v.dtype) @ v
        else:
            q, k, v = qkv
            out = F.scaled_dot_product_attention(q[:, :, skip:], k, v)
        return self.proj(out.transpose(1, 2).reshape(b, n - skip, d))


class Block(nn.Module):
    """A pre-norm transformer block: attention, then a two-layer perceptron, each added to its input."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(Linear(dim, hidden), nn.GELU(), Linear(hidden, dim))

    def forward(self, x: Tensor, skip: int = 0) -> Tensor:  # (B, N, D) -> (B, N - skip, D)
        x = x[:, skip:] + self.attn(self.norm1(x), skip)
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    """A vision transformer without class token: patches plus positions, blocks, a final norm."""

    def __init__(self, cfg: IJepaConfig):
        super().__init__()
        m = cfg.model
        self.grid_size = cfg.grid_size
        self.embed_dim = m.embed_dim
        self.patch_embed = PatchEmbed(m.patch_size, m.in_chans, m.embed_dim)
        add_positions(self, m.positions, self.grid_size, m.embed_dim)
        self.blocks = nn.ModuleList(Block(m.embed_dim, m.num_heads, m.mlp_ratio) for _ in range(m.enc_depth))
        self.norm = nn.LayerNorm(m.embed_dim, eps=1e-6)
        init_transformer(self)

    @property
    def attention_layers(self) -> list[Attention]:
        """What can record its attention, the first layer first."""
        return [block.attn for block in self.blocks]

    def token_grid(self, images: Tensor) -> tuple[int, int]:
        """Patches down and across for images (B, C, height, width); refuses what the patch size does not divide."""
        return self.patch_embed.grid_size(images)

    def tokens(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Patch tokens with their positions, before any block: (B, N, D), or (B, K, D) for kept indices (B, K)."""
        positions = resize_positions(self.pos_embed, self.grid_size, self.patch_embed.grid_size(images))
        return self.patch_embed(images, keep) + (positions if keep is None else F.embedding(keep, positions[0]))

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """(B, C, height, width) -> (B, N, D); with `keep` (B, K) only those patches enter the blocks: (B, K, D)."""
        x = self.tokens(images, keep)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Predictor(nn.Module):
    """A narrow transformer that takes context tokens and, for each target patch, a mask token that knows only its position."""

    def __init__(self, cfg: IJepaConfig):
        super().__init__()
        m = cfg.model
        self.grid_size, self.blockwise = cfg.grid_size, m.blockwise_prediction
        self.embed = Linear(m.embed_dim, m.pred_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, m.pred_dim))
        add_positions(self, m.positions, self.grid_size, m.pred_dim)
        self.blocks = nn.ModuleList(Block(m.pred_dim, m.num_heads, m.pred_mlp_ratio or m.mlp_ratio) for _ in range(m.pred_depth))
        self.norm = nn.LayerNorm(m.pred_dim, eps=1e-6)
        self.proj = Linear(m.pred_dim, m.embed_dim)
        init_transformer(self)

    def forward(self, context: Tensor, masks: Masks, grid_size: tuple[int, int] | None = None) -> Tensor:
        """Predictions for every target patch from the context's tokens.

        With `model.blockwise_prediction` each target block is asked for in a sequence of its own, as in the paper. Otherwise all are asked
        for in one: mask tokens know no content, so nothing leaks between blocks, and a step costs a quarter less.

        Args:
            context: the student's tokens (B, Nc, D).
            masks: where they come from, (B, Nc), and what is asked for, (B, M, Nt).
            grid_size: the image's grid (H, W) where it is not the config's.

        Returns:
            (B, M, Nt, D).
        """
        positions = resize_positions(self.pos_embed, self.grid_size, grid_size or self.grid_size)[0]  # (N, P)
        seen = self.embed(context) + F.embedding(masks.context, positions)  # (B, Nc, P)
        if self.blockwise:  # one sequence a block: B becomes B * M, and M * Nt becomes Nt
            seen = seen.repeat_interleave(masks.targets.shape[1], dim=0)
        asked = self.mask_token + F.embedding(masks.targets.reshape(len(seen), -1), positions)  # (B, M * Nt, P)
        x = torch.cat([seen, asked], dim=1)
        *first, last = self.blocks
        for block in first:
            x = block(x)
        x = last(x, skip=context.shape[1])  # nobody asks what becomes of the context's tokens
        return self.proj(self.norm(x)).view(*masks.targets.shape, -1)


def init_transformer(module: nn.Module) -> None:
    """Initialise weights by their fan-in, positions small, and what a block adds to its input small as well.

    The usual 0.02 for every weight is made for widths of a thousand; at a width of 64 it all but silences the content: the tokens
    are then almost all position, and the loss falls to nothing while nothing is learnt. A block that begins near the identity lets
    the first targets be what is in the patch, and learning starts from there.
    """
    for name, p in module.named_parameters():
        if name.endswith(("pos_embed", "mask_token")):
            nn.init.trunc_normal_(p, std=0.02)
        elif p.dim() > 1:
            gain = 0.1 if name.endswith(("attn.proj.weight", "mlp.2.weight")) else 1.0
            nn.init.normal_(p, std=gain * p[0].numel() ** -0.5)
        elif name.endswith("bias"):
            nn.init.zeros_(p)


def ijepa_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """Smooth-L1 between predicted and actual target representations, averaged over everything (B, M, Nt, D)."""
    return F.smooth_l1_loss(predictions.float(), targets.float())


def for_each_context(x: Tensor, masks: Masks) -> Tensor:
    """Images or their tokens (B / K, ...), each repeated for its K contexts: (B, ...)."""
    contexts = len(masks.context) // len(x)
    return x if contexts == 1 else x.repeat_interleave(contexts, dim=0)


class IJEPA_base(nn.Module):
    """Student, teacher and predictor: the whole of I-JEPA.

    Args:
        cfg: the config; its `model` section sets the sizes, its `mask` section plays no part here.

    Attributes:
        student_encoder: sees the context and is trained.
        teacher_encoder: sees everything, gets no gradient, follows the student; the paper evaluates this one.
        predictor: from the context's tokens to the targets'.

    Raises:
        ConfigError: the config does not hold together, or names a backbone that is not to be had.
    """

    def __init__(self, cfg: IJepaConfig):
        super().__init__()
        cfg.validate()
        self.cfg = cfg.copy()
        if cfg.model.classification_backbone in STAGE_WIDTHS:
            self.student_encoder = StageEncoder(cfg)
        else:
            self.student_encoder = Encoder(cfg)
            for module in self.student_encoder.modules():
                if isinstance(module, nn.LayerNorm):
                    module.eps = cfg.model.norm_eps
            if cfg.model.classification_pretrained:
                load_torchvision_weights(self.student_encoder, cfg.model.classification_backbone)
        self.predictor = Predictor(cfg)
        self.teacher_encoder = copy.deepcopy(self.student_encoder).requires_grad_(False)
        self.student_encoder.requires_grad_(not cfg.model.classification_frozen)
        self.train()

    @classmethod
    def without_weights(cls, cfg: IJepaConfig) -> IJEPA_base:
        """The model of a config on "meta", where weights take no memory: `load_state_dict(..., assign=True)` brings them."""
        plain = cfg.copy()
        plain.model.classification_pretrained = False  # they would be loaded for nothing
        with torch.device("meta"):
            model = cls(plain).to("meta")
        model.cfg = cfg.copy()
        return model

    @property
    def device(self) -> torch.device:
        """What the model computes on; `to` moves it. Images and masks are moved there by whoever takes them."""
        return next(self.parameters()).device

    def train(self, mode: bool = True) -> IJEPA_base:
        """As `nn.Module.train`, but a frozen encoder keeps its batch statistics as well."""
        super().train(mode)
        if self.cfg.model.classification_frozen:
            self.student_encoder.eval()
            self.teacher_encoder.eval()
        return self

    def forward(self, images: Tensor, masks: Masks) -> tuple[Tensor, Tensor]:
        """Predict the targets' representations from the context's.

        Args:
            images: (B / K, C, height, width), normalised, on any device.
            masks: context (B, Nc) and targets (B, M, Nt), from `wejepa.masking.sample_block_masks`, on any device. Each image has K
                contexts in a row, usually one; the teacher sees it once for all of them.

        Returns:
            (predictions, targets), each (B, M, Nt, D), on the model's device; the targets are layer-normalised and carry no gradient.
        """
        images, masks = images.to(self.device), masks.to(self.device)
        grid_size = self.student_encoder.token_grid(images)
        context = self.student_encoder(for_each_context(images, masks), keep=masks.context)  # (B, Nc, D)
        predictions = self.predictor(context, masks, grid_size)  # (B, M, Nt, D)
        with torch.no_grad():
            tokens = for_each_context(self.teacher_encoder(images), masks)  # (B, N, D)
            hidden = take(tokens, masks.targets.flatten(1)).float()  # (B, M * Nt, D)
            targets = F.layer_norm(hidden, hidden.shape[-1:]).view(*masks.targets.shape, -1)
        return predictions, targets

    def encoder(self, name: str = "teacher") -> Encoder | StageEncoder:
        """The encoder of that name: "teacher", as in the paper, or "student".

        Raises:
            ConfigError: another name.
        """
        if name not in ("teacher", "student"):
            raise ConfigError(f"encoder = {name!r}: give 'teacher' or 'student'")
        return self.teacher_encoder if name == "teacher" else self.student_encoder

    def encode(self, images: Tensor, encoder: str = "teacher") -> Tensor:
        """All tokens of images (B, C, height, width), on any device, under the "teacher" or the "student": (B, N, D), on the model's.

        Always in evaluation mode: to look changes nothing. A network with batch normalisation uses its running statistics, which are of
        whole images in the teacher, and of masked ones in the student.
        """
        network = self.encoder(encoder)
        training = network.training
        try:
            return network.eval()(images.to(self.device))
        finally:
            network.train(training)

    @torch.no_grad()
    def features(self, images: Tensor, pooling: str = "mean") -> Tensor:
        """One vector for each of images (B, C, height, width), on any device: the teacher's tokens, pooled; on the model's device.

        Args:
            images: normalised, as a source gives them.
            pooling: "mean" over all tokens, (B, D); or "grid", over each cell of a grid of 4 x 4, (B, 16 * D).

        Raises:
            ConfigError: another pooling.
        """
        return pool_tokens(self.encode(images).float(), self.teacher_encoder.token_grid(images), pooling)

    def momentum_update(self, momentum: float, skip: Tensor | None = None) -> None:
        """teacher <- momentum * teacher + (1 - momentum) * student, over all parameters; nothing where both are frozen.

        Args:
            momentum: share that the teacher keeps of itself, from 0 to 1.
            skip: (), 1 to stand still all the same, see `wejepa.ema.update_teacher`.
        """
        if not self.cfg.model.classification_frozen:
            update_teacher(self.teacher_encoder, self.student_encoder, momentum, skip)

    def enable_attention_recording(self, enabled: bool = True) -> None:
        """Keep the attention weights of both encoders' next forward passes, or stop keeping and forget them.

        Raises:
            ConfigError: the encoder is a convolutional network, which has no attention.
        """
        for encoder in (self.student_encoder, self.teacher_encoder):
            for layer in encoder.attention_layers:
                layer.record, layer.recorded = enabled, None

    def get_recorded_attentions(self, encoder: str = "teacher") -> list[Tensor]:
        """The weights of the last forward pass, one (B, heads, N, N) a layer; each row sums to one.

        Of a Swin transformer the layers of its last stage, where places and tokens are the same.

        Raises:
            ConfigError: the encoder is a convolutional network.
            RuntimeError: nothing was recorded.
        """
        recorded = [layer.recorded for layer in self.encoder(encoder).attention_layers]
        if any(r is None for r in recorded):
            raise RuntimeError(
                f"no attention of the {encoder} is recorded: call enable_attention_recording(True), then encode(images, {encoder!r})"
            )
        return recorded


class IJepaLoss(nn.Module):
    """The loss of a batch as one forward pass: what DistributedDataParallel must wrap to see every gradient.

    Args:
        model: the model.
        loss: a function of predictions and targets, each (B, M, Nt, D), that gives one number, ().
    """

    def __init__(self, model: IJEPA_base, loss: Callable[[Tensor, Tensor], Tensor] = ijepa_loss):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, images: Tensor, masks: Masks) -> Tensor:
        """Images (B, C, S, S) and their masks -> the mean loss, ().

        Raises:
            ConfigError: the model's own predictor or the loss gives another shape.
        """
        predictions, targets = self.model(images, masks)
        if predictions.shape != targets.shape:  # a loss would broadcast them
            raise ConfigError(f"predictor: it gives {tuple(predictions.shape)} for targets {tuple(targets.shape)}; give one shape for both")
        loss = self.loss(predictions, targets)
        if loss.shape != ():
            raise ConfigError(f"loss: it gives {tuple(loss.shape)}; take the mean, so that it gives one number, ()")
        return loss
