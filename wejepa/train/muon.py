"""Muon (Jordan et al., 2024), another optimizer for the matrices of transformer blocks: `optimizer.kind = "muon"`.

It gives each matrix a step whose singular values are all about one: directions that the gradient hardly holds move as far as those that
dominate it. torch.optim.Muon does that too, for one matrix after another and in bfloat16. A training step of the default config takes some
40 ms with bfloat16 and 75 without. To that torch's adds 6 where the processor has bfloat16 and 62 where it has not; the lines below add 5.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

__all__ = ["Muon", "orthogonal"]

MOMENTUM = 0.95
SIZE = 0.6  # of a step's numbers, root mean square, in learning rates; AdamW's are at most about 1


class Muon(torch.optim.AdamW):
    """AdamW, but the matrices of some groups move along their momentum, orthogonalised; rate and weight decay mean what they do in AdamW.

    A matrix's momentum is kept where AdamW keeps the mean of its gradient, so a checkpoint holds it.

    Args:
        groups: as for AdamW; with "matrices": True those of matrices that take Muon's steps.
        betas: of AdamW, for the others.
    """

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float]):
        super().__init__([{"matrices": False} | group for group in groups], betas=betas, fused=True)

    @torch.no_grad()
    def step(self) -> None:
        """One update. Where `found_inf` is set to 1 everything stands still, as with a fused AdamW."""
        alike = defaultdict(list)
        for group in self.param_groups:
            for p in group["params"]:
                if group["matrices"] and p.grad is not None:
                    alike[p.shape].append((p, p.grad, group["lr"], group["weight_decay"]))
                    p.grad = None  # AdamW leaves out what has none
        super().step()
        for ps in alike.values():  # matrices of a shape at once
            gradients = torch.stack([gradient for _, gradient, _, _ in ps])
            before = torch.stack([self._momentum(p) for p, *_ in ps])
            skip = getattr(self, "found_inf", gradients.new_zeros(()))
            momenta = torch.where(skip > 0, before, before.lerp(gradients, 1 - MOMENTUM))
            steps = orthogonal(torch.where(skip > 0, 0, momenta.lerp(gradients, 1 - MOMENTUM)))
            for (p, gradient, rate, decay), momentum, step in zip(ps, momenta, steps, strict=True):
                p.mul_(1 - (1 - skip) * rate * decay).sub_(step, alpha=rate * SIZE * max(p.shape) ** 0.5)
                self.state[p]["exp_avg"].copy_(momentum)
                self.state[p]["step"] += 1 - skip
                p.grad = gradient

    def _momentum(self, p: Tensor) -> Tensor:
        if not self.state[p]:  # as AdamW's looks, which never uses its second moment here
            self.state[p].update(step=torch.zeros((), device=p.device), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        return self.state[p]["exp_avg"]


def orthogonal(matrices: Tensor, rounds: int = 5) -> Tensor:
    """Matrices (B, M, N) with their own singular vectors and singular values of about 1: 0.68 to 1.2.

    Values under 0.2 % of the matrix's norm grow 485-fold at most, and do not get there; zeros stay zero.

    Newton and Schulz's way, with Jordan's numbers: a round is X <- (a + b X X' + c X X' X X') X, an odd polynomial of each singular value.
    The factor before X is made of the small square X X' alone, so its product over the rounds is found first, and meets X once. That needs
    products in true float32.
    """
    a, b, c = 3.4445, -4.7750, 2.0315  # steep at 0, where most singular values of a gradient are
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = (x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)).contiguous()
    square, one = x @ x.mT, torch.eye(x.shape[-2], device=x.device, dtype=x.dtype)
    product = one.expand(len(x), -1, -1)
    for _ in range(rounds):
        factor = torch.baddbmm(a * one + b * square, square, square, alpha=c)
        product, square = factor @ product, factor @ square @ factor
    return (product @ x).mT if tall else product @ x
