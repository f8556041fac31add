"""Memory that a step frees stays with the process while it trains, and goes back when it ends."""

import subprocess
import sys

import pytest

from wejepa.train import memory
from wejepa.train.memory import freed_memory_kept

FAULTS = """
import resource, torch
from wejepa.train.memory import freed_memory_kept
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(9_000_000)  # 36 MB, more than glibc ever keeps by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
outside = faults()
with freed_memory_kept():
    with freed_memory_kept():
        pass
    for _ in range(4):
        inside = faults()  # the first fill the memory that is kept
print(outside, inside, faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_pages_are_not_fetched_anew():
    printed = subprocess.run([sys.executable, "-c", FAULTS], check=True, capture_output=True, text=True).stdout
    outside, inside, afterwards = map(int, printed.split())
    assert 2 * inside < outside < 2 * afterwards


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    with freed_memory_kept():
        assert memory._open == 0
