"""The set `emoji`, how it was made, and what is said when a file that ships is not as it was."""

import csv
import importlib.util
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from wejepa.config import IJepaConfig, default_config
from wejepa.data import STATISTICS, available_datasets, embedded, emoji_index, example_photograph, load_images
from wejepa.errors import ConfigError, DataError
from wejepa.train.pretrain import main

ROOT = Path(__file__).resolve().parent.parent
SPLITS = ("train", "test")
CLASSES = ("Smileys", "People", "Animals", "Food", "Travel", "Activities", "Objects", "Symbols", "Flags")


def emoji_config(img_size: int = 64) -> IJepaConfig:
    cfg = default_config()
    cfg.data.dataset, cfg.model.img_size = "emoji", img_size
    return cfg


@pytest.fixture(scope="module")
def emoji():
    return {split: load_images(emoji_config(), split) for split in SPLITS}


@pytest.fixture(scope="module")
def index():
    return {split: emoji_index(split) for split in SPLITS}


@pytest.fixture(scope="module")
def make_assets():
    spec = importlib.util.spec_from_file_location("make_assets", ROOT / "scripts" / "make_assets.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---------------------------------------------------------------- what is in it


@pytest.mark.parametrize(
    ("split", "each"), [("train", (270, 618, 254, 210, 348, 136, 422, 358, 432)), ("test", (68, 154, 64, 52, 88, 34, 106, 90, 108))]
)
def test_the_set(emoji, split, each):
    source = emoji[split]
    assert source.classes == CLASSES and tuple(source.labels.bincount().tolist()) == each
    assert source.images.shape == (sum(each), 3, 64, 64) and source.images.dtype == torch.uint8 and source.labels.dtype == torch.int64
    assert "emoji" in available_datasets()


def test_the_index_tells_what_each_image_shows(emoji, index):
    for split in SPLITS:
        assert [CLASSES.index(emoji.category) for emoji in index[split]] == emoji[split].labels.tolist()
        for noto, twemoji in zip(index[split][::2], index[split][1::2], strict=True):  # images 2 k and 2 k + 1
            assert (noto.vendor, twemoji.vendor) == ("noto", "twemoji") and noto._replace(vendor="twemoji") == twemoji
    names = [emoji.name for split in SPLITS for emoji in index[split][::2]]
    assert len(names) == len(set(names)) == 1906


def test_an_emoji_and_its_variants_are_on_one_side(index):
    for attribute in ("name", "group"):
        assert {getattr(e, attribute) for e in index["train"]} & {getattr(e, attribute) for e in index["test"]} == set()
    group = {emoji.name: emoji.group for split in SPLITS for emoji in index[split]}
    for alike in (
        ("runner", "man-running", "woman-running", "woman_running_facing_right"),
        ("flag-no", "flag-sj", "flag-bv"),
        ("family", "man-man-boy", "woman-woman-girl"),
    ):
        assert len({group[name] for name in alike}) == 1
    assert len({group[name] for name in ("grinning", "heart", "couple_with_heart", "male_sign", "flag-se")}) == 5


def test_no_test_image_is_a_training_image(emoji):
    """Nor nearly: from the same drawing, WebP would make two that differ by a few steps."""
    small = {s: torch.nn.functional.avg_pool2d(emoji[s].images.float(), 4).flatten(1) for s in SPLITS}
    rms = torch.cdist(small["test"], small["train"]).min(1).values / small["test"].shape[1] ** 0.5
    assert rms.min() > 1


@pytest.mark.parametrize(
    ("name", "noto", "twemoji"),
    [  # the mean colour of the middle in the original drawings
        ("red_circle", (244, 67, 54), (221, 46, 68)),
        ("large_blue_circle", (25, 118, 210), (85, 172, 238)),
        ("large_green_circle", (124, 179, 66), (120, 177, 89)),
        ("black_large_square", (66, 66, 66), (49, 55, 61)),
        ("orange_heart", (255, 152, 0), (244, 144, 12)),
        ("grinning", (253, 224, 48), (255, 204, 77)),
        ("fr", (255, 255, 255), (238, 238, 238)),
    ],
)
def test_known_emoji_have_their_colours(emoji, index, name, noto, twemoji):
    split = next(s for s in SPLITS if any(e.name == name for e in index[s]))
    for e, image in zip(index[split], emoji[split].images, strict=True):
        if e.name == name:
            middle = image[:, 28:36, 28:36].float().mean((1, 2))
            torch.testing.assert_close(middle, torch.tensor({"noto": noto, "twemoji": twemoji}[e.vendor]).float(), rtol=0, atol=4)


def test_drawings_are_upright(emoji, index):
    """The flag of France is blue, white, red from left to right."""
    split = next(s for s in SPLITS if any(e.name == "fr" for e in index[s]))
    for image in emoji[split].images[[i for i, e in enumerate(index[split]) if e.name == "fr"]].float():
        left, middle, right = (image[:, 16:48, x : x + 6].mean((1, 2)) for x in (8, 29, 50))
        assert left[2] > left[0] + 100 and middle.min() > 200 and right[0] > right[2] + 100


def test_every_drawing_is_in_its_place(emoji, index):
    """Twemoji's circles are plain and in the middle: cut a pixel beside the drawings, they would not be their own mirror images."""
    for split, name in (("train", "large_green_circle"), ("test", "red_circle")):
        circle = emoji[split].images[index[split].index(next(e for e in index[split] if (e.name, e.vendor) == (name, "twemoji")))].float()
        for axis in (-1, -2):
            assert (circle - circle.flip(axis)).abs().mean() < 2


def test_the_stated_statistics_are_those_of_the_set(emoji):
    pixels = emoji["train"].images.float().div(255).transpose(0, 1).flatten(1)
    for stated, found in zip(STATISTICS["emoji"], (pixels.mean(1), pixels.std(1)), strict=True):
        torch.testing.assert_close(found, torch.tensor(stated), rtol=0, atol=1e-3)


def test_it_is_the_same_every_time(emoji):
    again = load_images(emoji_config(), "test")
    assert torch.equal(again.images, emoji["test"].images) and torch.equal(again.labels, emoji["test"].labels)


@pytest.mark.parametrize("side", [32, 48])
def test_other_sizes(emoji, side):
    image = Image.fromarray(emoji["test"].images[3].permute(1, 2, 0).numpy())
    wanted = np.asarray(image.resize((side, side), Image.Resampling.BILINEAR)).astype(np.float32) / 255
    source = load_images(emoji_config(side), "test")
    (given,) = source.batches(torch.tensor([3]), 1)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in STATISTICS["emoji"])
    torch.testing.assert_close(given[0] * std + mean, torch.from_numpy(wanted).permute(2, 0, 1), rtol=0, atol=0.01)


