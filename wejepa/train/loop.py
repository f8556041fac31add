"""The training loop: one step is mask, predict, descend, and let the teacher follow (I-JEPA, section 3)."""

from __future__ import annotations

import contextlib
import math
import signal
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wejepa.config import IJepaConfig
from wejepa.data import Ahead, FolderImages, Source, check_source, deaths_wait, load_images, steps_per_epoch, training_batches
from wejepa.devices import autocast, pick_device, precision, to_device
from wejepa.errors import ConfigError, DataError, TrainingError, WejepaError
from wejepa.masking import Masks, sample_block_masks
from wejepa.memory import freed_memory_kept
from wejepa.model import IJEPA_base, IJepaLoss, ijepa_loss
from wejepa.paths import path_of
from wejepa.seeds import generator_for
from wejepa.train.callbacks import Callback, LogFile, Monitor, tensorboard_writer
from wejepa.train.checkpoints import MOMENTS, Expected, own_parts
from wejepa.train.folder import LOG, CheckpointFolder, resume_from
from wejepa.train.interruption import Interruption, RunInterrupted, RunStopped
from wejepa.train.muon import Muon
from wejepa.train.ranks import Ranks, gathered, shard, spread_like
from wejepa.train.schedules import Schedule

__all__ = ["Pretraining", "parameter_groups"]

MASKS = 1  # tells the masks' random numbers from the crops' of the same step
LEAST_SCALE = 2.0**-10  # of a loss under float16; it begins at 2 ** 16 and is halved at each gradient that is not finite


