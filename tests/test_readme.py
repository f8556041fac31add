"""What README and the how-to pages show is run as it stands there; README is short, and no page says what another one says.

The lines on a photo collection are run in test_collection.py, those on the model that ships in test_pretrained.py.
"""

import ast
import re
import shlex
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import tiny_config
from test_start import in_metas_layout, model_of

from wejepa import interop
from wejepa.config import default_config
from wejepa.model import IJEPA_base
from wejepa.train import finetune, pretrain
from wejepa.train.checkpoints import save_model

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
HOW_TOS = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "website" / "howto").glob("*.md"))}
TASKS = {
    "Features of the images in a folder": "features",
    "Your own Dataset": "ImageFolder",
    "Your own transform": "v2.Compose",
    "TensorBoard, and a callback of your own": "tensorboard",
    "Another loss": "loss=",
    "Another predictor": "model.predictor",
    "Several contexts of each crop": "num_contexts",
    "Export from the GPU": "export",
    "Fine-tune with labels": "finetune_encoder",
    "Continue from Meta's checkpoint": "start_from",
    "Search a folder": "search",
}


def python_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def commands(module: str) -> list[str]:
    """The arguments that pages give the module, without comments and with what a shell would put in their place."""
    found = re.findall(rf"^[^#`\n]*-m {re.escape(module)}\b(.*)$", "\n".join([README, *HOW_TOS.values()]), flags=re.MULTILINE)
    return [re.sub(r" +#.*| > .*", "", line).strip() for line in found]


BEGINNING, *SECTIONS = re.split(r"^## ", HOW_TOS["tasks"], flags=re.MULTILINE)
BLOCKS = {section.partition("\n")[0]: python_blocks(section) for section in SECTIONS}


class Writer:
    """What stands in for TensorBoard's writer where it is not installed."""

    def __init__(self, folder, purge_step):
        Path(folder).mkdir()

    def add_scalar(self, *_):
        pass

    flush = add_scalar


# ---------------------------------------------------------------- what the pages are like


def test_readme_is_short_and_names_every_page():
    assert len(README.splitlines()) < 120
    assert set(re.findall(r"\(website/howto/(\w+)\.md\)", README)) == set(HOW_TOS) - {"index"}
    assert set(re.findall(r"\((\w+)\.md\)", HOW_TOS["index"])) == set(HOW_TOS) - {"index"}
    start = (ROOT / "website" / "index.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^howto/(\w+)$", start, flags=re.MULTILINE)) == set(HOW_TOS)


def test_no_page_repeats_another():
    """Paragraphs, code and tables, by what they say."""
    seen: dict[str, str] = {}
    for name, text in {"README": README, **HOW_TOS}.items():
        for part in re.split(r"\n\n|^```\w*\n", text, flags=re.MULTILINE):
            said = re.sub(r"\]\([^)]*\)|\s+", " ", part).strip()
            if len(said) > 100:
                assert said not in seen, f"{name} says what {seen[said]} says: {said[:200]}"
                seen[said] = name


def test_there_are_eleven_tasks_of_at_most_ten_lines():
    assert list(BLOCKS) == list(TASKS) and len(TASKS) == 11
    for task, word in TASKS.items():
        (block,) = BLOCKS[task]
        ast.parse(block)
        assert word in block
        assert len([line for line in block.splitlines() if line.strip()]) <= 10, task


def test_every_setting_and_option_that_the_pages_name_is_there(tmp_path, monkeypatch, capsys):
    """Every command that trains is asked for its settings instead."""
    monkeypatch.chdir(tmp_path)
    assert pretrain.main(["--print-config"]) == 0
    Path("my.json").write_text(capsys.readouterr().out)
    training = commands("wejepa.train.pretrain")
    assert len(training) > 10
    for line in training:
        asked = [] if {"--print-config", "--help-settings"} & set(line.split()) else ["--print-config"]
        assert pretrain.main([*shlex.split(line), *asked]) == 0, line
    settings = {f"{name}.{key}" for name, section in default_config().to_dict().items() if isinstance(section, dict) for key in section}
    for name, text in {"README": README, **HOW_TOS}.items():
        named = re.findall(r"`(?:--set )?((?:data|mask|model|optimizer|hardware)\.\w+)[`= ]", text)
        assert set(named) - {"optimizer.epoch"} <= settings, name  # the one whose refusal is shown


