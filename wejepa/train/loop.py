"""The training loop: one step is mask, predict, descend, and let the teacher follow."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wejepa.analysis.features import extract_tokens, knn_accuracy, rankme, teacher_variance
from wejepa.config import IJepaConfig
from wejepa.data import generator_for, load_images, steps_per_epoch, training_batches
from wejepa.errors import CheckpointError, ConfigError, TrainingError
from wejepa.masking import sample_block_masks
from wejepa.model import IJEPA_base, ijepa_loss
from wejepa.train.checkpoints import LATEST, load_checkpoint, load_weights, save_checkpoint
from wejepa.train.schedules import Schedule

MONITORED = (1000, 500)  # training images that the epoch's k-NN votes with, and other training images that it classifies
MASKS = 1  # tells the masks' random numbers from the crops' of the same step
BETAS = (0.9, 0.95)  # a memory of twenty steps, not a thousand: in runs of a few thousand the gradient soon is another one


class Pretraining:
    """A pretraining run: everything that a step changes, and nothing else, is what a checkpoint holds.

    Args:
        cfg: the config, validated here.
        resume: a checkpoint to go on from; "auto" for the newest in the output folder, if any; None to start afresh.
    """

    def __init__(self, cfg: IJepaConfig, resume: str | Path | None = None):
        cfg.validate()
        self.cfg = cfg.copy()
        self.output = Path(cfg.hardware.output_dir)
        self.device = pick_device(cfg.hardware.device)
        self.source = load_images(cfg, "train")
        self.steps_per_epoch = steps_per_epoch(self.source, cfg)
        self.schedule = Schedule(cfg.optimizer, self.steps_per_epoch)
        torch.manual_seed(cfg.hardware.seed)  # the initial weights; all later choices have generators of their own
        self.model = IJEPA_base.from_config(cfg).to(self.device)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model), betas=BETAS, fused=True)
        self.loss = torch.compile(self._loss) if cfg.hardware.compile_model else self._loss
        self.step, self.history = 0, []
        if resume == "auto":
            resume = self.output / LATEST if (self.output / LATEST).exists() else None
        if resume is not None:
            self._restore(resume)

    # ------------------------------------------------------------ one step

    def _loss(self, images: Tensor, masks) -> Tensor:
        return ijepa_loss(*self.model(images, masks))

    def train_step(self, images: Tensor) -> float:
        """One update on images (B, C, S, S); returns the loss before it."""
        cfg, now = self.cfg, self.schedule(self.step)
        masks = sample_block_masks(len(images), cfg.grid_size, cfg.mask, generator_for(cfg.hardware.seed, self.step, MASKS))
        for group in self.optimizer.param_groups:
            group["lr"] = now.learning_rate
            group["weight_decay"] = now.weight_decay * group["decays"]

        with autocast(self.device, cfg.hardware.mixed_precision):
            loss = self.loss(images.to(self.device), masks.to(self.device))
        self.optimizer.zero_grad()
        loss.backward()
        if cfg.optimizer.grad_clip_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), cfg.optimizer.grad_clip_norm)
        value = loss.item()
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss is {value} at step {self.step}; the last checkpoint in {self.output} is from before: resume it with "
                f"hardware.mixed_precision = false, or start afresh below optimizer.base_learning_rate = {cfg.optimizer.base_learning_rate}"
            )
        self.optimizer.step()
        self.model.momentum_update(now.momentum)
        self.step += 1
        return value

    # ------------------------------------------------------------ all of them

    def run(self, report=None) -> Path:
        """Train to the last epoch and return the last checkpoint's path; `report` is called with each epoch's history entry."""
        from tqdm.auto import tqdm

        epochs = self.cfg.optimizer.epochs
        while self.step < epochs * self.steps_per_epoch:
            epoch, losses, start = self.step // self.steps_per_epoch, [], time.perf_counter()
            bar = tqdm(
                training_batches(self.source, self.cfg, epoch), total=self.steps_per_epoch, leave=False, desc=f"epoch {epoch + 1}/{epochs}"
            )
            for images in bar:
                losses.append(self.train_step(images))
            seconds = time.perf_counter() - start
            entry = {"epoch": epoch + 1, "step": self.step, "loss": sum(losses) / len(losses), **self.monitor()}
            entry |= {"images_per_second": self.steps_per_epoch * self.cfg.data.train_batch_size / seconds, "seconds": seconds}
            self.history.append(entry)
            if report is not None:
                report(entry)
            if (epoch + 1) % self.cfg.hardware.checkpoint_every == 0 or epoch + 1 == epochs:
                save_checkpoint(self.output / LATEST, self.state())
        if not (self.output / LATEST).exists():  # a finished run was resumed into another folder
            save_checkpoint(self.output / LATEST, self.state())
        return self.output / LATEST

    def monitor(self) -> dict[str, float | None]:
        """What tells learning from collapse, on images of the training set: teacher variance, RankMe, nearest neighbours."""
        voters, asked = (min(n, len(self.source) * n // sum(MONITORED)) for n in MONITORED)
        index = torch.randperm(len(self.source), generator=generator_for(self.cfg.hardware.seed))[: voters + asked]
        tokens = encode_images(self.model, self.source, index, self.cfg)
        x, y = tokens.mean(1), self.source.labels[index]
        return {
            "teacher_variance": teacher_variance(tokens),
            "rankme": rankme(x),
            "knn": knn_accuracy(x[:voters], y[:voters], x[voters:], y[voters:]) if len(self.source.classes) > 1 else None,
        }

    # ------------------------------------------------------------ what a checkpoint holds

    def state(self) -> dict[str, Any]:
        """The whole state; the random choices are functions of seed and step, so they need no place in it."""
        return {
            "config": self.cfg.to_dict(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "history": self.history,
            "versions": {"torch": str(torch.__version__)},
        }

    def _restore(self, path: str | Path) -> None:
        state = load_checkpoint(path)
        ours, theirs = self.cfg.to_dict(), state["config"]
        free = {"data": ("root", "num_workers", "eval_batch_size"), "hardware": [k for k in ours["hardware"] if k != "seed"]}
        for section, settings in ours.items():
            for name, value in settings.items():
                before = theirs.get(section, {}).get(name)
                if before != value and name not in free.get(section, ()):
                    raise CheckpointError(
                        f"{path} was trained with {section}.{name} = {before!r}, this run says {value!r}: a resumed run goes on with the "
                        f"settings it began with; set it back, or start afresh in another hardware.output_dir"
                    )
        load_weights(self.model, state["model"], path)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.history = state["step"], state["history"]


def encode_images(model: IJEPA_base, source, index: Tensor, cfg: IJepaConfig, encoder: str = "teacher") -> Tensor:
    """Tokens (N, P, D) of images under the config's precision."""
    device = next(model.parameters()).device

    def encode(images: Tensor) -> Tensor:
        with autocast(device, cfg.hardware.mixed_precision):
            return model.encode(images.to(device), encoder=encoder)

    return extract_tokens(encode, source.batches(index, cfg.data.eval_batch_size))


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Trained parameters in two groups: matrices decay; biases, norms, positions and the mask token do not."""
    groups: dict[bool, list[Tensor]] = {True: [], False: []}
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups[p.dim() > 1 and not name.endswith(("pos_embed", "mask_token"))].append(p)
    return [{"params": ps, "decays": decays} for decays, ps in groups.items()]


def pick_device(name: str) -> torch.device:
    """The device of that name, or for "auto" CUDA where there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"hardware.device = {name!r} is not to be had here: take 'auto' or 'cpu'") from error
    return device


def computes_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices natively; where it only emulates them they are slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def autocast(device: torch.device, wanted: bool) -> contextlib.AbstractContextManager:
    """bfloat16 matrix products if wanted and native, else nothing."""
    if wanted and computes_bfloat16(device):
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()
