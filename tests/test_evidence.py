"""The protocol with intervals: what is kept, merged and compared, and that every row of it can be judged."""

import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks import evidence
from wejepa.config import default_config
from wejepa.train.finetune import FinetuneConfig, Judge

pytestmark = pytest.mark.slow


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Noise in place of a set, two numbers of labels, two draws, and folders of the test's own."""

    def recipe(name):
        cfg = default_config()
        cfg.data.use_fake_data, cfg.data.fake_data_size, cfg.data.train_batch_size = True, 200, 20
        cfg.optimizer.epochs, cfg.optimizer.warmup_epochs, cfg.data.dataset = 1, 0.5, name
        return cfg

    monkeypatch.setattr(evidence, "recipe", recipe)
    monkeypatch.setattr(evidence, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(evidence, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(evidence, "SEEN", 40)
    monkeypatch.setattr(evidence, "LABELS", (5, 500))
    monkeypatch.setattr(evidence.judged, "__defaults__", ((5, 500), 2))
    return Judge(FinetuneConfig(labels_per_class=0), recipe("emoji"))


def test_every_row_is_judged_kept_and_compared(small, tmp_path):
    pytest.importorskip("sklearn")
    rows = [row for row in evidence.ROWS if row.name != "oriented gradients" and "emoji" in row.sets]
    assert {row.name for row in evidence.ROWS} - {row.name for row in rows} == {
        "oriented gradients",
        "the model that ships",
        "the model that ships, then with labels",
        "the model that ships, by Muon",
        "pretrained by Muon, five minutes",
    }
    evidence.run("emoji", rows, [0, 1], None)
    found = evidence.kept("emoji")
    assert found.keys() == {row.name for row in rows}
    assert [len(found[row.name]) for row in rows] == [2 if row.seeds else 1 for row in rows]
    for row in rows:
        cells = found[row.name][0]["right"]
        assert cells.keys() == {"5/0", "5/1", "500/0"}  # all labels can be drawn in one way
        for cell in cells.values():
            assert all(len(evidence.unpacked(text, 200)) == 200 for text in cell.values()) and cell
    columns = found["pretrained"][0]["right"]["5/0"].keys()
    assert columns == {"mean", "layers", "grid", "knn"} == found["same encoder, random"][0]["right"]["5/0"].keys()
    assert found["raw pixels"][0]["right"]["5/0"].keys() == {"grid", "knn"}
    assert found["whole encoder, with labels"][0]["right"]["5/0"].keys() == {"own"}
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "results").iterdir()}
    evidence.run("emoji", rows, [0, 1], None)  # nothing is missing, so nothing is judged again
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "results").iterdir()} == before
    lines = list(evidence.table("emoji"))
    assert sum(line.startswith("| raw pixels |") for line in lines) == 4  # accuracies and differences, for both numbers of labels


def test_oriented_gradients(small):
    pytest.importorskip("skimage")
    train, test = evidence.gradients(small, 0)["grid"]
    assert train.shape == (200, 324) and test.isfinite().all() and train.std() > 0


def test_which_images_were_right_survives_being_packed():
    right = torch.rand(77, generator=torch.Generator().manual_seed(0)) < 0.6
    assert torch.equal(evidence.unpacked(json.loads(json.dumps(evidence.packed(right))), 77), right)


def test_an_interval_is_wider_for_fewer_images_and_for_seeds_that_differ():
    generator = torch.Generator().manual_seed(0)
    many = (torch.rand(3, 5, 2000, generator=generator) < 0.7).double()
    mean, low, high = evidence.interval(many)
    assert low < mean < high and mean == pytest.approx(0.7, abs=0.02)
    _, low_few, high_few = evidence.interval(many[..., :100])
    assert high_few - low_few > 2 * (high - low)
    apart = many.clone()
    apart[0] = (torch.rand(5, 2000, generator=generator) < 0.9).double()
    _, low_apart, high_apart = evidence.interval(apart)
    assert high_apart - low_apart > 2 * (high - low)


def test_an_interval_covers_the_truth_about_as_often_as_it_says():
    """Of rows without any difference, five in a hundred would be told apart."""
    generator = torch.Generator().manual_seed(1)
    covered = 0
    for _ in range(60):
        hardness = torch.rand(300, generator=generator)  # of the images, shared by both rows
        one, other = ((torch.rand(1, 1, 300, generator=generator) < hardness).double() for _ in range(2))
        _, low, high = evidence.interval(evidence.ahead(one, other), repeats=200)
        covered += low <= 0 <= high
    assert covered >= 52  # 57 expected; 52 or fewer once in a hundred


