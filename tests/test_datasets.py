"""Datasets that nobody here wrote, as the images of a run: cropped once, exact over kills and workers, refused where they hold none."""

import multiprocessing
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import tiny_config
from test_own_parts import assert_same, refusal
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset
from torchvision.datasets import FakeData, ImageFolder
from torchvision.transforms import v2

from wejepa.config import IJepaConfig
from wejepa.data import IMAGENET, as_source, load_images, normalise, training_batches, with_channels
from wejepa.data.datasets import labels_of, seeded
from wejepa.errors import CheckpointError, DataError
from wejepa.train.callbacks import Callback
from wejepa.train.interruption import RunInterrupted, RunStopped
from wejepa.train.loop import Pretraining
from wejepa.train.pretrain import launch_pretraining

SIDE, IMAGES = 16, 24


class Numpy:
    """A transform that draws from every global generator: noise, in floats, ready for the encoder."""

    def __call__(self, image: Image.Image) -> torch.Tensor:
        x = v2.functional.to_dtype(v2.functional.to_image(image), torch.float32, scale=True).mean(0, keepdim=True)
        x = v2.functional.resize(x, [SIDE, SIDE])
        return x + random.random() + torch.from_numpy(np.random.rand(1, SIDE, SIDE).astype(np.float32)) + torch.rand(1)


@pytest.fixture
def cfg(tmp_path) -> IJepaConfig:
    cfg = tiny_config(tmp_path / "run")
    cfg.data.use_fake_data = False
    cfg.optimizer.epochs = 3
    return cfg


@pytest.fixture
def folder(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    for i in range(IMAGES):
        place = tmp_path / "photos" / "train" / ("cats", "dogs")[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20 + i % 3, 18 + i % 5, 3), dtype=np.uint8)).save(place / f"{i:02}.png")
    return tmp_path / "photos" / "train"


def datasets(folder: Path) -> dict[str, Dataset]:
    return {
        "FakeData": FakeData(IMAGES, (3, 20, 20)),
        "ImageFolder": ImageFolder(folder),
        "ImageFolder with a transform": ImageFolder(folder, Numpy()),
        "FakeData with a transform": FakeData(
            IMAGES,
            (3, 20, 20),
            transform=v2.Compose([v2.RandomResizedCrop(SIDE), v2.Grayscale(), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]),
        ),
    }


NAMES = ("FakeData", "ImageFolder", "ImageFolder with a transform", "FakeData with a transform")


# ---------------------------------------------------------------- exact


class Killer(Callback):
    def __init__(self, step: int, signum: int):
        self.step, self.signum = step, signum

    def on_step(self, step, numbers):
        if step == self.step:
            os.kill(os.getpid(), self.signum)


def train(cfg: IJepaConfig, dataset: Dataset, resume=None, callbacks=()) -> Path:
    return launch_pretraining(cfg, resume, source=as_source(dataset, cfg), callbacks=callbacks).checkpoint


@pytest.mark.parametrize("name", NAMES)
def test_trained_killed_and_resumed_to_the_bit(cfg, folder, tmp_path, name):
    """Killed in the middle of the second epoch, stopped in the third, on as many workers each time as the others have not."""
    dataset = datasets(folder)[name]
    whole = train(cfg, dataset)
    cfg.hardware.output_dir, cfg.hardware.checkpoint_minutes = str(tmp_path / "killed"), 1e-9
    killed = multiprocessing.get_context("fork").Process(target=train, args=(cfg, dataset, None, [Killer(5, signal.SIGKILL)]))
    killed.start()
    killed.join(60)
    assert killed.exitcode == -signal.SIGKILL
    torch.rand(3), random.random(), np.random.rand()  # whatever was drawn in the meantime does not matter
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    cfg.data.num_workers = 2
    with pytest.raises(RunInterrupted):
        train(cfg, dataset, "auto", [Killer(7, signal.SIGTERM)])
    signal.signal(signal.SIGTERM, before)
    cfg.data.num_workers = 0
    assert_same(train(cfg, dataset, "auto"), whole)


@pytest.mark.parametrize("name", NAMES[2:])
def test_a_random_transform_is_random_in_training_and_draws_nothing_from_the_caller(cfg, folder, name):
    source = as_source(datasets(folder)[name], cfg)
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    expected = torch.rand(1), random.random(), np.random.rand()
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    index = torch.zeros(1, dtype=torch.long)
    epochs = [torch.cat(list(training_batches(source, cfg, epoch))) for epoch in (0, 0, 1)]
    again = [next(source.batches(index, 1)) for _ in range(2)]
    assert (torch.rand(1), random.random(), np.random.rand()) == expected
    assert torch.equal(epochs[0], epochs[1]) and torch.equal(*again)
    assert not torch.isin(epochs[0].sum((1, 2, 3)), epochs[2].sum((1, 2, 3))).any()


