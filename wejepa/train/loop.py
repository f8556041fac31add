"""The training loop: one step is mask, predict, descend, and let the teacher follow."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wejepa.analysis.features import extract_tokens, knn_accuracy, rankme, teacher_variance
from wejepa.config import IJepaConfig
from wejepa.data import generator_for, load_images, naming_dead_workers, steps_per_epoch, training_batches
from wejepa.errors import CheckpointError, ConfigError, TrainingError
from wejepa.masking import Masks, sample_block_masks
from wejepa.model import IJEPA_base
from wejepa.train.checkpoints import LOG, CheckpointFolder, check_tensors, load_checkpoint
from wejepa.train.distributed import IJepaLoss, Ranks, shard, spread_like, whole
from wejepa.train.interruption import Interruption, RunInterrupted
from wejepa.train.memory import freed_memory_kept
from wejepa.train.schedules import Schedule

MONITORED = (1000, 500)  # training images that the epoch's k-NN votes with, and other training images that it classifies
MASKS = 1  # tells the masks' random numbers from the crops' of the same step
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's names
BETAS = (0.9, 0.95)  # a memory of twenty steps, not a thousand: in runs of a few thousand the gradient soon is another one

# Settings that a resumed run may change: they do not say what is learnt.
FREE = {
    "data": {"root", "num_workers", "eval_batch_size", "max_unreadable_share"},
    "optimizer": {"accumulation_steps"},
    "hardware": {
        "device", "mixed_precision", "compile_model", "shard_model",
        "checkpoint_every", "checkpoint_minutes", "keep_checkpoints", "keep_every", "output_dir",
    },
}  # fmt: skip


class Pretraining:
    """A pretraining run: everything that a step changes, and nothing else, is what a checkpoint holds.

    Args:
        cfg: the config, validated here.
        resume: a checkpoint to go on from; "auto" for the newest good one in the output folder, if any; None to start afresh.
    """

    def __init__(self, cfg: IJepaConfig, resume: str | Path | None = None):
        cfg.validate()
        self.cfg = cfg.copy()
        self.ranks = Ranks.join(pick_device(cfg.hardware.device))
        self.device = self.ranks.device
        self._check_parts()
        self.source = load_images(cfg, "train")
        self.steps_per_epoch = steps_per_epoch(self.source, cfg)
        self.schedule = Schedule(cfg.optimizer, self.steps_per_epoch)
        h = cfg.hardware
        self.output = Path(h.output_dir)
        self.checkpoints = CheckpointFolder(self.output, keep=h.keep_checkpoints, keep_steps=h.keep_every * self.steps_per_epoch)
        self.step, self.history = 0, []
        self.losses, self.seconds = [], 0.0  # of the epoch under way
        self._unreadable_logged, self._saved_at = 0, time.monotonic()

        torch.manual_seed(cfg.hardware.seed)  # the initial weights; all later choices have generators of their own
        self.model = IJEPA_base.from_config(cfg)
        state = self._open(resume)
        if cfg.hardware.shard_model:
            shard(self.model, self.ranks)
        else:
            self.model.to(self.device)
        self.loss = self.ranks.wrap(IJepaLoss(self.model), cfg.hardware.shard_model)
        if cfg.hardware.compile_model:
            self.loss = torch.compile(self.loss)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model), betas=BETAS, fused=True)
        if state is not None:
            self._set_moments(state["moments"])

    def _check_parts(self) -> None:
        batch, world, parts = self.cfg.data.train_batch_size, self.ranks.world, self.cfg.optimizer.accumulation_steps
        if batch % (world * parts):
            raise ConfigError(
                f"data.train_batch_size = {batch} does not divide by {world} processes times optimizer.accumulation_steps = {parts}: "
                f"take {math.ceil(batch / (world * parts)) * world * parts}"
            )
        if self.cfg.hardware.shard_model and not torch.distributed.is_initialized():
            raise ConfigError("hardware.shard_model = true needs several processes: start them with torchrun, or set it to false")

    # ------------------------------------------------------------ one step

    def train_step(self, images: Tensor) -> float:
        """One update on this process's images (B / ranks, C, S, S); returns the whole batch's loss before it."""
        cfg, now, world = self.cfg, self.schedule(self.step), self.ranks.world
        # Every process draws the masks of the whole batch and takes its part: the number of processes changes nothing.
        masks = sample_block_masks(len(images) * world, cfg.grid_size, cfg.mask, generator_for(cfg.hardware.seed, self.step, MASKS))
        masks = masks.part(self.ranks.rank, world)
        for group in self.optimizer.param_groups:
            group["lr"] = now.learning_rate
            group["weight_decay"] = now.weight_decay * group["decays"]

        self.optimizer.zero_grad()
        value = self._backward(images.to(self.device), masks.to(self.device))
        norm = whole(nn.utils.clip_grad_norm_(self.model.parameters(), cfg.optimizer.grad_clip_norm or math.inf)).item()
        if not (math.isfinite(value) and math.isfinite(norm)):  # the weights are still those of the step before
            raise TrainingError(
                f"at step {self.step} the loss is {value} and the gradient's norm {norm}; the last checkpoint in {self.output} is from "
                f"before: resume it with hardware.mixed_precision = false, or start afresh below optimizer.base_learning_rate = "
                f"{cfg.optimizer.base_learning_rate}"
            )
        self.optimizer.step()
        self.model.momentum_update(now.momentum)
        self.step += 1
        return value

    def _backward(self, images: Tensor, masks: Masks) -> float:
        """Gradients of the mean loss, in as many parts as the config says; returns the loss."""
        parts, value = self.cfg.optimizer.accumulation_steps, 0.0
        for part in range(parts):
            last = part == parts - 1
            wait = contextlib.nullcontext() if last or not hasattr(self.loss, "no_sync") else self.loss.no_sync()
            with wait:
                with autocast(self.device, self.cfg.hardware.mixed_precision):
                    loss = self.loss(images.chunk(parts)[part], masks.part(part, parts)) / parts
                loss.backward()
            value += loss.item()
        return value

    # ------------------------------------------------------------ all of them

    def run(self, report=None) -> Path:
        """Train to the last epoch and return the last checkpoint's path; `report` is called with each epoch's history entry.

        SIGINT and SIGTERM end it after the step under way, with a checkpoint; a second one ends it at once.

        Raises:
            RunInterrupted: a signal came.
            TrainingError: the loss or the gradient is no longer finite; the last checkpoint is from before.
            CheckpointError: one could not be written.
        """
        last, self._saved_at = self.cfg.optimizer.epochs * self.steps_per_epoch, time.monotonic()
        # A worker's death is noticed wherever the main process happens to be, so both guards are around everything.
        with Interruption() as interruption, freed_memory_kept(), naming_dead_workers(self.cfg.data.num_workers):
            while self.step < last:
                self._epoch(interruption, report)
        if self.ranks.from_first(not self.checkpoints.latest.exists()):  # a finished run was resumed into another folder
            self.save()
        self.ranks.sum(0)  # nobody leaves before the checkpoint is there
        return self.checkpoints.latest

    def _epoch(self, interruption: Interruption, report) -> None:
        from tqdm.auto import tqdm

        cfg, per_epoch = self.cfg, self.steps_per_epoch
        epoch, first = divmod(self.step, per_epoch)
        batches = training_batches(self.source, cfg, epoch, first, part=(self.ranks.rank, self.ranks.world))
        title = f"epoch {epoch + 1}/{cfg.optimizer.epochs}"
        quiet = {} if self.ranks.first else {"disable": True}  # for the first, TQDM_DISABLE decides
        bar = tqdm(batches, initial=first, total=per_epoch, leave=False, desc=title, **quiet)
        begun = time.perf_counter() - self.seconds
        for images in bar:
            loss = self.train_step(images)
            # What one process knows and all must act on travels with the loss.
            loss, signum, due = self.ranks.sum(loss / self.ranks.world, interruption.signum, self.ranks.first and self._is_due())
            self.losses.append(loss)
            self.seconds = time.perf_counter() - begun
            if (signum or due) and len(self.losses) < per_epoch:
                self.save()
                if signum:
                    raise RunInterrupted(interruption.signum or signal.SIGTERM, self.checkpoints.latest, self.step)

        entry = {"epoch": epoch + 1, "step": self.step, "loss": sum(self.losses) / per_epoch}
        if self.ranks.first or cfg.hardware.shard_model:  # a sharded model computes only where all processes take part
            entry |= self.monitor()
        entry |= {"images_per_second": per_epoch * cfg.data.train_batch_size / self.seconds, "seconds": self.seconds}
        self.history.append(self.ranks.from_first(entry))
        self.losses, self.seconds = [], 0.0
        if report is not None and self.ranks.first:
            report(entry)
        self._log_unreadable()
        every = (cfg.hardware.checkpoint_every, cfg.hardware.keep_every)
        if signum or due or epoch + 1 == cfg.optimizer.epochs or any(n and (epoch + 1) % n == 0 for n in every):
            self.save()
        if signum and epoch + 1 < cfg.optimizer.epochs:
            raise RunInterrupted(interruption.signum or signal.SIGTERM, self.checkpoints.latest, self.step)

    def monitor(self) -> dict[str, float | None]:
        """What tells learning from collapse, on images of the training set: teacher variance, RankMe, nearest neighbours."""
        index = torch.randperm(len(self.source), generator=generator_for(self.cfg.hardware.seed))[: sum(MONITORED)]
        index = self.source.readable(index)
        voters = len(index) * MONITORED[0] // sum(MONITORED)
        tokens = encode_images(self.model, self.source, index, self.cfg)
        x, y = tokens.mean(1), self.source.labels[index]
        return {
            "teacher_variance": teacher_variance(tokens),
            "rankme": rankme(x),
            "knn": knn_accuracy(x[:voters], y[:voters], x[voters:], y[voters:]) if len(self.source.classes) > 1 else None,
        }

    def log(self, line: str) -> None:
        """Print a line and add it to the output folder's log."""
        print(line, flush=True)
        with contextlib.suppress(OSError), open(self.output / LOG, "a") as file:  # a full disk stops checkpoints, not lines
            file.write(line + "\n")

    def _log_unreadable(self) -> None:
        for path, reason in list(self.source.unreadable.items())[self._unreadable_logged :]:
            self.log(f"passed over {path}: {reason}")
        self._unreadable_logged = len(self.source.unreadable)

    # ------------------------------------------------------------ what a checkpoint holds

    def save(self) -> None:
        """Write a checkpoint; with a sharded model every process must call this."""
        state = self.state() if self.ranks.first or self.cfg.hardware.shard_model else None
        if self.ranks.first:
            self.checkpoints.save(state)
        self._saved_at = time.monotonic()

    def _is_due(self) -> bool:
        minutes = self.cfg.hardware.checkpoint_minutes
        return bool(minutes) and time.monotonic() - self._saved_at > 60 * minutes

    def state(self) -> dict[str, Any]:
        """The whole state, whole tensors on any number of processes.

        Random numbers, the order of the images and the schedules are functions of seed and step, so the step stands for them all.
        """
        return {
            "config": self.cfg.to_dict(),
            "model": {name: whole(value) for name, value in self.model.state_dict().items()},
            "moments": {
                kind: {name: whole(self.optimizer.state[p].get(kind, torch.zeros_like(p))) for name, p in self._trained().items()}
                for kind in MOMENTS
            },
            "step": self.step,
            "history": self.history,
            "losses": self.losses,
            "seconds": self.seconds,
            "images": self.source.fingerprint,
            "versions": {"torch": str(torch.__version__)},
        }

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def _open(self, resume: str | Path | None) -> dict[str, Any] | None:
        """Choose the checkpoint to go on from, take its weights and its place in the run, and make the output folder ready."""
        path, notes, state = self._choose(resume) if self.ranks.first else (None, [], None)
        path = self.ranks.from_first(path)
        if path is not None:
            state = state or self._read(path)
            self.model.load_state_dict(state["model"])
            self.step, self.history = state["step"], state["history"]
            self.losses, self.seconds = state["losses"], state["seconds"]
        self.ranks.sum(0)  # all have read it before files are moved
        if self.ranks.first:
            moved = self.checkpoints.begin(path, self.step)
            for line in [*notes, moved, f"going on from {path} at step {self.step}" if path else None]:
                if line:
                    self.log(line)
        return state

    def _choose(self, resume: str | Path | None) -> tuple[Path | None, list[str], dict[str, Any] | None]:
        """The checkpoint that `resume` asks for and its state, or None; and what was found wrong with newer ones."""
        if resume is None:
            return None, [], None
        if resume != "auto":
            return Path(resume), [], self._read(Path(resume))
        found, notes = self.checkpoints.newest_first(), []
        for path in found:
            try:
                return path, notes, self._read(path)
            except CheckpointError as error:
                notes.append(f"passed over: {error}")
        if found:
            first = notes[0].removeprefix("passed over: ")
            raise CheckpointError(f"none of the {len(found)} checkpoints in {self.output} can be resumed: {first}")
        return None, [], None

    def _read(self, path: Path) -> dict[str, Any]:
        """The state in a checkpoint, after all of it has been checked against this run."""
        state = load_checkpoint(path)
        if "source" in state:
            raise CheckpointError(f"{path} holds weights alone, from {state['source']}: load_model reads it, no run goes on from it")
        self._check_settings(state.get("config"), path)
        check_tensors(state.get("model"), self.model.state_dict(), path)
        moments = state.get("moments")
        for kind in MOMENTS:
            check_tensors(moments.get(kind) if isinstance(moments, dict) else None, self._trained(), path)
        kinds = {"step": int, "history": list, "losses": list, "seconds": float, "images": str}
        wrong = [name for name, kind in kinds.items() if not isinstance(state.get(name), kind)]
        if not wrong:
            epoch, done = divmod(state["step"], self.steps_per_epoch)
            wrong += ["step"] if not 0 < state["step"] <= self.cfg.optimizer.epochs * self.steps_per_epoch else []
            wrong += ["history"] if len(state["history"]) != epoch or not all(isinstance(e, dict) for e in state["history"]) else []
            wrong += ["losses"] if len(state["losses"]) != done or not all(isinstance(v, float) for v in state["losses"]) else []
        if wrong:
            raise CheckpointError(f"{path} is no whole training state: {wrong[0]} = {str(state.get(wrong[0]))[:60]}; take an earlier one")
        if state["images"] != self.source.fingerprint:
            raise CheckpointError(
                f"{path} was trained on {state['images']}, data.root now has {self.source.fingerprint}: "
                f"put the same images back, or start afresh in another hardware.output_dir"
            )
        return state

    def _check_settings(self, theirs: Any, path: Path) -> None:
        defaults = IJepaConfig().to_dict()  # what a setting was before there was one
        for section, settings in self.cfg.to_dict().items():
            before = theirs.get(section) if isinstance(theirs, dict) else None
            for name, value in settings.items():
                found = before.get(name, defaults[section][name]) if isinstance(before, dict) else None
                if found != value and name not in FREE.get(section, ()):
                    raise CheckpointError(
                        f"{path} was trained with {section}.{name} = {found!r}, this run says {value!r}: a resumed run goes on with the "
                        f"settings it began with; set it back, or start afresh in another hardware.output_dir"
                    )

    def _set_moments(self, moments: dict[str, dict[str, Tensor]]) -> None:
        for name, p in self._trained().items():
            count = torch.tensor(float(self.step), device=self.device)
            self.optimizer.state[p] = {"step": count} | {kind: spread_like(moments[kind][name], p) for kind in MOMENTS}


def encode_images(model: IJEPA_base, source, index: Tensor, cfg: IJepaConfig, encoder: str = "teacher") -> Tensor:
    """Tokens (N, P, D) of images under the config's precision."""
    device = next(model.parameters()).device

    def encode(images: Tensor) -> Tensor:
        with autocast(device, cfg.hardware.mixed_precision):
            return model.encode(images.to(device), encoder=encoder)

    with freed_memory_kept(), naming_dead_workers(cfg.data.num_workers):
        return extract_tokens(encode, source.batches(index, cfg.data.eval_batch_size))


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Trained parameters in two groups: matrices and kernels decay; biases, norms, scales, positions and the mask token do not."""
    groups: dict[bool, list[Tensor]] = {True: [], False: []}
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups[p.dim() > 1 and name.endswith("weight")].append(p)
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