def test_rows_are_compared_image_by_image():
    """Two rows that fail on the same images differ by less than their own intervals let on."""
    base = (torch.rand(1, 1, 1000, generator=torch.Generator().manual_seed(2)) < 0.5).double()
    better = base.clone()
    better[..., :30] = 1.0
    gain, low, high = evidence.interval(evidence.ahead(better, base))
    _, own_low, own_high = evidence.interval(base)
    assert 0 < low < gain < high and high - low < (own_high - own_low) / 2
    assert evidence.ahead(torch.ones(3, 5, 9), torch.zeros(1, 5, 9)).shape == (3, 5, 9)


def test_the_model_that_ships_is_judged_on_its_own_set(small, monkeypatch):
    rows = [row for row in evidence.ROWS if row.name in ("the model that ships", "the model that ships, then with labels")]
    evidence.run("emoji", rows, [0], None)
    assert evidence.kept("emoji") == {}  # it reads other images
    monkeypatch.setattr(evidence, "SHIPPED", {"fashion_mnist_mini": "fashion"})
    monkeypatch.setattr(evidence, "shipped", lambda judge: evidence.load_pretrained("fashion").teacher_encoder)
    pixels = [row for row in evidence.ROWS if row.name == "raw pixels"]
    evidence.run("fashion_mnist_mini", rows + pixels, [0, 1], None)
    found = evidence.kept("fashion_mnist_mini")
    assert [len(found[row.name]) for row in rows + pixels] == [1, 1, 1]
    assert any("the model that ships, grid, is ahead of" in line for line in evidence.table("fashion_mnist_mini"))


def test_the_model_that_ships_by_muon_is_trained_as_that_but_for_the_optimizer(small, monkeypatch):
    made, asked = evidence.load_pretrained("fashion"), []
    monkeypatch.setattr(evidence, "SHIPPED", {"emoji": "fashion"})
    monkeypatch.setattr(evidence, "launch_pretraining", lambda cfg, resume: asked.append(cfg) or SimpleNamespace(model=made))
    assert evidence.shipped_by_muon(small, 0).keys() == evidence.read(small, made.teacher_encoder).keys()
    before, after = (cfg.to_dict() for cfg in (made.cfg, asked[0]))
    changed = {(part, name) for part in before for name in before[part] if before[part][name] != after[part][name]}
    assert changed == {("data", "dataset"), ("hardware", "output_dir"), ("optimizer", "kind"), ("optimizer", "momentum_teacher_final")}


def test_each_set_is_read_at_its_own_size():
    for name in evidence.SETS:
        cfg = evidence.recipe(name)
        assert cfg.data.dataset == name.removesuffix("_64") and cfg.model.img_size == (64 if name == "emoji_64" else 32)


def test_what_is_trained_with_labels_takes_the_number_of_the_draw_as_its_seed(small):
    asked = []

    class Guess:
        def predict(self, source, index):
            return torch.zeros(len(index), dtype=torch.int64)

    row = evidence.Row("", trained=lambda judge, seed: asked.append((len(judge.index), seed)) or Guess())
    assert evidence.judged(row, small, 7).keys() == {"5/0", "5/1", "500/0"}
    assert [seed for _, seed in asked] == [0, 1, 0] and asked[0][0] == asked[1][0] < asked[2][0]


def test_the_tables_take_the_place_between_their_marks(small):
    rows = [row for row in evidence.ROWS if row.name in ("raw pixels", "same encoder, random")]
    evidence.run("emoji", rows, [0], None)
    old = "before\n<!-- evidence emoji -->\nold\n<!-- end of evidence emoji -->\nafter\n"
    new = evidence.written(old)
    assert new.startswith("before\n<!-- evidence emoji -->\nAccuracy with 5 ") and new.endswith(
        "|\n\n<!-- end of evidence emoji -->\nafter\n"
    )
    assert "old" not in new and "| raw pixels | 1 | - | - | " in new and evidence.written(new) == new


@pytest.mark.slow
def test_the_tables_in_the_benchmarks_are_those_of_the_files():
    text = evidence.README.read_text(encoding="utf-8")
    assert text.count("<!-- evidence ") == 3 and evidence.written(text) == text
