"""A checkpoint that is a folder is handled as a file is: whole or not there, read strictly, pruned, moved, named the latest.

One process writes them here, which takes no launcher; test_distributed.py has those that several wrote.
"""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from ranks import tiny_config, train

from benchmarks.faults import same
from wejepa.data import MemoryImages
from wejepa.errors import CheckpointError, DataError
from wejepa.train import sharded
from wejepa.train.checkpoints import load_checkpoint, load_model, save_checkpoint
from wejepa.train.folder import CheckpointFolder
from wejepa.train.interruption import RunStopped
from wejepa.train.loop import Pretraining
from wejepa.train.ranks import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))
SHARDS = "__0_0.distcp"
FILES = [".metadata", SHARDS, "manifest.json", "rest.pt"]

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Pretraining:
    """A run after three steps."""
    run = Pretraining(tiny_config(tmp_path_factory.mktemp("run")))
    run.losses = [float(run.train_step(torch.randn(8, 1, 16, 16))) for _ in range(3)]
    return run


@pytest.fixture(scope="module")
def state(run) -> dict:
    """Its state, with a key that this version does not know."""
    return run.state() | {"later": {"scale": 65536.0}}


@pytest.fixture(scope="module")
def sound(tmp_path_factory, state) -> Path:
    path = tmp_path_factory.mktemp("sound") / "step_00000003.pt"
    save_checkpoint(path, state, ALONE)
    return path


@pytest.fixture
def path(tmp_path, sound) -> Path:
    """A copy of the sound one, to damage."""
    shutil.copytree(sound, tmp_path / sound.name)
    return tmp_path / sound.name


def refusal(read, path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def signed_again(path: Path) -> None:
    """Make the manifest of a checkpoint fit what was done to its files."""
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"] = {name: sharded.signature(path / name) for name in manifest["files"]}
    (path / "manifest.json").write_text(json.dumps(manifest))


# ---------------------------------------------------------------- there and back


def test_a_state_comes_back_as_it_was(sound, state):
    back = load_checkpoint(sound)
    assert back.pop("format") == "wejepa checkpoint 2"
    assert same(back, state)
    assert names(sound) == FILES and names(sound.parent) == [sound.name]


def test_a_model_is_loaded_from_it(sound, run):
    assert same(dict(load_model(sound).state_dict()), dict(run.model.state_dict()))


def test_every_file_is_flushed_before_the_folder_has_its_name(tmp_path, state, monkeypatch):
    flushed, fsync, rename = [], os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda handle: (flushed.append(os.readlink(f"/proc/self/fd/{handle}")), fsync(handle))[1])
    monkeypatch.setattr(Path, "rename", lambda self, to: (flushed.append(f"renamed {self.name}"), rename(self, to))[1])
    save_checkpoint(tmp_path / "run" / "step_00000003.pt", state, ALONE)
    before = flushed[: next(i for i, name in enumerate(flushed) if name.startswith("renamed .step"))]
    assert {Path(name).name.removesuffix(".tmp") for name in before} >= {*FILES} and flushed[-1] == str(tmp_path / "run")
    assert before[-1].endswith(".tmp")  # the names in the folder


@pytest.mark.parametrize("where", ["dcp", "rest", "rename"])
def test_a_write_that_fails_leaves_nothing(tmp_path, state, monkeypatch, where):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    target, name = {"dcp": (os, "fsync"), "rest": (torch, "save"), "rename": (Path, "rename")}[where]
    if where == "rest":
        save, calls = torch.save, []
        total = 1 + len(state["model"]) + sum(map(len, state["moments"].values()))
        monkeypatch.setattr(target, name, lambda *a, **k: full() if calls.append(1) or len(calls) == total else save(*a, **k))
    else:
        monkeypatch.setattr(target, name, full)
    with pytest.raises(CheckpointError, match=r"cannot write .*step_00000003\.pt .*No space left.*hardware\.output_dir"):
        save_checkpoint(tmp_path / "step_00000003.pt", state, ALONE)
    assert names(tmp_path) == []


