"""The objectives that notebook 09 sets beside I-JEPA, and the benchmark that trains them."""

import json
import math

import pytest
import torch
from torch.nn.functional import one_hot

from benchmarks import evidence
from benchmarks import objectives as benchmark
from wejepa.config import default_config
from wejepa.seeds import generator_for


@pytest.fixture(scope="module")
def names():
    return benchmark.definitions("fashion_mnist_mini")


def views(size: int = 48, width: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    a, noise = torch.randn(2, size, width, generator=generator_for(0))
    return a, a + 0.3 * noise


def test_losses_are_lightlys(names):
    loss = pytest.importorskip("lightly.loss")
    a, b = views()
    assert names["ntxent"](a, b, 0.2) == pytest.approx(float(loss.NTXentLoss(temperature=0.2)(a, b)), rel=1e-5)
    assert names["vicreg"](a, b) == pytest.approx(float(loss.VICRegLoss()(a, b)), rel=1e-5)


def test_losses_on_what_can_be_reckoned(names):
    perfect, same = torch.eye(16), torch.ones(16, 4)
    assert names["ntxent"](perfect, perfect, 0.05) < 1e-3 and names["ntxent"](same, same, 0.2) == pytest.approx(math.log(31), rel=1e-5)
    signs = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])  # unrelated features of deviation above 1
    assert names["vicreg"](signs, signs) == pytest.approx(0, abs=1e-6)
    assert names["vicreg"](signs[:, :1].repeat(1, 2), signs[:, :1].repeat(1, 2)) == pytest.approx(2 * (4 / 3) ** 2, rel=1e-5)
    wide = torch.randn(4000, 8, generator=generator_for(1))
    assert names["sigreg"](wide, generator_for(2)) < 3 < 100 < names["sigreg"](3 * wide, generator_for(2))


def test_every_objective_trains_its_encoder_and_nothing_moves_a_teacher_but_its_average(names):
    """On the shapes of a batch; two objectives of one seed begin with the same encoder."""
    first = None
    for name, kind in names["objectives"].items():
        torch.manual_seed(0)
        objective = kind(default_config(), 10)
        weights = objective.encoder.patch_embed.proj.weight
        first = weights.detach().clone() if first is None else first
        assert torch.equal(weights, first), name
        x = torch.randn(6 * kind.views, 3, 32, 32, generator=generator_for(0))
        loss = objective(x, torch.arange(6).repeat_interleave(kind.views), generator_for(1))
        loss.backward()
        assert loss.shape == () and loss.isfinite(), name
        silent = [n for n, p in objective.encoder.named_parameters() if p.grad is None or not p.grad.abs().sum()]
        assert not silent, f"{name}: no gradient reaches {silent}"
        if hasattr(objective, "teacher"):
            teacher = objective.teacher.patch_embed.proj.weight
            assert teacher.grad is None and torch.equal(teacher, first)
            with torch.no_grad():
                weights.add_(1)
            objective.follow(0.75)
            assert torch.allclose(teacher, first + 0.25)


def test_the_same_seconds(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "CALIBRATION", tmp_path / "calibration.json")
    benchmark.CALIBRATION.write_text(json.dumps({"milliseconds": {"emoji": {"I-JEPA": 40.0, "SimCLR": 50.0}}}))
    assert benchmark.steps_of("emoji", "I-JEPA") == benchmark.BUDGET and benchmark.steps_of("emoji", "SimCLR") == benchmark.BUDGET * 4 / 5


def test_rates_are_chosen_without_test_images():
    judge, whole = benchmark.judge_of_trials("fashion_mnist_mini"), benchmark.judge_of("fashion_mnist_mini")
    assert (len(judge.train), len(judge.test)) == (8000, 2000)
    kept, held = (set(map(bytes, images.numpy().reshape(len(images), -1))) for images in (judge.train.images, judge.test.images))
    assert kept | held == set(map(bytes, whole.train.images.numpy().reshape(len(whole.train), -1)))


def test_features_are_of_the_images_that_a_draw_labels(monkeypatch):
    monkeypatch.setattr(benchmark, "DRAWS", {5: 2, 20: 1})
    told = []

    def classes(judge, seed):
        told.append((seed, len(judge.index)))
        return {"grid": (one_hot(judge.train.labels[judge.index]).float(), one_hot(judge.test_y).float())}

    right = benchmark.judged(classes, "fashion_mnist_mini", 3)
    assert right.keys() == {"5/0", "5/1", "20/0"} and told[1] == (3, 200)
    for cell in right.values():
        assert all(evidence.unpacked(text, 2000).all() for text in cell.values()) and cell.keys() == {"grid", "knn"}


@pytest.mark.parametrize("sample", [benchmark.random_patches, benchmark.published_masks()])
def test_other_masks_have_the_shape_of_ours(sample):
    cfg = default_config()
    masks = sample(64, cfg.grid_size, cfg.mask, generator_for(0))
    assert masks.context.shape[0] == masks.targets.shape[0] == 64 and masks.targets.dim() == 3
    assert min(masks.context.min(), masks.targets.min()) >= 0 and max(masks.context.max(), masks.targets.max()) < 64
    if sample is benchmark.random_patches:
        assert masks.context.shape[1] == 21 and masks.targets.shape[1:] == (1, 38)
        assert not any(torch.isin(c, t).any() for c, t in zip(*masks, strict=True))


def test_ablations_change_one_thing_and_can_be_trained(names):
    for variant, (changed, change_masks) in benchmark.ABLATIONS.items():
        cfg = default_config()
        before = cfg.to_dict()
        change_masks(cfg.mask)
        assert bool(changed) != (cfg.to_dict() != before), variant
        kind = type("Changed", (names["objectives"]["I-JEPA"],), {name: make() for name, make in changed.items()})
        loss = kind(cfg, 10)(torch.randn(4, 3, 32, 32, generator=generator_for(0)), None, generator_for(1))
        assert loss.isfinite(), variant


def test_the_queue_is_useful_wherever_it_is_cut():
    runs = list(benchmark.queue((0, 1, 2, 3, 4)))
    files = [path for _, path, _ in runs]
    assert len(set(files)) == len(files)
    done: set[str] = set()
    for part, path, _ in runs:
        if part == "main":
            objective = path.stem.removeprefix("main-").rsplit("-", 1)[0].split("-", 1)[1]
            assert {benchmark.trial_file(objective, rate).name for rate in benchmark.RATES} <= done
        done.add(path.name)
    order = [part for part, _, _ in runs]
    assert order.index("main") < order.index("references") < order.index("ablations") < len(order) - 1 - order[::-1].index("main")