def test_a_run_on_it_with_the_default_settings(tmp_path, monkeypatch, capsys):
    """Of 200 images, for one epoch; only the number of images, the epochs and the folder differ from the defaults."""
    whole = embedded.emoji_images
    monkeypatch.setattr("wejepa.data.named.emoji_images", lambda split: (*(part[:200] for part in whole(split)[:2]), CLASSES))
    settings = ("data.dataset=emoji", "optimizer.epochs=1", f"hardware.output_dir={tmp_path}", "hardware.device=cpu")
    assert main([part for setting in settings for part in ("--set", setting)]) == 0
    assert f"checkpoint {tmp_path}" in capsys.readouterr().out


# ---------------------------------------------------------------- names that are no set or split


def test_a_misspelt_name_finds_it(capsys):
    assert main(["--set", "data.dataset=emojis"]) == 2
    assert capsys.readouterr().err.startswith("ConfigError: data.dataset = 'emojis' is not known; did you mean 'emoji'?")
    assert main(["--set", "data.dataset=xyz"]) == 2
    assert " emoji, fashion_mnist, " in capsys.readouterr().err


def test_the_index_of_an_unknown_split():
    with pytest.raises(ConfigError, match="split = 'val': give 'train' or 'test'"):
        emoji_index("val")


# ---------------------------------------------------------------- files that are not as they ship


