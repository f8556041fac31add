"""`~` is the home folder wherever a path is given, and a name that is not UTF-8 can be told of."""

import io
import json
import os
import sys
from pathlib import Path
from unittest import mock

import pytest
from PIL import Image
from ranks import tiny_config

from wejepa.config import default_config
from wejepa.data import load_images
from wejepa.errors import DataError
from wejepa.interop import export, from_huggingface, from_meta, to_huggingface
from wejepa.interop import main as convert
from wejepa.model import IJEPA_base
from wejepa.paths import path_of, printable
from wejepa.train.callbacks import LogFile
from wejepa.train.checkpoints import load_model, save_model
from wejepa.train.finetune import FinetuneConfig, train_linear_probe
from wejepa.train.finetune import main as judge
from wejepa.train.loop import Pretraining
from wejepa.train.pretrain import launch_pretraining, main

ODD = os.fsdecode(b"caf\xe9.png")  # Latin-1, as from an old disk


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A home folder, and another one to stand in, in which no folder `~` may come up."""
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    yield tmp_path / "home"
    assert list((tmp_path / "here").iterdir()) == []


def test_a_run_is_written_to_and_resumed_from_the_home_folder(home):
    (home / "my.json").write_text(json.dumps(tiny_config(Path("~/run")).to_dict()))
    assert main(["--config", "~/my.json"]) == 0
    assert (home / "run" / "latest.pt").exists()
    assert main(["--config", "~/my.json", "--resume", "~/run/latest.pt"]) == 0
    assert not (home / "run" / "earlier-1").exists()  # it knows its own folder under both names


def test_data_and_checkpoints_are_found_in_the_home_folder(home):
    for split in ("train", "test"):
        for number in range(12):
            path = home / "images" / split / f"class {number % 2}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (20, 20), 20 * number).save(path)
    cfg = tiny_config(home / "run")
    cfg.data.use_fake_data, cfg.data.dataset, cfg.data.root = False, "imagefolder", "~/images"
    assert len(load_images(cfg)) == 12
    save_model("~/model.pt", IJEPA_base(cfg), "a test")
    assert load_model("~/model.pt").cfg == cfg
    protocol = FinetuneConfig(checkpoint="~/model.pt", labels_per_class=5, device="cpu")
    assert 0 <= train_linear_probe(protocol).accuracy <= 1  # by the checkpoint's own data.root
    cfg.data.root = "/nowhere"
    save_model("~/model.pt", IJEPA_base(cfg), "a test")
    arguments = ["checkpoint=~/model.pt", "data_root=~/images", "labels_per_class=5", "device=cpu"]
    assert judge([word for text in arguments for word in ("--set", text)]) == 0


def test_a_run_goes_on_with_its_images_under_either_name(home):
    for number in range(16):
        path = home / "images" / "train" / f"class {number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (20, 20), 10 * number).save(path)
    cfg = tiny_config(Path("~/run"))
    cfg.data.use_fake_data, cfg.data.dataset, cfg.data.root, cfg.hardware.checkpoint_every = False, "imagefolder", "~/images", 1
    written = launch_pretraining(cfg).checkpoint
    assert written == home / "run" / "latest.pt"
    for root in ("~/images", str(home / "images")):
        cfg.data.root = root
        assert Pretraining(cfg, resume="~/run/step_00000002.pt").step == 2


def test_weights_go_to_and_come_from_the_home_folder(home, capsys):
    pytest.importorskip("safetensors")
    save_model("~/model.pt", IJEPA_base(tiny_config(home)), "a test")
    assert convert(["convert", "~/model.pt", "~/copy.pt"]) == 0 and (home / "copy.pt").is_file()
    assert convert(["convert", "~/nothing", "~/x.pt"]) == 2 and "there is no folder ~/nothing" in capsys.readouterr().err
    assert export(IJEPA_base(tiny_config(home)), "~/encoder.safetensors") == home / "encoder.safetensors"
    with pytest.raises(ValueError, match=f"there is no file {home}/meta.pth.tar"):
        from_meta("~/meta.pth.tar")
    to_huggingface(IJEPA_base(tiny_config(home)), "~/folder")
    assert from_huggingface("~/folder").cfg.model.embed_dim == 16


def test_sets_of_libraries_are_looked_for_in_the_home_folder(home, monkeypatch):
    asked = []

    class Absent:
        def __init__(self, root, *args, **kwargs):
            asked.append(root)
            raise RuntimeError("not there") if kwargs.get("download") is False else OSError("the network is unreachable")

    monkeypatch.setitem(sys.modules, "torchvision", mock.MagicMock(datasets=mock.MagicMock(CIFAR10=Absent)))
    monkeypatch.setitem(sys.modules, "datasets", mock.MagicMock(load_dataset=Absent))
    cfg = tiny_config(home / "run")
    cfg.data.use_fake_data, cfg.data.dataset, cfg.data.root = False, "cifar10", "~/sets"
    with pytest.raises(DataError, match=f"{home}/sets"):
        load_images(cfg)
    assert set(asked) == {f"{home}/sets"}
    (home / "pets").mkdir()
    cfg.data.dataset = "hf:~/pets"
    with pytest.raises(DataError, match=f"hf:{home}/pets"):
        load_images(cfg)
    assert asked[-1] == f"{home}/pets"


def test_another_users_home_that_is_not_there_stays_a_name():
    assert path_of("~nobody-of-this-name/x") == Path("~nobody-of-this-name/x")
    assert path_of("a/b") == Path("a/b")


def test_a_damaged_file_whose_name_is_not_utf_8_does_not_end_the_run(tmp_path, monkeypatch):
    try:
        (tmp_path / ODD).touch()
    except OSError:
        pytest.skip("the file system takes no such name")
    cfg = tiny_config(tmp_path / "run")
    folder = tmp_path / "images" / "train" / "a"
    folder.mkdir(parents=True)
    for number in range(24):
        Image.new("L", (20, 20), 10 * number).save(folder / f"{number}.png")
    (folder / ODD).write_bytes(b"no image")
    cfg.data.use_fake_data, cfg.data.dataset, cfg.data.root, cfg.data.max_unreadable_share = (
        False,
        "imagefolder",
        str(folder.parent.parent),
        0.5,
    )
    strict = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict")
    monkeypatch.setattr(sys, "stdout", strict)
    with pytest.warns(UserWarning, match="passed over"):
        launch_pretraining(cfg)
    strict.flush()
    for told in (strict.buffer.getvalue(), (tmp_path / "run" / "log.txt").read_bytes()):
        assert rb"caf\udce9.png: " in told


def test_a_terminal_that_knows_few_letters_gets_escapes(tmp_path, monkeypatch):
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    LogFile(tmp_path / "log.txt").write("Größe")
    assert ascii_only.buffer.getvalue() == b"Gr\\xf6\\xdfe\n"
    assert (tmp_path / "log.txt").read_bytes() == "Größe\n".encode()
    assert printable("Größe", None) == "Größe"
    assert default_config().summary()
