"""The same work beside others' code: lightly's I-JEPA, a training step; transformers' IJepaModel, a forward pass of the encoder.

    pip install -e '.[benchmarks]'
    python -m benchmarks.against_peers

lightly's modules are put together as its example does it, on torchvision's transformers, with the sizes, the batch and the masks that ours
gets; its step has what ours has: forward, backward, clipping, AdamW, the teacher's update. It runs the predictor once a target block and a
class token through both encoders: that is its way of doing the work, so it is timed with it. The masks are ours on both sides.
transformers' encoder gets the weights of ours, and must give the same tokens.
"""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.step import CONFIGURATIONS, configuration, images_of, make_step
from benchmarks.timing import Contender, asked, in_turn, milliseconds, parser, plain, ratio, tell
from wejepa.config import IJepaConfig
from wejepa.data import generator_for
from wejepa.devices import autocast
from wejepa.masking import sample_block_masks
from wejepa.memory import freed_memory_kept
from wejepa.model import IJEPA_base
from wejepa.train.loop import MASKS

CPU = torch.device("cpu")
# transformers' names for query, key, value, projection, the two norms and the perceptron's two maps.
LAYER = [f"attention.{name}_proj" for name in "qkvo"] + ["layernorm_before", "layernorm_after", "mlp.fc1", "mlp.fc2"]


def peer(name: str) -> bool:
    """Whether a peer is installed; says so where it is not."""
    found = importlib.util.find_spec(name) is not None
    if not found:
        print(f"{name} is not installed, so it is left out: pip install -e '.[benchmarks]'")
    return found


# ---------------------------------------------------------------- a step, lightly


def make_lightly_step(cfg: IJepaConfig) -> Callable[[], Any]:
    warnings.simplefilter("ignore")  # lightly's remarks on optional packages
    import torchvision
    from lightly.models import utils
    from lightly.models.modules import ijepa

    m, patches = cfg.model, cfg.grid_size[0] * cfg.grid_size[1]

    def transformer(width: int, depth: int) -> nn.Module:
        return torchvision.models.VisionTransformer(m.img_size, m.patch_size, depth, m.num_heads, width, int(m.mlp_ratio * width))

    student = ijepa.IJEPABackbone.from_vit(transformer(m.embed_dim, m.enc_depth))
    narrow = transformer(m.pred_dim, m.pred_depth).encoder
    predictor = ijepa.IJEPAPredictor(patches, 1, 1, m.pred_dim, m.pred_dim, patches, m.embed_dim, 0.0, 0.0)
    predictor.layers, predictor.ln = narrow.layers, narrow.ln  # as its from_vit_encoder does, which fixes the widths at 768
    teacher = copy.deepcopy(student)
    model = nn.ModuleList([student, predictor, teacher])
    optimizer, criterion, images, step = torch.optim.AdamW(model.parameters(), lr=1.5e-4), nn.SmoothL1Loss(), images_of(cfg), 0

    def one() -> float:
        nonlocal step
        masks = sample_block_masks(len(images), cfg.grid_size, cfg.mask, generator_for(cfg.hardware.seed, step, MASKS))
        context, targets = [masks.context], list(masks.targets.unbind(1))
        with autocast(CPU, cfg.hardware.mixed_precision):
            predictions = predictor(student(images, context), context, targets)
            with torch.no_grad():
                whole = teacher(images)
                wanted = utils.apply_masks(F.layer_norm(whole, whole.shape[-1:]), targets)
            loss = criterion(predictions, wanted)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for theirs, mine in zip(student.parameters(), teacher.parameters(), strict=True):
                mine.data.mul_(0.996).add_((1 - 0.996) * theirs.detach().data)
        step += 1
        return loss.item()

    return one


def steps(args) -> None:
    for name in args.only:
        contenders = []
        for kind, bfloat16 in (("bfloat16", True), ("float32", False)):
            cfg = configuration(name, bfloat16)
            contenders.append(Contender(f"wejepa, {kind}", make_step, (cfg,), args.threads))
            contenders.append(Contender(f"lightly, {kind}", make_lightly_step, (cfg,), args.threads))
        times = in_turn(contenders, args.repeats, clock=args.clock)
        images, ours = cfg.data.train_batch_size, times["wejepa, bfloat16"]
        rows = [
            [kind, *milliseconds(t), f"{images / t.median:.0f}", f"{ratio(t, ours):.2f}", f"{t.memory / 2**20:.0f}"]
            for kind, t in times.items()
        ]
        head = ["", "median, ms", "10 to 90 %, ms", "images/s", "times wejepa's in bfloat16", "memory, MiB"]
        figures = plain(times) | {"ratios": {kind: ratio(t, ours) for kind, t in times.items()}}
        tell(f"A training step at {name}, {args.threads} thread(s), {args.clock} time", head, rows, figures, args)


