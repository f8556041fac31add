"""Images by name: what is in them, in which order they come, and what is said when they are not there."""

import gzip
import importlib
import importlib.util
import pickle
import re
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from framing import frames
from PIL import Image

from wejepa.config import DataConfig, HardwareConfig, IJepaConfig, MaskConfig, ModelConfig
from wejepa.data import (
    STATISTICS,
    FolderImages,
    MemoryImages,
    available_datasets,
    crop_box,
    example_photograph,
    load_images,
    random_crops,
    resample,
    steps_per_epoch,
    training_batches,
)
from wejepa.errors import ConfigError, DataError


def import_torchvision():
    """torchvision; its Python alone where its operators were compiled for another build of torch than the one installed.

    That mix (a CPU wheel beside a CUDA wheel) cannot be imported as it is, but reading data sets needs no operators, so declaring
    them is enough to test it. What wejepa says to a user with that mix is another matter.
    """
    package = Path(importlib.util.find_spec("torchvision").origin).parent
    try:
        torch.ops.load_library(next(file for file in package.glob("_C*") if file.suffix in (".so", ".pyd")))
    except (OSError, StopIteration):
        operators = torch.library.Library("torchvision", "DEF")
        for name in set(re.findall(r"torchvision::(\w+)", (package / "_meta_registrations.py").read_text())):
            operators.define(f"{name}(Tensor x) -> Tensor")
    return importlib.import_module("torchvision")


torchvision = import_torchvision()
RandomResizedCrop = importlib.import_module("torchvision.transforms").RandomResizedCrop


def tiny_config(dataset: str = "fake", *, img_size: int = 32, in_chans: int = 3, seed: int = 0, **data) -> IJepaConfig:
    """A config of a set by name, or of noise."""
    choice = {"use_fake_data": True} if dataset == "fake" else {"dataset": dataset}
    return IJepaConfig(
        data=DataConfig(**{"fake_data_size": 40, "train_batch_size": 8, "crop_scale": (0.5, 1.0)} | choice | data),
        mask=MaskConfig(target_scale=(0.1, 0.2), context_share=0.3),
        model=ModelConfig(img_size=img_size, patch_size=4, in_chans=in_chans, embed_dim=16, pred_dim=16, num_heads=2),
        hardware=HardwareConfig(seed=seed),
    )


WHOLE = [1.0, 1.0, 0.0, 0.0, 0.0]  # of a square image


def everything(source, batch_size: int = 1000) -> torch.Tensor:
    return torch.cat(list(source.batches(torch.arange(len(source)), batch_size)))


def plain_source(images: torch.Tensor, **shape) -> MemoryImages:
    """Images whose normalisation is the identity."""
    channels, side = images.shape[1], images.shape[-1]
    shape = {"img_size": side, "in_chans": channels, "mean": (0.0,) * channels, "std": (1.0,) * channels} | shape
    return MemoryImages(images, torch.zeros(len(images), dtype=torch.long), ("only",), **shape)


@pytest.fixture(scope="module")
def embedded():
    return {split: load_images(tiny_config("fashion_mnist_mini"), split) for split in ("train", "test")}


# ---------------------------------------------------------------- the embedded set


@pytest.mark.parametrize(("split", "each"), [("train", 1000), ("test", 200)])
def test_the_embedded_set(embedded, split, each):
    source = embedded[split]
    assert len(source) == 10 * each and len(source.classes) == 10
    assert source.labels.dtype == torch.int64 and source.labels.bincount().tolist() == [each] * 10
    assert source.images.shape == (10 * each, 1, 32, 32) and source.images.dtype == torch.uint8
    inner = torch.zeros(32, 32, dtype=torch.bool)
    inner[2:-2, 2:-2] = True
    assert (source.images[..., ~inner] == 0).all()  # padded with black
    assert source.images[..., 2, :].any() and source.images[..., 29, :].any()  # by two pixels, no more
    assert source.images[..., 2].any() and source.images[..., 29].any()
    assert len(source.images.flatten(1).unique(dim=0)) > 9.9 * each


def test_the_embedded_images_belong_to_their_labels(embedded):
    """Trousers are tall and narrow, sandals lie low; a mosaic cut in the wrong order would mix them."""
    train, test = (embedded[s] for s in ("train", "test"))
    means = torch.stack([train.images[train.labels == c].float().mean(0).flatten() for c in range(10)])
    nearest = torch.cdist(test.images.float().flatten(1), means).argmin(1)
    assert (nearest == test.labels).float().mean() > 0.6  # the nearest class mean: 68 % on the whole set


def test_training_and_test_images_are_different_ones(embedded):
    train = {image.numpy().tobytes() for image in embedded["train"].images}
    shared = sum(image.numpy().tobytes() in train for image in embedded["test"].images)
    assert shared < 5


