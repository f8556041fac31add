"""The teacher's update: an exponential moving average of the student (I-JEPA, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["update_teacher"]


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float, skip: Tensor | None = None) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, over all parameters.

    Buffers stay the teacher's: its batch statistics are of whole images, which it sees, the student's of masked ones.

    Args:
        teacher: moved in place.
        student: of the same architecture.
        momentum: share that the teacher keeps of itself, from 0 to 1.
        skip: (), 1 to stand still and 0 to move, on the weights' device: so nobody has to wait for what is known only there.
    """
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum = {momentum}: give a number from 0 (copy the student) to 1 (stand still)")
    theirs, ours = list(teacher.parameters()), list(student.parameters())
    weight = 1 - momentum if skip is None else [(1 - skip) * (1 - momentum)] * len(ours)
    torch._foreach_lerp_(theirs, ours, weight)  # one pass over the weights
