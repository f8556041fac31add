"""A checkpoint is whole or not there, and anything else is refused with the file's name and the reason."""

import os
import pickle
import zipfile
from functools import partial

import pytest
import torch

from wejepa.config import DataConfig, IJepaConfig, MaskConfig, ModelConfig
from wejepa.errors import CheckpointError
from wejepa.model import IJEPA_base
from wejepa.train.checkpoints import FORMAT, load_checkpoint, load_model, save_checkpoint


def tiny_config(**model) -> IJepaConfig:
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "enc_depth": 2, "pred_depth": 1, "pred_dim": 12, "num_heads": 2}
    return IJepaConfig(
        data=DataConfig(use_fake_data=True),
        mask=MaskConfig(target_scale=(0.1, 0.2), context_share=0.3),
        model=ModelConfig(in_chans=3, **sizes | model),
    )


@pytest.fixture
def model() -> IJEPA_base:
    torch.manual_seed(0)
    model = IJEPA_base(tiny_config())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    return model


@pytest.fixture
def state(model) -> dict:
    return {"config": model.cfg.to_dict(), "model": model.state_dict(), "step": 7}


@pytest.fixture
def path(tmp_path, state):
    save_checkpoint(tmp_path / "run" / "latest.pt", state)
    return tmp_path / "run" / "latest.pt"


def refusal(read, path) -> str:
    """The message with which a file is refused: one line that names it."""
    with pytest.raises(CheckpointError) as caught:
        read(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


# ---------------------------------------------------------------- there and back


def test_a_state_comes_back_as_it_was(path, state):
    back = load_checkpoint(str(path))
    assert back["config"] == state["config"] and back["step"] == 7
    assert back["model"].keys() == state["model"].keys()
    assert all(torch.equal(back["model"][k], v) for k, v in state["model"].items())
    assert [file.name for file in path.parent.iterdir()] == ["latest.pt"]


def test_a_loaded_model_gives_the_same_outputs(path, model):
    loaded, images = load_model(path), torch.randn(3, 3, 16, 16)
    assert not loaded.training and loaded.cfg == model.cfg
    for encoder in ("teacher", "student"):
        assert torch.equal(loaded.encode(images, encoder), model.encode(images, encoder))
    assert not any(p.requires_grad for p in loaded.teacher_encoder.parameters())
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in loaded.state_dict().items())


def test_a_new_checkpoint_replaces_the_old_one(path, state):
    save_checkpoint(path, {**state, "step": 8})
    assert load_checkpoint(path)["step"] == 8


# ---------------------------------------------------------------- writing is all or nothing


@pytest.mark.parametrize("error", [OSError("No space left on device"), RuntimeError("PytorchStreamWriter failed writing file")])
def test_a_write_that_fails_leaves_the_old_file(path, state, monkeypatch, error):
    before = path.read_bytes()

    def half(_, file):
        file.write(b"half a checkpoint")
        raise error

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(CheckpointError, match=rf"cannot write .*{error}.*hardware\.output_dir"):
        save_checkpoint(path, {**state, "step": 8})
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_an_interrupt_while_writing_leaves_the_old_file(path, state, monkeypatch):
    def interrupted(_, file):
        file.write(b"half a checkpoint")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, {**state, "step": 8})
    monkeypatch.undo()
    assert load_checkpoint(path)["step"] == 7 and list(path.parent.iterdir()) == [path]


def test_while_writing_the_old_file_is_there(path, state, monkeypatch):
    save, seen = torch.save, []

    def watched(*args):
        seen.append(load_checkpoint(path)["step"])
        save(*args)

    monkeypatch.setattr(torch, "save", watched)
    save_checkpoint(path, {**state, "step": 8})
    assert seen == [7] and load_checkpoint(path)["step"] == 8


def test_a_file_is_flushed_whole_before_it_takes_the_name_and_the_folder_after(path, state, monkeypatch):
    """Without it a power failure leaves an empty file under the right name, or the old one where the run has gone on."""
    fsync, replace, events = os.fsync, os.replace, []

    def flushed(handle):
        found = os.fstat(handle)
        events.append(("flushed", found.st_ino, found.st_size))
        fsync(handle)

    def renamed(old, new):
        found = os.stat(old)
        events.append(("renamed", found.st_ino, found.st_size))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)
    save_checkpoint(path, {**state, "step": 8})
    new, folder = path.stat(), path.parent.stat()
    assert events[:2] == [("flushed", new.st_ino, new.st_size), ("renamed", new.st_ino, new.st_size)]
    assert [event[:2] for event in events[2:]] == [("flushed", folder.st_ino)]


def test_another_name_of_the_old_file_keeps_its_content(path, state):
    """latest.pt is one: a new checkpoint must not be written through it."""
    os.link(path, path.with_name("other.pt"))
    save_checkpoint(path, {**state, "step": 8})
    assert load_checkpoint(path.with_name("other.pt"))["step"] == 7