FILES = {
    "emoji": ("emoji.csv", "emoji_noto.webp", "emoji_twemoji.webp"),
    "fashion_mnist_mini": ("fashion_mnist_mini_train.png", "fashion_mnist_mini_labels.npz"),
}
LICENCES = {
    "emoji": ("NOTO_EMOJI_LICENSE", "TWEMOJI_LICENSE", "EMOJI_DATASOURCE_LICENSE"),
    "fashion_mnist_mini": ("FASHION_MNIST_LICENSE",),
}


def load(name: str):
    cfg = emoji_config(32)
    cfg.data.dataset = name
    return load_images(cfg)


@pytest.mark.parametrize("harm", ["truncated", "altered", "missing"])
@pytest.mark.parametrize(("name", "file"), [(name, file) for name, files in FILES.items() for file in files])
def test_a_damaged_file(assets, name, file, harm):
    content = bytearray((assets / file).read_bytes())
    if harm == "missing":
        (assets / file).unlink()
    elif harm == "truncated":
        (assets / file).write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        (assets / file).write_bytes(content)
    reason = {"missing": r"cannot be read \(No such file or directory\)"}.get(harm, r"is not as it ships with wejepa \(another SHA-256\)")
    with pytest.raises(DataError, match=rf"{file} .*{reason}: reinstall wejepa$"):
        load(name)


@pytest.mark.parametrize(("name", "file"), [(name, file) for name, files in LICENCES.items() for file in files])
def test_a_missing_licence(assets, name, file):
    (assets / file).unlink()
    with pytest.raises(DataError, match=rf"{file} is missing, the licence of images beside it: reinstall wejepa$"):
        load(name)