def test_a_part_of_a_batch_has_the_images_of_the_whole(cfg, folder):
    source = as_source(datasets(folder)["ImageFolder with a transform"], cfg)
    whole = next(training_batches(source, cfg, 0))
    parts = [next(training_batches(source, cfg, 0, part=(rank, 2))) for rank in range(2)]
    assert torch.equal(torch.cat(parts), whole)


def test_generators_are_as_they_were_even_after_an_error():
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    expected = torch.rand(1), random.random(), np.random.rand()
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    with pytest.raises(KeyError), seeded(1, 2):
        torch.rand(5), random.random(), np.random.rand()
        raise KeyError
    assert (torch.rand(1), random.random(), np.random.rand()) == expected


# ---------------------------------------------------------------- cropped once


def test_pil_images_are_cropped_as_a_folders_files_are(cfg, folder):
    """The same files through torchvision's ImageFolder and by name: the same batches, labels and classes."""
    cfg.data.dataset, cfg.data.root = "imagefolder", str(folder.parent)
    own, named = as_source(ImageFolder(folder), cfg), load_images(cfg)
    for mine, theirs in zip(training_batches(own, cfg, 1), training_batches(named, cfg, 1), strict=True):
        assert torch.equal(mine, theirs)
    index = torch.arange(IMAGES)
    assert all(torch.equal(a, b) for a, b in zip(own.batches(index, 5), named.batches(index, 5), strict=True))
    assert torch.equal(own.labels, named.labels) and own.classes == named.classes == ("cats", "dogs")


def test_bytes_are_cropped_and_normalised(cfg):
    images = torch.randint(0, 256, (9, 3, SIDE, SIDE), dtype=torch.uint8)
    cfg.data.crop_scale, cfg.data.horizontal_flip = (1.0, 1.0), False
    for given, expected in ((images, images), (images[:, :1], images[:, :1].expand(-1, 3, -1, -1)), (images[:, 0], images[:, :1])):
        source = as_source(TensorDataset(given), cfg)
        expected = with_channels(normalise(with_channels(expected, 3), *IMAGENET), 1)
        assert torch.equal(next(source.batches(torch.arange(9), 9)), expected)
        (batch,) = training_batches(source, cfg, 0)
        sums = expected.sum((1, 2, 3))
        assert batch.shape == (8, 1, SIDE, SIDE) and all((sums - total).abs().min() < 30 for total in batch.sum((1, 2, 3)))


def test_floats_are_taken_as_they_are(cfg):
    images = torch.randn(9, 1, SIDE, SIDE, dtype=torch.float64)
    source = as_source(TensorDataset(images), cfg)
    assert torch.equal(next(source.batches(torch.arange(9), 9)), images.float())
    (batch,) = training_batches(source, cfg, 0)
    assert all(any(torch.equal(image, x) for x in images.float()) for image in batch)


# ---------------------------------------------------------------- labels and fingerprint


def test_labels_come_from_targets_and_classes_from_classes(folder):
    found = ImageFolder(folder)
    labels, classes = labels_of(Subset(found, [0, IMAGES - 1]))
    assert labels.tolist() == [0, 1] and classes == ("cats", "dogs")
    found.classes = []
    assert labels_of(found)[1] == ("0", "1")
    for odd in ([[1], [2, 3]], ["a"] * IMAGES, [0.5] * IMAGES, [-1] * IMAGES, [0]):
        found.targets = odd
        assert labels_of(found)[0].tolist() == [0] * IMAGES and labels_of(found)[1] == ("",)


def test_the_log_has_a_k_nn_where_there_are_labels(cfg, folder):
    cfg.optimizer.epochs = 1
    assert launch_pretraining(cfg, source=as_source(ImageFolder(folder), cfg)).history[0]["knn"] is not None
    assert launch_pretraining(cfg, source=as_source(FakeData(IMAGES, (3, 20, 20)), cfg)).history[0]["knn"] is None


def test_the_fingerprint_tells_which_images_a_checkpoint_saw(cfg, folder):
    one = as_source(ImageFolder(folder), cfg).fingerprint
    assert one.startswith(f"{IMAGES} items of ImageFolder, ")
    assert as_source(ImageFolder(folder), cfg).fingerprint == one
    assert as_source(Subset(ImageFolder(folder), range(IMAGES - 1)), cfg).fingerprint != one
    path = next(folder.glob("*/00.png"))
    Image.fromarray(np.asarray(Image.open(path))[::-1].copy()).save(path)
    assert as_source(ImageFolder(folder), cfg).fingerprint != one

    cfg.optimizer.epochs = 2
    checkpoint = train(cfg, ImageFolder(folder))
    with pytest.raises(CheckpointError, match="was trained on 24 items of ImageFolder, .* now has 24 items of FakeData"):
        Pretraining(cfg, checkpoint, source=as_source(FakeData(IMAGES, (3, 20, 20)), cfg))


