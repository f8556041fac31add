"""The judge is judged: it finds what is there, finds nothing in noise, and never looks at the test labels while choosing."""

import copy
import math

import numpy as np
import pytest
import torch
from PIL import Image

from wejepa.analysis.features import extract_backbone_features
from wejepa.config import DataConfig, HardwareConfig, IJepaConfig, MaskConfig, ModelConfig
from wejepa.data import MemoryImages, load_images, read_image, sources
from wejepa.errors import CheckpointError, ConfigError, DataError
from wejepa.model import IJEPA_base
from wejepa.train import finetune
from wejepa.train.checkpoints import save_checkpoint
from wejepa.train.classifier import Classifier
from wejepa.train.finetune import Comparison, FinetuneConfig, Judge, compare_pretrained_vs_scratch, fit_probe, train_linear_probe

CLASSES = 5


def tiny_config(**data) -> IJepaConfig:
    return IJepaConfig(
        data=DataConfig(**{"use_fake_data": True, "fake_data_size": 60, "train_batch_size": 10} | data),
        mask=MaskConfig(target_scale=(0.1, 0.2), context_share=0.3),
        model=ModelConfig(img_size=16, patch_size=4, in_chans=1, embed_dim=16, enc_depth=2, pred_depth=1, pred_dim=12, num_heads=2),
        hardware=HardwareConfig(device="cpu", mixed_precision=False),
    )


def protocol(**changes) -> FinetuneConfig:
    return FinetuneConfig(**{"pooling": "mean", "labels_per_class": 0, "supervised_epochs": 1} | changes)


@pytest.fixture
def model() -> IJEPA_base:
    torch.manual_seed(0)
    return IJEPA_base(tiny_config()).eval()


