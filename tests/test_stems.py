"""The benchmarks' convolutional patch embedding: what is hidden stays hidden."""

import torch

from benchmarks.stems import WithStem, two_convolutions
from wejepa.config import default_config
from wejepa.masking import sample_block_masks


def test_the_kept_tokens_do_not_depend_on_hidden_pixels():
    torch.manual_seed(0)
    embed, keep = two_convolutions(3, 32), torch.tensor([[0, 9, 10, 63], [1, 2, 30, 40]])
    images = torch.randn(2, 3, 32, 32, requires_grad=True)
    whole, kept = embed(images), embed(images, keep)
    assert whole.shape == (2, 64, 32) and kept.shape == (2, 4, 32)
    kept.pow(2).sum().backward()
    touched = images.grad.abs().sum(1).view(2, 8, 4, 8, 4).sum((2, 4)).flatten(1)  # by patch
    assert [set(row.nonzero().flatten().tolist()) for row in touched] == [set(row.tolist()) for row in keep]
    everything = torch.arange(64).expand(2, 64)
    assert torch.allclose(embed(images, everything), whole, atol=1e-6)


def test_student_and_teacher_have_a_stem_each():
    cfg = default_config()
    cfg.model.embed_dim, cfg.model.pred_dim = 32, 32
    model = WithStem(cfg)
    masks = sample_block_masks(2, cfg.grid_size, cfg.mask, torch.Generator().manual_seed(0))
    predictions, targets = model(torch.randn(2, 3, 32, 32), masks)
    assert predictions.shape == targets.shape
    predictions.sum().backward()
    student, teacher = model.student_encoder.patch_embed, model.teacher_encoder.patch_embed
    assert all(p.grad is not None for p in student.parameters()) and not any(p.requires_grad for p in teacher.parameters())
    with torch.no_grad():
        student.layers[0].weight.add_(1.0)
    before = teacher.layers[0].weight.clone()
    model.momentum_update(0.5)
    assert torch.allclose(teacher.layers[0].weight, (before + student.layers[0].weight) / 2)
