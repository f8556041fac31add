"""Data sets of Hugging Face: by name or folder, read, labelled, passed over and refused as image folders are."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from wejepa.config import adapt_config_for_backbone, default_config, hf224_config
from wejepa.data import load_images, training_batches
from wejepa.errors import ConfigError, DataError
from wejepa.model import IJEPA_base
from wejepa.train.checkpoints import load_model
from wejepa.train.finetune import FinetuneConfig, train_linear_probe
from wejepa.train.pretrain import launch_pretraining

datasets = pytest.importorskip("datasets")


@pytest.fixture(scope="module", autouse=True)
def quiet_and_offline(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        datasets.disable_progress_bars()
        yield
        datasets.enable_progress_bars()


def picture(i: int) -> Image.Image:
    pixels = np.random.default_rng(i).integers(0, 256, (20 + i % 3, 24, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An image folder: 2 classes, 12 training and 4 test images."""
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 6), ("test", 2)):
        for c, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                picture(100 * c + i + (50 if split == "test" else 0)).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def saved(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "pets"
    datasets.load_dataset(str(folder)).save_to_disk(path)
    return path


def config(name, size=32):
    cfg = default_config()
    cfg.model.img_size = size
    cfg.data.dataset, cfg.data.train_batch_size, cfg.data.eval_batch_size = f"hf:{name}", 4, 4
    return cfg


def parquet_of(folder, tmp_path):
    for split, rows in datasets.load_dataset(str(folder)).items():
        (tmp_path / "parquet").mkdir(exist_ok=True)
        rows.to_parquet(tmp_path / "parquet" / f"{split}-00000.parquet")
    return tmp_path / "parquet"


@pytest.mark.parametrize("kind", ["imagefolder", "save_to_disk", "parquet"])
def test_the_images_are_those_of_the_folder(folder, saved, tmp_path, kind):
    path = {"imagefolder": folder, "save_to_disk": saved}.get(kind) or parquet_of(folder, tmp_path)
    for split in ("train", "test"):
        found = load_images(config(path), split)
        cfg = config(path)
        cfg.data.dataset, cfg.data.root = "imagefolder", str(folder)
        files = load_images(cfg, split)
        assert found.classes == files.classes == ("cat", "dog")
        assert torch.equal(found.labels, files.labels) and found.labels.dtype == torch.int64
        index = torch.arange(len(files))
        assert len(found) == len(files)
        for mine, theirs in zip(found.batches(index, 4), files.batches(index, 4), strict=True):
            assert torch.equal(mine, theirs)
    for mine, theirs in zip(training_batches(load_images(config(path)), cfg, 0), training_batches(load_images(cfg), cfg, 0), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("workers", [0, 2])
def test_worker_processes_decode_rows(saved, workers):
    cfg = config(saved)
    cfg.data.num_workers = workers
    alone = list(load_images(config(saved)).batches(torch.arange(12), 5))
    assert all(torch.equal(a, b) for a, b in zip(alone, load_images(cfg).batches(torch.arange(12), 5), strict=True))


def rows_with(tmp_path, changes, features=None):
    """Twelve rows saved to a folder; `changes` replaces some images by other content."""
    path = tmp_path / "rows"
    features = features or datasets.Features(
        {"id": datasets.Value("int64"), "photo": datasets.Image(), "kind": datasets.ClassLabel(names=["a", "b"])}
    )
    images = []
    for i in range(12):
        file = tmp_path / f"{i}.png"
        picture(i).save(file)
        content = changes.get(i, file.read_bytes())
        images.append(None if content is None else {"bytes": content, "path": None})
    columns = {"id": list(range(12)), "photo": images, "kind": [i % 2 for i in range(12)]}
    datasets.Dataset.from_dict({k: v for k, v in columns.items() if k in features}, features=features).save_to_disk(path)
    return path


def test_columns_are_found_by_their_kind_and_a_set_without_splits_is_for_training(tmp_path):
    path = rows_with(tmp_path, {})
    source = load_images(config(path))
    assert source.classes == ("a", "b") and source.labels.tolist() == [0, 1] * 6
    with pytest.raises(DataError, match="has no split test or validation or valid or val, only train: name one .* data.test_split"):
        load_images(config(path), "test")


def with_splits(tmp_path, **labels):
    """A saved set with splits of these labels, -1 where there is none."""
    kinds = datasets.Features({"image": datasets.Image(), "kind": datasets.ClassLabel(names=["a", "b"])})
    rows = {split: {"image": [picture(i) for i in range(len(y))], "kind": y} for split, y in labels.items()}
    datasets.DatasetDict({split: datasets.Dataset.from_dict(r, features=kinds) for split, r in rows.items()}).save_to_disk(tmp_path / "set")
    return config(tmp_path / "set")


def test_a_test_split_without_labels_gives_way_to_one_with(tmp_path):
    cfg = with_splits(tmp_path, train=[0, 1] * 6, test=[-1] * 5, validation=[0, 1, 1])
    source = load_images(cfg, "test")
    assert source.labels.tolist() == [0, 1, 1] and "validation" in str(source.files[0])


def test_a_split_can_be_named(tmp_path):
    cfg = with_splits(tmp_path, train=[0, 1] * 6, extra=[1, 1, 0], test=[0], unlabelled=[-1, -1])
    cfg.data.train_split, cfg.data.test_split = "extra", "train"
    assert load_images(cfg).labels.tolist() == [1, 1, 0] and load_images(cfg, "test").labels.tolist() == [0, 1] * 6
    cfg.data.test_split = "dev"
    with pytest.raises(DataError, match="has no split dev, only train, extra, test, unlabelled: name one in data.test_split"):
        load_images(cfg, "test")


def test_a_probe_on_images_without_labels_is_refused_before_any_is_decoded(tmp_path, monkeypatch):
    cfg = with_splits(tmp_path, train=[0, 1] * 6, test=[-1] * 5)
    model = IJEPA_base(cfg)
    monkeypatch.setattr("wejepa.data.sources.read_image", None)
    with pytest.raises(DataError, match=r"5 of the 5 test images of data.dataset = 'hf:.*' have no label"):
        train_linear_probe(FinetuneConfig(), model)


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ("owner/name", ("owner/name", None, None)),
        ("owner/name#small", ("owner/name", "small", None)),
        ("owner/name@v1.0", ("owner/name", None, "v1.0")),
        ("owner/name@v1.0#small", ("owner/name", "small", "v1.0")),
    ],
)
def test_a_revision_and_a_configuration_can_be_named(monkeypatch, given, asked):
    calls = []

    def load(name, config, revision, streaming):
        calls.append((name, config, revision))
        raise ValueError("offline")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match="could not be loaded"):
        load_images(config(given))
    assert calls == [asked]