# ---------------------------------------------------------------- the encoder, transformers


def forward_of(encoder: nn.Module, images: torch.Tensor, bfloat16: bool) -> Callable[[], torch.Tensor]:
    kept = freed_memory_kept()  # as `encode_images` has it; for both sides
    kept.__enter__()

    @torch.no_grad()
    def forward(kept=kept) -> torch.Tensor:
        with autocast(CPU, bfloat16):
            tokens = encoder(images)
        return tokens if isinstance(tokens, torch.Tensor) else tokens.last_hidden_state

    return forward


def encoder_and_images(cfg: IJepaConfig) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return IJEPA_base(cfg).teacher_encoder.eval(), images_of(cfg)


def make_encoder(cfg: IJepaConfig) -> Callable[[], Any]:
    return forward_of(*encoder_and_images(cfg), cfg.hardware.mixed_precision)


def make_transformers_encoder(cfg: IJepaConfig, tolerance: float = 0.0) -> Callable[[], Any]:
    """`IJepaModel` with the weights of ours; refused where its tokens differ from ours by more than the tolerance."""
    ours, images = encoder_and_images(cfg)
    theirs = as_transformers(ours, cfg)
    forward = forward_of(theirs, images, cfg.hardware.mixed_precision)
    wanted = forward_of(ours, images, cfg.hardware.mixed_precision)()
    difference = ((forward() - wanted).float().norm() / wanted.float().norm()).item()
    if difference > tolerance:
        raise SystemExit(f"the two encoders' tokens differ by {difference:.1e} of their norm, more than {tolerance:.1e}")
    return forward


def as_transformers(encoder: nn.Module, cfg: IJepaConfig) -> nn.Module:
    """transformers' model of the same sizes with the same weights."""
    from transformers import IJepaConfig as TheirConfig
    from transformers import IJepaModel

    m = cfg.model
    theirs = IJepaModel(
        TheirConfig(
            hidden_size=m.embed_dim,
            num_hidden_layers=m.enc_depth,
            num_attention_heads=m.num_heads,
            intermediate_size=int(m.mlp_ratio * m.embed_dim),
            image_size=m.img_size,
            patch_size=m.patch_size,
            num_channels=m.in_chans,
            layer_norm_eps=1e-6,
        )
    ).eval()
    own = encoder.state_dict()
    weights = {
        "embeddings.position_embeddings": own["pos_embed"],
        "embeddings.patch_embeddings.projection.weight": own["patch_embed.proj.weight"],
        "embeddings.patch_embeddings.projection.bias": own["patch_embed.proj.bias"],
        "layernorm.weight": own["norm.weight"],
        "layernorm.bias": own["norm.bias"],
    }
    for block in range(m.enc_depth):
        for kind in ("weight", "bias"):
            parts = own[f"blocks.{block}.attn.qkv.{kind}"].chunk(3)
            values = [*parts, *(own[f"blocks.{block}.{name}.{kind}"] for name in ("attn.proj", "norm1", "norm2", "mlp.0", "mlp.2"))]
            weights |= {f"layers.{block}.{name}.{kind}": value for name, value in zip(LAYER, values, strict=True)}
    missing = theirs.load_state_dict(weights, strict=False)
    if missing.unexpected_keys or [key for key in missing.missing_keys if "mask_token" not in key and "pooler" not in key]:
        raise SystemExit(f"transformers names its weights otherwise by now: {missing}")
    return theirs


def encoders(args) -> None:
    for name in args.only:
        contenders = []
        for kind, bfloat16, tolerance in (("float32", False, 1e-5), ("bfloat16", True, 2e-2)):
            cfg = configuration(name, bfloat16)
            contenders.append(Contender(f"wejepa, {kind}", make_encoder, (cfg,), args.threads))
            contenders.append(Contender(f"IJepaModel, {kind}", make_transformers_encoder, (cfg, tolerance), args.threads))
        times = in_turn(contenders, 4 * args.repeats, clock=args.clock)  # short, and they differ by little
        rows = [[kind, *milliseconds(t), f"{ratio(t, times['wejepa, ' + kind.split(', ')[1]]):.2f}"] for kind, t in times.items()]
        head = ["", "median, ms", "10 to 90 %, ms", "times wejepa's of the same type"]
        tell(f"The encoder's forward pass at {name}, {args.threads} thread(s), {args.clock} time", head, rows, plain(times), args)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--only", choices=CONFIGURATIONS, nargs="+", default=CONFIGURATIONS)
    args = asked(options)
    if peer("lightly"):
        steps(args)
    if peer("transformers"):
        encoders(args)


if __name__ == "__main__":
    main()