class Pretraining:
    """A pretraining run: everything that a step changes, and nothing else, is what a checkpoint holds.

    Args:
        cfg: the config, validated here.
        resume: a checkpoint to go on from; "auto" for the newest good one in the output folder, if any; None to start afresh.
        source: images of your own in place of those that the config names: `wejepa.data.as_source(dataset, cfg)`, or a `Source`.
        model: what is trained, in place: an `IJEPA_base` of the config's sizes, whose parts may be your own; the run begins with its
            weights (with several processes, those of the first). By default a new one, its weights drawn by the seed. `model.start_from`
            replaces the weights of either.
        loss: a function of predictions and targets, each (B, M, Nt, D), that gives one number, ().
        monitor: a function of the model that gives numbers by name for the history, called at the end of every epoch, on the first process
            (with `hardware.shard_model` on all); by default `wejepa.train.callbacks.Monitor`.
        callbacks: told of every step and epoch, see `wejepa.train.callbacks`.

    A run with a source, model or loss of its own is resumed with the same ones: a checkpoint holds the weights and the names of these.

    Raises:
        ConfigError, DataError, CheckpointError: each with one line that says what to do, before the output folder is touched.
    """

    def __init__(
        self,
        cfg: IJepaConfig,
        resume: str | Path | None = None,
        *,
        source: Source | None = None,
        model: IJEPA_base | None = None,
        loss: Callable[[Tensor, Tensor], Tensor] = ijepa_loss,
        monitor: Callable[[IJEPA_base], dict[str, Any]] | None = None,
        callbacks: Iterable[Callback] = (),
    ):
        cfg.validate()
        if model is not None:
            check_model(model, cfg)
        self.cfg, self.callbacks = cfg.copy(), list(callbacks)
        self.ranks = Ranks.join(pick_device(cfg.hardware.device))
        self.device = self.ranks.device
        check_parts(cfg, self.ranks)
        with self.ranks.naming_lost_ones():
            self.source = load_once_per_node(cfg, self.ranks) if source is None else same_everywhere(source, cfg, self.ranks)
        self.steps_per_epoch = steps_per_epoch(self.source, cfg)
        self.schedule = Schedule(cfg.optimizer, self.steps_per_epoch)
        h, self.output = cfg.hardware, path_of(cfg.hardware.output_dir)
        self.checkpoints = CheckpointFolder(self.output, keep=h.keep_checkpoints, keep_steps=h.keep_every * self.steps_per_epoch)
        self.log = LogFile(self.output / LOG)
        self.step, self.history = 0, []
        self.losses, self.seconds = [], 0.0  # of the epoch under way
        # Steps that are under way when one's numbers are read: an accelerator has kernels to run while the next batch is prepared.
        self.late = 0 if self.device.type == "cpu" else 1
        self._unread: deque[tuple[int, Tensor]] = deque()
        self._unreadable_logged, self._saved_at = 0, time.monotonic()

        weakref.finalize(self, self.checkpoints.lock.release)
        try:
            with self.ranks.naming_lost_ones():
                self._begin(resume, model, loss, monitor)
        except BaseException:
            self.checkpoints.lock.release()
            raise

    def _begin(self, resume: str | Path | None, model: IJEPA_base | None, loss: Callable, monitor: Callable | None) -> None:
        """The model and the optimizer, as they are at the first step or as a checkpoint holds them, and the folder made ready."""
        h = self.cfg.hardware
        torch.manual_seed(h.seed)  # the initial weights; all later choices have generators of their own
        if model is None:
            self.model = IJEPA_base(self.cfg)
        else:
            self.model = model.to(self.device).train()
            self.model.cfg = self.cfg.copy()
            self.ranks.share(self.model.state_dict().values())
        self.parts = own_parts(self.model, loss)
        self.monitor = Monitor(self.cfg, self.source, self.model) if monitor is None else partial(monitor, self.model)
        dtype = precision(self.device, h.mixed_precision)
        if h.shard_model:
            shard(self.model, self.ranks, dtype)
        else:
            self.model.to(self.device)
        weights = self.model.state_dict()
        expected = Expected(self.cfg, weights, self._trained(), self.steps_per_epoch, self.source.fingerprint, self.parts)
        state, given = resume_from(resume, self.checkpoints, expected, self.ranks, self.log.write)
        for name, value in given.items():
            weights[name].copy_(spread_like(value, weights[name]))
        if state is not None:
            self.step, self.history = state["step"], state["history"]
            self.losses, self.seconds = state["losses"], state["seconds"]
        self.loss = self.ranks.wrap(IJepaLoss(self.model, loss), h.shard_model)
        if h.compile_model:
            self.loss = torch.compile(self.loss)
        self.optimizer = optimizer_of(self.model, self.cfg)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)
        if state is not None:
            self._set_moments(state["moments"], self.step - state.get("skipped", 0))
            if self.scaler.is_enabled() and "scaler" in state:
                self.scaler.load_state_dict(state["scaler"])

    # ------------------------------------------------------------ one step

    def train_step(self, images: Tensor) -> Tensor:
        """One update on this process's crops (B / ranks, C, S, S); returns their mean loss before it, () on the device.

        Nothing here waits for an accelerator. There and here, a loss or gradient that is not finite changes neither student nor teacher.

        Raises:
            TrainingError: on the CPU: the loss or the gradient is not finite. `run` raises it on every device, one step later on others.
        """
        cfg, now, world = self.cfg, self.schedule(self.step), self.ranks.world
        # Every process draws the masks of the whole batch and takes its part: the number of processes changes nothing.
        count = len(images) * cfg.mask.num_contexts * world
        masks = sample_block_masks(count, cfg.grid_size, cfg.mask, generator_for(cfg.hardware.seed, self.step, MASKS))
        masks = masks.part(self.ranks.rank, world)
        for group in self.optimizer.param_groups:
            group["lr"] = now.learning_rate
            group["weight_decay"] = now.weight_decay * group["decays"]

        self.optimizer.zero_grad()
        loss = self._backward(to_device(images, self.device), Masks(*(to_device(index, self.device) for index in masks)))
        self.scaler.unscale_(self.optimizer)
        norm = gathered(nn.utils.clip_grad_norm_(self.model.parameters(), cfg.optimizer.grad_clip_norm or math.inf))
        skip = 1 - norm.isfinite().float()
        self.optimizer.found_inf = skip  # which the fused AdamW heeds on the device
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.model.momentum_update(now.momentum, skip)
        self._numbers = torch.stack([loss, norm.to(loss.dtype)])
        if not self.late:
            self._check(self.step, *self._numbers.tolist())
        self.step += 1
        return loss

    def _backward(self, images: Tensor, masks: Masks) -> Tensor:
        """Gradients of the mean loss, in as many parts as the config says; returns the loss, () on the device."""
        parts, losses = self.cfg.optimizer.accumulation_steps, []
        for part in range(parts):
            last = part == parts - 1
            wait = contextlib.nullcontext() if last or not hasattr(self.loss, "no_sync") else self.loss.no_sync()
            with wait:
                with autocast(self.device, self.cfg.hardware.mixed_precision):
                    loss = self.loss(images.chunk(parts)[part], masks.part(part, parts)) / parts
                losses.append(loss.detach())
                # 1, or what float16 needs; not a number where the loss is none, so that every process sees it in the gradient's norm.
                loss.backward(self.scaler.scale(1 + 0 * loss.detach()))
        return torch.stack(losses).to(torch.float32 if self.device.type == "mps" else torch.float64).sum()  # MPS has no float64

    def _check(self, step: int, loss: float, norm: float) -> None:
        """Refuse a loss or gradient that is not finite; under float16 a gradient may overflow until its scale has fallen far enough."""
        if math.isfinite(loss) and (math.isfinite(norm) or (self.scaler.is_enabled() and self.scaler.get_scale() > LEAST_SCALE)):
            return
        raise TrainingError(  # the weights are still those of the step before
            f"at step {step} the loss is {loss} and the gradient's norm {norm}; the last checkpoint in {self.output} is from "
            f"before: resume it with hardware.mixed_precision = false, or start afresh below optimizer.base_learning_rate = "
            f"{self.cfg.optimizer.base_learning_rate}"
        )

    # ------------------------------------------------------------ all of them

    def run(self) -> Path:
        """Train to the last epoch and return the last checkpoint's path.

        SIGINT and SIGTERM end it after the step under way, with a checkpoint; a SIGINT after that ends it at once.

        Raises:
            RunInterrupted: a signal came.
            RunStopped: a process that decodes died, or too many files cannot be read; the checkpoint of the last whole step is written.
            TrainingError: the loss or the gradient is no longer finite, or another process has ended; the last checkpoint is from before.
            CheckpointError: one could not be written; or, where the object has run before, another run has taken the folder since.
        """
        try:
            with self.ranks.naming_lost_ones():
                return self._run()
        finally:
            self.checkpoints.lock.release()

    def _run(self) -> Path:
        self.ranks.once(self.checkpoints.take_again)
        last, self._saved_at = self.cfg.optimizer.epochs * self.steps_per_epoch, time.monotonic()
        with Interruption() as interruption, freed_memory_kept(), deaths_wait():
            while self.step < last:
                self._epoch(interruption)
        if self.ranks.from_first(not self.checkpoints.latest.exists()):  # a finished run was resumed into another folder
            self.save()
        self.ranks.sum(0)  # nobody leaves before the checkpoint is there
        return self.checkpoints.latest

    def _epoch(self, interruption: Interruption) -> None:
        from tqdm.auto import tqdm

        cfg, per_epoch = self.cfg, self.steps_per_epoch
        epoch, first = divmod(self.step, per_epoch)
        end = self.step - first + per_epoch
        batches = training_batches(self.source, cfg, epoch, first, part=(self.ranks.rank, self.ranks.world), device=self.device)
        batches = Ahead(batches, count=1 + self.late)
        quiet = {} if self.ranks.first else {"disable": True}  # for the first, TQDM_DISABLE decides
        bar = tqdm(batches, initial=first, total=per_epoch, leave=False, desc=f"epoch {epoch + 1}/{cfg.optimizer.epochs}", **quiet)
        begun = time.perf_counter() - self.seconds
        if any(self.ranks.sum(batches.fetch() is not None)):
            self._stop(batches.fault)
        for images in bar:
            self.train_step(images)
            # What one process knows and all must act on travels with the loss.
            self._send_numbers(interruption.signum, self.ranks.first and self._is_due(), batches.fetch() is not None)
            signum, due, fault = self._read_numbers(begun, leave=0 if self.step == end else self.late)
            if signum or due or fault:
                self._read_numbers(begun)
            if (signum or due) and self.step < end:
                self.save()
                if signum:
                    raise RunInterrupted(interruption.signum or signal.SIGTERM, self.checkpoints.latest, self.step)
            if fault and self.step < end:
                self._stop(batches.fault)
            if self.step == end:  # a fault that came after the last batch waits until the epoch is told of: without that no state is whole
                break

        entry = {"epoch": epoch + 1, "step": self.step, "loss": sum(self.losses) / per_epoch}
        if self.ranks.first or cfg.hardware.shard_model:  # a sharded model computes only where all processes take part
            entry |= self.monitor()
        entry |= {"images_per_second": per_epoch * cfg.data.train_batch_size / self.seconds, "seconds": self.seconds}
        self.history.append(self.ranks.from_first(entry))
        self.losses, self.seconds = [], 0.0
        if self.ranks.first:
            for callback in self.callbacks:
                callback.on_epoch(entry)
        self._log_unreadable()
        every = (cfg.hardware.checkpoint_every, cfg.hardware.keep_every)
        last = epoch + 1 == cfg.optimizer.epochs
        if signum or due or last or any(n and (epoch + 1) % n == 0 for n in every):
            self.save()
        if signum and not last:
            raise RunInterrupted(interruption.signum or signal.SIGTERM, self.checkpoints.latest, self.step)
        if fault and not last:
            self._stop(batches.fault)

    def _stop(self, fault: Exception | None) -> None:
        """Save the last whole step and end the run, as this process, or another one for None, cannot have its next batch."""
        if self.step and not self.ranks.once(lambda: self.checkpoints.holds(self.step)):
            self.save()

        def tell() -> None:
            if fault is not None:
                text = str(fault) if isinstance(fault, WejepaError) else f"{type(fault).__name__}: {fault}"
                raise RunStopped(text, self.checkpoints.latest if self.step else None, self.step) from fault

        self.ranks.together(tell)

    def _send_numbers(self, *told: float) -> None:
        """Queue the last step's loss and norm, and with them what this process has to tell the others: one small collective."""
        own = [*(self._numbers / self.ranks.world), *(torch.full_like(self._numbers[0], value) for value in told)]
        self._unread.append((self.step, self.ranks.total(torch.stack(own))))

    def _read_numbers(self, begun: float, leave: int = 0) -> tuple[int, bool, bool]:
        """Note the numbers of all steps but the last `leave`; returns the signal that came or 0, whether a checkpoint is due, and whether
        a process cannot have its next batch."""
        signum, due, fault = 0, False, False
        while len(self._unread) > leave:
            step, numbers = self._unread.popleft()
            loss, norm, signum, due, fault = numbers.tolist()  # waits for the device: once a step
            self._check(step - 1, loss, norm)
            if not math.isfinite(norm) and self.ranks.first:
                self.log.write(f"step {step}: its gradient overflows float16 and changes no weights; the loss is scaled down")
            self.losses.append(loss)
            self.seconds = time.perf_counter() - begun
            then = self.schedule(step - 1)
            for callback in self.callbacks:
                callback.on_step(step, {"loss": loss, "gradient_norm": norm, **vars(then)})
        return int(signum), bool(due), bool(fault)

    def _log_unreadable(self) -> None:
        for path, reason in list(self.source.unreadable.items())[self._unreadable_logged :]:
            self.log.write(f"passed over {path}: {reason}")
        self._unreadable_logged = len(self.source.unreadable)

    # ------------------------------------------------------------ what a checkpoint holds

    def save(self) -> None:
        """Write a checkpoint; every process calls this, and with a sharded model each writes its own part."""
        if self.cfg.hardware.shard_model:
            self.checkpoints.save(self.state(), self.ranks)
        else:
            self.ranks.once(lambda: self.checkpoints.save(self.state()))  # where it cannot be written, all processes hear of it
        self._saved_at = time.monotonic()

    def _is_due(self) -> bool:
        minutes = self.cfg.hardware.checkpoint_minutes
        return bool(minutes) and time.monotonic() - self._saved_at > 60 * minutes

    def state(self) -> dict[str, Any]:
        """The whole state; a sharded model's tensors are DTensors, of which this process holds its part.

        Random numbers, the order of the images and the schedules are functions of seed and step, so the step stands for them all.
        """
        return {
            "config": self.cfg.to_dict(),
            "model": dict(self.model.state_dict()),
            "moments": {
                kind: {name: self.optimizer.state[p].get(kind, torch.zeros_like(p)) for name, p in self._trained().items()}
                for kind in MOMENTS
            },
            "step": self.step,
            "history": self.history,
            "losses": self.losses,
            "seconds": self.seconds,
            "images": self.source.fingerprint,
            "versions": {"torch": str(torch.__version__)},
            **({"parts": self.parts} if self.parts else {}),
            **self._scaling(),
        }

    def _scaling(self) -> dict[str, Any]:
        """What float16 adds to a checkpoint: the scaler's state, and the steps whose update was left out; nothing without it."""
        updates = next((int(state["step"]) for state in self.optimizer.state.values() if state), self.step)
        found = {"scaler": self.scaler.state_dict()} if self.scaler.is_enabled() else {}
        return found | ({"skipped": self.step - updates} if updates < self.step else {})

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def _set_moments(self, moments: dict[str, dict[str, Tensor]], updates: int) -> None:
        for name, p in self._trained().items():
            count = torch.tensor(float(updates), device=self.device)
            self.optimizer.state[p] = {"step": count} | {kind: spread_like(moments[kind][name], p) for kind in MOMENTS}