def test_of_two_columns_of_images_the_one_named_image_is_taken(tmp_path):
    kinds = datasets.Features({"before": datasets.Image(), "image": datasets.Image(), "after": datasets.Image()})
    columns = {"before": [picture(1)] * 5, "image": [picture(2)] * 5, "after": [picture(4)] * 5}
    datasets.Dataset.from_dict(columns, features=kinds).save_to_disk(tmp_path / "rows")
    datasets.Dataset.from_dict({"photo": columns["image"]}, features=datasets.Features({"photo": datasets.Image()})).save_to_disk(
        tmp_path / "one"
    )
    both, one = (next(load_images(config(tmp_path / name)).batches(torch.arange(5), 5)) for name in ("rows", "one"))
    assert torch.equal(both, one)


def test_without_labels_there_is_one_class(tmp_path):
    path = rows_with(tmp_path, {}, datasets.Features({"photo": datasets.Image()}))
    source = load_images(config(path))
    assert source.classes == ("",) and not source.labels.any() and len(source) == 12


def test_a_set_without_images_is_refused(tmp_path):
    path = rows_with(tmp_path, {}, datasets.Features({"id": datasets.Value("int64")}))
    with pytest.raises(DataError, match="has no column of images, only id"):
        load_images(config(path))


def test_damaged_rows_are_named_and_passed_over(tmp_path):
    path = rows_with(tmp_path, {3: b"no image", 7: None})
    cfg = config(path)
    cfg.data.max_unreadable_share = 0.5
    source = load_images(cfg)
    with pytest.warns(UserWarning, match=r"train/3 cannot be read as an image \(its content is no image of a known kind\): passed over"):
        kept = source.readable(torch.arange(12))
    assert kept.tolist() == [0, 1, 2, 4, 5, 6, 8, 9, 10, 11]
    assert source.unreadable[path / "train" / "7"] == "the row has no image"
    assert sum(len(batch) for batch in training_batches(source, cfg, 0)) == 12
    cfg.data.max_unreadable_share = 0.1
    with pytest.raises(DataError, match="2 of 12 files"), pytest.warns(UserWarning):
        load_images(cfg).readable(torch.arange(12))


