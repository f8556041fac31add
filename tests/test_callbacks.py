"""What a run writes down: each step and epoch once, whatever befalls it; a monitor of your own, and one that grows with the classes."""

import csv
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from ranks import STEPS, tiny_config

from wejepa.config import IJepaConfig
from wejepa.errors import CheckpointError, ConfigError
from wejepa.train import callbacks
from wejepa.train.callbacks import Callback, MetricsFile, Monitor, epoch_line
from wejepa.train.checkpoints import load_checkpoint
from wejepa.train.loop import Pretraining
from wejepa.train.pretrain import launch_pretraining

HALF = STEPS // 2  # an epoch
NUMBERS = {"loss", "gradient_norm", "learning_rate", "weight_decay", "momentum"}


@pytest.fixture
def cfg(tmp_path) -> IJepaConfig:
    return tiny_config(tmp_path / "run")


class At(Callback):
    """Calls a function after a step, and keeps the numbers of every one."""

    def __init__(self, step: int = 0, function=None):
        self.step, self.function, self.numbers = step, function, {}

    def on_step(self, step, numbers):
        self.numbers[step] = numbers
        if step == self.step:
            self.function()


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def rows(folder: str | Path) -> list[dict[str, str]]:
    with open(Path(folder) / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def killed_at(cfg: IJepaConfig, step: int, resume=None) -> None:
    run = multiprocessing.get_context("fork").Process(target=launch_pretraining, args=(cfg, resume), kwargs={"callbacks": [At(step, kill)]})
    run.start()
    run.join(60)
    assert run.exitcode == -signal.SIGKILL


# ---------------------------------------------------------------- metrics.csv


def test_every_step_is_told_of_and_written_down_to_the_last_digit(cfg):
    heard = At()
    result = launch_pretraining(cfg, callbacks=[heard])
    written = rows(cfg.hardware.output_dir)
    assert [int(row["step"]) for row in written] == list(heard.numbers) == list(range(1, STEPS + 1))
    for row, numbers in zip(written, heard.numbers.values(), strict=True):
        assert {name: float(row[name]) for name in NUMBERS} == numbers
    schedule = Pretraining(cfg).schedule
    assert heard.numbers[3]["learning_rate"] == schedule(2).learning_rate and heard.numbers[3]["momentum"] == schedule(2).momentum
    assert sum(heard.numbers[step]["loss"] for step in range(1, HALF + 1)) / HALF == pytest.approx(result.history[0]["loss"])


def test_over_kills_and_resumes_no_step_is_missing_or_there_twice(cfg, tmp_path):
    launch_pretraining(cfg)
    whole = rows(cfg.hardware.output_dir)
    cfg.hardware.output_dir = str(tmp_path / "killed")
    cfg.hardware.checkpoint_every = 1
    killed_at(cfg, HALF + 3)  # three steps after its checkpoint
    with open(tmp_path / "killed" / "metrics.csv", "a") as file:
        file.write("14,0.5")  # half a line
    killed_at(cfg, HALF + 4, "auto")
    launch_pretraining(cfg, "auto")
    assert rows(tmp_path / "killed") == whole


def test_a_run_that_goes_on_elsewhere_takes_its_steps_along_and_one_that_goes_back_keeps_them(cfg, tmp_path):
    cfg.hardware.checkpoint_every = 1
    half = launch_pretraining(cfg).checkpoint.with_name(f"step_{HALF:08d}.pt")
    whole = rows(half.parent)
    cfg.hardware.output_dir = str(tmp_path / "elsewhere")
    launch_pretraining(cfg, half)
    assert rows(tmp_path / "elsewhere") == rows(half.parent) == whole

    cfg.hardware.output_dir = str(half.parent)
    launch_pretraining(cfg, half)
    assert rows(half.parent / "earlier-1") == rows(half.parent) == whole
    launch_pretraining(cfg)
    assert rows(half.parent / "earlier-2") == whole


def test_steps_that_somebody_removed_are_told_of(cfg, capsys):
    cfg.hardware.checkpoint_every = 1
    half = launch_pretraining(cfg).checkpoint.with_name(f"step_{HALF:08d}.pt")
    (half.parent / "metrics.csv").unlink()
    launch_pretraining(cfg, half)
    assert f"metrics.csv lacks {HALF} of the first {HALF} steps" in capsys.readouterr().out
    assert [int(row["step"]) for row in rows(half.parent)] == list(range(HALF + 1, STEPS + 1))


def test_a_file_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="choose another hardware.output_dir"):
        MetricsFile(tmp_path / "nowhere" / "metrics.csv")


