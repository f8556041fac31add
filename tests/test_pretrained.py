"""The models that ship: whole, small, better than random ones, and refused when tampered with."""

import ast
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import wejepa
from wejepa.analysis.features import extract_backbone_features, knn_accuracy
from wejepa.collection import main as collection
from wejepa.config import IJepaConfig, default_config
from wejepa.data import embedded, load_images
from wejepa.errors import ConfigError, DataError
from wejepa.model import IJEPA_base
from wejepa.pretrained import PRETRAINED, load_pretrained, pretrained_facts
from wejepa.train.checkpoints import load_checkpoint, load_model, save_model
from wejepa.train.finetune import main as finetune
from wejepa.train.loop import Pretraining
from wejepa.train.pretrain import main as pretrain

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", PRETRAINED)
def test_a_shipped_model_is_whole_small_and_ready(name):
    model = wejepa.load_pretrained(name)
    assert isinstance(model, IJEPA_base) and not model.training and model.predictor is not None
    assert all(p.dtype == torch.float32 and p.isfinite().all() and p.device.type == "cpu" for p in model.parameters())
    assert (embedded.ASSETS / f"{name}.safetensors").stat().st_size < 1.5e6
    assert model.cfg.grid_size == {"fashion": (8, 8), "emoji": (16, 16)}[name]
    for p, q in zip(model.student_encoder.parameters(), model.teacher_encoder.parameters(), strict=True):
        assert p.requires_grad and not q.requires_grad and p.data_ptr() != q.data_ptr()
    load_images(model.cfg, "test")  # its config names a set that ships as well


@pytest.mark.parametrize("name", PRETRAINED)
def test_a_shipped_model_has_learnt(name):
    """By its neighbours, mean-pooled, far above the same encoder at random."""
    model = load_pretrained(name)
    torch.manual_seed(0)
    models = {"trained": model, "random": IJEPA_base(model.cfg).eval()}
    train, test = load_images(model.cfg, "train"), load_images(model.cfg, "test")
    some, others = torch.arange(0, len(train), 3), torch.arange(0, len(test), 2)
    scores = {}
    for which, one in models.items():
        x, y = extract_backbone_features(one, train, some), extract_backbone_features(one, test, others)
        scores[which] = knn_accuracy(x, train.labels[some], y, test.labels[others])
    assert scores["trained"] > scores["random"] + 0.05, scores


@pytest.mark.parametrize("name", PRETRAINED)
def test_how_a_shipped_model_was_made_is_told(name):
    facts = pretrained_facts(name)
    cfg = IJepaConfig.from_dict(facts["config"])
    assert len(facts["history"]) == cfg.optimizer.epochs and facts["history"][-1]["epoch"] == cfg.optimizer.epochs
    assert {"trained", "random", "pixels"} == facts["accuracy"].keys() and facts["licence"].startswith("MIT")
    assert facts["accuracy"]["trained"]["mean"] > facts["accuracy"]["random"]["mean"]
    assert str(ROOT) not in json.dumps(facts) and "/tmp" not in json.dumps(facts)


def test_a_name_that_is_not_known():
    with pytest.raises(ConfigError, match="'fashon' is no model that ships with wejepa; did you mean 'fashion'"):
        load_pretrained("fashon")
    with pytest.raises(ConfigError, match="device"):
        load_pretrained("fashion", device="gpu7")


