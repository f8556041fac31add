"""Several contexts of a crop and several crops of an image: what each gives alone, and one look of the teacher for all of a crop."""

import pytest
import torch
from ranks import tiny_config

from wejepa.config import IJepaConfig
from wejepa.data import load_images, training_batches
from wejepa.masking import Masks, sample_block_masks
from wejepa.model import IJEPA_base, ijepa_loss
from wejepa.seeds import generator_for
from wejepa.train.checkpoints import load_checkpoint
from wejepa.train.loop import Pretraining
from wejepa.train.pretrain import launch_pretraining


@pytest.fixture
def cfg(tmp_path) -> IJepaConfig:
    return tiny_config(tmp_path / "run")


def test_contexts_of_a_crop_are_predicted_as_each_alone_and_the_teacher_looks_once(cfg):
    model, images = IJEPA_base(cfg), torch.randn(4, 1, 16, 16)
    masks = sample_block_masks(12, cfg.grid_size, cfg.mask, generator_for(1))
    looks = []
    model.teacher_encoder.register_forward_hook(lambda _, inputs, output: looks.append(len(output)))
    predictions, targets = model(images, masks)
    assert looks == [4] and predictions.shape == targets.shape == (12, *masks.targets.shape[1:], 16)
    for k in range(3):
        alone = model(images, Masks(masks.context[k::3], masks.targets[k::3]))
        torch.testing.assert_close((predictions[k::3], targets[k::3]), alone)
    assert len({tuple(row) for row in masks.context.tolist()}) == 12  # each context is another one


def test_crops_of_an_image_follow_one_another_and_differ(cfg):
    cfg.data.fake_data_size = 20
    single = list(training_batches(load_images(cfg), cfg, 0))
    cfg.data.num_crops, cfg.data.crop_scale = 3, (0.2, 0.3)
    source = load_images(cfg)
    source.images = torch.arange(20, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 16, 16) * 10  # each image of its own grey
    batches = list(training_batches(source, cfg, 0))
    assert len(batches) == len(single) == 2 and batches[0].shape == (24, 1, 16, 16)
    grey = batches[0].mean((1, 2, 3)).view(8, 3)
    assert (grey.std(1) < 1e-5).all() and len(grey[:, 0].unique()) == 8
    cfg.data.num_crops = 2
    batch = next(training_batches(load_images(cfg), cfg, 0))
    assert not torch.equal(batch[0::2], batch[1::2])
    halves = [next(training_batches(load_images(cfg), cfg, 0, part=(rank, 2))) for rank in range(2)]
    assert torch.equal(torch.cat(halves), batch)
    rest = list(training_batches(load_images(cfg), cfg, 0, first_step=1))
    assert torch.equal(rest[0], list(training_batches(load_images(cfg), cfg, 0))[1])


def test_a_step_is_the_mean_over_all_contexts_also_in_parts(cfg):
    cfg.data.num_crops, cfg.mask.num_contexts = 2, 3
    losses = []
    for parts in (1, 4):
        cfg.optimizer.accumulation_steps = parts
        run = Pretraining(cfg)
        images = next(training_batches(run.source, cfg, 0))
        masks = sample_block_masks(48, cfg.grid_size, cfg.mask, generator_for(cfg.hardware.seed, 0, 1))
        expected = float(ijepa_loss(*run.model(images, masks)).detach())
        losses.append(float(run.train_step(images)))
        assert losses[-1] == pytest.approx(expected, rel=1e-5)


def test_a_run_with_several_contexts_and_crops_resumes_to_the_bit(cfg, tmp_path):
    cfg.data.num_crops, cfg.mask.num_contexts, cfg.hardware.checkpoint_every = 2, 2, 1
    whole = launch_pretraining(cfg)
    cfg.hardware.output_dir = str(tmp_path / "resumed")
    resumed = launch_pretraining(cfg, whole.checkpoint.with_name("step_00000010.pt"))
    one, other = (load_checkpoint(result.checkpoint)["model"] for result in (whole, resumed))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert "2 crops of each image" in cfg.summary() and "; 2 times" in cfg.summary()
