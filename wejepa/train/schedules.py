"""How the learning rate, the weight decay and the teacher's momentum move over a run (I-JEPA, appendix A.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from wejepa.config import OptimizerConfig

__all__ = ["SHAPES", "Schedule", "StepSettings", "cosine", "linear"]


def cosine(progress: float, start: float, end: float) -> float:
    """From `start` at progress 0 to `end` at progress 1, along half a cosine."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))


def linear(progress: float, start: float, end: float) -> float:
    """From `start` at progress 0 to `end` at progress 1, in a straight line."""
    return start + (end - start) * min(max(progress, 0.0), 1.0)


SHAPES = {"cosine": cosine, "linear": linear}


@dataclass(frozen=True)
class StepSettings:
    """What one update is made with."""

    learning_rate: float
    weight_decay: float
    momentum: float


@dataclass(frozen=True)
class Schedule:
    """The settings of every step of a run, a function of the step alone, so that a resumed run takes up where it left.

    Args:
        cfg: the optimizer settings.
        steps_per_epoch: updates in an epoch.
    """

    cfg: OptimizerConfig
    steps_per_epoch: int

    def __call__(self, step: int) -> StepSettings:
        """The settings of update number `step`, counted from 0."""
        o = self.cfg
        total, warmup = o.epochs * self.steps_per_epoch, round(o.warmup_epochs * self.steps_per_epoch)
        progress = step / max(1, total - 1)
        if step < warmup:
            rate = o.start_learning_rate + (o.base_learning_rate - o.start_learning_rate) * step / warmup
        else:
            rate = cosine((step - warmup) / max(1, total - 1 - warmup), o.base_learning_rate, o.final_learning_rate)
        return StepSettings(
            learning_rate=rate,
            weight_decay=SHAPES[o.weight_decay_schedule](progress, o.weight_decay, o.final_weight_decay),
            momentum=SHAPES[o.momentum_schedule](progress, o.momentum_teacher, o.momentum_teacher_final),
        )
