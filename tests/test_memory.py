"""Memory that a step frees stays with the process while it trains, and goes back when it ends."""

import ctypes
import json
import subprocess
import sys

import pytest

from wejepa import memory
from wejepa.memory import freed_memory_kept

# Whether a large tensor is mapped from the system, by glibc's own count. Page faults would tell less: huge pages hide them.
MAPPED = """
import ctypes, json, psutil, torch
from wejepa.memory import freed_memory_kept
class Info(ctypes.Structure):  # its fourth number counts the mapped regions
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd a b c d e".split()]
libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Info
def mapped():
    before = libc.mallinfo2().hblks
    tensor = torch.ones(9_000_000)  # 36 MB, more than glibc ever keeps by itself
    return libc.mallinfo2().hblks - before
seen = [mapped()]
with freed_memory_kept():
    seen.append(mapped())
    with freed_memory_kept():
        pass
    seen.append(mapped())
    held = psutil.Process().memory_info().rss
seen.append(mapped())
given_back = held - psutil.Process().memory_info().rss
print(json.dumps({"mapped": seen, "given_back": given_back}))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="mallopt and mallinfo2 are glibc's")
def test_large_tensors_come_from_kept_memory_inside_alone():
    done = subprocess.run([sys.executable, "-c", MAPPED], check=True, capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert found["mapped"] == [1, 0, 0, 1]
    assert found["given_back"] > 30_000_000


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    with freed_memory_kept():
        assert memory._open == 0