def test_the_stated_statistics_are_those_of_the_set(embedded):
    pixels = embedded["train"].images.double() / 255
    mean, std = STATISTICS["fashion_mnist_mini"]
    assert mean[0] == pytest.approx(float(pixels.mean()), abs=0.002)
    assert std[0] == pytest.approx(float(pixels.std()), abs=0.002)
    x = everything(embedded["train"])
    assert x.mean().abs() < 0.01 and (x.std() - 1).abs() < 0.01


# ---------------------------------------------------------------- images as they are


def test_batches_keep_order_and_are_normalised(embedded):
    source = embedded["test"]
    index = torch.tensor([1999, 0, 7, 7, 500])
    parts = list(source.batches(index, 2))
    assert [len(p) for p in parts] == [2, 2, 1]
    mean, std = STATISTICS["fashion_mnist_mini"]
    expected = ((source.images[index].double() / 255 - mean[0]) / std[0]).float().expand(-1, 3, -1, -1)
    torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-5, atol=1e-5)
    assert torch.cat(parts).dtype == torch.float32


def test_each_channel_has_its_own_statistics():
    images = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    source = plain_source(images, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    expected = (images / 255 - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)
    torch.testing.assert_close(everything(source), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("stored", "wanted"), [(1, 3), (3, 1), (1, 1), (3, 3)])
def test_channels(stored, wanted):
    images = torch.randint(0, 256, (4, stored, 8, 8), dtype=torch.uint8)
    x = everything(plain_source(images, in_chans=wanted))
    assert x.shape == (4, wanted, 8, 8)
    expected = images / 255 if stored == wanted else (images / 255).mean(1, keepdim=True).expand(-1, wanted, -1, -1)
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-6)
    crops = torch.tensor([[WHOLE]]).expand(1, 4, 5)
    assert next(plain_source(images, in_chans=wanted).augmented(torch.arange(4)[None], crops)).shape == (4, wanted, 8, 8)


def test_images_are_brought_to_the_encoders_size(embedded):
    source = load_images(tiny_config("fashion_mnist_mini", img_size=16), "test")
    small = everything(source)[:50]
    assert small.shape == (50, 3, 16, 16)
    torch.testing.assert_close(small.mean((2, 3)), everything(embedded["test"])[:50].mean((2, 3)), rtol=0, atol=0.05)


def test_images_in_memory_are_readable_and_counted(embedded):
    index = torch.tensor([5, 3, 3])
    assert torch.equal(embedded["test"].readable(index), index) and embedded["test"].unreadable == {}
    assert (embedded["train"].fingerprint, embedded["test"].fingerprint) == ("10000 images", "2000 images")


@pytest.mark.parametrize(
    ("bad", "message"), [(10, r"labels\[3\] = 10 is no class from 0 to 9"), (-1, r"labels\[3\] = -1 is no class from 0")]
)
def test_labels_without_a_class_are_refused(bad, message):
    shape = {"img_size": 8, "in_chans": 1, "mean": (0.5,), "std": (0.5,)}
    images, labels, classes = torch.zeros(5, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 9, 4, bad, bad]), tuple("abcdefghij")
    with pytest.raises(DataError, match=message):
        MemoryImages(images, labels, classes, **shape)
    MemoryImages(images, labels.clamp(0, 9), classes, **shape)


@pytest.mark.parametrize("labels", [torch.zeros(4).long(), torch.zeros(6).long(), torch.zeros(5, 1).long()])
def test_labels_that_are_not_one_for_each_image_are_refused(labels):
    with pytest.raises(DataError, match=r"labels: give one for each of the 5 images, \(5,\), not \("):
        MemoryImages(torch.zeros(5, 1, 8, 8, dtype=torch.uint8), labels, ("only",), img_size=8, in_chans=1, mean=(0.5,), std=(0.5,))


@pytest.mark.parametrize("images", [torch.zeros(5, 1, 8, 8), torch.zeros(5, 8, 8, dtype=torch.uint8)])
def test_images_that_are_not_bytes_of_that_shape_are_refused(images):
    with pytest.raises(DataError, match=r"images: give bytes \(N, C, H, W\), uint8 .* not torch\.\w+ \(5, "):
        plain_source(images, img_size=8, in_chans=1, mean=(0.5,), std=(0.5,))


# ---------------------------------------------------------------- augmentation


@pytest.fixture
def noise() -> tuple[MemoryImages, torch.Tensor]:
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return plain_source(images), images / 255


def augment(source: MemoryImages, crop: list[float]) -> torch.Tensor:
    """All images of a source under one crop: left, top, width and height as shares, and mirror."""
    n, (height, width) = len(source), source.images.shape[-2:]
    return next(source.augmented(torch.arange(n)[None], torch.tensor(frames(*crop, width, height)).expand(1, n, 5)))