def test_an_interrupt_while_writing_is_one(tmp_path, state, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path / "step_00000003.pt", state, ALONE)
    assert names(tmp_path) == []


# ---------------------------------------------------------------- what is no checkpoint


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_missing_truncated_or_damaged_is_named(path, name):
    content = (path / name).read_bytes()
    for at in (len(content) // 3, len(content) // 2, len(content) - 2):
        damaged = bytearray(content)
        damaged[at] ^= 1
        (path / name).write_bytes(damaged)
        assert str(path / name) in refusal(load_checkpoint, path) or name == "manifest.json"  # which told of another file
        (path / name).write_bytes(content[:at])
        assert str(path / name) in refusal(load_checkpoint, path)
    (path / name).unlink()
    assert name in refusal(load_checkpoint, path)


def test_any_other_manifest_is_refused(path):
    content = (path / "manifest.json").read_bytes()
    for at in range(len(content)):
        damaged = bytearray(content)
        damaged[at] ^= 1 << at % 7
        if json_of(damaged) != json_of(content):  # another blank between two words changes nothing
            (path / "manifest.json").write_bytes(damaged)
            refusal(load_checkpoint, path)
    for manifest in ([], {}, {"format": sharded.FORMAT, "files": {}}, {"format": "wejepa sharded checkpoint 9", "files": {}}):
        (path / "manifest.json").write_text(json.dumps(manifest))
        assert str(path / "manifest.json") in refusal(load_checkpoint, path)


def json_of(content: bytes):
    try:
        return json.loads(content)
    except ValueError:
        return None


def test_a_manifest_names_no_files_elsewhere(path):
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../elsewhere"] = manifest["files"][SHARDS]
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert "'../elsewhere'" in refusal(load_checkpoint, path)


def test_a_folder_that_is_no_checkpoint(tmp_path):
    assert "there is no checkpoint" in refusal(load_checkpoint, tmp_path)


class Bomb:
    def __reduce__(self):
        return os.system, ("touch /tmp/went_off",)


@pytest.mark.parametrize("payload", ["a call", "a class of torch's", "another object", "a stray file", "a missing part", "bytes"])
def test_metadata_that_were_made_to_fit_the_manifest(path, payload, monkeypatch):
    """As a stranger could make them: nothing in them is called, and nothing is read but what they may hold."""
    called = []
    monkeypatch.setattr(os, "system", called.append)
    metadata = sharded.unpickled(path / ".metadata")
    name = next(iter(metadata.state_dict_metadata))
    if payload == "a call":
        metadata = {"metadata": Bomb()}
    elif payload == "a class of torch's":
        metadata.planner_data = torch.nn.Identity
    elif payload == "another object":
        metadata = torch.Size([1])
    elif payload == "a stray file":
        for part in metadata.storage_data.values():
            part.relative_path = "../" + part.relative_path
    elif payload == "a missing part":
        metadata.state_dict_metadata[name].chunks.clear()
    else:
        metadata.state_dict_metadata[name] = dcp.metadata.BytesStorageMetadata()
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    signed_again(path)
    assert str(path / ".metadata") in refusal(load_checkpoint, path)
    assert not called


@pytest.mark.parametrize("name", ["surplus", "model/a/b", "moments/exp_avg_cubed/a"])
def test_tensors_that_belong_nowhere(tmp_path, name):
    sharded.write_shards(tmp_path / "x.pt", {name: torch.zeros(2)}, {"format": "wejepa checkpoint 2"}, ALONE)
    assert f"it holds {name}" in refusal(load_checkpoint, tmp_path / "x.pt")


def test_a_part_that_is_no_tensor_after_all(path):
    """Its bytes are another's, and the manifest fits."""
    content = (path / SHARDS).read_bytes()
    (path / SHARDS).write_bytes(content[::-1])
    signed_again(path)
    assert "truncated, damaged" in refusal(load_checkpoint, path)


def test_a_state_that_is_not_this_runs_is_refused(tmp_path, run, state):
    def resume(path):
        cfg = run.cfg.copy()
        cfg.hardware.output_dir = str(tmp_path / "other")
        Pretraining(cfg, resume=path)

    broken = {**state["model"], "predictor.mask_token": torch.full_like(state["model"]["predictor.mask_token"], torch.inf)}
    changes = {
        "not finite, in predictor.mask_token": {"model": broken},
        "is missing": {"model": {}},
        "no whole training state: losses": {"losses": [0.5]},
        "was trained on 7 images": {"images": "7 images"},
    }
    for number, (fault, change) in enumerate(changes.items()):
        save_checkpoint(tmp_path / f"{number}.pt", state | change, ALONE)
        assert fault in refusal(resume, tmp_path / f"{number}.pt")
    assert not (tmp_path / "other").exists()


# ---------------------------------------------------------------- in a run's folder


def test_a_folder_of_both_kinds(tmp_path, state):
    """latest.pt is another name of the newest, whichever kind it and the one before are; pruning takes both."""
    folder = CheckpointFolder(tmp_path, keep=2)
    for step, ranks in enumerate([None, ALONE, ALONE, None, None, ALONE], start=1):
        folder.save(state | {"step": step}, ranks)
        newest = tmp_path / f"step_{step:08d}.pt"
        assert newest.is_dir() == bool(ranks) and folder.latest.is_symlink() == bool(ranks)
        assert folder.latest.samefile(newest) and load_checkpoint(folder.latest)["step"] == step
        assert folder.newest_first() == [newest, tmp_path / f"step_{step - 1:08d}.pt"][: min(step, 2)]
    assert names(tmp_path) == ["latest.pt", "step_00000005.pt", "step_00000006.pt"]


def test_those_for_good_stay(tmp_path, state):
    folder = CheckpointFolder(tmp_path, keep=1, keep_steps=2)
    for step in (1, 2, 3, 4, 5):
        folder.save(state | {"step": step}, ALONE)
    assert names(tmp_path) == ["latest.pt", *(f"step_0000000{step}.pt" for step in (2, 4, 5))]


def test_latest_moves_with_the_folder(tmp_path, state):
    CheckpointFolder(tmp_path / "a").save(state, ALONE)
    (tmp_path / "a").rename(tmp_path / "b")
    assert load_checkpoint(tmp_path / "b" / "latest.pt")["step"] == 3


def test_folders_are_moved_aside_and_what_was_half_written_is_removed(tmp_path, state):
    folder = CheckpointFolder(tmp_path, keep=5)
    for step in (1, 2, 3):
        folder.save(state | {"step": step}, ALONE)
    shutil.copytree(tmp_path / "step_00000003.pt", tmp_path / ".step_00000004.pt.77.tmp")
    (tmp_path / ".latest.pt.77.tmp").symlink_to("step_00000001.pt")
    assert "earlier-1" in folder.begin(tmp_path / "step_00000001.pt", 1)
    assert names(tmp_path) == ["earlier-1", "latest.pt", "log.txt", "run.json", "step_00000001.pt"]
    assert names(tmp_path / "earlier-1") == ["step_00000002.pt", "step_00000003.pt"]
    assert folder.latest.samefile(tmp_path / "step_00000001.pt") and load_checkpoint(folder.latest)["step"] == 1
    assert "earlier-2" in folder.begin()
    assert names(tmp_path) == ["earlier-1", "earlier-2", "log.txt", "run.json"]
    assert load_checkpoint(tmp_path / "earlier-2" / "step_00000001.pt")["step"] == 1


def test_a_latest_whose_checkpoint_was_removed_is_none(tmp_path, state):
    folder = CheckpointFolder(tmp_path)
    folder.save(state, ALONE)
    shutil.rmtree(tmp_path / "step_00000003.pt")
    assert folder.newest_first() == [] and "no checkpoint" in refusal(load_checkpoint, folder.latest)
    folder.begin()
    assert names(tmp_path) == ["log.txt", "run.json"]


def test_a_run_goes_on_from_a_folder_and_passes_over_a_damaged_one(tmp_path, capsys):
    cfg = tiny_config(tmp_path / "run")
    cfg.hardware.checkpoint_every, cfg.hardware.keep_checkpoints = 1, 5
    whole = train(cfg)
    for path in CheckpointFolder(tmp_path / "run").newest_first():
        state = load_checkpoint(path)
        del state["format"]
        path.unlink()
        save_checkpoint(path, state, ALONE)
    (tmp_path / "run" / "latest.pt").unlink()
    (path.with_name("step_00000020.pt") / SHARDS).unlink()
    capsys.readouterr()
    resumed = train(cfg, "auto")
    assert f"passed over: {path.with_name('step_00000020.pt') / SHARDS} is truncated, damaged" in capsys.readouterr().out
    assert resumed["losses"] == whole["losses"][10:] and resumed["weights"] == whole["weights"]


def test_a_run_that_stops_where_the_checkpoint_is_already_there(tmp_path, monkeypatch):
    """A folder, unlike a file, is not replaced by another one of its name."""

    def broken(self, index, crops, device, augmented=MemoryImages.augmented):
        yield from augmented(self, index, crops, device)
        raise DataError("no next images")

    monkeypatch.setattr(MemoryImages, "augmented", broken)
    monkeypatch.setattr(Pretraining, "save", lambda self: self.checkpoints.save(self.state(), self.ranks))
    cfg = tiny_config(tmp_path / "run")
    cfg.hardware.checkpoint_every = 1
    with pytest.raises(RunStopped, match="no next images; .*latest.pt holds step 10: go on"):
        Pretraining(cfg).run()
    assert (tmp_path / "run" / "step_00000010.pt").is_dir()


KILLED = """
import os, signal, sys, warnings
import torch, torch.distributed.checkpoint as dcp
from pathlib import Path
from wejepa.train import sharded
from wejepa.train.folder import CheckpointFolder
from wejepa.train.ranks import Ranks
warnings.simplefilter("ignore")
torch.set_num_threads(1)

def work(folder, moment, nth):
    owner, name = {"save": (dcp, "save"), "fsync": (os, "fsync"), "rename": (Path, "rename"), "replace": (os, "replace"), "symlink":
        (Path, "symlink_to"), "rmtree": (sharded.shutil, "rmtree"), "unlink": (os, "unlink")}[moment]
    original, calls = getattr(owner, name), []
    def deadly(*args, **kwargs):
        calls.append(1)
        if len(calls) == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    setattr(owner, name, deadly)
    folder = CheckpointFolder(folder)
    for step in range(1, 6):
        weights = {"a": torch.full((1000,), float(step))}
        folder.save({"step": step, "model": weights, "moments": {}}, Ranks(0, 1, torch.device("cpu")))

for line in sys.stdin:
    folder, moment, nth = line.split()
    child = os.fork()
    if not child:
        work(folder, moment, int(nth))
        os._exit(0)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.mark.slow
def test_a_kill_at_any_stage_of_writing_loses_at_most_that_checkpoint(tmp_path):
    """Processes that kill themselves at the nth call of a function that writes, renames or removes."""
    kinds = {"save": [1], "fsync": [*range(1, 7), 13], "rename": [1, 4], "replace": [1, 2], "symlink": [3], "rmtree": [3]}
    kinds["unlink"] = [3, 6, 7]
    asked = [(tmp_path / f"{moment}{nth}", moment, nth) for moment, nths in kinds.items() for nth in nths]
    given = "".join(f"{folder} {moment} {nth}\n" for folder, moment, nth in asked)
    done = subprocess.run(
        [sys.executable, "-c", KILLED], input=given, env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.split() == [str(int(signal.SIGKILL))] * len(asked), done.stderr
    late = 0
    for path, _, _ in asked:
        folder = CheckpointFolder(path)
        for checkpoint in [*folder.newest_first(), *([folder.latest] if folder.latest.exists() else [])]:
            state = load_checkpoint(checkpoint)  # nothing unreadable, not even once
            assert (state["model"]["a"] == state["step"]).all()
            late += 1
        folder.begin()
        assert not list(path.glob(".*")), "what the killed process was writing is cleared away"
    assert late > 15