def features(n: int, seed: int, spread: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors around five centres, of very different scale in each coordinate, and their classes."""
    centres = torch.randn(CLASSES, 24, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, CLASSES, (n,), generator=generator)
    x = centres[y] + spread * torch.randn(n, 24, generator=generator)
    return 10 ** torch.linspace(-3, 3, 24) * x + 7, y


# ---------------------------------------------------------------- the probe on given features


def test_the_probe_finds_what_is_there():
    result = fit_probe(*features(500, 0), *features(300, 1), protocol())
    assert result.accuracy > 0.99
    assert result.predictions.shape == (300,) and result.predictions.dtype == torch.int64


def test_the_probe_finds_nothing_in_labels_without_meaning():
    (x, _), (test_x, _) = features(500, 0), features(1000, 1)
    generator = torch.Generator().manual_seed(5)
    y, test_y = (torch.randint(0, CLASSES, (n,), generator=generator) for n in (500, 1000))
    assert abs(fit_probe(x, y, test_x, test_y, protocol()).accuracy - 1 / CLASSES) < 0.06


def test_the_accuracy_is_the_share_of_right_predictions():
    train, (test_x, test_y) = features(200, 0, spread=1.5), features(300, 1, spread=1.5)
    result = fit_probe(*train, test_x, test_y, protocol())
    assert result.accuracy == pytest.approx(float((result.predictions == test_y).float().mean()))
    assert 0.3 < result.accuracy < 1


def test_choosing_never_looks_at_the_test_labels():
    (x, y), (test_x, test_y) = features(200, 0, spread=3.0), features(200, 1, spread=3.0)
    honest = fit_probe(x, y, test_x, test_y, protocol())
    for seed in range(5):
        other_y = test_y[torch.randperm(200, generator=torch.Generator().manual_seed(seed))]
        other = fit_probe(x, y, test_x, other_y, protocol())
        assert other.penalty == honest.penalty
        assert torch.equal(other.predictions, honest.predictions)
    swapped = fit_probe(x, y, test_x, (test_y + 1) % CLASSES, protocol())
    assert torch.equal(swapped.predictions, honest.predictions) and swapped.accuracy != honest.accuracy


def test_choosing_never_looks_at_the_test_images():
    """Each test vector is classified on its own: others beside it, however far off, change neither the choice nor its class."""
    (x, y), (test_x, test_y) = features(200, 0, spread=3.0), features(200, 1, spread=3.0)
    alone = fit_probe(x, y, test_x, test_y, protocol())
    beside = fit_probe(x, y, torch.cat([test_x, 50 * test_x + 1e4]), test_y.repeat(2), protocol())
    assert beside.penalty == alone.penalty
    assert torch.equal(beside.predictions[:200], alone.predictions)


def test_the_penalty_is_chosen_on_images_that_were_held_out(monkeypatch):
    """None of the images that a penalty is judged on has trained it, and the regression that counts is trained on all of them."""
    asked, fit = [], finetune._softmax_regression
    monkeypatch.setattr(finetune, "_softmax_regression", lambda *args: asked.append(args) or fit(*args))
    (x, y), (test_x, test_y) = features(200, 0, spread=3.0), features(50, 1)
    result = fit_probe(x, y, test_x, test_y, protocol())
    *tried, (last_x, last_y, _, penalty, *_) = asked
    turned = finetune._along_axes(x, test_x)[0]
    assert torch.equal(last_x, turned) and torch.equal(last_y, y) and penalty == result.penalty
    places = [(turned == row).all(1).nonzero().item() for row in tried[0][0]]
    assert len(set(places)) == 160 and torch.equal(tried[0][1], y[places])
    assert all(args[0] is tried[0][0] for args in tried) and tuple(args[3] for args in tried) == finetune.PENALTIES
    held = torch.tensor(sorted(set(range(200)) - set(places)))
    rights = []
    for args in tried:
        weights, biases = fit(*args)
        rights.append(float(((turned[held] @ weights.T + biases).argmax(1) == y[held]).float().mean()))
    assert penalty == finetune.PENALTIES[rights.index(max(rights))]


def test_the_choice_depends_on_the_training_features():
    results = [fit_probe(*features(200, s, spread), *features(50, 9), protocol()) for s, spread in enumerate((0.1, 2.0, 4.0, 8.0))]
    assert len({r.penalty for r in results}) > 1


def test_the_probe_repeats_and_follows_its_seed():
    data = (*features(200, 0, spread=3.0), *features(400, 1, spread=3.0))
    one, again, *others = (fit_probe(*data, protocol(seed=seed)) for seed in (0, 0, 1, 2, 3, 4, 5))
    assert one.penalty == again.penalty and torch.equal(one.predictions, again.predictions)
    assert len({result.penalty for result in (one, *others)}) > 1, "another fifth chooses another penalty"


def drowned(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What tells the classes apart is a thousandth of what all coordinates share, as in the averaged tokens of a random encoder."""
    x, y = features(n, seed)
    shared = torch.randn(n, 1, generator=torch.Generator().manual_seed(seed + 1000))
    return shared + 1e-3 * (x - 7) / 10 ** torch.linspace(-3, 3, 24), y


def test_fewer_images_than_features_are_the_same_question(monkeypatch):
    """Along their own few axes the images give the regression that they give along all."""
    x, test_x = torch.randn(2, 30, 80, generator=torch.Generator().manual_seed(0))
    y = torch.arange(30) % CLASSES
    few, test_few, variances = finetune._along_axes(x, test_x)
    assert few.shape == test_few.shape == (30, 30) and variances.shape == (30,)
    turn = torch.linalg.qr(torch.randn(80, 80, generator=torch.Generator().manual_seed(1)))[0]
    scaled = ((v - x.mean(0)) / x.std(0) / 80**0.5 for v in (x, test_x))
    plain, test_plain = (v @ turn for v in scaled)
    monkeypatch.setattr(finetune, "STEPS", 500)
    predicted = []
    for train, test, spread in ((few, test_few, variances), (plain, test_plain, torch.ones(80))):
        weights, biases = finetune._softmax_regression(train, y, spread, 1e-3, torch.zeros(CLASSES, train.shape[1]), torch.zeros(CLASSES))
        predicted.append((test @ weights.T + biases).softmax(1))
    assert predicted[0].numpy() == pytest.approx(predicted[1].numpy(), abs=2e-3)


@pytest.mark.parametrize("penalty", [1e-2, 1e-5, 1e-8])
def test_the_regression_is_at_its_minimum(penalty, monkeypatch):
    """The same probabilities as scikit-learn's, which leaves the biases free too."""
    regression = pytest.importorskip("sklearn.linear_model").LogisticRegression
    (x, y), (test_x, _) = features(400, 0, spread=3.0), features(100, 1, spread=3.0)
    kept = (y > 0) | (torch.arange(400) % 4 == 0)  # one class is rare, so the biases matter
    x, y = x[kept], y[kept]
    train, test, variances = finetune._along_axes(x, test_x)
    monkeypatch.setattr(finetune, "STEPS", 300)
    weights, biases = finetune._softmax_regression(train, y, variances, penalty, torch.zeros(CLASSES, 24), torch.zeros(CLASSES))
    expected = regression(C=1 / penalty / len(x), tol=1e-7, max_iter=20_000).fit(train.double(), y).predict_proba(test.double())
    assert (test @ weights.T + biases).softmax(1).numpy() == pytest.approx(expected, abs=2e-3)


def test_the_probe_finds_what_is_drowned_in_what_all_coordinates_share():
    (x, y), (test_x, test_y) = drowned(500, 0), drowned(300, 1)
    assert fit_probe(x, y, test_x, test_y, protocol()).accuracy > 0.99
    assert fit_probe(-x, y, -test_x, test_y, protocol()).accuracy > 0.99


def test_the_probe_takes_features_of_constant_coordinates_and_any_scale():
    (x, y), (test_x, test_y) = features(300, 0), features(200, 1)
    dead, test_dead = (torch.cat([v, torch.full((len(v), 3), 4.0)], dim=1) for v in (x, test_x))
    assert fit_probe(1e-3 * dead, y, 1e-3 * test_dead, test_y, protocol()).accuracy > 0.98


# ---------------------------------------------------------------- the probe on an encoder


@pytest.mark.parametrize("encoder", ["teacher", "student"])
@pytest.mark.parametrize("pooling", ["mean", "grid"])
def test_the_probe_of_an_encoder_is_the_probe_of_its_features(model, encoder, pooling):
    with torch.no_grad():
        model.teacher_encoder.patch_embed.proj.weight.mul_(-1)  # so that it matters which encoder is asked
    cfg = protocol(encoder=encoder, pooling=pooling)
    result = train_linear_probe(cfg, model)
    sources = [load_images(model.cfg, split) for split in ("train", "test")]
    (x, test_x) = (extract_backbone_features(model, source, encoder=encoder, pooling=pooling) for source in sources)
    expected = fit_probe(x, sources[0].labels, test_x, sources[1].labels, cfg)
    assert torch.equal(result.predictions, expected.predictions) and result.accuracy == expected.accuracy


def test_probing_leaves_the_encoder_as_it_was(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train_linear_probe(protocol(), model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_the_probe_of_a_checkpoint(model, tmp_path):
    save_checkpoint(tmp_path / "x.pt", {"config": model.cfg.to_dict(), "model": model.state_dict()})
    one, other = train_linear_probe(protocol(checkpoint=str(tmp_path / "x.pt"))), train_linear_probe(protocol(), model)
    assert torch.equal(one.predictions, other.predictions)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        train_linear_probe(protocol(checkpoint=str(tmp_path / "none.pt")))


def test_labels_per_class_are_drawn_at_random_by_their_seed(model):
    assert load_images(model.cfg).labels.bincount().tolist() == [6] * 10
    for count, labels in ((2, 20), (6, 60), (50, 60), (0, 60)):
        judge = Judge(protocol(labels_per_class=count), model.cfg)
        assert len(judge.index) == labels and judge.train_y.bincount().tolist() == [labels // 10] * 10
    one, again, other = (Judge(protocol(labels_per_class=2, labels_seed=seed, seed=seed), model.cfg).index.tolist() for seed in (0, 0, 1))
    assert one == again and one != other and one == sorted(set(one))


def test_a_draw_is_of_the_same_images_whatever_the_probes_seed(model):
    one, other = (Judge(protocol(labels_per_class=2, seed=seed), model.cfg).index for seed in (0, 1))
    assert torch.equal(one, other)


def by_pattern(monkeypatch, classes: tuple[str, ...] = ("stripes", "dots", "rings")) -> list[tuple[str, str]]:
    """Replace the data set by one that any encoder can tell apart; returns the (root, split) pairs that are asked for."""
    asked, patterns = [], torch.randint(0, 200, (len(classes), 1, 16, 16), generator=torch.Generator().manual_seed(9))

    def load(cfg, split="train"):
        asked.append((cfg.data.root, split))
        labels = torch.arange(60) % len(classes)
        generator = torch.Generator().manual_seed(len(asked))
        images = (patterns[labels] + torch.randint(0, 50, (60, 1, 16, 16), generator=generator)).to(torch.uint8)
        return MemoryImages(images, labels, classes, img_size=16, in_chans=1, mean=(0.5,), std=(0.3,))

    monkeypatch.setattr(finetune, "load_images", load)
    return asked


def test_the_images_may_have_moved(model, monkeypatch):
    asked = by_pattern(monkeypatch)
    assert train_linear_probe(protocol(), model).accuracy > 0.9
    assert set(asked) == {(model.cfg.data.root, "train"), (model.cfg.data.root, "test")}
    asked.clear()
    assert train_linear_probe(protocol(data_root="elsewhere"), model).accuracy > 0.9
    assert set(asked) == {("elsewhere", "train"), ("elsewhere", "test")} and model.cfg.data.root != "elsewhere"


def test_one_class_cannot_be_probed(model, monkeypatch):
    by_pattern(monkeypatch, classes=("only",))
    for judge in (train_linear_probe, compare_pretrained_vs_scratch):
        with pytest.raises(DataError, match=rf"data\.dataset = '{model.cfg.data.dataset}' .*class folders"):
            judge(protocol(), model)


@pytest.mark.parametrize(("name", "value", "known"), [("pooling", "max", "mean or grid"), ("encoder", "predictor", "teacher or student")])
def test_unknown_names_are_refused(model, name, value, known):
    for judge in (train_linear_probe, compare_pretrained_vs_scratch):
        with pytest.raises(ConfigError, match=rf"{name} = '{value}': give {known}"):
            judge(protocol(**{name: value}), model)


@pytest.mark.parametrize(
    ("name", "value"), [("supervised_epochs", 0), ("labels_per_class", -1), ("draws", 2.5), ("pooling", 3), ("seed", -1)]
)
def test_settings_are_checked(name, value):
    with pytest.raises(ConfigError, match=rf"{name} = {value}"):
        FinetuneConfig(**{name: value})
    with pytest.raises(ConfigError, match="did you mean 'pooling'"):
        FinetuneConfig().poling = "mean"


# ---------------------------------------------------------------- the comparison


def test_the_comparison_has_five_rows_and_four_columns(model):
    report = compare_pretrained_vs_scratch(protocol(labels_per_class=3), model, pretraining_seconds=123.0)
    assert isinstance(report, Comparison) and (report.labels, report.tested) == (30, 60)
    pretrained, random, pixels, supervised, tuned = report.rows
    assert "pretrained" in pretrained and "random" in random and "pixels" in pixels and "labels" in supervised
    assert "pretrained" in tuned and "labels" in tuned
    for name, row in report.rows.items():
        assert row.keys() == {"seconds", "mean", "grid", "knn"} | ({"layers"} if name != pixels else set())
        assert all(0 <= row[key] <= 1 for key in row if key != "seconds") and math.isfinite(row["seconds"])
    table = report.table().splitlines()
    assert len(table) == 2 + 5 and len({line.count("|") for line in table}) == 1
    for line, (name, row) in zip(table[2:], report.rows.items(), strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[:5] == [name, *(f"{100 * row[key]:.1f}" if key in row else "-" for key in ("mean", "layers", "grid", "knn"))]
    assert "123" in table[2]
    ahead = report.differences().splitlines()
    assert len(ahead) == 2 + 4 and len({line.count("|") for line in ahead}) == 1
    assert [line.count(" to ") for line in ahead[2:]] == [4, 3, 4, 4], "each column that both rows have, with its interval"


def test_the_columns_are_the_probes_of_each_pooling(model):
    report = compare_pretrained_vs_scratch(protocol(labels_per_class=4), model)
    row = next(iter(report.rows.values()))
    for pooling in ("mean", "layers", "grid"):
        assert row[pooling] == train_linear_probe(protocol(labels_per_class=4, pooling=pooling), model).accuracy


def test_the_random_row_is_the_model_as_its_pretraining_began(model):
    """Judged before any training, the first two rows must be the same encoder."""
    torch.manual_seed(model.cfg.hardware.seed)
    fresh = IJEPA_base(model.cfg)
    rows = list(compare_pretrained_vs_scratch(protocol(), fresh).rows.values())
    assert all(rows[0][key] == rows[1][key] for key in ("mean", "grid", "knn"))


def test_the_comparison_repeats_and_leaves_the_model_as_it_was(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    one, again = (compare_pretrained_vs_scratch(protocol(), model) for _ in range(2))
    for name in one.rows:
        assert all(one.rows[name][key] == again.rows[name][key] for key in ("mean", "grid", "knn")), name
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_every_row_learns_where_there_is_something_to_learn(model, monkeypatch):
    by_pattern(monkeypatch)
    model.cfg.optimizer.base_learning_rate = 3e-3
    report = compare_pretrained_vs_scratch(protocol(supervised_epochs=4), model)
    for name, row in report.rows.items():
        assert min(row["mean"], row["grid"], row["knn"]) > 0.8, name


def test_the_supervised_encoder_is_trained(model, monkeypatch):
    by_pattern(monkeypatch)
    classifier = finetune.train_with_labels(Judge(protocol(), model.cfg), None)
    torch.manual_seed(protocol().seed)
    begun = IJEPA_base(model.cfg).student_encoder.state_dict()
    assert not any(torch.equal(value, begun[name]) for name, value in classifier.encoder.state_dict().items())


def test_the_pretrained_encoder_is_trained_with_labels_and_stays_as_it_was(model, monkeypatch):
    by_pattern(monkeypatch)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    begun = []
    train = finetune.train_classifier
    kept = lambda classifier, *args, **options: begun.append(copy.deepcopy(classifier.encoder)) or train(classifier, *args, **options)  # noqa: E731
    monkeypatch.setattr(finetune, "train_classifier", kept)
    result = finetune.finetune_encoder(protocol(encoder="student"), model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, before[f"student_encoder.{name}"]) for name, value in begun[0].state_dict().items())
    assert not torch.equal(result.classifier.encoder.pos_embed, begun[0].pos_embed)
    finetune.finetune_encoder(protocol(from_scratch=True, seed=3), model)
    assert not torch.equal(begun[1].pos_embed, begun[0].pos_embed)


def test_fine_tuning_learns_and_tells_its_accuracy(model, monkeypatch):
    by_pattern(monkeypatch)
    model.cfg.optimizer.base_learning_rate = 3e-3
    result = finetune.finetune_encoder(protocol(supervised_epochs=6), model)
    judge = Judge(protocol(), model.cfg)
    assert result.accuracy == float((result.predictions == judge.test_y).float().mean()) > 0.9
    assert result.classifier.classes == ("stripes", "dots", "rings") and not result.classifier.training


def test_settings_of_fine_tuning_reach_it(model, monkeypatch):
    by_pattern(monkeypatch)
    asked = []
    monkeypatch.setattr(finetune, "train_classifier", lambda *args, **options: asked.append(options))
    finetune.finetune_encoder(protocol(layer_decay=0.5, label_smoothing=0.2, supervised_epochs=7, seed=5), model)
    finetune.finetune_encoder(protocol(layer_decay=0.5, label_smoothing=0.2, supervised_epochs=7, seed=5, from_scratch=True), model)
    given = {"epochs": 7, "seed": 5, "learning_rate": model.cfg.optimizer.base_learning_rate}
    assert asked == [given | {"layer_decay": 0.5, "label_smoothing": 0.2}, given]


def test_draws_of_labels_are_averaged_and_paired(model):
    report = compare_pretrained_vs_scratch(protocol(labels_per_class=3, draws=3, labels_seed=7), model)
    for seed in range(3):
        single = compare_pretrained_vs_scratch(protocol(labels_per_class=3, labels_seed=7 + seed), model)
        for name, row in single.right.items():
            assert all(torch.equal(values[0], report.right[name][column][seed]) for column, values in row.items())
    first, other, *_ = report.rows
    mean, low, high = report.difference(first, other, "grid")
    assert mean == pytest.approx(report.rows[first]["grid"] - report.rows[other]["grid"]) and low <= mean <= high
    assert len(report.differences().splitlines()) == 2 + 4


def test_the_interval_of_a_difference_holds_the_truth_as_often_as_it_says():
    """Two classifiers that are right with probability 0.7 and 0.6 on images of differing difficulty, under five draws."""
    generator, inside = torch.Generator().manual_seed(0), 0
    for _ in range(60):
        hard = torch.rand(1, 300, generator=generator)
        one, other = ((torch.rand(5, 300, generator=generator) < p + 0.5 * (hard - 0.5)) for p in (0.7, 0.6))
        _, low, high = Comparison({}, 0, 300, {"one": {"grid": one}, "other": {"grid": other}}).difference("one", "other", "grid")
        inside += low <= 0.1 <= high
    assert inside >= 52  # 57 are expected; fewer than 52 in one of a hundred cases


def test_large_pixels_are_judged_small_and_said_so(model):
    model.cfg.model.img_size = 64
    judge = Judge(protocol(), model.cfg)
    pooled = []
    judge._right = lambda found: pooled.append(found) or {}
    judge.pixels_right()
    assert judge.pixel_row == "raw pixels, at 32 x 32" and pooled[0]["grid"][0].shape == (60, 32 * 32)
    assert pooled[0]["mean"][0].shape == (60, 4 * 4)


def test_images_without_labels_are_refused_before_any_is_computed(model, monkeypatch):
    by_pattern(monkeypatch)
    load = finetune.load_images

    def without(cfg, split="train"):
        source = load(cfg, split)
        source.labels = source.labels.clone()
        source.labels[:3] = -1 if split == "test" else source.labels[:3]
        return source

    monkeypatch.setattr(finetune, "load_images", without)
    monkeypatch.setattr(MemoryImages, "batches", None)
    with pytest.raises(DataError, match="3 of the 60 test images .* have no label"):
        train_linear_probe(protocol(), model)


def test_the_command_line_probes_and_compares(tmp_path, capsys):
    from wejepa.train.finetune import main
    from wejepa.train.pretrain import main as pretrain

    small = [
        "data.use_fake_data=true",
        "data.fake_data_size=64",
        "data.train_batch_size=16",
        "optimizer.epochs=1",
        f"hardware.output_dir={tmp_path}",
    ]
    assert pretrain([part for s in small for part in ("--set", s)]) == 0
    capsys.readouterr()
    given = [f"checkpoint={tmp_path}/latest.pt", "supervised_epochs=1"]
    options = [part for s in given for part in ("--set", s)]
    assert main(options) == 0
    assert capsys.readouterr().out.startswith("test accuracy ")
    assert main([*options, "--mode", "compare"]) == 0
    assert "raw pixels" in capsys.readouterr().out
    written = tmp_path / "new" / "classifier.pt"
    assert main([*options, "--mode", "finetune", "--set", f"classifier={written}"]) == 0
    assert str(written) in capsys.readouterr().out and Classifier.load(written).classes


def test_the_command_line_refuses_in_one_line(tmp_path, capsys):
    from wejepa.train.finetune import main

    for wrong in ("pooling", "poling=mean", "epochs=0", f"checkpoint={tmp_path}/none.pt"):
        assert main(["--set", wrong]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_one_encoder_decodes_each_image_once_for_all_readings(tmp_path, monkeypatch):
    """A hundred classes in folders; the probes, the neighbours and the pixels read what was decoded once."""
    noise = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in range(100):
            folder = tmp_path / split / f"{name:03d}"
            folder.mkdir(parents=True)
            for number in range(2):
                Image.fromarray(noise.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{number}.png", compress_level=0)
    cfg = tiny_config(use_fake_data=False, dataset="imagefolder", root=str(tmp_path))
    cfg.model.in_chans = 3
    judge, decoded = Judge(protocol(), cfg), []

    def counted(path, *rest):
        decoded.append(path)
        return read_image(path, *rest)

    monkeypatch.setattr(sources, "read_image", counted)
    scores = judge.scores(IJEPA_base(cfg).eval())
    assert set(scores) == {"mean", "layers", "grid", "knn"}
    assert len(decoded) == len(set(decoded)) == 400
    decoded.clear()
    judge.pixel_scores()
    assert len(decoded) == len(set(decoded)) == 400


def test_a_feature_that_is_constant_in_training_does_not_drown_the_others():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(200) % 2
    x = torch.randn(200, 8, generator=generator) + 3 * y[:, None]
    x[:, 0] = -0.8157 + 1e-7 * torch.randn(200, generator=generator)  # a black pixel, up to rounding
    test_x = x.clone()
    test_x[:, 0] = 2.0  # light falls on it
    assert fit_probe(x, y, test_x, y, FinetuneConfig()).accuracy > 0.95