def test_the_whole_image_is_a_crop_that_changes_nothing(noise):
    source, images = noise
    torch.testing.assert_close(augment(source, [0, 0, 1, 1, 0]), images, rtol=0, atol=1e-4)


def test_mirroring_is_a_flip(noise):
    source, images = noise
    torch.testing.assert_close(augment(source, [0, 0, 1, 1, 1]), images.flip(-1), rtol=0, atol=1e-4)
    crop = [0.3, 0.2, 0.5, 0.6]
    torch.testing.assert_close(augment(source, [*crop, 1]), augment(source, [*crop, 0]).flip(-1), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("crop", "part"),
    [
        ([0, 0, 0.5, 1], np.s_[..., :, :16]),
        ([0.5, 0, 0.5, 1], np.s_[..., :, 16:]),
        ([0, 0, 1, 0.5], np.s_[..., :16, :]),
        ([0.25, 0.5, 0.5, 0.25], np.s_[..., 16:24, 8:24]),
    ],
)
def test_a_crop_is_that_part_of_the_image_enlarged(noise, crop, part):
    source, images = noise
    expected = F.interpolate(images[part], size=(32, 32), mode="bilinear", align_corners=False)
    inner = np.s_[..., 4:-4, 4:-4]  # at its border a crop may look at its neighbours, an image has none
    torch.testing.assert_close(augment(source, [*crop, 0])[inner], expected[inner], rtol=0, atol=1e-4)


def test_each_image_has_its_own_crop(noise):
    source, _ = noise
    index, crops = torch.tensor([[2, 5], [0, 1]]), torch.rand(2, 2, 5) * 0.5 + 0.4
    crops[..., 4] = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    for part, crop, batch in zip(index, crops, source.augmented(index, crops), strict=True):
        for i in range(2):
            alone = next(source.augmented(part[None, i : i + 1], crop[None, i : i + 1]))
            torch.testing.assert_close(batch[i], alone[0], rtol=0, atol=1e-6)


def test_random_crops_lie_inside_the_image():
    cfg = tiny_config(crop_scale=(0.3, 0.6), horizontal_flip=True)
    crops = random_crops(4000, cfg, torch.Generator().manual_seed(0))
    left, top, wide, high = crop_box(crops, 1, 1).unbind(1)
    for start, length in ((left, wide), (top, high)):
        assert start.min() >= 0 and length.min() > 0 and (start + length).max() <= 1 + 1e-6
    area, aspect, mirror = wide * high, wide / high, crops[:, 4]
    assert area.min() > 0.295 and area.max() < 0.605 and area.min() < 0.31 and area.max() > 0.59
    assert 0.74 < aspect.min() < 0.77 and 1.3 < aspect.max() < 1.34
    assert sorted(mirror.unique().tolist()) == [0, 1] and abs(mirror.mean() - 0.5) < 0.05
    for start, length in ((left, wide), (top, high)):
        assert abs((start / (1 - length).clamp(min=1e-3)).mean() - 0.5) < 0.03  # anywhere, with no favoured side
    cfg.data.horizontal_flip = False
    assert (random_crops(100, cfg, torch.Generator().manual_seed(0))[:, 4] == 0).all()


def test_the_crops_of_square_images_are_what_they_always_were():
    """Five uniform numbers a crop: area, aspect, left, top, mirror; each side cut to the image. A resumed run depends on it."""
    cfg = tiny_config(crop_scale=(0.8, 1.0), horizontal_flip=True)
    crops = random_crops(500, cfg, torch.Generator().manual_seed(3))
    u = torch.rand(5, 500, generator=torch.Generator().manual_seed(3))
    area, aspect = 0.8 + u[0] * 0.2, (4 / 3) ** (2 * u[1] - 1)
    wide, high = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    assert (wide == 1).any() and (high == 1).any()
    expected = 32 * torch.stack([u[2] * (1 - wide), u[3] * (1 - high), wide, high], dim=1)
    torch.testing.assert_close(crop_box(crops, 32, 32), expected, rtol=1e-6, atol=1e-5)
    assert torch.equal(crops[:, 4], (u[4] < 0.5).float())


@pytest.mark.parametrize(("width", "height"), [(32, 32), (400, 300), (300, 400), (1000, 300)])
def test_a_share_of_one_is_the_whole_image(width, height):
    """Up to 4:3, as torchvision's RandomResizedCrop has it."""
    boxes = crop_box(random_crops(50, tiny_config(crop_scale=(1.0, 1.0)), torch.Generator().manual_seed(0)), width, height)
    _, _, wide, high = RandomResizedCrop.get_params(torch.empty(1, height, width), (1.0, 1.0), (3 / 4, 4 / 3))
    torch.testing.assert_close(boxes[:, 2:], torch.tensor([[float(high), float(wide)]]).expand(50, 2))
    if (wide, high) == (height, width):
        assert not boxes[:, :2].any()