def test_what_cannot_be_had_is_one_clear_error(tmp_path, monkeypatch):
    for name in (str(tmp_path / "nothing"), str(tmp_path), "someone/pets"):
        with pytest.raises(DataError, match=f"data.dataset = 'hf:{name}' could not be loaded"):
            load_images(config(name))
    for wrong in ("hf:", "hf"):
        cfg = default_config()
        cfg.data.dataset = wrong
        with pytest.raises(ConfigError, match=f"data.dataset = '{wrong}' is not known; .*hf:NAME"):
            load_images(cfg)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"needs the package datasets .*pip install 'wejepa\[datasets\]'"):
        load_images(config("someone/pets"))


@pytest.mark.slow
def test_the_large_preset_trains_on_rows_with_a_backbone_and_goes_on(folder, saved, tmp_path):
    cfg = adapt_config_for_backbone(hf224_config(), "mobilenet_v3_small")
    cfg.data.dataset, cfg.data.train_batch_size, cfg.data.num_workers = f"hf:{saved}", 6, 0
    cfg.optimizer.epochs, cfg.optimizer.warmup_epochs = 2, 0
    cfg.hardware.output_dir = str(tmp_path)
    result = launch_pretraining(cfg)
    assert len(result.history) == 2
    assert launch_pretraining(cfg, resume="auto").history == result.history
    probe = FinetuneConfig(checkpoint=str(result.checkpoint))
    assert len(train_linear_probe(probe).predictions) == 4
    assert load_model(result.checkpoint).cfg == cfg


def test_another_set_under_the_same_name_is_noticed(tmp_path):
    path = rows_with(tmp_path, {})
    source = load_images(config(path))
    assert source.fingerprint.startswith("12 rows, ")
    source.labels = 1 - source.labels
    del source.fingerprint
    assert source.fingerprint != load_images(config(path)).fingerprint


@pytest.mark.parametrize("kind", ["imagefolder", "parquet"])
def test_a_stream_gives_so_many_images_of_the_set(folder, tmp_path, kind):
    path = folder if kind == "imagefolder" else parquet_of(folder, tmp_path)
    cfg = config(path)
    whole = load_images(cfg, "train")
    everything = torch.cat(list(whole.batches(torch.arange(len(whole)), 100)))
    cfg.data.streamed = 5
    some = load_images(cfg, "train")
    images = torch.cat(list(some.batches(torch.arange(5), 100)))
    assert len(some) == 5 and len(load_images(cfg, "test")) == 4  # all there are
    where = [int((everything == image).flatten(1).all(1).nonzero()) for image in images]
    assert len(set(where)) == 5 and where != sorted(where), "other images, or the first ones of a sorted set"
    assert torch.equal(some.labels, whole.labels[where]) and some.classes == whole.classes
    assert torch.equal(some.labels, load_images(cfg, "train").labels), "another choice the second time"