class Unseeded(TensorDataset):
    """Its randomness is its own."""

    def __getitem__(self, i):
        return super().__getitem__(i)[0] + torch.rand(1, generator=GENERATOR)


GENERATOR = torch.Generator()


def test_a_dataset_that_is_not_the_same_twice_is_told_of_and_can_be_resumed(cfg):
    dataset = Unseeded(torch.rand(IMAGES, 1, SIDE, SIDE))
    with pytest.warns(UserWarning, match=r"Unseeded\[0\] is not the same twice"):
        one, other = as_source(dataset, cfg), as_source(dataset, cfg)
    assert one.fingerprint == other.fingerprint
    dataset.fingerprint = "version 2"
    with pytest.warns(UserWarning):
        assert as_source(dataset, cfg).fingerprint == "24 items of Unseeded, version 2"


# ---------------------------------------------------------------- what is no dataset of images


class Items(Dataset):
    def __init__(self, *items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        if isinstance(self.items[i], Exception):
            raise self.items[i]
        return self.items[i]


class Endless(IterableDataset):
    def __iter__(self):
        return iter(())


def test_what_gives_no_images_is_refused_in_one_line(cfg):
    grey = Image.new("L", (20, 20))
    for dataset, told in {
        Items({"image": grey}): r"Items\[0\] is no image: it is dict; a Dataset's items must be PIL images, bytes",
        Items((3, grey)): "it is int; a Dataset's",
        Items(()): "it is tuple; a Dataset's",
        Items(torch.zeros(3, 4, 4, dtype=torch.int64)): r"it is a tensor torch.int64 \(3, 4, 4\)",
        Items(torch.zeros(4, 8, 8, dtype=torch.uint8)): r"it is a tensor torch.uint8 \(4, 8, 8\)",
        Items(torch.zeros(3, 224, 224)): r"Items\[0\] is a tensor of floats \(3, 224, 224\), .* need \(1, 16, 16\): make its transform",
        Items(*[KeyError("path")] * 10): r"the first 8 items of Items cannot be read \(KeyError: 'path'\)",
        Items(): "Items has no items",
        Endless(): "Endless has no numbered items",
        iter([grey]): "has no numbered items",
        "photos": "str has no numbered items; give a Dataset",
    }.items():
        with pytest.raises(DataError, match=told) as caught:
            as_source(dataset, cfg)
        assert "\n" not in str(caught.value)


def test_a_dataset_in_place_of_a_source_is_refused(cfg):
    assert "source: FakeData has no labels; give wejepa.data.as_source(dataset, cfg)" in refusal(cfg, source=FakeData(IMAGES))


@pytest.mark.parametrize(
    ("odd", "told"),
    [
        ("text", r"Items\[13\] is no image: it is str"),
        (torch.zeros(1, SIDE, SIDE), r"Items\[13\] is a tensor of floats, where items before are PIL"),
    ],
)
def test_an_item_of_another_kind_ends_the_run_with_a_checkpoint(cfg, odd, told):
    items = [Image.new("L", (20, 20), i) for i in range(IMAGES)]
    items[13] = odd
    cfg.data.train_batch_size = 2
    with pytest.raises(RunStopped, match=f"{told}.*latest.pt holds step"):
        Pretraining(cfg, source=as_source(Items(*items), cfg)).run()


def test_items_that_cannot_be_read_are_passed_over_and_named(cfg):
    items = [Image.new("L", (20, 20), i) for i in range(IMAGES)]
    items[0] = OSError("image file is truncated")
    cfg.optimizer.epochs = 1
    with pytest.warns(UserWarning, match="Items/0 cannot be read as an image .image file is truncated.: passed over"):
        train(cfg, Items(*items))
    items[1] = OSError("image file is truncated")
    with pytest.raises(DataError, match=r"data.max_unreadable_share = 0.05, but already 2 of 24"), pytest.warns(UserWarning):
        train(cfg, Items(*items))


# ---------------------------------------------------------------- a list of files


def test_a_list_of_files(cfg, folder):
    files = sorted(folder.glob("*/*.png"))
    source = as_source([str(file) for file in files], cfg)
    assert len(source) == IMAGES and source.classes == ("",) and list(source.files) == files
    cfg.data.dataset, cfg.data.root = "imagefolder", str(folder.parent)
    assert source.fingerprint == load_images(cfg).fingerprint
    with pytest.raises(DataError, match="list has no items"):
        as_source([], cfg)