def test_a_folder_that_cannot_be_made_is_named(tmp_path, state):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(CheckpointError, match=r"hardware\.output_dir") as caught:
        save_checkpoint(tmp_path / "file" / "latest.pt", state)
    assert str(tmp_path / "file" / "latest.pt") in str(caught.value)


# ---------------------------------------------------------------- what is no checkpoint


@pytest.mark.parametrize("read", [load_checkpoint, load_model])
def test_a_missing_file(tmp_path, read):
    assert "no checkpoint" in refusal(read, tmp_path / "none.pt")
    assert "no checkpoint" in refusal(read, tmp_path)  # a folder is no file


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_a_truncated_file(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert "truncated, damaged or not a wejepa checkpoint" in refusal(load_checkpoint, path)


@pytest.mark.parametrize("content", [bytes(range(256)) * 10, b"hello", b"PK\x03\x04 no archive", b"\x80\x02 no pickle", b"\x00" * 100])
def test_a_file_of_other_bytes(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    refusal(load_checkpoint, tmp_path / "x.pt")


@pytest.mark.parametrize("content", [b".", b"a", b"K", b"X\x01", b"}b."])
def test_a_file_that_the_unpickler_stumbles_over(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    refusal(load_checkpoint, tmp_path / "x.pt")


class Bomb:
    """What is called when it is unpickled."""

    went_off = False

    def __reduce__(self):
        return _go_off, ()


def _go_off():
    Bomb.went_off = True


@pytest.mark.parametrize("write", [partial(pickle.dump, protocol=2), torch.save])
def test_nothing_in_a_file_is_executed(tmp_path, write):
    with open(tmp_path / "x.pt", "wb") as file:
        write({"format": FORMAT, "model": Bomb()}, file)
    refusal(load_checkpoint, tmp_path / "x.pt")
    assert not Bomb.went_off


FOREIGN = [([1, 2], "list"), ({"state_dict": {}, "epoch": 3}, "state_dict"), (torch.zeros(3), "Tensor")]


@pytest.mark.parametrize(("content", "named"), FOREIGN)
def test_a_foreign_checkpoint_is_told_by_what_it_holds(tmp_path, content, named):
    torch.save(content, tmp_path / "x.pt")
    message = refusal(load_checkpoint, tmp_path / "x.pt")
    assert "is not a checkpoint of wejepa" in message and named in message


@pytest.mark.parametrize("entry", ["data.pkl", "data/3", "byteorder"])
def test_an_entry_marked_as_a_folder_is_damage(path, entry):
    """torch.load takes such an entry for empty, and gives a tensor of whatever was in memory."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(f"/{entry}")]
    header = content.rindex(name.encode()) - 46  # in the archive's directory
    assert content[header : header + 4] == b"PK\x01\x02"
    content[header + 38] |= 0x10
    path.write_bytes(content)
    assert "truncated, damaged" in refusal(load_checkpoint, path)


def test_every_flipped_bit_of_a_weight_is_noticed(path, state):
    content = path.read_bytes()
    weights = state["model"]["student_encoder.blocks.0.mlp.0.weight"].numpy().tobytes()
    start = content.index(weights)
    for at in range(start, start + len(weights), 97):
        damaged = bytearray(content)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        refusal(load_checkpoint, path)


# ---------------------------------------------------------------- weights that do not fit


def changed(path, state, change) -> str:
    change(state)
    save_checkpoint(path, state)
    return refusal(load_model, path)


def test_a_missing_weight_is_named(path, state):
    message = changed(path, state, lambda s: s["model"].pop("student_encoder.pos_embed"))
    assert "student_encoder.pos_embed is missing" in message and "more" not in message


def test_an_unexpected_weight_is_named(path, state):
    assert "surplus is unexpected" in changed(path, state, lambda s: s["model"].update(surplus=torch.zeros(1)))


def test_a_weight_of_another_shape_is_named_with_both(path, state):
    message = changed(path, state, lambda s: s["model"].update({"teacher_encoder.norm.weight": torch.zeros(5)}))
    assert "teacher_encoder.norm.weight is (5,) torch.float32, not (16,) torch.float32" in message


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_named(path, state, number):
    def change(s):
        s["model"]["predictor.mask_token"][0, 0, 3] = number

    assert "numbers that are not finite, in predictor.mask_token" in changed(path, state, change)


def test_several_faults_are_counted(path, state):
    def change(s):
        del s["model"]["student_encoder.pos_embed"], s["model"]["teacher_encoder.pos_embed"]

    assert "and 1 more" in changed(path, state, change)


def test_a_config_of_another_architecture(path, state):
    message = changed(path, state, lambda s: s.update(config=tiny_config(enc_depth=3).to_dict()))
    assert "blocks.2" in message and "is missing" in message


@pytest.mark.parametrize("part", ["config", "model"])
def test_a_checkpoint_without_a_part(path, state, part):
    assert part in changed(path, state, lambda s: s.pop(part))


def test_a_config_that_this_version_does_not_know(path, state):
    assert "model.wings" in changed(path, state, lambda s: s["config"]["model"].update(wings=2))