# ---------------------------------------------------------------- TensorBoard


class Writer:
    def __init__(self, folder, purge_step):
        self.folder, self.purged, self.scalars, self.flushed = folder, purge_step, {}, 0
        self.made.append(self)

    def add_scalar(self, name, value, step):
        assert (name, step) not in self.scalars
        self.scalars[name, step] = value

    def flush(self):
        self.flushed += 1


def test_tensorboard_gets_every_step_and_epoch_and_hides_what_is_made_anew(cfg, monkeypatch):
    made = Writer.made = []
    monkeypatch.setattr(callbacks, "tensorboard_writer", lambda: Writer)
    monkeypatch.setattr("wejepa.train.loop.tensorboard_writer", lambda: Writer)
    cfg.hardware.tensorboard, cfg.hardware.checkpoint_every = True, 1
    result = launch_pretraining(cfg)
    (writer,) = made
    assert writer.folder == str(Path(cfg.hardware.output_dir) / "tensorboard") and writer.purged == 1 and writer.flushed == 2
    assert {(f"step/{name}", step) for name in NUMBERS for step in range(1, STEPS + 1)} <= writer.scalars.keys()
    assert writer.scalars["epoch/rankme", HALF] == result.history[0]["rankme"]
    cfg.hardware.tensorboard = False  # a resumed run may change it
    launch_pretraining(cfg, result.checkpoint.with_name(f"step_{HALF:08d}.pt"))
    assert len(made) == 1
    cfg.hardware.tensorboard = True
    launch_pretraining(cfg, result.checkpoint.with_name(f"step_{HALF:08d}.pt"))
    assert made[1].purged == HALF + 1


def test_tensorboard_reads_what_torchs_writer_wrote(cfg):
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    cfg.hardware.tensorboard = True
    launch_pretraining(cfg)
    events = reading.EventAccumulator(str(Path(cfg.hardware.output_dir) / "tensorboard")).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("step/loss")]
    expected = [(int(row["step"]), pytest.approx(float(row["loss"]))) for row in rows(cfg.hardware.output_dir)]
    assert losses == expected and "epoch/rankme" in events.Tags()["scalars"]


def test_tensorboard_that_is_not_installed_is_told_of_before_anything_is_written(cfg, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    cfg.hardware.tensorboard = True
    with pytest.raises(
        ConfigError, match=r"hardware.tensorboard = true needs the package tensorboard .*pip install 'wejepa\[tensorboard\]'"
    ):
        launch_pretraining(cfg)
    assert not Path(cfg.hardware.output_dir).exists()


# ---------------------------------------------------------------- the monitor


def test_a_monitor_of_the_callers_own_takes_the_place_of_the_packages(cfg, capsys):
    def norm(model):
        return {"norm": round(float(model.teacher_encoder.pos_embed.norm()), 3)}

    result = launch_pretraining(cfg, monitor=norm)
    assert result.history[-1].keys() == {"epoch", "step", "loss", "norm", "images_per_second", "seconds"}
    assert result.history[-1]["norm"] == norm(result.model)["norm"]
    assert f"norm {result.history[-1]['norm']}" in capsys.readouterr().out
    assert load_checkpoint(result.checkpoint)["history"] == result.history
    assert launch_pretraining(cfg, "auto").history == result.history  # the table shows such lines as well


def test_the_table_leaves_open_what_was_not_measured():
    entry = {"epoch": 1, "step": 2, "loss": 0.5, "images_per_second": 9.0, "seconds": 1.0, "knn": None}
    assert epoch_line(entry).split() == ["1", "0.5000", "-", "-", "-", "9"]


class Classes:
    """Images that are nothing but their class, 1,000 of them, as features that are perfect."""

    def __init__(self, classes: int, per_class: int):
        self.classes, self.labels = tuple(map(str, range(classes))), torch.arange(classes * per_class) % classes

    def __len__(self):
        return len(self.labels)

    def readable(self, index):
        return index


@pytest.mark.parametrize(("classes", "voters"), [(10, 1000), (1000, 20_000)])
def test_perfect_features_score_one_whatever_the_number_of_classes(cfg, monkeypatch, classes, voters):
    torch.manual_seed(0)
    source, directions, asked = Classes(classes, 30_000 // classes), torch.randn(classes, 64), []

    def perfect(model, source, index, cfg):
        asked.append(len(index))
        return directions[source.labels[index]][:, None]

    monkeypatch.setattr(callbacks, "encode_images", perfect)
    assert Monitor(cfg, source, None)()["knn"] > 0.995
    assert sum(asked) == voters + 500 and max(asked) <= 1500
