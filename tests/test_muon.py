"""The optimizer beside AdamW."""

from pathlib import Path

import pytest
import torch
from ranks import STEPS, tiny_config
from test_own_parts import assert_same

from wejepa.config import IJepaConfig, adapt_config_for_backbone, default_config
from wejepa.errors import CheckpointError, ConfigError
from wejepa.model import IJEPA_base
from wejepa.train.loop import Pretraining, optimizer_of
from wejepa.train.muon import Muon, orthogonal
from wejepa.train.pretrain import launch_pretraining


@pytest.mark.parametrize("shape", [(3, 16, 40), (3, 40, 16), (2, 16, 16)])
def test_singular_values_become_about_one_and_their_vectors_stay(shape):
    small = min(shape[1:])
    u, _, v = torch.linalg.svd(torch.randn(shape, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    values = torch.logspace(0, -2, small)
    steps = orthogonal(7 * u * values @ v)
    found = u.mT @ steps @ v.mT
    assert found.diagonal(dim1=-2, dim2=-1).sub(1).abs().max() < 0.35
    assert (found - torch.diag_embed(found.diagonal(dim1=-2, dim2=-1))).abs().max() < 1e-3
    assert not orthogonal(torch.zeros(shape)).any()
    torch.testing.assert_close(orthogonal((7 * u * values @ v).double()), steps.double(), rtol=0, atol=1e-3)
    torch.testing.assert_close(steps, by_definition(7 * u * values @ v), rtol=0, atol=1e-3)


def by_definition(x: torch.Tensor) -> torch.Tensor:
    """Five rounds, each on the matrix itself."""
    x = x / x.norm(dim=(-2, -1), keepdim=True)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


def test_a_matrix_follows_its_momentum_and_all_else_adamw():
    draw = torch.Generator().manual_seed(0)
    matrix, other = (torch.nn.Parameter(torch.randn(4, 6, generator=draw)) for _ in range(2))
    groups = [{"params": [p], "lr": 0.1, "weight_decay": 0.5, "matrices": p is matrix} for p in (matrix, other)]
    optimizer = Muon(groups, betas=(0.9, 0.95))
    expected, momentum, beside = matrix.detach().clone(), torch.zeros(4, 6), torch.nn.Parameter(other.detach().clone())
    adamw = torch.optim.AdamW([beside], lr=0.1, weight_decay=0.5, betas=(0.9, 0.95))
    for _ in range(3):
        matrix.grad, other.grad = torch.randn(4, 6, generator=draw), torch.randn(4, 6, generator=draw)
        beside.grad = other.grad.clone()
        momentum = 0.95 * momentum + 0.05 * matrix.grad
        step = by_definition(0.95 * momentum + 0.05 * matrix.grad)  # Nesterov's
        expected = (1 - 0.1 * 0.5) * expected - 0.1 * 0.6 * 6**0.5 * step
        optimizer.step()
        adamw.step()
        torch.testing.assert_close(matrix.detach(), expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(other, beside)


def of_kind(kind: str, output: Path) -> IJepaConfig:
    cfg = tiny_config(output)
    cfg.optimizer.kind = kind
    return cfg


def test_only_the_blocks_matrices_move_otherwise_than_under_adamw(tmp_path):
    images = torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    weights, sizes = [], {}
    for kind in ("adamw", "muon"):
        cfg = of_kind(kind, tmp_path / kind)
        cfg.optimizer.weight_decay = cfg.optimizer.final_weight_decay = 0.0
        run = Pretraining(cfg)
        before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
        run.train_step(images)
        weights.append({name: p.detach().clone() for name, p in run.model.named_parameters()})
        sizes = {name: (p - before[name]).square().mean().sqrt() / run.schedule(0).learning_rate for name, p in weights[-1].items()}
    matrices = {name for name, p in weights[0].items() if ".blocks." in name and p.ndim == 2 and not name.startswith("teacher")}
    followed = {name.replace("student", "teacher") for name in matrices if name.startswith("student")}
    assert {name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])} == matrices | followed
    assert all(0.3 < sizes[name] < 0.8 for name in matrices)  # SIZE is 0.6


@pytest.mark.parametrize(("backbone", "names"), [("swin_t", {"qkv", "proj", "0", "3", "reduction"}), ("resnet18", set())])
def test_of_other_encoders_it_moves_the_matrices_of_blocks_alone(backbone, names):
    cfg = adapt_config_for_backbone(default_config(), backbone)
    cfg.optimizer.kind = "muon"
    model = IJEPA_base.without_weights(cfg)
    names_of = {p: name for name, p in model.named_parameters()}
    optimizer = optimizer_of(model, cfg)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == sum(p.requires_grad for p in model.parameters())
    moved = [names_of[p] for group in optimizer.param_groups if group["matrices"] for p in group["params"]]
    assert {name.split(".")[-2] for name in moved if name.startswith("student")} == names
    assert len([name for name in moved if name.startswith("predictor")]) == 4 * cfg.model.pred_depth


def test_a_run_under_it_resumes_to_the_bit_and_under_no_other(tmp_path):
    cfg = of_kind("muon", tmp_path / "run")
    cfg.hardware.checkpoint_every = 1
    whole = launch_pretraining(cfg)
    half = whole.checkpoint.with_name(f"step_{STEPS // 2:08d}.pt")
    cfg.hardware.output_dir = str(tmp_path / "resumed")
    assert_same(launch_pretraining(cfg, half).checkpoint, whole.checkpoint)
    with pytest.raises(CheckpointError, match="optimizer.kind"):
        Pretraining(of_kind("adamw", tmp_path / "other"), half)


def test_a_gradient_that_is_no_number_moves_nothing(tmp_path):
    run = Pretraining(of_kind("muon", tmp_path / "run"))
    run.train_step(torch.randn(8, 1, 16, 16))
    kept = [value.clone() for value in (*run.model.state_dict().values(), *(s["exp_avg"] for s in run.optimizer.state.values()))]
    for p in run.model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    run.optimizer.found_inf = torch.ones(())
    run.optimizer.step()
    now = (*run.model.state_dict().values(), *(s["exp_avg"] for s in run.optimizer.state.values()))
    assert all(torch.equal(one, other) for one, other in zip(kept, now, strict=True))
    assert {int(state["step"]) for state in run.optimizer.state.values()} == {1}


def test_weights_spread_over_processes_are_refused(tmp_path):
    cfg = of_kind("muon", tmp_path / "run")
    cfg.hardware.shard_model = True
    with pytest.raises(ConfigError, match="optimizer.kind = 'muon' needs whole matrices.*shard_model false"):
        cfg.validate()
    assert "Muon, 2 epochs" in of_kind("muon", tmp_path).summary()
