"""The teacher is exactly m * teacher + (1 - m) * student, over everything it consists of."""

import copy

import pytest
import torch
from torch import nn

from wejepa.config import DataConfig, IJepaConfig, ModelConfig
from wejepa.ema import update_teacher
from wejepa.model import IJEPA_base


def tiny_config() -> IJepaConfig:
    return IJepaConfig(
        data=DataConfig(use_fake_data=True),
        model=ModelConfig(img_size=16, patch_size=4, in_chans=3, embed_dim=16, enc_depth=2, pred_depth=1, pred_dim=12, num_heads=2),
    )


@pytest.fixture
def model() -> IJEPA_base:
    """A model whose student and teacher differ in every single parameter."""
    torch.manual_seed(0)
    model = IJEPA_base(tiny_config())
    with torch.no_grad():
        for p in [*model.student_encoder.parameters(), *model.teacher_encoder.parameters()]:
            p.add_(torch.randn_like(p))
    return model


@pytest.mark.parametrize("momentum", [0.0, 0.25, 0.9, 0.996, 1.0])
def test_the_update_is_the_formula_over_all_parameters(model, momentum):
    student = {name: p.detach().clone() for name, p in model.student_encoder.named_parameters()}
    before = {name: p.detach().clone() for name, p in model.teacher_encoder.named_parameters()}
    assert before.keys() == student.keys() and len(before) > 20
    assert any("patch_embed" in name for name in before) and any("pos_embed" in name for name in before)
    model.momentum_update(momentum)
    for name, p in model.teacher_encoder.named_parameters():
        expected = (momentum * before[name].double() + (1 - momentum) * student[name].double()).float()
        torch.testing.assert_close(p.detach(), expected, rtol=2e-7, atol=5e-7, msg=name)
    for name, p in model.student_encoder.named_parameters():
        assert torch.equal(p, student[name])


@pytest.mark.parametrize(("momentum", "source"), [(1.0, "teacher_encoder"), (0.0, "student_encoder")])
def test_the_ends_are_exact(model, momentum, source):
    expected = copy.deepcopy(getattr(model, source).state_dict())
    model.momentum_update(momentum)
    for name, value in model.teacher_encoder.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_the_update_moves_in_place_and_leaves_no_graph(model):
    places = [p.data_ptr() for p in model.teacher_encoder.parameters()]
    model.momentum_update(0.5)
    assert [p.data_ptr() for p in model.teacher_encoder.parameters()] == places
    assert all(p.grad_fn is None and not p.requires_grad for p in model.teacher_encoder.parameters())


@pytest.mark.parametrize("momentum", [-0.1, 1.1, float("nan")])
def test_a_momentum_out_of_range_is_refused(model, momentum):
    before = copy.deepcopy(model.teacher_encoder.state_dict())
    with pytest.raises(ValueError, match=f"momentum = {momentum}"):
        model.momentum_update(momentum)
    assert all(torch.equal(v, before[k]) for k, v in model.teacher_encoder.state_dict().items())


def test_batch_statistics_stay_the_teachers():
    student, teacher = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    student(torch.randn(8, 4) + 3)
    teacher(torch.randn(8, 4) - 3)
    before = copy.deepcopy(teacher.state_dict())
    update_teacher(teacher, student, 0.0)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(teacher.state_dict()[name], before[name]), name
    assert (teacher.running_mean < 0).all()
