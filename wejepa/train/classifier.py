"""An encoder and a linear layer, trained with labels as a whole: fine-tuning, or supervised learning where the weights begin at random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wejepa.config import IJepaConfig
from wejepa.data import random_crops
from wejepa.devices import autocast, pick_device, precision, to_device
from wejepa.errors import CheckpointError, ConfigError
from wejepa.memory import freed_memory_kept
from wejepa.model import IJEPA_base
from wejepa.paths import path_of
from wejepa.seeds import generator_for
from wejepa.train.checkpoints import describe, first_fault, load_checkpoint, save_checkpoint
from wejepa.train.schedules import cosine

__all__ = ["Classifier", "train_classifier"]


class Classifier(nn.Module):
    """Class scores from the mean of an encoder's tokens.

    Args:
        cfg: the config of the encoder's model.
        encoder: an `Encoder` or `StageEncoder`; it is kept, not copied.
        classes: the names of the classes, in the order of the scores.
    """

    def __init__(self, cfg: IJepaConfig, encoder: nn.Module, classes: tuple[str, ...]):
        super().__init__()
        self.cfg, self.classes = cfg.copy(), tuple(classes)
        self.encoder = encoder.requires_grad_(True)
        self.head = nn.Linear(encoder.embed_dim, len(classes))

    @property
    def device(self) -> torch.device:
        """What it computes on; images are moved there."""
        return self.head.weight.device

    def forward(self, images: Tensor) -> Tensor:
        """Scores (B, classes) of images (B, C, height, width), normalised, on any device."""
        return self.head(self.encoder(images.to(self.device)).mean(1))

    @torch.no_grad()
    def predict(self, source, index: Tensor) -> Tensor:
        """The class (N,), on the CPU, of each image that `index` names, in evaluation mode and under the config's precision."""
        training, found = self.training, []
        try:
            self.eval()
            with freed_memory_kept():
                for images in source.batches(index, self.cfg.data.eval_batch_size, self.device):
                    with autocast(self.device, self.cfg.hardware.mixed_precision):
                        found.append(self(images).argmax(1).cpu())
        finally:
            self.train(training)
        return torch.cat(found)

    def save(self, path: str | Path) -> None:
        """Write it for `load`: weights, config and the classes' names.

        Raises:
            CheckpointError: it cannot be written.
        """
        about = {"config": self.cfg.to_dict(), "classes": list(self.classes)}
        save_checkpoint(path_of(path), about | {"classifier": {name: value.cpu() for name, value in self.state_dict().items()}})

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> Classifier:
        """The classifier that `save` wrote, in evaluation mode.

        Args:
            path: the file.
            device: "cpu", "cuda", "mps", or "auto" for the best one present.

        Raises:
            ConfigError: there is no such device.
            CheckpointError: no such file, a damaged one, or one that holds no classifier.
        """
        device = pick_device(device, "device")
        state = load_checkpoint(path)
        if "classifier" not in state:
            raise CheckpointError(f"{path} holds no classifier: give one that wejepa.train.finetune has written")
        try:
            cfg = IJepaConfig.from_dict(state["config"])
            model = cls(cfg, IJEPA_base.without_weights(cfg).student_encoder, tuple(state["classes"])).to("meta")
        except (KeyError, ConfigError) as error:
            raise CheckpointError(f"{path} does not fit this version of wejepa ({error}): take the version that wrote it") from error
        if fault := first_fault(describe(state["classifier"]), describe(model.state_dict())):
            raise CheckpointError(f"{path}: {fault}; take another one")
        model.load_state_dict(state["classifier"], assign=True)
        return model.eval().to(device)


@freed_memory_kept()
def train_classifier(
    classifier: Classifier,
    source,
    index: Tensor,
    *,
    epochs: int,
    seed: int,
    learning_rate: float,
    layer_decay: float = 1.0,
    label_smoothing: float = 0.0,
) -> None:
    """Train a classifier, all of it, where it is: cross-entropy under pretraining's crops, by AdamW.

    The rate is warmed up for a tenth of the steps and lowered along a cosine; the gradient of the encoder is clipped at 1.

    Args:
        classifier: what is trained.
        source: labelled images, from `wejepa.data.load_images`.
        index: which of them.
        epochs: passes over them.
        seed: order of the images and crops.
        learning_rate: the head's at its highest.
        layer_decay: the share of the rate of the layer above that a layer gets, see `layerwise_groups`.
        label_smoothing: share of the target that is spread over all classes.
    """
    cfg, encoder, device = classifier.cfg, classifier.encoder, classifier.device
    classifier.train()
    optimizer = torch.optim.AdamW(layerwise_groups(classifier, layer_decay), fused=True)
    batch_size = min(cfg.data.train_batch_size, len(index))
    per_epoch = len(index) // batch_size
    steps, step = epochs * per_epoch, 0
    scaler = torch.amp.GradScaler(device.type, enabled=precision(device, cfg.hardware.mixed_precision) == torch.float16)
    for epoch in range(epochs):
        order = index[torch.randperm(len(index), generator=generator_for(seed, epoch))]
        parts = order[: per_epoch * batch_size].view(per_epoch, batch_size)
        crops = torch.stack([random_crops(batch_size, cfg, generator_for(seed, epoch, i)) for i in range(per_epoch)])
        for part, images in zip(parts, source.augmented(parts, crops, device), strict=True):
            rate = min(1.0, 10 * (step + 1) / steps) * cosine(step / steps, learning_rate, 0.0)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["share"]
            with autocast(device, cfg.hardware.mixed_precision):
                scores = classifier(images)
            loss = F.cross_entropy(scores.float(), to_device(source.labels[part], device), label_smoothing=label_smoothing)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            step += 1
    classifier.eval()


def layerwise_groups(classifier: Classifier, layer_decay: float) -> list[dict[str, Any]]:
    """Parameter groups with the "share" of the rate that each gets: 1 for the head, and less by `layer_decay` with each block below it.

    What an encoder has learnt first is the most general, and needs to change the least (BEiT, Bao et al., 2022). Weight decay is 0.05, on
    the encoder's matrices and kernels alone.
    """
    blocks = [name for name, _ in classifier.encoder.blocks.named_children()]

    def below_the_head(name: str) -> int:
        part, _, rest = name.removeprefix("encoder.").partition(".")
        if part == "blocks":
            return len(blocks) - blocks.index(rest.partition(".")[0])
        return {"head": 0, "norm": 1}.get(part, len(blocks) + 1)  # patches and positions are the furthest

    groups: dict[tuple[int, bool], list[Tensor]] = {}
    for name, p in classifier.named_parameters():
        decays = p.dim() > 1 and name.endswith("weight") and not name.startswith("head.")
        groups.setdefault((below_the_head(name), decays), []).append(p)
    return [{"params": ps, "share": layer_decay**distance, "weight_decay": 0.05 * decays} for (distance, decays), ps in groups.items()]
