"""What holds for every test."""

import torch

torch.set_num_threads(1)  # the models are tiny, and test processes side by side would fight over the cores
