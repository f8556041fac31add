"""The batches of an epoch, each a function of seed, epoch and step."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

from wejepa.config import IJepaConfig
from wejepa.data.crops import random_crops
from wejepa.data.sources import Source
from wejepa.errors import DataError
from wejepa.seeds import generator_for

__all__ = ["Ahead", "steps_per_epoch", "training_batches"]


class Ahead:
    """Batches, the next of which are fetched before they are needed: a fault is known while there is still a step to be made without them.

    Args:
        batches: where they come from.
        count: how many to hold ready; more by one than the steps that are under way when what the processes tell each other is read.

    Attributes:
        fault: the error that keeps this process from the batch after those that are ready, or None.
    """

    def __init__(self, batches: Iterator[Tensor], count: int = 1):
        self.batches, self.count, self.fault = batches, count, None
        self._ready: deque[Tensor] = deque()

    def fetch(self) -> Exception | None:
        """Hold as many ready as there are to be, and return the fault."""
        while self.fault is None and len(self._ready) < self.count:
            try:
                self._ready.append(next(self.batches))
            except StopIteration:
                break
            except Exception as error:  # kept until all processes of the run can act on it
                self.fault = error
        return self.fault

    def __iter__(self) -> Iterator[Tensor]:
        self.fetch()
        while self._ready:
            yield self._ready.popleft()
            self.fetch()
        if self.fault is not None:
            raise self.fault


def training_batches(
    source: Source,
    cfg: IJepaConfig,
    epoch: int,
    first_step: int = 0,
    part: tuple[int, int] = (0, 1),
    device: torch.device | str = "cpu",
) -> Iterator[Tensor]:
    """The augmented batches (B, C, S, S) of one epoch, each image once; a short last batch is left out.

    With `data.num_crops`, B is that many times `data.train_batch_size`: the crops of an image follow one another.

    Args:
        source: the images.
        cfg: its `data` section gives the size of a batch and the crops, its `hardware` section the seed.
        epoch: which order and crops, from 0.
        first_step: step of the epoch to begin with.
        part: (rank, ranks) gives the rank-th of so many equal parts of every batch, (B / ranks, C, S, S); side by side they are the whole
            batch, however many they are. The number of ranks must divide `data.train_batch_size`.

    Raises:
        DataError: the set has fewer images than a batch, or too many of its files cannot be read.
    """
    steps, size, seed = steps_per_epoch(source, cfg), cfg.data.train_batch_size, cfg.hardware.seed
    order = torch.randperm(len(source), generator=generator_for(seed, epoch))
    index = order[: steps * size].view(steps, size)[first_step:].repeat_interleave(cfg.data.num_crops, dim=1)
    size *= cfg.data.num_crops
    crops = [random_crops(size, cfg, generator_for(seed, epoch, step)) for step in range(first_step, steps)]
    rank, ranks = part
    mine = slice(rank * size // ranks, (rank + 1) * size // ranks)
    if crops:
        yield from source.augmented(index[:, mine], torch.stack(crops)[:, mine], device)


def steps_per_epoch(source: Source, cfg: IJepaConfig) -> int:
    """Whole batches in the set."""
    if len(source) < cfg.data.train_batch_size:
        raise DataError(f"data.train_batch_size = {cfg.data.train_batch_size} is more than the set's {len(source)} images: make it smaller")
    return len(source) // cfg.data.train_batch_size
