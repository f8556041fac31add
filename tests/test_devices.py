"""What takes images moves them to the model's device, what gives numbers for figures gives them on the CPU, and nothing mixes the two."""

import copy
import dataclasses
import importlib
import inspect
import pkgutil

import matplotlib
import pytest
import torch
from elsewhere import READ, Elsewhere, Machine, sent_elsewhere
from ranks import tiny_config
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.torch_version import TorchVersion

import wejepa
from wejepa import devices
from wejepa.analysis import attention, features, visualization
from wejepa.collection import Collection
from wejepa.config import IJepaConfig, adapt_config_for_backbone, hf224_config
from wejepa.data import load_images, training_batches
from wejepa.errors import ConfigError
from wejepa.interop import compare, export, from_huggingface, to_huggingface
from wejepa.masking import Masks, sample_block_masks
from wejepa.model import IJEPA_base, IJepaLoss
from wejepa.train.callbacks import Callback, Monitor
from wejepa.train.checkpoints import load_model, save_model
from wejepa.train.classifier import Classifier
from wejepa.train.finetune import (
    FinetuneConfig,
    Judge,
    compare_pretrained_vs_scratch,
    finetune_encoder,
    fit_probe,
    train_linear_probe,
)
from wejepa.train.interruption import Interruption
from wejepa.train.loop import Pretraining, parameter_groups

matplotlib.use("Agg")
CPU, THERE = torch.device("cpu"), torch.device("meta")
COUNT = 3  # images


@pytest.fixture
def cfg(tmp_path) -> IJepaConfig:
    cfg = tiny_config(tmp_path / "run")
    cfg.data.fake_data_size = 60
    return cfg


# ---------------------------------------------------------------- which device, which precision


