"""What holds for every test."""

import os
import shutil

import pytest
import torch

from wejepa.data import embedded

# The models are tiny, and test processes side by side would fight over the cores; `benchmarks.portable` asks for more threads.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


@pytest.fixture
def assets(tmp_path, monkeypatch):
    """A copy of the files that ship, to do harm to."""
    folder = tmp_path / "assets"
    shutil.copytree(embedded.ASSETS, folder)
    monkeypatch.setattr(embedded, "ASSETS", folder)
    return folder