@pytest.mark.parametrize(("width", "height"), [(400, 300), (300, 400), (300, 300)])
def test_crops_have_the_shapes_that_torchvision_draws(width, height):
    """Drawn in pixels: in shares of the image, the crops of a 4:3 photograph would have a median of 1.33, from 1.04 to 1.71."""
    cfg, image = tiny_config(crop_scale=(0.3, 1.0)), torch.empty(1, height, width)
    *_, wide, high = crop_box(random_crops(10_000, cfg, torch.Generator().manual_seed(0)), width, height).unbind(1)
    assert wide.max() <= width + 1e-3 and high.max() <= height + 1e-3
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = torch.tensor([RandomResizedCrop.get_params(image, (0.3, 1.0), (3 / 4, 4 / 3)) for _ in range(3000)]).float()
    at = torch.tensor([0.05, 0.5, 0.95])
    torch.testing.assert_close((wide / high).quantile(at), (theirs[:, 3] / theirs[:, 2]).quantile(at), rtol=0, atol=0.08)


@pytest.mark.parametrize(("width", "height"), [(4000, 100), (100, 4000), (200, 100)])
def test_no_crop_of_a_panorama_is_squeezed_further_than_four_to_three(width, height):
    left, top, wide, high = crop_box(random_crops(500, tiny_config(), torch.Generator().manual_seed(0)), width, height).unbind(1)
    assert (wide / high).max() < 1.3334 and (wide / high).min() > 0.7499
    for start, length, whole in ((left, wide, width), (top, high, height)):
        assert start.min() >= 0 and (start + length).max() <= whole * (1 + 1e-6)
    assert torch.maximum(wide / width, high / height).min() > 0 and torch.minimum(wide, high).max() == pytest.approx(100)


def pillows(pixels: torch.Tensor, box: list[float], mirror: float, size: int) -> torch.Tensor:
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    image = image.resize((size, size), Image.Resampling.BILINEAR, box=(box[0], box[1], box[0] + box[2], box[1] + box[3]))
    small = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return small.flip(-1) if mirror else small


@pytest.mark.parametrize("size", [8, 24, 96])
def test_resampling_is_pillows(size):
    """Smaller, larger, and smaller across but larger down; the box of each image where it likes."""
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (40, 3, 30, 40), dtype=torch.uint8, generator=random)
    crops = random_crops(40, tiny_config(crop_scale=(0.02, 1.0), horizontal_flip=True), random)
    boxes = crop_box(crops, 40, 30)
    mine = resample(pixels, boxes, crops[:, 4], size)
    theirs = torch.stack([pillows(p, box, m, size) for p, box, m in zip(pixels, boxes.tolist(), crops[:, 4].tolist(), strict=True)])
    assert mine.dtype == torch.float32 and mine.shape == (40, 3, size, size)
    assert (mine - theirs).abs().max() < 1.1  # which rounds after each direction


def test_enlarging_is_bilinear_with_the_border_repeated():
    """What the crops of images as small as the encoder's have always been, to rounding."""
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (64, 1, 32, 32), dtype=torch.uint8, generator=random)
    crops = random_crops(64, tiny_config(crop_scale=(0.8, 1.0), horizontal_flip=True), random)
    left, top, wide, high = crop_box(crops, 1, 1).unbind(1)
    theta = torch.zeros(64, 2, 3)  # one affine map an image crops, resizes and mirrors at once
    theta[:, 0, 0], theta[:, 0, 2] = wide * (1 - 2 * crops[:, 4]), 2 * left + wide - 1
    theta[:, 1, 1], theta[:, 1, 2] = high, 2 * top + high - 1
    at = F.affine_grid(theta, [64, 1, 32, 32], align_corners=False)
    expected = F.grid_sample(pixels.float(), at, mode="bilinear", padding_mode="border", align_corners=False)
    torch.testing.assert_close(resample(pixels, crop_box(crops, 32, 32), crops[:, 4], 32), expected, rtol=0, atol=0.01)


def test_training_and_evaluation_see_one_distribution():
    """Noise of 96 pixels that is shrunk to 32 loses three quarters of its deviation, also under a crop; without antialiasing all stays."""
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (60, 3, 96, 96), dtype=torch.uint8, generator=random)
    source = plain_source(images, img_size=32)
    tested, trained = everything(source).std(), augment(source, [0, 0, 1, 1, 0]).std()
    alone = F.interpolate(images / 255, size=(32, 32), mode="bilinear", antialias=True).std()
    assert tested == pytest.approx(float(alone), rel=1e-3) and trained == pytest.approx(float(alone), rel=1e-3)
    drawn = next(source.augmented(torch.arange(60)[None], random_crops(60, tiny_config(crop_scale=(0.8, 1.0)), random)[None]))
    assert drawn.std() == pytest.approx(float(alone), rel=0.1) and alone < 0.3 * (images / 255).std()


