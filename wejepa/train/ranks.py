"""One run on several processes, as torchrun starts them.

Every process holds the model and computes the loss of its share of each batch; gradients are averaged in the backward pass, so all
processes make the same update. Or, with `hardware.shard_model`, each holds a share of every weight as well (FSDP2).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from wejepa.errors import ConfigError, WejepaError
from wejepa.model import Block, IJEPA_base, IJepaLoss

__all__ = ["Ranks", "gathered", "is_spread", "own_part", "shard", "spread_like"]

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those of its run.

    Attributes:
        rank: its number, from 0.
        world: how many there are.
        device: what it computes on.
    """

    rank: int
    world: int
    device: torch.device

    @classmethod
    def join(cls, device: torch.device) -> Ranks:
        """Meet the other processes if torchrun started this one, else be alone.

        Args:
            device: of the kind to compute on; on "cuda" each process takes the GPU of its local rank.

        Raises:
            ConfigError: a machine has more processes than GPUs.
        """
        if "TORCHELASTIC_RUN_ID" not in os.environ and not dist.is_initialized():
            return cls(0, 1, device)
        if device.type == "cuda":
            local = int(os.environ.get("LOCAL_RANK", 0))
            if local >= torch.cuda.device_count():
                raise ConfigError(
                    f"--nproc-per-node is more than this machine's {torch.cuda.device_count()} GPUs: make it smaller, "
                    "or set hardware.device to cpu"
                )
            device = torch.device("cuda", local)
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            _meet("nccl" if device.type == "cuda" else "gloo")
        return cls(dist.get_rank(), dist.get_world_size(), device)

    @property
    def first(self) -> bool:
        """Whether this process writes the checkpoints and prints the lines."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Each value summed over the processes: one small collective."""
        if self.world == 1:
            return list(values)
        return self.total(torch.tensor(values, dtype=torch.float64, device=self.device)).tolist()

    def total(self, values: Tensor) -> Tensor:
        """Values on the device summed over the processes, in place; nobody waits for the device."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def from_first(self, value: Any) -> Any:
        """The first process's value, in every process."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Every process's value, in the order of the ranks, in every process."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def together(self, function: Callable[[], T]) -> T:
        """What the function gives in this process; if it fails in any process, its error is raised in all, and none waits for another."""
        if self.world == 1:
            return function()
        result, error = None, None
        try:
            result = function()
        except Exception as caught:
            error = caught
        told = (
            error if error is None or isinstance(error, WejepaError) else RuntimeError(f"rank {self.rank}: {type(error).__name__}: {error}")
        )
        errors = self.gather(told)
        if error := error or next((e for e in errors if e is not None), None):
            raise error
        return result

    def once(self, function: Callable[[], T]) -> T:
        """What the function gives in the first process, in every process; the others do not call it. Its error is raised in all."""
        return self.from_first(self.together(function if self.first else lambda: None))

    def leave(self) -> None:
        """Part from the other processes, all of them at the same point.

        Left to the interpreter's end, the group's threads now and then outlive what they need, and a finished job ends with an abort.
        """
        if self.world > 1:
            dist.barrier()
            dist.destroy_process_group()

    def wrap(self, loss: IJepaLoss, sharded: bool) -> nn.Module:
        """The loss as a module whose backward pass averages the gradients over the processes."""
        if self.world == 1 or sharded:  # a sharded model does it by itself
            return loss
        ids = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(loss, device_ids=ids, gradient_as_bucket_view=True)


def _meet(backend: str) -> None:
    """Join the group, under names of its own for each start of the job.

    torchrun keeps one store over restarts: under the same names the processes would find the addresses of those that died, and wait.
    """
    store, rank, world = next(dist.rendezvous("env://"))
    start = store.add("wejepa/start", 0)
    dist.init_process_group(backend, store=dist.PrefixStore(f"wejepa/{start}", store), rank=rank, world_size=world)
    dist.barrier()  # all have read the number
    if rank == 0:
        store.add("wejepa/start", 1)


def shard(model: IJEPA_base, ranks: Ranks, dtype: torch.dtype = torch.float32) -> None:
    """Spread each block's weights over the processes, in place; they are gathered when the block computes, and let go of after it.

    Args:
        model: its weights stay float32 where they lie.
        ranks: the processes.
        dtype: with bfloat16, the matrices of transformer blocks are gathered in it: half as many bytes travel. They compute under autocast
            only, so that all between them stays float32, and their gradients are summed in float32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # It warns that nothing may be added in place to what a module returns; nothing is.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for part in (model.student_encoder, model.predictor, model.teacher_encoder):
        for block in part.blocks:
            if dtype == torch.bfloat16 and isinstance(block, Block):  # a norm's weights stay float32
                for matrices in (block.attn, block.mlp):
                    fully_shard(matrices, mesh=mesh, reshard_after_forward=True, mp_policy=half)
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
        # Also for the parts themselves: the teacher has no backward pass that would let go of a copy that its update makes stale.
        fully_shard(part, mesh=mesh, reshard_after_forward=True)


def is_spread(value: Tensor) -> bool:
    """Whether it is a DTensor, of which each process holds a part."""
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def gathered(value: Tensor) -> Tensor:
    """A tensor with its parts put together: a collective where it has any."""
    return value.full_tensor() if is_spread(value) else value


def own_part(value: Tensor) -> Tensor:
    """What this process holds of a tensor: all of it where it is not spread."""
    return value.to_local() if is_spread(value) else value


def spread_like(value: Tensor, like: Tensor) -> Tensor:
    """A tensor that is whole on every process, or spread as `like` is already: on the device of `like`, and spread as it is."""
    from torch.distributed.tensor import distribute_tensor

    if is_spread(value) or not is_spread(like):
        return value.to(like.device)
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