@pytest.mark.parametrize("file", ["fashion.safetensors", "fashion.json"])
@pytest.mark.parametrize("harm", ["gone", "cut", "changed"])
def test_weights_that_were_tampered_with(assets, file, harm):
    content = bytearray((assets / file).read_bytes())
    if harm == "gone":
        (assets / file).unlink()
    else:
        content[len(content) // 2] ^= 1
        (assets / file).write_bytes(content if harm == "changed" else content[:-10])
    with pytest.raises(DataError, match=rf"{file}.*reinstall wejepa"):
        load_pretrained("fashion")


@pytest.mark.parametrize(("name", "file"), [(name, file) for name, files in PRETRAINED.items() for file in files])
def test_weights_without_their_licence(assets, name, file):
    (assets / file).unlink()
    with pytest.raises(DataError, match=rf"{file} is missing"):
        load_pretrained(name)


def test_a_run_begins_with_a_shipped_model(tmp_path, capsys):
    cfg = default_config()
    cfg.data.use_fake_data, cfg.data.fake_data_size, cfg.data.train_batch_size = True, 20, 10
    cfg.model.start_from, cfg.hardware.output_dir = "fashion", str(tmp_path / "run")
    run = Pretraining(cfg)
    assert "begins with fashion: teacher taken as teacher, student as student, predictor as predictor" in capsys.readouterr().out
    for name, value in load_pretrained("fashion").state_dict().items():
        assert torch.equal(run.model.state_dict()[name], value), name


def test_its_name_serves_where_a_checkpoint_is_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert finetune(["--set", "checkpoint=fashion", "--set", "labels_per_class=10"]) == 0
    assert "test accuracy" in capsys.readouterr().out
    save_model("fashion", IJEPA_base(default_config()), "a test")  # a file of that name goes first
    assert not torch.equal(load_model("fashion").teacher_encoder.pos_embed, load_pretrained("fashion").teacher_encoder.pos_embed)
    assert load_checkpoint("fashion")["source"] == "a test"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("make_weights", ROOT / "scripts" / "make_weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_writes_what_it_trained(tmp_path, monkeypatch, script):
    assert script.config_of("fashion", "data").to_dict()["data"]["dataset"] == "fashion_mnist"
    monkeypatch.setattr(script, "ASSETS", tmp_path)
    cfg = default_config()
    cfg.optimizer.epochs, cfg.optimizer.warmup_epochs, cfg.hardware.output_dir = 1, 0.5, str(tmp_path / "run")
    cfg.data.use_fake_data, cfg.data.fake_data_size = True, 256
    trained = wejepa.launch_pretraining(cfg).model
    script.write("fashion", tmp_path / "run")
    from safetensors.torch import load_file

    written = load_file(tmp_path / "fashion.safetensors")
    assert {name: value.half() for name, value in trained.state_dict().items()}.keys() == written.keys()
    assert all(torch.equal(value.half(), written[name]) for name, value in trained.state_dict().items())
    assert len(json.loads((tmp_path / "fashion.json").read_text())["history"]) == 1


def test_runs_are_chosen_without_one_drawing_telling_the_other(tmp_path, monkeypatch, script, capsys):
    """Features that tell which emoji it is, and nothing of its class, find every twin and no class."""
    save_model(tmp_path / "latest.pt", IJEPA_base(default_config()), "a test")
    emoji = torch.randn(200, 256, generator=torch.Generator().manual_seed(0)).repeat_interleave(2, 0)
    classes = torch.randint(8, (200,), generator=torch.Generator().manual_seed(1)).repeat_interleave(2)

    class Known:
        def __init__(self, protocol, cfg):
            self.index, self.train_y = torch.arange(400), classes

        def features(self, encoder, poolings):
            return {pooling: (emoji, None) for pooling in poolings}

    monkeypatch.setattr(script, "Judge", Known)
    script.choose("emoji", [tmp_path])
    found = ast.literal_eval(capsys.readouterr().out.removeprefix(tmp_path.name))
    assert found.pop("pairs") == 100 and found.keys() == {"mean", "layers", "grid", "knn"}
    assert max(found.values()) < 30, found  # one in eight by chance; with a drawing on either side nearly all


def test_loading_needs_no_training_code():
    code = "import sys, wejepa; wejepa.load_pretrained('fashion'); sys.exit(any(m.startswith('wejepa.train') for m in sys.modules))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_how_tos_lines_run(tmp_path, monkeypatch, capsys):
    page = (ROOT / "website" / "howto" / "weights.md").read_text(encoding="utf-8")
    section = page.partition("## The models that ship\n")[2].partition("\n## ")[0]
    (block,) = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    names = {"images": torch.zeros(2, 3, 32, 32)}
    exec(compile(block, "weights.md", "exec"), names)
    assert names["features"].shape == (2, 64)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for i in range(3):
        Image.new("RGB", (40, 30), (80 * i, 0, 0)).save(tmp_path / "photos" / f"{i}.png")
    (command,) = re.findall(r"^python -m wejepa.collection (.*)$", section, flags=re.MULTILINE)
    assert collection(command.split()) == 0 and (tmp_path / "photos.safetensors").is_file()
    (command,) = re.findall(r"^python -m wejepa.train.pretrain (.*)$", section, flags=re.MULTILINE)
    capsys.readouterr()
    assert pretrain([*command.split(), "--print-config"]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["start_from"] == "fashion"