@pytest.mark.parametrize(
    ("cuda", "mps", "best"), [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_auto_takes_cuda_then_mps_then_the_cpu(monkeypatch, cuda, mps, best):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert devices.pick_device("auto") == torch.device(best)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it is here")
def test_a_device_that_is_not_here_is_refused_by_its_settings_name(cfg):
    cfg.hardware.device = "cuda"
    with pytest.raises(ConfigError, match=r"hardware\.device = 'cuda' is not to be had here: take 'auto' or 'cpu'"):
        Pretraining(cfg)
    for use in (train_linear_probe, compare_pretrained_vs_scratch):
        with pytest.raises(ConfigError, match=r"FinetuneConfig\.device = 'cuda' is not to be had here"):
            use(FinetuneConfig(device="cuda", checkpoint="no such file"))
    with pytest.raises(ConfigError, match="device = 'nowhere' is not to be had here"):
        load_model("no such file", "nowhere")


@pytest.fixture
def own_precision(monkeypatch):
    """The devices' own, also where the tests are run in float32."""
    monkeypatch.delenv("WEJEPA_MIXED_PRECISION", raising=False)


@pytest.mark.usefixtures("own_precision")
@pytest.mark.parametrize(
    ("kind", "native", "wanted"),
    [("cuda", True, torch.bfloat16), ("cuda", False, torch.float16), ("mps", False, torch.float16)],
)
def test_bfloat16_where_it_is_native_and_float16_on_other_gpus(monkeypatch, kind, native, wanted):
    """A T4 emulates bfloat16, and PyTorch counts that as support unless it is asked to leave emulation out."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    device = torch.device(kind)
    assert devices.computes_bfloat16(device) == native
    assert devices.precision(device, True) == wanted
    assert devices.precision(device, False) == torch.float32


@pytest.mark.usefixtures("own_precision")
@pytest.mark.parametrize("native", [True, False])
def test_a_cpu_computes_in_bfloat16_or_in_float32(monkeypatch, native):
    monkeypatch.setattr(devices, "computes_bfloat16", lambda device: native)
    assert devices.precision(CPU, True) == (torch.bfloat16 if native else torch.float32)
    assert devices.precision(CPU, False) == torch.float32
    monkeypatch.setenv("WEJEPA_MIXED_PRECISION", "0")
    assert devices.precision(CPU, True) == torch.float32


@pytest.mark.usefixtures("own_precision")
def test_features_are_computed_in_the_configs_precision(cfg, monkeypatch):
    monkeypatch.setattr(devices, "computes_bfloat16", lambda device: True)
    model, source, seen = IJEPA_base(cfg), load_images(cfg), []
    model.teacher_encoder.blocks[0].attn.qkv.register_forward_hook(lambda _, inputs, output: seen.append(output.dtype))
    for mixed in (True, False):
        cfg.hardware.mixed_precision = mixed
        assert features.encode_images(model, source, torch.arange(COUNT), cfg).dtype == torch.float32
    assert seen == [torch.bfloat16, torch.float32]


# ---------------------------------------------------------------- a model on CUDA, images on the CPU: shapes and devices alone


class Images:
    """A source that knows of no device."""

    def __init__(self, images: torch.Tensor):
        self.images, self.labels, self.classes = images, torch.arange(len(images)) % 2, ("one", "two")

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, index, batch_size, *_, **__):
        yield self.images


def on_fake_cuda(model: nn.Module) -> nn.Module:
    """A model's weights as FakeTensorMode has them, in place."""
    for module in model.modules():
        for tensors, kind in ((module._parameters, nn.Parameter), (module._buffers, lambda t, _: t)):
            for name, t in tensors.items():
                if t is not None:
                    tensors[name] = kind(torch.empty(t.shape, dtype=t.dtype, device="cuda"), t.requires_grad)
    return model


# By name a call (model, images, masks), and where its result has to be.
WITH_A_MODEL = {
    "IJEPA_base.forward": (lambda model, x, masks: model(x, masks), "cuda"),
    "IJEPA_base.encode": (lambda model, x, masks: [model.encode(x), model.encode(x, "student")], "cuda"),
    "IJEPA_base.features": (lambda model, x, masks: [model.features(x), model.features(x, "grid")], "cuda"),
    "IJepaLoss": (lambda model, x, masks: [IJepaLoss(model)(x, masks)], "cuda"),
    "record_attention": (lambda model, x, masks: attention.record_attention(model, x), "cpu"),
    "attention_rollout": (lambda model, x, masks: [attention.attention_rollout(attention.record_attention(model, x))], "cpu"),
    "prediction_errors": (lambda model, x, masks: [attention.prediction_errors(model, x, model.cfg.mask, samples=2)], "cpu"),
    "imagine": (lambda model, x, masks: [attention.imagine(model, x, masks, x)], "cpu"),
    "nearest_tokens": (lambda model, x, masks: [attention.nearest_tokens(model.encode(x)[0], model.encode(x)[0])], "cpu"),
    "token_colours": (lambda model, x, masks: [attention.token_colours(model.encode(x), model.cfg.grid_size)], "cpu"),
    "token_similarity": (lambda model, x, masks: [attention.token_similarity(model.encode(x)[0], model.encode(x)[1])], "cpu"),
    "extract_backbone_features": (
        lambda model, x, masks: [features.extract_backbone_features(model, Images(x))],
        "cpu",
    ),
    "encode_images": (lambda model, x, masks: [features.encode_images(model, Images(x), torch.arange(COUNT), model.cfg)], "cpu"),
}


# Seen to hold with 2.14.1; FakeTensorMode of 2.9.1 asks the CUDA driver, and ends the process where there is none.
fake_cuda = pytest.mark.skipif(TorchVersion(torch.__version__) < (2, 14), reason="older versions need a CUDA driver for fake CUDA tensors")


@fake_cuda
@pytest.mark.parametrize("name", WITH_A_MODEL)
def test_a_model_on_cuda_takes_images_from_the_cpu(cfg, monkeypatch, name):
    call, where = WITH_A_MODEL[name]
    cfg.hardware.mixed_precision = False
    model = IJEPA_base(cfg)
    real = sample_block_masks(COUNT, cfg.grid_size, cfg.mask)
    with FakeTensorMode():
        on_fake_cuda(model)
        masks = Masks(*(torch.zeros(index.shape, dtype=torch.int64) for index in real))
        monkeypatch.setattr(attention, "sample_block_masks", lambda *_: masks)  # which are numpy's, and not to be faked
        assert model.device.type == "cuda"
        results = call(model, torch.randn(COUNT, 1, 16, 16), masks)
        assert results and all(result.device.type == where for result in results)


@fake_cuda
@pytest.mark.parametrize("backbone", ["resnet18", "swin_t"])
def test_a_backbone_on_cuda_takes_images_from_the_cpu(backbone):
    cfg = adapt_config_for_backbone(hf224_config(), backbone)
    model, size = IJEPA_base(cfg).eval(), cfg.model.img_size
    real = sample_block_masks(1, cfg.grid_size, cfg.mask)
    with FakeTensorMode():
        on_fake_cuda(model)
        masks = Masks(*(torch.zeros(index.shape, dtype=torch.int64) for index in real))
        images = torch.randn(1, 3, size, size)
        assert all(result.device.type == "cuda" for result in model(images, masks))
        if backbone.startswith("swin"):
            assert all(weights.device.type == "cpu" for weights in attention.record_attention(model, images))


# ---------------------------------------------------------------- elsewhere, with the numbers


@pytest.fixture
def elsewhere(monkeypatch):
    """A machine with an accelerator that computes, and that AdamW takes for one of those it has a fused kernel for."""
    monkeypatch.setattr(importlib.import_module("torch.optim.adam"), "_device_dtype_check_for_fused", lambda *_, **__: None)
    with Machine():
        yield


@pytest.fixture
def models(cfg, elsewhere) -> tuple[IJEPA_base, IJEPA_base]:
    """The same weights here and there."""
    torch.manual_seed(0)
    here = IJEPA_base(cfg).eval()
    return here, sent_elsewhere(copy.deepcopy(here))


def there(*tensors):
    moved = tuple(t.to(THERE) for t in tensors)
    return moved if len(moved) > 1 else moved[0]


def assert_here_and_close(found, expected) -> None:
    if isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for pair in zip(found, expected, strict=True):
            assert_here_and_close(*pair)
        return
    assert type(found) is type(expected)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4, equal_nan=True)


def test_make_believe_tensors_notice_what_is_mixed(elsewhere):
    a = there(torch.ones(3))
    assert isinstance(a, Elsewhere) and a.device == THERE and torch.equal((2 * a).cpu(), torch.full((3,), 2.0))
    with pytest.raises(RuntimeError, match="same device"):
        a + torch.ones(3)
    with pytest.raises(RuntimeError):
        a.numpy()


def test_what_is_measured_elsewhere_is_what_is_measured_here(cfg, models, elsewhere):
    source = load_images(cfg, "train")
    index = torch.arange(20)
    images = next(source.batches(index[:COUNT], COUNT))

    def measured(model, move):
        tokens = model.encode(images)
        x, y = tokens.mean(1), move(torch.arange(COUNT) % 2)
        recorded = attention.record_attention(model, images)
        masks = torch.Generator().manual_seed(0)
        return [
            features.encode_images(model, source, index, cfg),
            features.encode_images(model, Images(images), index[:COUNT], cfg),
            features.extract_backbone_features(model, source, index, pooling="grid"),
            recorded,
            attention.attention_rollout([move(w) for w in recorded]),
            attention.prediction_errors(model, images, cfg.mask, samples=3, generator=masks),
            attention.token_colours(tokens, cfg.grid_size),
            torch.tensor(features.rankme(x)),
            torch.tensor(features.teacher_variance(tokens)),
            torch.tensor(features.knn_accuracy(x, y, x.cpu(), y.cpu(), k=2)),
            torch.tensor(features.knn_accuracy(x.cpu(), y.cpu(), x, y, k=2)),
            torch.tensor(list(Monitor(cfg, source, model)().values())),
        ]

    assert_here_and_close(measured(models[1], there), measured(models[0], lambda x: x))


def test_an_explorer_takes_a_model_and_images_from_elsewhere(cfg, models, elsewhere):
    from wejepa.widgets import MaskExplorer, MaskPainter, PatchExplorer, TokenExplorer

    images = torch.rand(2, 1, 16, 16)
    here, away = TokenExplorer({"one": models[0]}, images), TokenExplorer({"one": models[1]}, there(images))
    for mode in ("attention", "similarity", "error"):
        here.mode = away.mode = mode
        assert_here_and_close(away.values["one", 0], here.values["one", 0])
    painters = MaskPainter(models[0], images, images), MaskPainter(models[1], there(images), there(images))
    assert_here_and_close(painters[1].hidden.errors, painters[0].hidden.errors)
    for explorer in (away, painters[1], MaskExplorer(cfg, there(images[0])), PatchExplorer(there(images[0]))):
        explorer.render()


def test_an_export_is_the_same_from_anywhere(models, elsewhere, tmp_path):
    pytest.importorskip("safetensors")
    for ending in (".safetensors", ".pt2", ""):
        assert export(models[1], tmp_path / f"there{ending}").exists()
    assert models[1].device == THERE
    from safetensors.torch import load_file

    for file in (tmp_path / "there.safetensors", to_huggingface(models[1], tmp_path / "folder") / "model.safetensors"):
        assert all(type(value) is torch.Tensor for value in load_file(file).values())
    back = from_huggingface(tmp_path / "there")
    assert torch.equal(back.teacher_encoder.pos_embed, models[0].teacher_encoder.pos_embed)
    compare({"a": torch.ones(2)}, {"a": there(torch.ones(2))}, tmp_path)


def test_a_collection_is_the_same_from_anywhere(models, elsewhere, tmp_path):
    source = load_images(models[0].cfg)
    here, away = (Collection.build(model, source) for model in models)
    assert type(away.cells) is torch.Tensor and away.encoder == here.encoder
    torch.testing.assert_close(away.cells, here.cells, atol=2e-3, rtol=2e-3)
    away.save(tmp_path / "images.safetensors")
    hits = Collection.load(tmp_path / "images.safetensors", models[1]).search(source.images[7], 3, patch=(0, 0, 0.5, 1))
    assert [hit.name for hit in hits] == [hit.name for hit in here.search(source.images[7], 3, patch=(0, 0, 0.5, 1))] and hits[
        0
    ].name == "7"


def test_a_loaded_model_is_where_it_is_wanted(cfg, tmp_path):
    save_model(tmp_path / "model.pt", IJEPA_base(cfg), "a test")
    assert load_model(tmp_path / "model.pt").device == CPU
    assert load_model(tmp_path / "model.pt", "meta").device == THERE


def test_probes_are_trained_where_the_protocol_says(cfg, models, elsewhere):
    """The same protocol here and there: the same predictions, on the CPU."""
    protocol = FinetuneConfig(labels_per_class=6, supervised_epochs=1)
    results = {}
    for device, model in zip(("cpu", "meta"), models, strict=True):
        protocol.device = device
        results[device] = train_linear_probe(protocol, model)
    assert_here_and_close(results["meta"].predictions, results["cpu"].predictions)
    assert results["meta"].accuracy == pytest.approx(results["cpu"].accuracy)
    x, y = torch.randn(40, 8), torch.arange(40) % 2
    assert_here_and_close(fit_probe(*there(x, y, x, y), protocol).predictions, fit_probe(x, y, x, y, protocol).predictions)


def test_the_rows_of_a_comparison_are_computed_where_the_protocol_says(cfg, models, elsewhere, monkeypatch):
    protocol = FinetuneConfig(labels_per_class=6, supervised_epochs=1, device="meta")
    monkeypatch.setattr(IJEPA_base, "to", lambda model, device: sent_elsewhere(model) if torch.device(device) == THERE else model)
    monkeypatch.setattr(Classifier, "to", lambda classifier, device: sent_elsewhere(classifier))
    judged, right = [], Judge.right
    monkeypatch.setattr(Judge, "right", lambda judge, encoder: judged.append(encoder.norm.weight.device) or right(judge, encoder))
    rows = compare_pretrained_vs_scratch(protocol, models[1]).rows
    assert len(rows) == 5 and judged == [THERE] * 4
    assert all(0 <= row["knn"] <= 1 for row in rows.values())


def test_an_encoder_is_fine_tuned_where_the_protocol_says(cfg, models, elsewhere, monkeypatch):
    monkeypatch.setattr(Classifier, "to", lambda classifier, device: sent_elsewhere(classifier) if device == THERE else classifier)
    protocol = FinetuneConfig(labels_per_class=6, supervised_epochs=1)
    results = {}
    for device, model in zip(("cpu", "meta"), models, strict=True):
        protocol.device = device
        results[device] = finetune_encoder(protocol, model)
        assert results[device].classifier.device.type == device
    assert_here_and_close(results["meta"].predictions, results["cpu"].predictions)


def test_the_nearest_neighbours_are_found_where_the_features_are(elsewhere):
    x, y, others = torch.randn(40, 8), torch.arange(40) % 2, torch.randn(9, 8)
    expected = features.knn_predictions(x, y, others)
    assert_here_and_close(features.knn_predictions(there(x), y, others), expected)
    assert_here_and_close(features.knn_predictions(*there(x, y, others)), expected)


def pretraining_elsewhere(cfg: IJepaConfig) -> Pretraining:
    run = Pretraining(cfg)
    sent_elsewhere(run.model)
    run.device, run.late = THERE, 1
    run.optimizer = torch.optim.AdamW(parameter_groups(run.model), betas=run.cfg.optimizer.betas, fused=True)
    return run


@pytest.mark.parametrize("parts", [1, 2])
def test_an_epoch_waits_for_the_device_once_a_step(cfg, elsewhere, monkeypatch, parts):
    cfg.optimizer.accumulation_steps, cfg.data.fake_data_size = parts, 80
    here, away = Pretraining(cfg), pretraining_elsewhere(cfg)
    for run in (here, away):
        run.monitor = dict
        monkeypatch.setattr(run, "callbacks", [Told()])
        READ.clear()
        with Interruption() as interruption:
            run._epoch(interruption)
    assert len(READ) == away.steps_per_epoch == 10
    (told_here,), (told_away,) = here.callbacks, away.callbacks
    assert [step for step, _ in told_away.steps] == [step for step, _ in told_here.steps] == list(range(1, 11))
    assert [loss for _, loss in told_away.steps] == pytest.approx([loss for _, loss in told_here.steps], rel=1e-4)


class Told(Callback):
    def __init__(self):
        self.steps = []

    def on_step(self, step, numbers):
        self.steps.append((step, numbers["loss"]))


def test_a_step_elsewhere_is_the_step_here(cfg, elsewhere):
    """All of it on the device: the images and masks that the loss is given, gradients, weights, and the numbers that are read later."""
    here, away = Pretraining(cfg), pretraining_elsewhere(cfg)
    given, loss = [], away.loss
    away.loss = lambda images, masks: given.extend([images, *masks]) or loss(images, masks)
    for images in training_batches(here.source, cfg, 0):
        one, other = here.train_step(images), away.train_step(images)
        assert other.device == THERE
        torch.testing.assert_close(other.cpu(), one, rtol=1e-5, atol=0)
    assert given and all(x.device == THERE for x in given)
    for p, q in zip(here.model.parameters(), away.model.parameters(), strict=True):
        torch.testing.assert_close(q.cpu(), p, rtol=0, atol=1e-3)


# ---------------------------------------------------------------- figures


def figures() -> dict:
    """By name a figure of tensors that are elsewhere."""
    torch.manual_seed(0)
    images, square = there(torch.rand(2, 1, 8, 8), torch.rand(2, 2))
    weights = there(torch.rand(2, 4, 4).softmax(-1))
    masks = Masks(*there(torch.tensor([[0], [1]]), torch.tensor([[[2]], [[3]]])))
    points, labels, counts = there(torch.rand(6, 2), torch.arange(6) % 2, torch.eye(2, dtype=torch.int64))
    v = visualization
    return {
        "plot_bands": lambda: v.plot_bands([1, 10], {"a": square}, x="x", y="y"),
        "hide": lambda: v.hide(images, masks.context, (2, 2)),
        "plot_confusion": lambda: v.plot_confusion(counts, ["a", "b"]),
        "plot_correspondences": lambda: v.plot_correspondences([tuple(images)], [masks.context[0]], {"a": [masks.context[1]]}, (2, 2)),
        "plot_coverage": lambda: v.plot_coverage({"a": square}),
        "plot_error_maps": lambda: v.plot_error_maps(images, there(torch.rand(2, 2, 2))),
        "plot_images": lambda: v.plot_images(images),
        "plot_maps": lambda: [v.plot_maps({"a": square}, numbers=".1f"), v.plot_maps({"a": square}, shared=False)],
        "plot_mask_steps": lambda: v.plot_mask_steps(images[0], {"a": (there(torch.eye(2)).bool(), [there(torch.eye(2)).bool()])}),
        "plot_masks": lambda: v.plot_masks(images, masks, (2, 2)),
        "plot_patches": lambda: v.plot_patches(images[0], 4),
        "plot_rows": lambda: v.plot_rows({"a": images}),
        "plot_queries": lambda: v.plot_queries(images, {"a": weights[:, 0]}, (2, 2), [0, 3]),
        "plot_similarity_maps": lambda: v.plot_similarity_maps({"a": there(torch.eye(4))}, (2, 2)),
        "plot_token_colours": lambda: v.plot_token_colours(images, {"a": there(torch.rand(2, 2, 2, 3))}),
        "plot_tsne_embeddings": lambda: v.plot_tsne_embeddings(points, labels, ["a", "b"]),
        "to_picture": lambda: v.to_picture(images[0], [0.5], [0.5]),
        "visualize_attention_scores": lambda: [
            v.visualize_attention_scores(images[0], [weights], (2, 2), query=query) for query in (None, 1)
        ],
    }


FIGURES = [name for name in visualization.__all__ if "Tensor" in str(inspect.signature(getattr(visualization, name)))]


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_drawn_of_tensors_from_elsewhere(elsewhere, name):
    figures()[name]()


def test_t_sne_takes_features_from_elsewhere(elsewhere):
    pytest.importorskip("sklearn")
    assert features.run_tsne_projection(there(torch.randn(12, 4))).shape == (12, 2)


# ---------------------------------------------------------------- nothing is forgotten

TESTED_ABOVE = {
    *WITH_A_MODEL, *FIGURES,
    "Collection", "MaskPainter", "Monitor", "compare_pretrained_vs_scratch", "export", "finetune_encoder", "fit_probe",
    "from_huggingface", "knn_accuracy", "knn_predictions", "load_model", "parameter_groups", "predict_hidden", "rankme",
    "run_tsne_projection", "save_model", "teacher_variance", "to_huggingface", "train_linear_probe",
}  # fmt: skip
NAMES = {"model", "models", "model_or_folder", "features", "tokens", "attentions", "train_x"}
# By test_distributed.py, on two processes; by test_own_parts.py: a run moves the model that it is given to its own device.
ELSEWHERE_TESTED = {"shard", "Pretraining", "launch_pretraining"}


def test_every_public_function_that_takes_a_model_or_features_is_tested_here():
    found = set()
    for info in pkgutil.walk_packages(wejepa.__path__, "wejepa."):
        module = importlib.import_module(info.name)
        for name in getattr(module, "__all__", ()):
            thing = getattr(module, name)
            if callable(thing) and not dataclasses.is_dataclass(thing):
                parameters = inspect.signature(thing).parameters.values()
                if any(p.name in NAMES and "Config" not in str(p.annotation) for p in parameters):
                    found.add(name)
    assert "encode_images" in found
    pure = {"pool_tokens"}  # one tensor in, one out, where it was
    assert found - pure - TESTED_ABOVE - ELSEWHERE_TESTED == set(), "add it to the tests above"