# ---------------------------------------------------------------- what they show runs


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder with what the pages' lines speak of: images to train on, photographs, and Meta's file."""
    folder, rng = tmp_path_factory.mktemp("pages"), np.random.default_rng(0)
    for i in range(66):
        for path in (folder / "my_images" / "train" / ("cat", "dog")[i % 2] / f"{i}.jpg", folder / "photos" / f"{i % 3}" / f"{i}.jpg"):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(path)
    (folder / "beach.jpg").write_bytes((folder / "photos" / "2" / "5.jpg").read_bytes())
    return folder


@pytest.fixture
def ran(images, tmp_path, monkeypatch):
    """A function that runs a task after the page's first lines, in a folder of its own, and gives the names that it leaves."""
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    for path in images.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)

    def run(task: str) -> dict:
        names: dict = {}
        for block in (*python_blocks(BEGINNING), *BLOCKS[task]):
            exec(compile(block, "tasks.md", "exec"), names)
        return names

    return run


def state() -> dict:
    """The newest checkpoint of the run that a task made."""
    return torch.load(max(Path("outputs", "pretrain").glob("step_*.pt")), weights_only=True)


def features_of_a_folder(names):
    assert names["features"].shape == (66, 64) and names["features"].isfinite().all() and len(names["photos"]) == 66


def own_dataset(names):
    assert names["result"].checkpoint.is_file() and len(names["result"].history) == 2 and names["result"].history[-1]["knn"] is not None


def own_transform(names):
    plain = names["as_source"](names["ImageFolder"]("my_images/train"), names["cfg"])
    assert state()["images"] != plain.fingerprint  # with a transform they are other images


def tensorboard_and_callback(names):
    assert Path("outputs", "pretrain", "tensorboard").is_dir() and Path("outputs", "pretrain", "metrics.csv").is_file()


def another_loss(names):
    assert state()["parts"] == {"loss": "mse_loss"}


def another_predictor(names):
    assert state()["parts"] == {"predictor": "MeanPredictor"}


def several_contexts(names):
    assert state()["config"]["mask"]["num_contexts"] == state()["config"]["data"]["num_crops"] == 2


def export_of_the_encoder(names):
    assert Path("encoder.onnx").stat().st_size > 100_000


def fine_tuning(names):
    assert 0.5 < names["tuned"].accuracy <= 1 and Path("classifier.pt").is_file()


def metas_weights(names):
    teacher = names["result"].model.teacher_encoder
    assert names["cfg"].model.blockwise_prediction and torch.equal(teacher.pos_embed, names["given"].teacher_encoder.pos_embed)


def search(names):
    assert len(names["hits"]) == 20 and names["hits"][0].name == "2/5.jpg" and Path("found.png").is_file()


CHECKS = (
    features_of_a_folder,
    own_dataset,
    own_transform,
    tensorboard_and_callback,
    another_loss,
    another_predictor,
    several_contexts,
    export_of_the_encoder,
    fine_tuning,
    metas_weights,
    search,
)