def test_images_in_memory_that_are_no_squares_are_cut_not_squeezed():
    images = torch.zeros(1, 1, 20, 40, dtype=torch.uint8)
    images[..., 10:30] = 255
    source = plain_source(images, img_size=20)
    assert (everything(source) == 1).all()
    ours = augment(source, [0.25, 0.0, 0.5, 1.0, 0])
    torch.testing.assert_close(ours, everything(source), rtol=0, atol=1e-5)


# ---------------------------------------------------------------- the batches of an epoch


def spied(source: MemoryImages, monkeypatch) -> list[torch.Tensor]:
    """Record which images each training batch is made of."""
    seen, original = [], source.augmented

    def augmented(index, crops, *device):
        seen.extend(index)
        return original(index, crops, *device)

    monkeypatch.setattr(source, "augmented", augmented)
    return seen


def test_an_epoch_holds_each_image_at_most_once(monkeypatch):
    cfg = tiny_config(fake_data_size=43)
    source = load_images(cfg)
    seen = spied(source, monkeypatch)
    batches = list(training_batches(source, cfg, epoch=0))
    assert [b.shape for b in batches] == [(8, 3, 32, 32)] * 5 and steps_per_epoch(source, cfg) == 5  # three are left out
    assert len(torch.cat(seen)) == len(torch.cat(seen).unique()) == 40
    first = torch.cat(seen).clone()
    seen.clear()
    list(training_batches(source, cfg, epoch=1))
    assert len(torch.cat(seen).unique()) == 40 and not torch.equal(torch.cat(seen), first)


def test_training_batches_follow_seed_and_epoch():
    cfg = tiny_config()
    source = load_images(cfg)

    def batches(epoch=0, seed=0):
        cfg.hardware.seed = seed
        torch.manual_seed(torch.seed() % 1000)  # whatever else is random does not matter
        return torch.stack(list(training_batches(source, cfg, epoch)))

    assert torch.equal(batches(), batches())
    assert not torch.equal(batches(epoch=0), batches(epoch=1))
    assert not torch.equal(batches(seed=0), batches(seed=1))


