"""Image files as people have them: what can be read is read right, what cannot is named and passed over, and too much of it is an error."""

import contextlib
import errno
import io
import multiprocessing
import os
import random
import signal
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from framing import frames
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from wejepa.config import DataConfig, HardwareConfig, IJepaConfig, MaskConfig, ModelConfig
from wejepa.data import IMAGENET, DeadWorker, FolderImages, decoding, load_images, read_image, sources, training_batches
from wejepa.errors import DataError
from wejepa.model import IJEPA_base
from wejepa.train import finetune
from wejepa.train.finetune import FinetuneConfig, Judge

QUICK = settings(max_examples=400, deadline=None, derandomize=True, database=None)
COLOUR, SIZE = (200, 100, 50), 24
BLACK, WHITE = (0, 0, 0), (255, 255, 255)
PHOTO = (40, 30)  # the fixture's
WHOLE = frames(0.0, 0.0, 1.0, 1.0, 0.0, *PHOTO)


def folder_config(root, batch: int = 4, share: float = 0.5, workers: int = 0) -> IJepaConfig:
    where = {"dataset": "imagefolder", "root": str(root)}
    return IJepaConfig(
        data=DataConfig(**where, train_batch_size=batch, max_unreadable_share=share, num_workers=workers),
        mask=MaskConfig(target_scale=(0.1, 0.2), context_share=0.3),
        model=ModelConfig(img_size=SIZE, patch_size=4, embed_dim=16, enc_depth=1, pred_depth=1, pred_dim=12, num_heads=2),
        hardware=HardwareConfig(device="cpu", mixed_precision=False),
    )


def plain(colour=COLOUR, mode: str = "RGB", size: tuple[int, int] = (SIZE, SIZE)) -> Image.Image:
    return Image.new(mode, size, colour)