def test_a_damaged_photograph(assets):
    (assets / "chelsea.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"chelsea\.png is not as it ships"):
        example_photograph()


def test_a_pillow_without_webp(monkeypatch):
    monkeypatch.setattr(Image, "open", lambda file: (_ for _ in ()).throw(OSError("cannot identify image file")))
    with pytest.raises(DataError, match=r"emoji_noto\.webp cannot be read by this Pillow \(cannot .*\): install one .* built with webp$"):
        load("emoji")


def test_every_file_that_ships_has_its_hash():
    assert {path.name for path in embedded.ASSETS.iterdir() if path.suffix and path.is_file()} == set(embedded.SHA256)
    for name in embedded.SHA256:
        embedded.asset(name)


def test_the_licences_say_what_they_are_for():
    for name, words in {
        "NOTO_EMOJI_LICENSE": ("emoji_noto.webp", "Noto Emoji", "put on white", "Apache License", "END OF TERMS AND CONDITIONS"),
        "TWEMOJI_LICENSE": (
            "emoji_twemoji.webp",
            "Twitter, Inc and other contributors",
            "put on white",
            "4.0 International Public",
        ),
        "EMOJI_DATASOURCE_LICENSE": ("emoji.csv", "Copyright (c) 2013 Cal Henderson", "Permission is hereby granted"),
    }.items():
        text = (embedded.ASSETS / name).read_text(encoding="utf-8")
        assert [word for word in words if word not in text] == []


# ---------------------------------------------------------------- how it was made


def test_the_split_is_what_the_script_makes_of_the_groups(make_assets):
    rows = list(csv.DictReader(io.StringIO(embedded.asset("emoji.csv").decode())))
    assert [row["name"] for row in rows] == sorted((row["name"] for row in rows), key=make_assets.order_of)
    unicode_name = {ours: theirs for theirs, ours in make_assets.EMOJI_CATEGORIES.items()}
    test = make_assets.a_fifth_of_each_class([unicode_name[row["category"]] for row in rows], [row["group"] for row in rows])
    assert test == {i for i, row in enumerate(rows) if row["split"] == "test"}


def test_who_belongs_together(make_assets):
    def entry(name, unified, category="People & Body"):
        return {"short_name": name, "unified": unified, "category": category}

    entries = [
        entry("runner", "1F3C3"),
        entry("woman-running", "1F3C3-200D-2640-FE0F"),
        entry("man", "1F468"),
        entry("male-cook", "1F468-200D-1F373"),
        entry("cook", "1F9D1-200D-1F373"),
        entry("fried_egg", "1F373", "Food & Drink"),
        entry("flag-no", "1F1F3-1F1F4", "Flags"),
        entry("flag-bv", "1F1E7-1F1FB", "Flags"),
        entry("flag-sj", "1F1F8-1F1EF", "Flags"),
    ]
    drawings = [(b"%d" % i, b"%d" % i) for i in range(9)]
    drawings[7], drawings[8] = (b"6", b"7"), (b"8", b"7")  # Noto draws one like Norway's, Twemoji the other like that one
    found = make_assets.emoji_groups(entries, drawings)
    assert found == ["runner", "runner", "man", "male-cook", "male-cook", "fried_egg", "flag-no", "flag-no", "flag-no"]


def test_the_script_makes_sheets_and_index(make_assets, tmp_path, monkeypatch):
    """Of two packages with 50 plain drawings, half transparent: they come out on white, each in its place, the same twice."""
    names = [f"e{i}" for i in range(50)]
    entries = [{"short_name": n, "unified": f"1F{i:03}", "category": "Objects", "image": f"{n}.png"} for i, n in enumerate(names)]
    entries.append({"short_name": "swatch", "unified": "1F3FB", "category": "Component", "image": "swatch.png"})
    for vendor in ("google", "twitter"):
        with tarfile.open(tmp_path / f"{vendor}.tgz", "w:gz") as package:
            files = {"package/emoji.json": json.dumps(entries).encode()}
            for i, n in enumerate(names):
                file = io.BytesIO()
                Image.new("RGBA", (64, 64), (4 * i, 4 * i, 4 * i, 128)).save(file, "png")
                files[f"package/img/{vendor}/64/{n}.png"] = file.getvalue()
            for name, content in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                package.addfile(info, io.BytesIO(content))
    with pytest.raises(SystemExit, match=r"google\.tgz is not emoji-datasource-google 16\.0\.0 as published: pack it again"):
        make_assets.emoji(tmp_path / "google.tgz", tmp_path / "twitter.tgz")
    monkeypatch.setattr(make_assets, "EMOJI_PACKAGES", {v: make_assets.sha512(tmp_path / f"{v}.tgz") for v in ("google", "twitter")})
    made = []
    for folder in (tmp_path / "first", tmp_path / "second"):
        folder.mkdir()
        monkeypatch.setattr(make_assets, "ASSETS", folder)
        make_assets.emoji(tmp_path / "google.tgz", tmp_path / "twitter.tgz")
        made.append({file.name: file.read_bytes() for file in folder.iterdir()})
    assert made[0] == made[1] and set(made[0]) == {"emoji.csv", "emoji_noto.webp", "emoji_twemoji.webp"}
    rows = list(csv.DictReader(io.StringIO(made[0]["emoji.csv"].decode())))
    assert sorted(row["name"] for row in rows) == sorted(names) and sum(row["split"] == "test" for row in rows) == 10
    sheet = np.asarray(Image.open(io.BytesIO(made[0]["emoji_noto.webp"])))
    assert sheet.shape == (2 * 66, 44 * 66, 3)
    for place, row in enumerate(rows):
        tile = sheet[place // 44 * 66 :, place % 44 * 66 :][1:65, 1:65].astype(int)
        grey = 255 - (255 - 4 * names.index(row["name"])) * 128 / 255
        assert abs(tile - grey).max() < 5
