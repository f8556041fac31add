"""A make-believe accelerator, for tests of code that must not mix devices: its tensors say they are elsewhere, and compute all the same.

`torch._subclasses.FakeTensorMode` follows shapes and devices alone. These follow the numbers as well, so what they pass through may look at
values, hand them to numpy and draw them, and it must give what it gives on the CPU. The device's name is "meta", which needs no hardware.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

READ = []  # the operations that have waited for numbers from there
THERE, CPU = torch.device("meta"), torch.device("cpu")


class Elsewhere(Tensor):
    """A tensor that says it is elsewhere, and has its numbers here."""

    @staticmethod
    def __new__(cls, here: Tensor):
        return Tensor._make_wrapper_subclass(cls, here.shape, strides=here.stride(), dtype=here.dtype, device=THERE)

    def __init__(self, here: Tensor):
        self.here = here

    def __repr__(self, **_) -> str:
        return f"Elsewhere({self.here})"

    def __deepcopy__(self, memo) -> Tensor:
        copy = Elsewhere(self.here.clone())
        return nn.Parameter(copy, self.requires_grad) if isinstance(self, nn.Parameter) else copy

    def tolist(self):
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


class Machine(TorchDispatchMode):
    """A machine with the accelerator: within it, what is made on "meta" or sent there is `Elsewhere`."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


def run(function, args, kwargs):
    """Call an operation on the numbers, where all its tensors are in one place, and give the result that place."""
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    there = any(isinstance(x, Elsewhere) for x in tensors)
    copies = function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
    indexes = function in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default)  # which take indices from the CPU
    if there and not copies and not indexes:
        for x in tensors:
            if not isinstance(x, Elsewhere) and x.dim() > 0:
                raise RuntimeError(f"{function}: expected all tensors to be on the same device, but found two")
    wanted = kwargs.get("device")
    if there and (function is torch.ops.aten._local_scalar_dense.default or (wanted is not None and torch.device(wanted) == CPU)):
        READ.append(function)
    if wanted is not None:
        there = torch.device(wanted).type == THERE.type
        kwargs = {**kwargs, "device": CPU}
    inside = tree_map_only(Elsewhere, lambda x: x.here, (args, kwargs))
    result = function(*inside[0], **inside[1])
    own = {id(x.here): x for x in tensors if isinstance(x, Elsewhere)}  # what is changed in place stays what it was

    def outside(x: Tensor) -> Tensor:
        if id(x) in own:
            return own[id(x)]
        return Elsewhere(x) if there else x

    return tree_map_only(Tensor, outside, result)


def sent_elsewhere(model: nn.Module) -> nn.Module:
    """A model, moved there in place."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and not isinstance(p, Elsewhere):
                module._parameters[name] = nn.Parameter(Elsewhere(p.detach().clone()), p.requires_grad)
        for name, b in module._buffers.items():
            if b is not None and not isinstance(b, Elsewhere):
                module._buffers[name] = Elsewhere(b.clone())
    return model