def check_model(model: IJEPA_base, cfg: IJepaConfig) -> None:
    """Refuse a model of other sizes than the config's."""
    if not isinstance(model, IJEPA_base):
        raise ConfigError(f"model: give an IJEPA_base, not {type(model).__name__}; its predictor may be a module of your own")
    own, wanted = (c.to_dict()["model"] for c in (model.cfg, cfg))
    if other := [name for name in wanted if own[name] != wanted[name]]:
        raise ConfigError(
            f"model.{other[0]} is {wanted[other[0]]!r} in the config and {own[other[0]]!r} in the model that was given: make it by "
            f"IJEPA_base(cfg), or set cfg.model = model.cfg.model"
        )


def same_everywhere(source: Source, cfg: IJepaConfig, ranks: Ranks) -> Source:
    """A source of the caller's, after a look at it, and at whether all processes were given the same."""
    ranks.together(lambda: check_source(source, cfg))
    if len(found := set(ranks.gather(source.fingerprint))) > 1:
        raise DataError(f"source: the processes of the run have different ones, {' and '.join(sorted(found))}: give each the same images")
    return source


def load_once_per_node(cfg: IJepaConfig, ranks: Ranks) -> Source:
    """The training images, for each process. The first process of a machine downloads or lists them while its others wait.

    A list of files is handed on; images in memory, and rows, are read by each process from what is there by then.
    """
    own = []

    def first() -> FolderImages | None:
        own.append(load_images(cfg, "train"))
        return own[0] if type(own[0]) is FolderImages else None

    listed = ranks.once_per_node(first)
    return ranks.together(lambda: own[0] if own else listed if listed is not None else load_images(cfg, "train"))


