"""README's own lines on own images and parts are run as they stand there, one block after the other, and none is long."""

import ast
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from wejepa.config import default_config
from wejepa.model import IJEPA_base
from wejepa.train.checkpoints import save_model
from wejepa.train.finetune import main

pytestmark = pytest.mark.slow

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
SECTION = README.partition("## Your own Dataset, parts and logging\n")[2].partition("\n## ")[0]
BLOCKS = re.findall(r"```python\n(.*?)```", SECTION, flags=re.DOTALL)
TASKS = ("Dataset", "transform", "loss", "predictor", "contexts", "tensorboard", "features", "export")


class Writer:
    """What stands in for TensorBoard's writer where it is not installed."""

    def __init__(self, folder, purge_step):
        Path(folder).mkdir()

    def add_scalar(self, *_):
        pass

    flush = add_scalar


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder where the blocks ran, and the names that they leave."""
    pytest.importorskip("torchvision")
    pytest.importorskip("onnxscript")
    folder, rng, names, patch = tmp_path_factory.mktemp("readme"), np.random.default_rng(0), {}, pytest.MonkeyPatch()
    for i in range(66):
        for path in (folder / "my_images" / "train" / ("cat", "dog")[i % 2] / f"{i}.jpg", folder / "photos" / f"{i % 3}" / f"{i}.jpg"):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(path)
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        patch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    patch.chdir(folder)
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), names)
    patch.undo()
    return folder, names


def test_there_is_a_block_for_each_task_and_none_has_more_than_ten_lines():
    assert len(BLOCKS) == len(TASKS)
    for block, task in zip(BLOCKS, TASKS, strict=True):
        assert task in block + SECTION.partition(block)[0].removesuffix("```python\n").rpartition("```")[2]
        assert len([line for line in block.splitlines() if line.strip()]) <= 10
        ast.parse(block)


def test_readmes_lines_run_and_do_what_they_say(ran):
    folder, names = ran
    assert names["features"].shape == (66, 64) and names["features"].isfinite().all()
    assert (folder / "encoder.onnx").stat().st_size > 100_000
    assert names["result"].history[-1]["knn"] is not None and len(names["photos"]) == 66
    runs = sorted((folder / "outputs" / "pretrain").glob("earlier-*"))
    assert len(runs) == 5  # each but the last
    assert (folder / "outputs" / "pretrain" / "tensorboard").is_dir() and (folder / "outputs" / "pretrain" / "metrics.csv").is_file()
    newest = [torch.load(max(run.glob("step_*.pt")), weights_only=True) for run in runs]
    assert [state.get("parts", {}) for state in newest] == [{}, {}, {"loss": "mse_loss"}, {"predictor": "MeanPredictor"}, {}]
    assert newest[0]["images"] != newest[1]["images"]  # with a transform they are other images
    assert newest[4]["config"]["mask"]["num_contexts"] == newest[4]["config"]["data"]["num_crops"] == 2


def test_readmes_lines_with_labels_run(tmp_path, monkeypatch, capsys):
    section = README.partition("## With labels\n")[2].partition("\n## ")[0]
    (block,) = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    assert len([line for line in block.splitlines() if line.strip()]) <= 10
    cfg = default_config()
    cfg.data.use_fake_data = True
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "first").mkdir(parents=True)
    save_model("outputs/first/latest.pt", IJEPA_base(cfg), "a test")
    names = {}
    exec(compile(block.replace("supervised_epochs=10", "supervised_epochs=1"), "README.md", "exec"), names)
    printed = ast.literal_eval(capsys.readouterr().out.strip().splitlines()[-1])
    assert list(printed) == [f"noise {c}" for c in range(10)] and abs(sum(printed.values()) - 1) < 1e-4
    commands = re.findall(r"^python -m wejepa.train.finetune (.*?) *#", section, flags=re.MULTILINE)
    assert len(commands) == 3
    for command, words in zip(commands, ("%", "| pretrained teacher", "classifier"), strict=True):
        assert main([*command.split(), "--set", "epochs=2", "--set", "supervised_epochs=1"]) == 0
        assert words in capsys.readouterr().out
    assert (tmp_path / "outputs" / "finetune" / "classifier.pt").is_file()
