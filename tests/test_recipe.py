"""The trials of the default recipe: each is one step of training away from a number."""

import pytest
import torch

from benchmarks import recipe
from wejepa.data import load_images
from wejepa.masking import sample_block_masks
from wejepa.model import ijepa_loss


@pytest.mark.parametrize("name", recipe.TRIALS)
def test_a_trial_predicts_what_it_is_told_and_everything_in_it_learns(name):
    trial = recipe.TRIALS[name]
    cfg = trial.config()
    model = trial.model(cfg)
    images = next(iter(load_images(cfg, "test").batches(torch.arange(4), 4)))
    masks = sample_block_masks(4 * cfg.mask.num_contexts, cfg.grid_size, cfg.mask, torch.Generator().manual_seed(0))
    predictions, targets = model(images, masks)
    assert predictions.shape == targets.shape and not targets.requires_grad
    (trial.loss or ijepa_loss)(predictions, targets).backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not [name for name, p in model.teacher_encoder.named_parameters() if p.requires_grad]


def test_pixels_are_those_of_the_targets():
    trial = recipe.TRIALS["pixels beside"]
    cfg = trial.config()
    images = torch.randn(2, 3, 32, 32)
    masks = sample_block_masks(2, cfg.grid_size, cfg.mask, torch.Generator().manual_seed(0))
    _, targets = trial.model(cfg)(images, masks)
    place = int(masks.targets[1, 2, 0])
    patch = images[1, :, 4 * (place // 8) :, 4 * (place % 8) :][:, :4, :4].flatten()
    assert torch.corrcoef(torch.stack([targets[1, 2, 0, 64:], patch]))[0, 1] > 0.999