def check_parts(cfg: IJepaConfig, ranks: Ranks) -> None:
    """Refuse a batch that the processes and accumulated parts cannot share evenly, shards without processes, and what is not installed."""
    batch, world, parts = cfg.data.train_batch_size, ranks.world, cfg.optimizer.accumulation_steps
    if batch % (world * parts):
        raise ConfigError(
            f"data.train_batch_size = {batch} does not divide by {world} processes times optimizer.accumulation_steps = {parts}: "
            f"take {math.ceil(batch / (world * parts)) * world * parts}"
        )
    if cfg.hardware.tensorboard:
        tensorboard_writer()
    if cfg.hardware.shard_model and not torch.distributed.is_initialized():
        raise ConfigError("hardware.shard_model = true needs several processes: start them with torchrun, or set it to false")


def optimizer_of(model: nn.Module, cfg: IJepaConfig) -> torch.optim.AdamW:
    """What descends, by `optimizer.kind`; Muon's own steps are for the matrices of transformer blocks, queries, keys and values in one."""
    decaying, others = parameter_groups(model)
    if cfg.optimizer.kind == "adamw":
        return torch.optim.AdamW([decaying, others], betas=cfg.optimizer.betas, fused=True)
    in_blocks = {p for name, p in model.named_parameters() if ".blocks." in name and p.ndim == 2}
    matrices = [p for p in decaying["params"] if p in in_blocks]
    decaying["params"] = [p for p in decaying["params"] if p not in in_blocks]
    return Muon([{"params": matrices, "decays": True, "matrices": True}, decaying, others], cfg.optimizer.betas)


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Trained parameters in two groups: matrices and kernels decay; biases, norms, scales, positions and the mask token do not."""
    groups: dict[bool, list[Tensor]] = {True: [], False: []}
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups[p.dim() > 1 and name.endswith("weight")].append(p)
    return [{"params": ps, "decays": decays} for decays, ps in groups.items()]