def quarters(width: int = 48, height: int = 32) -> Image.Image:
    """Four colours, so that no turn and no mirroring leaves the image as it was."""
    image = plain(COLOUR, size=(width, height))
    for x, y, colour in ((1, 0, (20, 20, 220)), (0, 1, (30, 200, 30)), (1, 1, (230, 230, 230))):
        image.paste(colour, (x * width // 2, y * height // 2, (x + 1) * width // 2, (y + 1) * height // 2))
    return image


def assert_colour(pixels: torch.Tensor, colour: tuple[int, int, int], tolerance: int = 0) -> None:
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, SIZE, SIZE)
    assert (pixels.int() - torch.tensor(colour).view(3, 1, 1)).abs().max() <= tolerance


def damage(path: Path, kind: str) -> None:
    """Make a JPEG file one of those that cannot be read."""
    content = path.read_bytes()
    path.unlink()
    if kind == "a link to nothing":
        path.symlink_to(path.with_name("gone"))
    else:
        path.write_bytes({"header": b"\xff\xd8" + bytes(50), "truncated": content[:-20], "empty": b"", "text": b"no image\n"}[kind])


UNREADABLE = {
    "header": "its content is no image of a known kind",
    "truncated": "image file is truncated",
    "empty": "its content is no image of a known kind",
    "text": "its content is no image of a known kind",
    "a link to nothing": "No such file or directory",
}


@pytest.fixture
def folder(tmp_path):
    """Twelve training and eight test photos, each of its own grey, in two classes."""
    for split, count in (("train", 12), ("test", 8)):
        for i in range(count):
            path = tmp_path / split / ("cat", "dog")[2 * i // count] / f"{i:02d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            plain((20 * i,) * 3, size=(40, 30)).save(path)
    return tmp_path


def grey_of(batch: torch.Tensor) -> list[int]:
    """Which image of the fixture each one of a batch (B, C, S, S) is."""
    mean, std = IMAGENET
    return ((batch[:, 0].mean((1, 2)) * std[0] + mean[0]) * 255 / 20).round().int().tolist()


def under(source: FolderImages, index: list[int], crop: list[float] = WHOLE) -> torch.Tensor:
    return next(source.augmented(torch.tensor([index]), torch.tensor(crop).expand(1, len(index), 5)))


@contextlib.contextmanager
def warned():
    """The warnings of a block, as texts."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield texts
    texts.extend(str(w.message) for w in found)


# ---------------------------------------------------------------- what can be read is read right


@pytest.mark.parametrize("ending", ["png", "bmp", "tif", "webp", "ppm", "gif"])
def test_a_colour_in_every_format(tmp_path, ending):
    path = tmp_path / f"1.{ending}"
    plain().save(path, **({"lossless": True} if ending == "webp" else {}))
    assert_colour(read_image(path, SIZE), COLOUR)


def two_halves(mode: str, left, right) -> Image.Image:
    image = plain(left, mode)
    image.paste(right, (SIZE // 2, 0, SIZE, SIZE))
    return image


def sixteen_bits(kind: str) -> Image.Image:
    pixels = np.full((SIZE, SIZE), 40000, kind)
    pixels[:, SIZE // 2 :] = 300
    return Image.fromarray(pixels)


def with_palette() -> Image.Image:
    image = two_halves("P", 0, 1)
    image.putpalette([*COLOUR, 10, 20, 30])
    return image


HALF = tuple(round((c * 128 + 255 * 127) / 255) for c in COLOUR)
MODES = {
    "CMYK, as JPEG": (lambda p: plain().convert("CMYK").save(p), "jpg", COLOUR, COLOUR, 3),
    "CMYK, as TIFF": (lambda p: plain().convert("CMYK").save(p), "tif", COLOUR, COLOUR, 1),
    "YCbCr": (lambda p: plain().convert("YCbCr").save(p), "tif", COLOUR, COLOUR, 2),
    "LAB": (lambda p: Image.merge("LAB", [plain(v, "L") for v in (137, 128, 128)]).save(p), "tif", (128,) * 3, (128,) * 3, 2),
    "a palette": (lambda p: with_palette().save(p), "png", COLOUR, (10, 20, 30), 0),
    "a palette with one transparent colour": (lambda p: with_palette().save(p, transparency=1), "png", COLOUR, WHITE, 0),
    "a palette with half-transparent colours": (lambda p: with_palette().save(p, transparency=bytes((128, 0))), "png", HALF, WHITE, 1),
    "RGBA": (lambda p: two_halves("RGBA", (*COLOUR, 128), (*COLOUR, 0)).save(p), "png", HALF, WHITE, 1),
    "RGBA in WebP": (lambda p: two_halves("RGBA", (*COLOUR, 255), (*COLOUR, 0)).save(p, lossless=True), "webp", COLOUR, WHITE, 0),
    "RGB with a transparent colour": (lambda p: two_halves("RGB", COLOUR, BLACK).save(p, transparency=BLACK), "png", COLOUR, WHITE, 0),
    "grey": (lambda p: two_halves("L", 40, 90).save(p), "png", (40,) * 3, (90,) * 3, 0),
    "grey with alpha": (lambda p: two_halves("LA", (100, 255), (100, 0)).save(p), "png", (100,) * 3, WHITE, 0),
    "grey with a transparent value": (lambda p: two_halves("L", 40, 90).save(p, transparency=90), "png", (40,) * 3, WHITE, 0),
    "one bit": (lambda p: two_halves("1", 0, 1).save(p), "png", BLACK, WHITE, 0),
    "one bit, as TIFF": (lambda p: two_halves("1", 1, 0).save(p), "tif", WHITE, BLACK, 0),
    "sixteen bits": (lambda p: sixteen_bits("<u2").save(p), "png", (40000 >> 8,) * 3, (1,) * 3, 0),
    "sixteen bits, the high byte first": (lambda p: sixteen_bits(">u2").save(p), "tif", (40000 >> 8,) * 3, (1,) * 3, 0),
    "thirty-two bits that hold sixteen": (lambda p: two_halves("I", 40000, 300).save(p), "tif", (40000 >> 8,) * 3, (1,) * 3, 0),
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_is_read_as_colour(tmp_path, name):
    write, ending, left, right, tolerance = MODES[name]
    write(path := tmp_path / f"1.{ending}")
    pixels = read_image(path, SIZE)
    expected = torch.cat([torch.tensor(c).view(3, 1, 1).expand(3, SIZE, SIZE // 2) for c in (left, right)], 2)
    assert pixels.dtype == torch.uint8 and (pixels.int() - expected).abs().max() <= tolerance


def test_a_gradient_of_sixteen_bits_keeps_its_greys(tmp_path):
    ramp = np.linspace(0, 65535, SIZE * SIZE).astype(np.uint16).reshape(SIZE, SIZE)
    Image.fromarray(ramp).save(tmp_path / "1.png")
    assert torch.equal(read_image(tmp_path / "1.png", SIZE), torch.from_numpy((ramp >> 8).astype(np.uint8)).expand(3, -1, -1))


@pytest.mark.parametrize("value", [65536, -1, 2**31 - 1])
def test_whole_numbers_of_unknown_range_are_not_guessed_at(tmp_path, value):
    two_halves("I", 40, value).save(tmp_path / "1.tif")
    with pytest.raises(ValueError, match="mode I, whose range is not known: save them with 8 or 16 bits"):
        read_image(tmp_path / "1.tif", SIZE)


def test_floating_point_pixels_are_not_guessed_at(tmp_path):
    plain(0.5, "F").save(tmp_path / "1.tif")
    with pytest.raises(ValueError, match="mode F, whose range is not known"):
        read_image(tmp_path / "1.tif", SIZE)


@pytest.mark.parametrize("ending", ["gif", "png", "webp", "tif"])
def test_the_first_frame_of_an_animation(tmp_path, ending):
    frames = [plain(colour) for colour in (COLOUR, BLACK, WHITE)]
    extra = {"lossless": True} if ending == "webp" else {}
    frames[0].save(tmp_path / f"1.{ending}", save_all=True, append_images=frames[1:], **extra)
    with Image.open(tmp_path / f"1.{ending}") as image:
        assert image.n_frames == 3
    assert_colour(read_image(tmp_path / f"1.{ending}", SIZE), COLOUR)


TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # EXIF's orientation, and Pillow's transposition that is undone by it


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize(("ending", "scale"), [("jpg", 1), ("jpg", 16), ("png", 1), ("tif", 1), ("webp", 1)])
def test_an_image_is_turned_upright(tmp_path, orientation, ending, scale):
    upright, exif = quarters(48 * scale, 32 * scale), Image.Exif()
    upright.save(tmp_path / "upright.png")
    exif[0x112] = orientation
    stored = upright.transpose(Image.Transpose(TURNS[orientation]))
    stored.save(tmp_path / f"1.{ending}", exif=exif, **{"jpg": {"quality": 95}, "webp": {"lossless": True}}.get(ending, {}))
    for crop in (None, frames(0.1, 0.3, 0.7, 0.6, 1.0, *upright.size)):
        one, other = (read_image(path, SIZE, crop).float() for path in (tmp_path / f"1.{ending}", tmp_path / "upright.png"))
        assert (one - other).abs().mean() < 3
        assert (one - read_image(tmp_path / "upright.png", SIZE, frames(0.0, 0.0, 1.0, 1.0, 1.0, *upright.size)).float()).abs().mean() > 15


def test_damaged_metadata_hide_no_pixels(tmp_path):
    """The width is told in letters: a fault that Pillow meets only when it has turned the image."""
    upright, exif, content = quarters(), Image.Exif(), io.BytesIO()
    exif[0x112], exif[0x10F] = 6, "maker"
    upright.transpose(Image.Transpose.ROTATE_90).save(content, "jpeg", exif=exif, quality=95)
    (tmp_path / "1.jpg").write_bytes(content.getvalue().replace(b"\x01\x0f\x00\x02", b"\x01\x00\x00\x02"))
    with Image.open(tmp_path / "1.jpg") as image, pytest.raises(Exception, match="integer"):
        ImageOps.exif_transpose(image)
    upright.save(tmp_path / "upright.png")
    one, other = (read_image(tmp_path / name, SIZE).float() for name in ("1.jpg", "upright.png"))
    assert (one - other).abs().mean() < 3


@pytest.mark.parametrize("size", [(1, 1), (1, 30), (20_000, 50), (50, 20_000), (20_000, 1)])
@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_the_smallest_and_the_longest_images(tmp_path, size, ending):
    plain(size=size).save(tmp_path / f"1.{ending}")
    parts = (0.0, 0.0, 1.0, 1.0, 0.0), (0.2, 0.1, 0.5, 0.6, 1.0), (0.9, 0.9, 0.1, 0.1, 0.0)
    for crop in (None, *(frames(*part, *size) for part in parts), [0.3, 1.0, 0.5, 0.5, 0.0]):
        assert_colour(read_image(tmp_path / f"1.{ending}", SIZE, crop), COLOUR, 2 if ending == "jpg" else 0)


def test_a_crop_that_rounding_pushes_over_the_edge(tmp_path):
    quarters().save(tmp_path / "1.png")
    for crop in ([1.0000001, 1.5000001, 1.0000001, 1.0, 0.0], [0.7, 1.1, 1.0000001, 1.0000001, 0.0]):
        over, exact = (read_image(tmp_path / "1.png", SIZE, c) for c in (crop, [round(v, 5) for v in crop]))
        assert (over.int() - exact.int()).abs().max() <= 1


def test_a_large_photo_is_decoded_at_a_smaller_size(tmp_path, monkeypatch):
    """At half, a quarter or an eighth of its size, as long as the crop keeps twice the pixels that are needed; and it looks the same."""
    y, x = np.mgrid[0:600, 0:800]
    waves = [127 + 60 * np.sin(x / a + y / b) + 60 * np.sin(y / 40 + c) for a, b, c in ((50, 90, 0), (70, -60, 1), (30, 200, 2))]
    Image.fromarray(np.stack(waves, -1).astype(np.uint8)).save(tmp_path / "1.jpg", quality=95)
    sizes, original = [], decoding._in_colour
    monkeypatch.setattr(decoding, "_in_colour", lambda image: sizes.append(image.size) or original(image))
    crops = {
        None: (100, 75),
        (0.0, 0.1, 0.9, 0.4, 0.0): (200, 150),
        (0.5, 0.1, 0.2, 0.4, 1.0): (400, 300),
        (0.5, 0.5, 0.1, 0.1, 0.0): (800, 600),
    }
    for crop, expected in crops.items():
        crop = crop and frames(*crop, 800, 600)
        one = read_image(tmp_path / "1.jpg", SIZE, crop)
        assert sizes.pop() == expected
        with monkeypatch.context() as whole:
            whole.setattr("PIL.JpegImagePlugin.JpegImageFile.draft", lambda *_: None)
            other = read_image(tmp_path / "1.jpg", SIZE, crop)
        assert sizes.pop() == (800, 600)
        assert (one.float() - other.float()).abs().mean() < 1.5


def test_a_large_image_is_read_without_a_remark(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    plain().save(tmp_path / "1.png")  # 576 pixels: Pillow warns
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_colour(read_image(tmp_path / "1.png", SIZE), COLOUR)


# ---------------------------------------------------------------- what cannot be read is passed over in training


@pytest.mark.parametrize("kind", UNREADABLE)
def test_the_next_readable_file_stands_in_for_one_that_is_not(folder, kind):
    damage(folder / "train" / "cat" / "03.jpg", kind)
    source = load_images(folder_config(folder))
    assert len(source) == 12
    with warned() as texts:
        batch = under(source, [2, 3, 4])
    assert grey_of(batch) == [2, 4, 4]
    assert len(texts) == len(source.unreadable) == 1
    (path, reason), text = *source.unreadable.items(), texts[0]
    assert path == folder / "train" / "cat" / "03.jpg" and UNREADABLE[kind] in reason
    assert text == f"{path} cannot be read as an image ({reason}): passed over" and "\n" not in text and text.count("03.jpg") == 1


def test_the_search_for_a_stand_in_goes_on_and_around(folder):
    for name in ("10", "11"):
        damage(folder / "train" / "dog" / f"{name}.jpg", "empty")
    damage(folder / "train" / "cat" / "00.jpg", "text")
    with warned() as texts:
        assert grey_of(under(source := load_images(folder_config(folder)), [9, 10, 11])) == [9, 1, 1]
    assert len(texts) == len(source.unreadable) == 3


def test_the_stand_in_is_cropped_as_the_file_would_have_been(folder):
    quarters(*PHOTO).save(folder / "train" / "cat" / "04.jpg")
    damage(folder / "train" / "cat" / "03.jpg", "empty")
    source = load_images(folder_config(folder))
    crops = torch.tensor([[frames(0.0, 0.0, 0.5, 0.5, 0.0, *PHOTO), frames(0.5, 0.25, 0.5, 0.5, 1.0, *PHOTO)]])
    with warned():
        one, other = (next(source.augmented(torch.tensor([index]), crops)) for index in ([3, 3], [4, 4]))
    assert torch.equal(one, other) and not torch.equal(one[0], one[1])


def test_an_image_of_too_many_pixels_is_passed_over(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)
    plain(size=(40, 36)).save(folder / "train" / "cat" / "03.jpg")  # 1440 pixels, the others have 1200
    with warned() as texts:
        assert grey_of(under(load_images(folder_config(folder)), [3])) == [4]
    assert len(texts) == 1 and "03.jpg cannot be read as an image (it has more than 1,400 pixels: scale it down): passed over" in texts[0]


def test_processes_that_help_pass_over_the_same_files(folder):
    for name in ("cat/01", "cat/02", "dog/11"):
        damage(folder / "train" / f"{name}.jpg", "truncated")
    runs = []
    for workers in (0, 2):
        source = load_images(cfg := folder_config(folder, workers=workers))
        with warned() as texts:
            batches = [batch for epoch in range(3) for batch in training_batches(source, cfg, epoch)]
        assert sorted(path.stem for path in source.unreadable) == ["01", "02", "11"]
        assert len(texts) == 3 and all(sum(path.name in text for text in texts) == 1 for path in source.unreadable)  # in three epochs
        runs.append(torch.stack(batches))
    assert torch.equal(*runs)


def test_a_run_that_goes_on_passes_over_the_same_files(folder):
    for i in (1, 4, 5):
        damage(folder / "train" / "cat" / f"{i:02d}.jpg", "header")
    cfg = folder_config(folder, batch=3)
    with warned():
        whole = list(training_batches(load_images(cfg), cfg, epoch=1))
        for first in range(4):
            rest = list(training_batches(load_images(cfg), cfg, epoch=1, first_step=first))
            assert len(rest) == 4 - first and all(torch.equal(a, b) for a, b in zip(rest, whole[first:], strict=True))


# ---------------------------------------------------------------- too many of them are an error


@pytest.mark.parametrize(
    ("share", "damaged", "refused"), [(0.0, 0, False), (0.0, 1, True), (0.25, 3, False), (0.25, 4, True), (1.0, 11, False)]
)
@pytest.mark.parametrize("workers", [0, 2])
def test_the_share_of_files_that_may_be_unreadable(folder, share, damaged, refused, workers):
    files = sorted((folder / "train").rglob("*.jpg"))
    for path in files[:damaged]:
        damage(path, "text")
    source = load_images(cfg := folder_config(folder, share=share, workers=workers))
    with warned() as texts, pytest.raises(DataError) if refused else contextlib.nullcontext() as caught:
        list(training_batches(source, cfg, epoch=0))
    assert len(texts) == len(source.unreadable) == damaged
    if refused:
        message, named = str(caught.value), sorted(str(path) for path in files if str(path) in str(caught.value))
        assert message.startswith(f"data.max_unreadable_share = {share:g}, but already {damaged} of 12 files cannot be read as images")
        assert len(named) == min(damaged, 3) and "repair or remove them, or allow a larger share" in message and "\n" not in message


@pytest.mark.parametrize("share", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("use", ["training", "testing"])
def test_files_that_all_are_unreadable_are_refused(folder, share, workers, use):
    for path in (folder / "train").rglob("*.jpg"):
        damage(path, "empty")
    source = load_images(cfg := folder_config(folder, share=share, workers=workers))
    with warned(), pytest.raises(DataError, match=r"data\.max_unreadable_share = .* of 12 files"):
        if use == "training":
            list(training_batches(source, cfg, epoch=0))
        else:
            source.readable(torch.arange(12))


def test_the_search_for_a_stand_in_ends_where_the_share_does(folder, monkeypatch):
    """A million unreadable files are not all tried before the first is told of."""
    tried = []
    monkeypatch.setattr(sources, "read_image", lambda *args: tried.append(args) or 1 / 0)
    found = load_images(folder_config(folder, share=0.25)).decoder[(10, WHOLE)]
    assert found.pixels is None and [i for i, _ in found.failed] == [10, 11, 0, 1] and len(tried) == 4


# ---------------------------------------------------------------- where labels count nothing stands in


@pytest.mark.parametrize("workers", [0, 2])
def test_which_files_are_readable(folder, workers):
    for i in (1, 4):
        damage(folder / "train" / "cat" / f"{i:02d}.jpg", "truncated")
    source = load_images(folder_config(folder, workers=workers))
    with warned() as texts:
        kept = source.readable(torch.tensor([11, 4, 2, 0, 2, 1]))
    assert kept.tolist() == [11, 2, 0, 2] and len(texts) == 2
    assert grey_of(torch.cat(list(source.batches(kept, 3)))) == [11, 2, 0, 2]
    assert source.readable(torch.tensor([], dtype=torch.long)).tolist() == []


def test_files_are_judged_once(folder, monkeypatch):
    damage(folder / "train" / "cat" / "01.jpg", "empty")
    source, read, original = load_images(folder_config(folder)), [], sources.read_image
    monkeypatch.setattr(sources, "read_image", lambda path, *rest: read.append(path.stem) or original(path, *rest))
    with warned() as texts:
        source.readable(torch.tensor([0, 1, 2]))
        assert source.readable(torch.tensor([2, 1, 3])).tolist() == [2, 3]
    assert read == ["00", "01", "02", "03"] and len(texts) == 1


def test_the_judge_leaves_out_unreadable_images_and_keeps_labels_beside_theirs(folder):
    for path in ("train/cat/02.jpg", "train/dog/07.jpg", "test/cat/00.jpg", "test/cat/02.jpg", "test/dog/05.jpg"):
        damage(folder / path, "truncated")
    cfg = folder_config(folder)
    with warned() as texts:
        judge = Judge(FinetuneConfig(labels_per_class=0), cfg)
    assert len(texts) == 5
    readable = [i for i in range(12) if i not in (2, 7)]
    assert judge.index.tolist() == readable and judge.train_y.tolist() == [int(i >= 6) for i in readable]
    assert judge.test_index.tolist() == [1, 3, 4, 6, 7] and judge.test_y.tolist() == [0, 0, 1, 1, 1]
    train, test = judge.tokens(IJEPA_base(cfg).eval())
    assert len(train) == 10 and len(test) == 5
    asked = []
    judge._right = lambda pooled: asked.append(pooled) or {}
    judge.pixel_scores()
    assert [len(x) for x in asked[0]["grid"]] == [10, 5]
    assert (asked[0]["grid"][1].mean(1).diff() > 0).all()  # the fixture's greys rise with the number
    judge.draw_labels(1)
    assert len(judge.index) == 10 and 2 not in judge.index
    judge.cfg.labels_per_class = 5
    for seed in range(4):  # what is drawn and cannot be read is left out, not replaced
        with warned():
            judge.draw_labels(seed)
        drawn = finetune.drawn_of_each_class(judge.train.labels, 5, seed).tolist()
        assert judge.index.tolist() == [i for i in drawn if i not in (2, 7)]
        assert judge.train_y.tolist() == judge.train.labels[judge.index].tolist()


def test_labels_a_probe_cannot_have():
    x, y, cfg = torch.randn(20, 4), torch.arange(20) % 2, FinetuneConfig()
    finetune.fit_probe(x, y, x, y, cfg)
    bad = y.clone()
    bad[7:9] = -1
    for labels, message in ((y[:19], r"{}_y has shape \(19,\) for 20 rows of {}_x"), (bad, r"{}_y\[7\] = -1: classes count from 0")):
        with pytest.raises(DataError, match=message.format("train", "train")):
            finetune.fit_probe(x, labels, x, y, cfg)
        with pytest.raises(DataError, match=message.format("test", "test")):
            finetune.fit_probe(x, y, x, labels, cfg)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_a_probe_cannot_read(value):
    x, y = torch.randn(20, 4), torch.arange(20) % 2
    broken = x.clone()
    broken[[3, 5], 1] = value
    for name, train_x, test_x in (("train_x", broken, x), ("test_x", x, broken)):
        with pytest.raises(DataError, match=f"2 rows of {name} hold NaN or infinity"):
            finetune.fit_probe(train_x, y, test_x, y, FinetuneConfig())


# ---------------------------------------------------------------- which files there are


def test_what_programs_hide_is_no_image(folder):
    before = load_images(folder_config(folder))
    for name in (".ipynb_checkpoints/1.jpg", "cat/._00.jpg", "cat/.thumbnails/00.jpg", ".DS_Store.jpg"):
        path = folder / "train" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"no image")
    (folder / "test" / ".cache").mkdir()
    with warned() as texts:
        source = load_images(folder_config(folder))
    assert source.files == before.files and source.classes == ("cat", "dog") and source.fingerprint == before.fingerprint
    assert not texts


def test_a_class_folder_without_images_is_named_and_keeps_its_number(folder):
    (folder / "test" / "bee").mkdir()
    plain().save(folder / "test" / "bee" / "1.png")
    (folder / "train" / "bee").mkdir()
    (folder / "train" / "bee" / "notes.txt").write_text("no image")
    with warned() as texts:
        source = load_images(folder_config(folder))
    assert source.classes == ("bee", "cat", "dog") and source.labels.unique().tolist() == [1, 2]
    assert texts == [f"{folder / 'train' / 'bee'} holds no images: the class keeps its number and has none here"]
    with warned() as texts:
        assert load_images(folder_config(folder), "test").labels.tolist() == [0] + [1] * 4 + [2] * 4
    assert not texts


def test_a_class_folder_may_be_a_link(folder):
    (folder / "train" / "dog").rename(folder / "elsewhere")
    (folder / "train" / "dog").symlink_to(folder / "elsewhere")
    with warned() as texts:
        source = load_images(folder_config(folder))
    assert source.labels.bincount().tolist() == [6, 6] and grey_of(under(source, [11])) == [11] and not texts


def test_only_files_are_images(folder):
    (folder / "train" / "cat" / "album.jpg").mkdir()
    os.mkfifo(folder / "train" / "cat" / "pipe.jpg")
    assert len(load_images(folder_config(folder))) == 12


def test_the_fingerprint_tells_sets_apart(folder, tmp_path):
    one = load_images(folder_config(folder))
    assert one.fingerprint == "12 files, b3db2e11"  # of cat/00.jpg to dog/11.jpg, a line each
    assert load_images(folder_config(folder), "test").fingerprint != one.fingerprint
    (tmp_path / "moved").mkdir()
    (folder / "train").rename(tmp_path / "moved" / "train")
    assert load_images(folder_config(tmp_path / "moved")).fingerprint == one.fingerprint
    (tmp_path / "moved" / "train" / "cat" / "00.jpg").rename(tmp_path / "moved" / "train" / "dog" / "00.jpg")
    other = load_images(folder_config(tmp_path / "moved")).fingerprint
    assert other != one.fingerprint and other.startswith("12 files, ")


def test_names_that_are_no_text_have_a_fingerprint(folder):
    os.rename(folder / "train" / "cat" / "00.jpg", os.fsencode(folder / "train" / "cat") + b"/\xff.jpg")
    assert load_images(folder_config(folder)).fingerprint.startswith("12 files, ")


# ---------------------------------------------------------------- processes that decode


class Dying(sources.Decoder):
    """Its workers are killed as a system short of memory kills them."""

    def __getitem__(self, item):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_dies_is_told_of(folder):
    source = load_images(cfg := folder_config(folder, workers=2))
    source.decoder.__class__ = Dying
    for _ in range(2):  # it is not forgotten
        with pytest.raises(
            DeadWorker, match=r"died, probably for want of memory \(DataLoader worker .*\): lower data\.num_workers = 2"
        ) as caught:
            list(training_batches(source, cfg, epoch=0))
    assert "\n" not in str(caught.value)


def test_a_worker_that_dies_while_the_batch_is_used_is_told_of_at_the_next_one(folder):
    """Nowhere else: half-way through an update of the weights nothing could be saved."""
    source = load_images(cfg := folder_config(folder, workers=1))
    before = signal.getsignal(signal.SIGCHLD)
    batches = training_batches(source, cfg, epoch=0)
    next(batches)
    (child,) = multiprocessing.active_children()
    child.kill()
    child.join()
    assert signal.getsignal(signal.SIGCHLD) == before
    with pytest.raises(DeadWorker, match=r"data\.num_workers = 1"):
        next(batches)
    assert not multiprocessing.active_children()


def test_a_worker_that_dies_while_it_hands_over_a_batch_is_told_of(folder, monkeypatch):
    """What comes up is an error of the connection, a moment before the process is known to be dead."""
    source = load_images(cfg := folder_config(folder, workers=1))
    batches = training_batches(source, cfg, epoch=0)
    next(batches)

    def hung_up(*_):
        for child in multiprocessing.active_children():
            child.kill()
        raise ConnectionResetError("Connection reset by peer")

    monkeypatch.setattr(type(source.workers._loader._iterator), "_try_get_data", hung_up)
    with pytest.raises(DeadWorker, match=r"Connection reset by peer\): lower data\.num_workers = 1"):
        list(batches)


def test_where_nothing_is_trained_this_process_does_what_a_dead_worker_was_to_do(folder):
    source = load_images(cfg := folder_config(folder, workers=1))
    batches = source.batches(torch.arange(12), 2)
    first = next(batches)
    for child in multiprocessing.active_children():
        child.kill()
        child.join()
    with warned() as texts:
        assert grey_of(torch.cat([first, *batches])) == list(range(12))
    assert len(texts) == 1 and "died" in texts[0] and "this process decodes the rest" in texts[0]
    with pytest.raises(DeadWorker):  # training does not go on as if nothing had been
        next(training_batches(source, cfg, epoch=0))


def pids() -> set[int]:
    return {child.pid for child in multiprocessing.active_children()}


def test_the_same_processes_serve_every_pass_until_the_source_is_gone(folder):
    source = load_images(cfg := folder_config(folder, workers=2))
    assert not pids()
    alone = [list(training_batches(load_images(folder_config(folder)), cfg, epoch)) for epoch in range(2)]
    first = list(training_batches(source, cfg, epoch=0))
    started = pids()
    source.readable(torch.arange(12))
    assert grey_of(torch.cat(list(source.batches(torch.arange(12), 5)))) == list(range(12))
    assert all(torch.equal(a, b) for a, b in zip(alone[0], first, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(alone[1], training_batches(source, cfg, epoch=1), strict=True))
    assert len(started) == 2 and pids() == started
    del source
    assert not pids()


def test_a_pass_that_nobody_ends_disturbs_no_other(folder):
    source = load_images(cfg := folder_config(folder, workers=1))
    alone = list(training_batches(load_images(folder_config(folder)), cfg, epoch=0))
    next(training_batches(source, cfg, epoch=1))  # given up at once
    batches = training_batches(source, cfg, epoch=0)
    one, started = [next(batches)], pids()
    assert grey_of(torch.cat(list(source.batches(torch.arange(12), 5)))) == list(range(12))  # in the middle of it
    assert started < pids() or pids() == started
    one.extend(batches)
    assert len(started) == 1 and all(torch.equal(a, b) for a, b in zip(alone, one, strict=True))


def test_workers_leave_the_callers_random_numbers_alone(folder):
    source = load_images(cfg := folder_config(folder, workers=1))
    state = torch.random.get_rng_state()
    list(training_batches(source, cfg, epoch=0))
    assert torch.equal(torch.random.get_rng_state(), state)


# ---------------------------------------------------------------- what is no fault of the file


class Failing:
    """`read_image` that fails so many times, on one file."""

    def __init__(self, error: Exception, times: int):
        self.error, self.times, self.tried, self.read = error, times, 0, read_image

    def __call__(self, path, *rest):
        if path.name == "03.jpg":
            self.tried += 1
            if self.tried <= self.times:
                raise self.error
        return self.read(path, *rest)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ENETDOWN])
def test_an_io_error_that_passes_is_waited_for(folder, monkeypatch, number):
    pauses = []
    monkeypatch.setattr(decoding.time, "sleep", pauses.append)
    monkeypatch.setattr(sources, "read_image", failing := Failing(OSError(number, os.strerror(number)), 3))
    with warned() as texts:
        assert grey_of(under(load_images(folder_config(folder)), [2, 3, 4])) == [2, 3, 4]
    assert failing.tried == 4 and pauses == list(decoding.PAUSES) and not texts


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("error", "tries", "message"),
    [
        (OSError(errno.EIO, "Input/output error"), 4, r"03\.jpg cannot be read \(Input/output error\), not at 4 attempts either"),
        (MemoryError(), 1, r"03\.jpg finds no memory to be decoded in: lower data\.num_workers"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 1, r"03\.jpg finds no memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 1, r"03\.jpg finds no memory"),
    ],
)
def test_what_does_not_pass_ends_the_run_and_is_not_counted_as_unreadable(folder, monkeypatch, workers, error, tries, message):
    monkeypatch.setattr(decoding, "PAUSES", (0.0, 0.0, 0.0))
    monkeypatch.setattr(sources, "read_image", failing := Failing(error, 10**9))
    source = load_images(cfg := folder_config(folder, share=1.0, workers=workers))
    with warned() as texts:
        for use in (lambda: list(training_batches(source, cfg, 0)), lambda: list(source.batches(torch.arange(12), 4))):
            with pytest.raises(DataError, match=message) as caught:
                use()
            assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
        with pytest.raises(DataError, match=message):
            source.readable(torch.arange(12))
    assert not source.unreadable and not texts
    if not workers:
        assert failing.tried == 3 * tries


@pytest.mark.parametrize("method", ["ImageOps.exif_transpose", "Image.Image.getexif"])
def test_no_memory_to_turn_an_image_is_not_an_image_that_need_not_be_turned(folder, monkeypatch, method):
    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(f"PIL.{method}", fail)
    with pytest.raises(DataError, match="finds no memory to be decoded in"):
        under(load_images(folder_config(folder)), [2])


def test_a_file_that_is_absent_or_forbidden_is_not_tried_again(folder, monkeypatch):
    monkeypatch.setattr(decoding.time, "sleep", lambda _: pytest.fail("no pause"))
    (folder / "train" / "cat" / "02.jpg").unlink()
    source = load_images(folder_config(folder))
    (folder / "train" / "cat" / "03.jpg").unlink()
    with warned() as texts:
        assert grey_of(under(source, [2])) == [4]
    assert len(texts) == 1 and "No such file" in texts[0]


# ---------------------------------------------------------------- whatever is in a file


def encoded(kind: str) -> bytes:
    content = io.BytesIO()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x112], exif[0x10F] = 6, "maker"
    if kind == "GIF":
        image = image.quantize(8)
    image.save(content, kind, **{"JPEG": {"exif": exif}, "PNG": {"exif": exif}, "TIFF": {"compression": "tiff_lzw"}}.get(kind, {}))
    return content.getvalue()


ENCODED = {kind: encoded(kind) for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP")}


def mutated(kind: str, seed: int) -> bytes:
    """A file with some bytes changed, cut out, or replaced by those of another file."""
    choice, content = random.Random(seed), bytearray(ENCODED[kind])
    for _ in range(choice.randint(1, 4)):
        at = choice.randrange(min(len(content), choice.choice((40, 200, 10**6)))) if content else 0  # headers are where it matters most
        match choice.randrange(4):
            case 0 if content:
                content[at] ^= 1 << choice.randrange(8)
            case 1 if content:
                content[at] = choice.choice((0, 1, 127, 128, 255))
            case 2:
                del content[at : at + choice.choice((1, 8, 10**6))]
            case _:
                other = ENCODED[choice.choice(list(ENCODED))]
                start = choice.randrange(len(other))
                content[at : at + choice.randint(0, 60)] = other[start : start + choice.randint(0, 60)]
    return bytes(content)


def test_whatever_is_in_a_file_it_is_read_or_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)  # so that no mutation asks for gigabytes
    shape = {"img_size": 8, "in_chans": 3, "mean": (0,), "std": (1,)}
    source = FolderImages(tmp_path, [tmp_path / "1.jpg"], torch.zeros(1), ("only",), num_workers=0, max_unreadable_share=1, **shape)
    outcomes = []

    @QUICK
    @given(st.sampled_from(sorted(ENCODED)), st.integers(0, 2**32), st.sampled_from([None, WHOLE, [0.3, 1.1, 0.5, 0.7, 1.0]]))
    def attempt(kind, seed, crop):
        source.files[0].write_bytes(mutated(kind, seed))
        found = source.decoder[(0, crop)]
        assert found.fault is None
        pixels, failed = found.pixels, found.failed
        if pixels is None:
            assert len(failed) == 1 and failed[0][0] == 0 and failed[0][1] and "\n" not in failed[0][1]
        else:
            assert failed == [] and pixels.dtype == torch.uint8 and pixels.shape == (3, 8, 8)
        outcomes.append((kind, pixels is not None))

    attempt()
    kinds = {read: {kind for kind, outcome in outcomes if outcome == read} for read in (True, False)}
    assert kinds[False] == set(ENCODED) and kinds[True] >= set(ENCODED) - {"PNG"}  # whose checksums let nothing pass
