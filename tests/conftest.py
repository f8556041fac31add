"""What holds for every test."""

import os

import torch

# The models are tiny, and test processes side by side would fight over the cores; `benchmarks.portable` asks for more threads.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