def test_an_epoch_can_be_entered_in_the_middle():
    cfg = tiny_config()
    source = load_images(cfg)
    whole = list(training_batches(source, cfg, epoch=2))
    for first in range(6):
        rest = list(training_batches(source, cfg, epoch=2, first_step=first))
        assert len(rest) == 5 - first
        assert all(torch.equal(a, b) for a, b in zip(rest, whole[first:], strict=True))


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_the_parts_of_several_processes_are_the_whole_batch(ranks):
    cfg = tiny_config()
    source = load_images(cfg)
    whole = list(training_batches(source, cfg, epoch=2, first_step=1))
    parts = [list(training_batches(source, cfg, epoch=2, first_step=1, part=(rank, ranks))) for rank in range(ranks)]
    assert all(len(batch) == 8 // ranks for part in parts for batch in part)
    assert len(whole) == 4 and all(torch.equal(torch.cat(side), one) for side, one in zip(zip(*parts, strict=True), whole, strict=True))


def test_the_augmentation_of_one_image_differs_between_epochs():
    cfg = tiny_config(fake_data_size=20, train_batch_size=20)
    source = plain_source(torch.arange(32, dtype=torch.uint8).expand(20, 1, 32, 32).contiguous())  # all images alike
    one, other = (next(training_batches(source, cfg, epoch)) for epoch in (0, 1))
    assert len(one.flatten(1).unique(dim=0)) > 10
    assert not torch.equal(one.flatten(1).unique(dim=0), other.flatten(1).unique(dim=0))


def test_a_batch_larger_than_the_set_is_refused():
    cfg = tiny_config(fake_data_size=20, train_batch_size=21)
    source = load_images(cfg)
    with pytest.raises(DataError, match=r"data\.train_batch_size = 21 .*20 images: make it smaller"):
        next(training_batches(source, cfg, epoch=0))


# ---------------------------------------------------------------- noise


@pytest.mark.parametrize("channels", [1, 3])
def test_fake_data(channels):
    cfg = tiny_config(img_size=16, in_chans=channels, fake_data_size=50)
    train, again, test = load_images(cfg), load_images(cfg), load_images(cfg, "test")
    assert len(train) == len(test) == 50 and len(train.classes) == 10
    assert everything(train).shape == (50, channels, 16, 16)
    assert torch.equal(everything(train), everything(again)) and not torch.equal(everything(train), everything(test))
    assert train.labels.bincount().tolist() == [5] * 10
    cfg.hardware.seed = 1
    assert not torch.equal(everything(train), everything(load_images(cfg)))
    assert everything(train).mean().abs() < 0.1 and (everything(train).std() - 1).abs() < 0.1


# ---------------------------------------------------------------- names


def test_an_unknown_set_names_the_nearest():
    with pytest.raises(ConfigError, match=r"data\.dataset = 'cifar11' is not known; did you mean 'cifar10'\?"):
        load_images(tiny_config("cifar11"))


def test_an_unknown_split_is_refused():
    with pytest.raises(ConfigError, match="split = 'valid': give 'train' or 'test'"):
        load_images(tiny_config(), "valid")


def test_the_available_sets():
    names = available_datasets()
    assert names == sorted(names) and "fake" not in names
    assert {"fashion_mnist_mini", "fashion_mnist", "cifar10", "cifar100", "stl10", "svhn", "imagenette", "imagefolder"} <= set(names)
    for mean, std in STATISTICS.values():
        assert len(mean) == len(std) in (1, 3) and all(0 < m < 1 for m in mean) and all(0 < s < 1 for s in std)


# ---------------------------------------------------------------- torchvision's sets


TORCHVISION = {
    "fashion_mnist": "FashionMNIST",
    "mnist": "MNIST",
    "kmnist": "KMNIST",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "svhn": "SVHN",
    "stl10": "STL10",
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_a_set_that_is_absent_offline(name, tmp_path, monkeypatch):
    asked = []

    def download(self, *_):
        asked.append(type(self).__name__)
        raise OSError("the network is unreachable")

    original = getattr(torchvision.datasets, TORCHVISION[name]).__init__

    def init(self, *args, download=False, **kwargs):
        if download:
            asked.append(type(self).__name__)
            raise OSError("the network is unreachable")
        original(self, *args, download=False, **kwargs)

    monkeypatch.setattr(getattr(torchvision.datasets, TORCHVISION[name]), "__init__", init)
    with pytest.raises(DataError) as caught:
        load_images(tiny_config(name, root=str(tmp_path / "nowhere")))
    message = str(caught.value)
    for part in (f"data.dataset = '{name}'", str(tmp_path / "nowhere"), "the network is unreachable", "fashion_mnist_mini"):
        assert part in message
    assert asked == [TORCHVISION[name]]  # a download was tried, once


def write_idx(path, array: np.ndarray, packed: bool = False) -> None:
    """MNIST's file format: two zero bytes, the type, the number of dimensions, the sizes, the bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(content) if packed else content)


@pytest.mark.parametrize("name", ["fashion_mnist", "mnist", "kmnist"])
def test_grey_sets_on_disk(name, tmp_path, monkeypatch):
    monkeypatch.setattr(getattr(torchvision.datasets, TORCHVISION[name]), "download", lambda self: pytest.fail("no download"))
    random = np.random.default_rng(0)
    written = {}
    for split, n in (("train", 30), ("t10k", 20)):
        images, labels = written[split] = random.integers(0, 256, (n, 28, 28), np.uint8), random.permutation(n).astype(np.uint8) % 10
        write_idx(tmp_path / TORCHVISION[name] / "raw" / f"{split}-images-idx3-ubyte", images)
        write_idx(tmp_path / TORCHVISION[name] / "raw" / f"{split}-labels-idx1-ubyte", labels)
    for split, stem in (("train", "train"), ("test", "t10k")):
        source = load_images(tiny_config(name, root=str(tmp_path)), split)
        images, labels = written[stem]
        assert source.images.shape == (len(images), 1, 32, 32) and len(source.classes) == 10
        assert torch.equal(source.images[:, 0, 2:-2, 2:-2], torch.from_numpy(images))
        assert torch.equal(source.labels, torch.from_numpy(labels).long())
        assert everything(source).shape == (len(images), 3, 32, 32)


@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_colour_sets_on_disk(name, classes, tmp_path, monkeypatch):
    """Rows of 3,072 bytes: all red ones of the image row by row, then green, then blue."""
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, *_: True)
    random = np.random.default_rng(0)
    key, meta = ("labels", "label_names") if classes == 10 else ("fine_labels", "fine_label_names")
    if classes == 10:
        folder, meta_file, files = "cifar-10-batches-py", "batches.meta", [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    else:
        folder, meta_file, files = "cifar-100-python", "meta", ["train", "test"]
    (tmp_path / folder).mkdir()
    (tmp_path / folder / meta_file).write_bytes(pickle.dumps({meta: [f"class {c}" for c in range(classes)]}))
    data = {file: (random.integers(0, 256, (6, 3072), np.uint8), random.integers(0, classes, 6).tolist()) for file in files}
    for file, (rows, labels) in data.items():
        (tmp_path / folder / file).write_bytes(pickle.dumps({"data": rows, key: labels}))
    for split, chosen in (("train", files[:-1]), ("test", files[-1:])):
        source = load_images(tiny_config(name, root=str(tmp_path)), split)
        rows = np.concatenate([data[file][0] for file in chosen])
        assert source.images.shape == (len(rows), 3, 32, 32) and len(source.classes) == classes
        assert np.array_equal(source.images.numpy().reshape(len(rows), 3072), rows)
        assert source.labels.tolist() == [label for file in chosen for label in data[file][1]]


@pytest.mark.parametrize(("name", "side"), [("svhn", 32), ("stl10", 96)])
def test_sets_whose_split_has_a_name(name, side, tmp_path, monkeypatch):
    """Both give channels first and `labels` rather than `targets`."""
    asked = []

    class Present:
        def __init__(self, root, split, download):
            asked.append((root, split, download))
            self.data = np.random.default_rng(0).integers(0, 256, (7, 3, side, side), np.uint8)
            self.labels = np.arange(7)

    monkeypatch.setattr(torchvision.datasets, TORCHVISION[name], Present)
    source = load_images(tiny_config(name, root=str(tmp_path)), "test")
    assert asked == [(str(tmp_path), "test", False)]
    images = Present("", "", False).data
    assert np.array_equal(source.images.numpy(), images)
    assert source.labels.tolist() == list(range(7)) and len(source.classes) == 10
    assert everything(source).shape == (7, 3, 32, 32)
    monkeypatch.setattr(Present, "__init__", lambda self, root, split, download: vars(self).update(data=images, labels=np.arange(7) + 4))
    with pytest.raises(DataError, match=r"labels\[6\] = 10 is no class from 0 to 9"):
        load_images(tiny_config(name, root=str(tmp_path)))


# ---------------------------------------------------------------- a folder of images


def save(path, pixels: np.ndarray, mode: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path)


@pytest.fixture
def folder(tmp_path):
    """Twelve training and four test images in two classes, of several sizes and kinds."""
    random = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 2)):
        for c, name in enumerate(("cat", "dog")):
            for i in range(count):
                shape = (40 + 8 * i, 40) if i % 2 else (40, 40 + 8 * i, 3)  # grey and colour, tall and wide
                pixels = random.integers(100 * c, 100 * c + 100, shape).astype(np.uint8)
                save(tmp_path / split / name / f"{i}.png", pixels, "P" if i == 2 else None)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    return tmp_path


def folder_config(root, **data) -> IJepaConfig:
    return tiny_config("imagefolder", img_size=24, root=str(root), **{"train_batch_size": 5} | data)


def test_a_folder_of_images(folder):
    train, test = (load_images(folder_config(folder), split) for split in ("train", "test"))
    assert isinstance(train, FolderImages)
    assert (len(train), len(test)) == (12, 4)
    assert train.classes == test.classes == ("cat", "dog")
    assert train.labels.tolist() == [0] * 6 + [1] * 6
    x = everything(train, 5)
    assert x.shape == (12, 3, 24, 24) and x.dtype == torch.float32
    brightness = x.mean((1, 2, 3))
    assert brightness[:6].max() < brightness[6:].min()  # cats were made dark
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in STATISTICS["imagefolder"])
    grey = x[torch.tensor([1, 3, 5])] * std + mean
    torch.testing.assert_close(grey[:, 0], grey[:, 2], rtol=0, atol=1e-5)


def test_colours_and_sides_of_a_file_survive(tmp_path):
    """The centre of a wide image, red above blue, keeps red first and above."""
    pixels = np.zeros((24, 40, 3), np.uint8)
    pixels[:12, :, 0] = pixels[12:, :, 2] = 255
    pixels[:, :8] = pixels[:, 32:] = 7  # what the central square leaves out
    save(tmp_path / "train" / "a" / "1.png", pixels)
    source = load_images(folder_config(tmp_path))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in STATISTICS["imagefolder"])
    back = (everything(source)[0] * std + mean) * 255
    torch.testing.assert_close(back, torch.from_numpy(pixels[:, 8:32].transpose(2, 0, 1)).float(), rtol=0, atol=0.01)


def test_folder_crops_and_mirrors_agree_with_those_in_memory(tmp_path):
    """A smooth image, so that the two ways to resample differ little."""
    y, x = np.mgrid[0:48, 0:48] / 47
    pixels = np.stack([255 * x, 255 * y, 255 * x * y], -1).astype(np.uint8)
    save(tmp_path / "train" / "a" / "1.png", pixels)
    on_disk = load_images(folder_config(tmp_path))
    mean, std = STATISTICS["imagefolder"]
    in_memory = plain_source(torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous(), img_size=24, mean=mean, std=std)
    for crop in ([0, 0, 1, 1, 0], [0.25, 0.5, 0.5, 0.5, 0], [0.1, 0.3, 0.6, 0.4, 1]):
        index, crops = torch.tensor([[0]]), torch.tensor([[frames(*crop)]])
        one, other = next(on_disk.augmented(index, crops)), next(in_memory.augmented(index, crops))
        torch.testing.assert_close(one, other, rtol=0, atol=0.12)


def test_workers_change_nothing(folder):
    alone, helped = (folder_config(folder, num_workers=n) for n in (0, 1))
    one, other = (list(training_batches(load_images(cfg), cfg, epoch=0)) for cfg in (alone, helped))
    assert len(one) == 2 and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert torch.equal(everything(load_images(alone), 5), everything(load_images(helped), 5))


def test_val_serves_as_test(folder):
    (folder / "test").rename(folder / "val")
    assert len(load_images(folder_config(folder), "test")) == 4


def test_a_class_that_the_test_images_lack_does_not_shift_the_others(folder):
    (folder / "test" / "cat").rename(folder / "cat")
    train, test = (load_images(folder_config(folder), split) for split in ("train", "test"))
    assert {train.classes[c] for c in test.labels.tolist()} == {"dog"}


def test_images_without_class_folders_are_one_class(tmp_path):
    save(tmp_path / "train" / "1.png", np.zeros((24, 24), np.uint8))
    source = load_images(folder_config(tmp_path, train_batch_size=2))
    assert len(source.classes) == 1 and source.labels.tolist() == [0]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_file_is_named(folder, workers):
    (folder / "train" / "dog" / "3.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    source = load_images(folder_config(folder, num_workers=workers))
    with pytest.raises(DataError, match=r"dog.3\.png cannot be read as an image .*repair or remove it"):
        everything(source, 5)


def test_a_truncated_file_is_named(folder):
    path = folder / "train" / "cat" / "0.png"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"cat.0\.png cannot be read"):
        everything(load_images(folder_config(folder)), 5)


def test_a_missing_folder_is_named(tmp_path):
    for split, named in (("train", "no folder train"), ("test", "no folder test or val")):
        with pytest.raises(DataError, match=named) as caught:
            load_images(folder_config(tmp_path / "photos"), split)
        assert repr(str(tmp_path / "photos")) in str(caught.value)


def test_an_empty_folder_is_named(tmp_path):
    (tmp_path / "train" / "cat").mkdir(parents=True)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    with pytest.raises(DataError, match="holds no images") as caught:
        load_images(folder_config(tmp_path))
    assert str(tmp_path / "train") in str(caught.value)


def test_a_folder_without_splits_is_all_for_training(folder):
    """Nested folders, whose names are classes, and a flat one, which has one class."""
    for root, labels in ((folder / "train", [0] * 6 + [1] * 6), (folder / "train" / "cat", [0] * 6)):
        source = load_images(folder_config(root))
        assert source.labels.tolist() == labels and everything(source, 5).shape == (len(labels), 3, 24, 24)
        with pytest.raises(DataError, match="no folder test or val"):
            load_images(folder_config(root), "test")
    deep = folder / "photos" / "2019" / "07"
    deep.mkdir(parents=True)
    shutil.copy(folder / "train" / "cat" / "0.png", deep / "a.png")
    assert len(load_images(folder_config(folder / "photos"))) == 1
    shutil.rmtree(folder / "train")  # but test/ is not taken for training images
    with pytest.raises(DataError, match="no folder train"):
        load_images(folder_config(folder))


def test_a_text_file_lists_image_files(folder, monkeypatch):
    listed = folder / "list.txt"
    listed.write_text(f"train/dog/1.png\n\n{folder / 'test' / 'cat' / '0.png'}\ntrain/cat/2.png\n", encoding="utf-8")
    monkeypatch.chdir("/")
    source = load_images(folder_config(listed))
    assert source.classes == ("",) and source.labels.tolist() == [0] * 3
    whole = load_images(folder_config(folder))
    assert torch.equal(everything(source, 5)[0], everything(whole, 5)[7])
    for text, told in (("", "is empty"), ("train/dog/1.png\nnotes.md\n", "names 'notes.md': list image files")):
        listed.write_text(text)
        with pytest.raises(DataError, match=told):
            load_images(folder_config(listed))
    listed.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read as a list of image files"):
        load_images(folder_config(listed))


def test_imagenette_is_found_where_its_archive_unpacks(folder, tmp_path):
    inside = tmp_path / "root" / "imagenette2-160"
    inside.mkdir(parents=True)
    (folder / "train").rename(inside / "train")
    (folder / "test").rename(inside / "val")
    cfg = tiny_config("imagenette", img_size=24, root=str(tmp_path / "root"))
    assert (len(load_images(cfg)), len(load_images(cfg, "test"))) == (12, 4)


def test_the_photograph_that_ships():
    photograph = example_photograph()
    assert photograph.shape == (3, 224, 224) and photograph.dtype == torch.uint8
    assert photograph.float().std() > 30  # a picture, not a plane
