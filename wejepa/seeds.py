"""Random numbers that are a function of whole numbers alone, so that a resumed run draws what an undisturbed one would."""

from __future__ import annotations

import numpy as np
import torch

__all__ = ["generator_for"]


def generator_for(*key: int) -> torch.Generator:
    """A random generator of its own for each tuple of whole numbers, such as (seed, epoch, step)."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))
