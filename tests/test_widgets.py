"""The explorers redraw when a control moves, say why they cannot, and leave nothing behind."""

import gc
import io
from dataclasses import fields

import numpy as np
import pytest
import torch
from PIL import Image

from wejepa import widgets
from wejepa.analysis.attention import attention_rollout, record_attention
from wejepa.config import IJepaConfig, MaskConfig, default_config
from wejepa.errors import ConfigError
from wejepa.model import IJEPA_base
from wejepa.widgets import SIDE, AttentionExplorer, MaskExplorer, PatchExplorer


@pytest.fixture(scope="module")
def cfg() -> IJepaConfig:
    return default_config()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def models(cfg) -> dict[str, IJEPA_base]:
    torch.manual_seed(0)
    return {"one": IJEPA_base(cfg).eval(), "other": IJEPA_base(cfg).eval()}


@pytest.fixture
def explorers(cfg, images, models):
    return [PatchExplorer(images[0]), MaskExplorer(cfg, images[0]), AttentionExplorer(models, images)]


def shown(explorer) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(explorer.picture.value)))


def another_value(control):
    if hasattr(control, "options"):
        return next(o for o in control.options if o != control.value)
    if isinstance(control.value, tuple):
        return (control.value[0], (control.value[0] + control.value[1]) / 2)
    return control.min if control.value != control.min else control.min + control.step


def test_every_control_changes_the_picture_or_the_line_below(explorers):
    for explorer in explorers:
        for name, control in explorer.controls.items():
            before = explorer.picture.value, explorer.caption.value
            control.value = another_value(control)
            after = explorer.picture.value, explorer.caption.value
            # A range of which only one end is drawn this time may change nothing.
            assert before != after or name.endswith(("scale", "ratio")), name
            assert "not possible" not in explorer.caption.value, (name, explorer.caption.value)


def test_what_is_shown_is_what_render_gives(explorers):
    for explorer in explorers:
        assert (shown(explorer) == np.asarray(explorer.render())).all()


def test_the_same_value_again_draws_nothing(cfg, images, monkeypatch):
    explorer, drawn = MaskExplorer(cfg, images[0]), []
    monkeypatch.setattr(explorer, "_draw", lambda: drawn.append(1))
    explorer.controls["seed"].value = explorer["seed"]
    assert not drawn


def test_there_is_a_control_for_every_setting_that_a_mask_depends_on(cfg, images):
    explorer = MaskExplorer(cfg, images[0])
    assert set(explorer.controls) == {field.name for field in fields(MaskConfig)} - {"num_contexts"} | {"seed"}
    assert explorer.mask_config == cfg.mask
    explorer.controls["num_target_blocks"].value = 2
    assert explorer.mask_config.num_target_blocks == 2 and cfg.mask.num_target_blocks == 4  # the caller's is left alone
    assert "predicts 2 blocks" in explorer.caption.value


def test_masks_that_cannot_be_are_explained_and_the_last_picture_stays(cfg, images):
    explorer = MaskExplorer(cfg, images[0])
    before = explorer.picture.value
    explorer.controls["context_share"].value = 0.99
    assert "not possible" in explorer.caption.value and "mask.target_scale" in explorer.caption.value
    assert explorer.picture.value == before
    with pytest.raises(ConfigError):
        explorer.render()
    explorer.controls["context_share"].value = 0.33
    assert "not possible" not in explorer.caption.value


def test_an_error_in_a_callback_is_not_swallowed(cfg, images, monkeypatch):
    explorer = MaskExplorer(cfg, images[0])

    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(widgets, "masked", broken)
    with pytest.raises(ZeroDivisionError):
        explorer.controls["seed"].value = 5


def test_the_student_sees_the_context_as_it_is_and_the_rest_tinted(cfg):
    white = torch.ones(3, 32, 32)
    white[:, 0, 0] = 0  # so that the range is known
    explorer = MaskExplorer(cfg, white, draws=1)
    from wejepa.masking import sample_block_masks

    masks = sample_block_masks(1, cfg.grid_size, cfg.mask, torch.Generator().manual_seed(0))
    picture = np.asarray(explorer.render())[-SIDE:]
    cell = SIDE // 8
    for place in range(64):
        row, col = divmod(place, 8)
        centre = picture[row * cell + cell // 2, col * cell + cell // 2]
        framed = any(abs(int(v) - 255) > 160 for v in centre)
        if not framed:
            assert (centre == 255).all() == (place in masks.context[0].tolist()), place


def test_attention_is_the_recorded_one(models, images):
    explorer = AttentionExplorer(models, images)
    for name, value in {"image": 2, "layer": 2, "head": 1, "row": 3, "column": 5}.items():
        explorer.controls[name].value = value
    weights = record_attention(models["other"], images[2:3])
    torch.testing.assert_close(explorer.attention("other"), weights[1][0, 0, 3 * 8 + 5].view(8, 8))
    explorer.controls["head"].value = "mean"
    torch.testing.assert_close(explorer.attention("other"), weights[1][0].mean(0)[3 * 8 + 5].view(8, 8))
    explorer.controls["layer"].value = "rollout"
    torch.testing.assert_close(explorer.attention("other"), attention_rollout(weights)[0, 3 * 8 + 5].view(8, 8))


def test_an_image_is_encoded_once(models, images, monkeypatch):
    explorer, calls = AttentionExplorer(models, images), []
    monkeypatch.setattr(widgets, "record_attention", lambda *args: calls.append(args) or record_attention(*args))
    for row in range(8):
        explorer.controls["row"].value = row
    assert not calls
    explorer.controls["image"].value = 1
    explorer.controls["row"].value = 0
    assert len(calls) == len(models)


def test_patches_that_do_not_divide_are_refused(images):
    with pytest.raises(ConfigError, match="5 does not divide an image of 32 x 32"):
        PatchExplorer(images[0], patch_sizes=(4, 5))


def test_the_line_counts_tokens(images):
    explorer = PatchExplorer(images[0])
    explorer.controls["patch_size"].value = 8
    assert explorer.caption.value.startswith("4 x 4 = 16 tokens of 192 numbers; attention compares 256 pairs")


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_and_colour(channels):
    assert PatchExplorer(torch.randn(channels, 16, 16)).render().mode == "RGB"


@pytest.mark.slow
def test_moving_leaves_no_figures_and_no_memory_behind(explorers):
    import tracemalloc

    import matplotlib.pyplot as plt

    def move(times):
        for k in range(times):
            for explorer in explorers:
                name, control = list(explorer.controls.items())[k % len(explorer.controls)]
                if name not in ("context_share", "target_scale", "context_scale"):
                    control.value = another_value(control)

    move(50)
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.take_snapshot()
    move(200)
    gc.collect()
    grown = sum(s.size_diff for s in tracemalloc.take_snapshot().compare_to(before, "filename"))
    tracemalloc.stop()
    assert grown < 500_000, f"{grown:,} bytes"
    assert not plt.get_fignums()