@pytest.mark.slow
@pytest.mark.parametrize(("task", "check"), list(zip(TASKS, CHECKS, strict=True)), ids=[check.__name__ for check in CHECKS])
def test_each_task_runs_and_does_what_it_says(ran, tmp_path, monkeypatch, task, check):
    """As it stands there; Meta's file is a small one, for a small model on noise."""
    given = None
    if check is export_of_the_encoder:
        pytest.importorskip("onnxscript")
    if check is metas_weights:
        cfg = tiny_config(tmp_path / "run")
        cfg.model.embed_dim, cfg.model.num_heads, cfg.model.pred_dim = 192, 3, 24  # of a published width, whose heads are known
        given = model_of(cfg)
        in_metas_layout(given, tmp_path / "IN1K-vit.h.14-300e.pth.tar")
        monkeypatch.setattr("wejepa.config.hf224_config", cfg.copy)
    check({**ran(task), "given": given})


@pytest.mark.slow
def test_readmes_lines_run(tmp_path, monkeypatch, capsys):
    """As they stand there, on noise and with a few epochs."""
    cfg = default_config()
    cfg.data.use_fake_data, cfg.optimizer.epochs = True, 1

    def quick(**settings):
        return finetune.FinetuneConfig(**settings, supervised_epochs=1)

    monkeypatch.setattr("wejepa.config.default_config", cfg.copy)
    monkeypatch.chdir(tmp_path)
    (block,) = python_blocks(README)
    exec(compile(block.replace("(FinetuneConfig(", "(quick("), "README.md", "exec"), names := {"quick": quick})
    assert "| pretrained teacher" in capsys.readouterr().out and names["result"].checkpoint.is_file()


@pytest.mark.slow
def test_the_lines_with_labels_run(tmp_path, monkeypatch, capsys):
    first, second = python_blocks(HOW_TOS["labels"])
    cfg = default_config()
    cfg.data.use_fake_data = True
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "first").mkdir(parents=True)
    save_model("outputs/first/latest.pt", IJEPA_base(cfg), "a test")
    exec(compile(second.replace("supervised_epochs=10", "supervised_epochs=1"), "labels.md", "exec"), {})
    printed = ast.literal_eval(capsys.readouterr().out.strip().splitlines()[-1])
    assert list(printed) == [f"noise {c}" for c in range(10)] and abs(sum(printed.values()) - 1) < 1e-4
    lines = commands("wejepa.train.finetune")
    shown = [line for line in lines if "outputs/first" in line]
    assert len(shown) == 3
    for command, words in zip(shown, ("%", "| pretrained teacher", "classifier"), strict=True):
        assert finetune.main([*command.split(), "--set", "supervised_epochs=1"]) == 0
        assert words in capsys.readouterr().out
    assert (tmp_path / "outputs" / "finetune" / "classifier.pt").is_file()

    monkeypatch.setattr("wejepa.config.default_config", cfg.copy)
    quick = "supervised_epochs=1, checkpoint=str(result.checkpoint)"
    exec(compile(first.replace("epochs = 10", "epochs = 1").replace("checkpoint=str(result.checkpoint)", quick), "labels.md", "exec"), {})
    assert "| pretrained teacher" in capsys.readouterr().out


@pytest.mark.slow
def test_the_lines_on_weights_from_elsewhere_and_on_backbones_run(tmp_path, monkeypatch):
    """As they stand there, but that the name on the hub leads to a model made here, and that Meta's file is a small one."""
    pytest.importorskip("onnxscript")
    cfg = tiny_config(tmp_path / "run")
    cfg.model.embed_dim, cfg.model.num_heads, cfg.model.pred_dim = 192, 3, 24
    in_metas_layout(model_of(cfg), tmp_path / "IN1K-vit.h.14-300e.pth.tar")
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(interop, "from_huggingface", lambda name: asked.append(name))
    elsewhere = next(block for block in python_blocks(HOW_TOS["weights"]) if "from_meta" in block)
    exec(compile(elsewhere, "weights.md", "exec"), {})
    assert asked == ["facebook/ijepa_vith14_1k"] and (tmp_path / "encoder.onnx").is_file()
    (block,) = python_blocks(HOW_TOS["backbones"])
    exec(compile(block, "backbones.md", "exec"), names := {})
    names["cfg"].validate()
    assert names["cfg"].model.classification_backbone == "resnet18"
