"""One run on several processes, as torchrun, srun or another launcher starts them.

Every process holds the model and computes the loss of its share of each batch; gradients are averaged in the backward pass, so all
processes make the same update. Or, with `hardware.shard_model`, each holds a share of every weight as well (FSDP2).
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import socket
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from wejepa.errors import ConfigError, TrainingError, WejepaError
from wejepa.model import Block, IJEPA_base, IJepaLoss
from wejepa.train.launchers import Launch, launched

__all__ = ["Ranks", "gathered", "is_spread", "own_part", "shard", "spread_like"]

T = TypeVar("T")
TO_MEET = datetime.timedelta(minutes=10)
AS_LONG_AS_IT_TAKES = datetime.timedelta(days=1)  # a download, or the listing of a large folder; a process that dies is noticed at once


@dataclass(frozen=True)
class Ranks:
    """This process among those of its run.

    Attributes:
        rank: its number, from 0.
        world: how many there are.
        device: what it computes on.
        node: the processes on its machine, the first of them first.
        job: a name of the whole job, the same after a restart by torchrun; None for a single process.
        restarted: processes of the same job have been here before: torchrun has started it anew.
    """

    rank: int
    world: int
    device: torch.device
    node: tuple[int, ...] = (0,)
    job: str | None = None
    restarted: bool = False
    _waiting: Any = None  # groups that wait as long as it takes: for all processes, and for those of this machine
    _waiting_on_node: Any = None

    @classmethod
    def join(cls, device: torch.device) -> Ranks:
        """Meet the other processes of this run, if it was started with any, else be alone; see `wejepa.train.launchers`.

        Args:
            device: of the kind to compute on; on "cuda" each process takes the GPU of its local rank.

        Raises:
            ConfigError: variables that do not fit together, processes that do not meet, or more of them on a machine than GPUs.
        """
        launch, job, restarted = launched(), None, False
        if launch is None and not dist.is_initialized():
            return cls(0, 1, device)
        local = launch.local_rank if launch else None
        if device.type == "cuda" and local is not None:
            device = _gpu(local)  # refused before anyone waits
        if dist.is_initialized():  # by our caller, who has chosen the GPU as well
            device = torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device
            hosts = [None] * dist.get_world_size()
            dist.all_gather_object(hosts, socket.gethostname())
        else:
            store, job, start, restarted = _meet(launch)
            hosts = _hosts(launch, store)
            if device.type == "cuda" and local is None:
                device = _gpu(hosts[: launch.rank].count(hosts[launch.rank]))
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.world)
            start()
        rank, world = dist.get_rank(), dist.get_world_size()
        everyone = dist.new_group(backend="gloo", timeout=AS_LONG_AS_IT_TAKES)
        nodes = {host: [r for r in range(world) if hosts[r] == host] for host in hosts}
        groups = {host: dist.new_group(of, backend="gloo", timeout=AS_LONG_AS_IT_TAKES) for host, of in nodes.items()}
        mine = hosts[rank]
        return cls(rank, world, device, tuple(nodes[mine]), job, restarted, everyone, groups[mine])

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

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Give every process the first one's values, in place; the tensors are on the device."""
        if self.world > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

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
        dist.all_gather_object(values, value, group=self._waiting)
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

    def once_per_node(self, function: Callable[[], T]) -> T:
        """What the function gives in the first process of each machine, in all of that machine; an error of any is raised in all."""
        result = self.together(function if self.rank == self.node[0] else lambda: None)
        if len(self.node) == 1:
            return result
        box = [result]
        dist.broadcast_object_list(box, src=self.node[0], group=self._waiting_on_node)
        return box[0]

    @contextlib.contextmanager
    def naming_lost_ones(self) -> Iterator[None]:
        """Make the error about a process that can no longer be reached a `TrainingError`."""
        try:
            yield
        except RuntimeError as error:
            if self.world == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
                raise
            raise TrainingError(
                f"another process of the run has ended, or cannot be reached ({str(error).splitlines()[0]}): its own last lines say why; "
                f"start all again with --resume auto"
            ) from error

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


def _meet(launch: Launch) -> tuple[dist.Store, str, Callable[[], None], bool]:
    """Meet in a store: under names of its own for each start of the job, which has one name for all its starts.

    torchrun keeps one store over restarts: under the same names the processes would find the addresses of those that died, and wait.

    Returns:
        The store; the job's name; what to call when the group is there; and whether other processes have met there before these.
    """
    global _meetings
    store = next(dist.rendezvous("env://"))[0] if launch.torchrun else _store_at(launch)
    job = store.compare_set("wejepa/job", "", uuid.uuid4().hex).decode()
    start = store.add("wejepa/start", 0)
    restarted = start > _meetings
    _meetings += 1

    def met() -> None:
        dist.barrier()  # all have read the number
        if launch.rank == 0:
            store.add("wejepa/start", 1)

    return dist.PrefixStore(f"wejepa/{start}", store), job, met, restarted


_meetings = 0  # of this process


@functools.cache  # one for the life of the process, as torchrun keeps one: a second run of the same processes meets there too
def _store_at(launch: Launch) -> dist.Store:
    """The meeting place that the variables name, on the machine of the first process, once all are there."""
    if launch.rank == 0:
        print(f"waiting for {launch.world} processes at {launch.address}:{launch.port}", flush=True)
    try:
        return dist.TCPStore(launch.address, launch.port, launch.world, launch.rank == 0, timeout=TO_MEET, wait_for_workers=True)
    except RuntimeError as error:  # of the store's own kinds, which are RuntimeErrors
        raise ConfigError(
            f"{launch.world} processes do not meet at {launch.address}, port {launch.port} ({str(error).splitlines()[0]}): start them all, "
            f"each with a RANK of its own; MASTER_ADDR must be the machine of rank 0, and MASTER_PORT free there"
        ) from error


def _hosts(launch: Launch, store: dist.Store) -> list[str]:
    """The name of each process's machine."""
    if store.add(f"rank {launch.rank}", 1) > 1:
        raise ConfigError(f"RANK = {launch.rank} was given to two processes of {launch.world}: give each a RANK of its own")
    store.set(f"host {launch.rank}", socket.gethostname())
    return [host.decode() for host in store.multi_get([f"host {rank}" for rank in range(launch.world)])]


def _gpu(local_rank: int) -> torch.device:
    """The GPU of a process, for everything it does from now on."""
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"this machine has {torch.cuda.device_count()} GPUs for more processes than that (--nproc-per-node, --ntasks-per-node): "
            f"start fewer, or set hardware.device to cpu"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


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
        for block in getattr(part, "blocks", ()):  # a predictor of the caller's own may have none
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
