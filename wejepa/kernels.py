"""What a step spends its time on, computed the fast way on a CPU; elsewhere, PyTorch's own functions.

Each function here gives what the textbook's line in its docstring gives, forward and backward, within the rounding of its type.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["Linear", "linear"]

ONEDNN = torch.backends.mkldnn.is_available()


class Linear(nn.Linear):
    """`nn.Linear`, computed by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias` for x (..., I), weight (O, I) and bias (O,): (..., O).

    In float32 PyTorch asks MKL for it. oneDNN, which ships beside it, is faster at a transformer's shapes: by a tenth to a fifth with AVX2,
    and by half on processors with AVX-512 from which MKL withholds it.
    """
    if (
        not ONEDNN
        or x.device.type != "cpu"
        or not x.dtype == weight.dtype == torch.float32
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()  # or exporting: a program is for any machine
    ):
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias) if torch.is_grad_enabled() else _product(x, weight, bias)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows, seen = grad.flatten(0, -2), x.flatten(0, -2)
        return (
            _product(grad, weight.t(), None) if of_x else None,
            # MKL is faster at a wide product than at a tall one.
            (rows.t() @ seen if len(weight) <= x.shape[-1] else (seen.t() @ rows).t()) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )
