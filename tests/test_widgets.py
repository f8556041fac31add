"""The explorers redraw when something is chosen, show what wejepa.analysis gives, say why they cannot, and leave nothing behind."""

import gc
import inspect
import io
import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from wejepa import widgets
from wejepa.analysis.attention import (
    attention_rollout,
    mutual_matches,
    nearest_tokens,
    predict_hidden,
    prediction_errors,
    record_attention,
    token_colours,
    token_similarity,
)
from wejepa.config import IJepaConfig, MaskConfig, default_config
from wejepa.errors import ConfigError
from wejepa.masking import sample_block_masks
from wejepa.model import IJEPA_base
from wejepa.widgets import SIDE, Kept, MaskExplorer, MaskPainter, PatchExplorer, TokenExplorer


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
    tokens = TokenExplorer(models, images)
    return [PatchExplorer(images[0]), MaskExplorer(cfg, images[0]), MaskPainter(models["one"], images, images), tokens]


def drawn(explorer) -> tuple:
    """What the browser is told to draw."""
    return tuple(str(panel) for panel in explorer.view["panels"]), explorer.view["caption"]


def other_values(explorer) -> dict:
    """For each choice of an explorer another value than it has now."""
    if isinstance(explorer, PatchExplorer):
        return {"size": 0, "patch": (1, 1)}
    if isinstance(explorer, MaskExplorer):
        ranges = {"target_scale": (0.1, 0.12), "target_aspect_ratio": (2.0, 3.0), "context_scale": (0.3, 0.4)}
        return ranges | {"context_aspect_ratio": (2.0, 2.0), "num_target_blocks": 2, "context_share": 0.2, "seed": 7}
    if isinstance(explorer, MaskPainter):
        return {"image": 1, "context": [0, 9, 18], "sampled": 5}
    modes = {"mode": "similarity", "image": 2, "second": 3, "patch": (1, 6), "asked": 1, "locked": False}
    return {"layer": 1, "head": 2} | modes


# ---------------------------------------------------------------- all of them


def test_every_choice_changes_what_is_drawn(explorers):
    for explorer in explorers:
        for name, value in other_values(explorer).items():
            before = drawn(explorer)
            setattr(explorer, name, value)
            assert explorer.view["problem"] == "", (name, explorer.view["problem"])
            assert drawn(explorer) != before, f"{type(explorer).__name__}.{name} changes nothing"


def test_the_browser_has_a_control_for_every_choice(explorers):
    on_the_picture = {"patch", "asked", "pinned", "context"}
    for explorer in explorers:
        names = {control["name"] for control in explorer.controls}
        assert set(explorer.choices) - on_the_picture == names - {"opacity"} - on_the_picture
        for control in explorer.controls:
            assert control["label"] and explorer.has_trait(control["name"])


def test_the_browsers_file_loads_nothing_from_elsewhere():
    folder = Path(widgets.__file__).parent
    text = (folder / "widgets.js").read_text() + (folder / "widgets.css").read_text()
    assert not re.search(r"https?:|\bimport\b|fetch\(|url\(|XMLHttpRequest|WebSocket", text)


def test_help_shows_what_an_explorer_takes(explorers):
    for explorer in explorers:
        taken = list(inspect.signature(type(explorer)).parameters)
        assert taken and not {"args", "kwargs", "self"} & set(taken)


def test_choices_that_come_together_are_drawn_once(models, images, monkeypatch):
    explorer = TokenExplorer(models, images)
    explorer.mode, explorer.second = "similarity", 1
    calls, draw = [], explorer._draw
    monkeypatch.setattr(explorer, "_draw", lambda: calls.append(1) or draw())
    explorer.set_state({"patch": [0, 0], "asked": 1})  # what a click sends
    assert (explorer.patch, explorer.asked, len(calls)) == ((0, 0), 1, 1)
    explorer.set_state({"patch": [0, 0], "asked": 1, "pinned": True})  # the same patch, pinned
    assert len(calls) == 1


def test_an_error_in_a_callback_is_neither_swallowed_nor_hidden(explorers, monkeypatch):
    def broken():
        raise ZeroDivisionError("by hand")

    for explorer in explorers:
        name, value = list(other_values(explorer).items())[-1]
        before = explorer.view["panels"]
        monkeypatch.setattr(explorer, "_draw", broken)
        with pytest.raises(ZeroDivisionError):
            setattr(explorer, name, value)
        assert explorer.view["problem"] == "ZeroDivisionError: by hand" and explorer.view["panels"] == before


def test_what_cannot_be_is_explained_and_the_last_picture_stays(cfg, images):
    explorer = MaskExplorer(cfg, images[0])
    before = explorer.view["panels"]
    explorer.context_share = 0.99
    assert explorer.view["problem"].startswith("Not possible: mask.target_scale") and explorer.view["panels"] == before
    with pytest.raises(ConfigError):
        explorer.render()
    explorer.context_share = 0.33
    assert explorer.view["problem"] == ""


def test_a_message_holds_what_the_browser_draws(explorers):
    for explorer in explorers:
        assert all(bytes(picture[:4]) in (b"\x89PNG", b"RIFF") for picture in explorer.pictures)
        for message, panel in zip(explorer.view["panels"], explorer.panels, strict=True):
            assert message["grid"] == list(panel.grid_size)
            if message["overlay"]:
                rows, cols = message["size"]
                assert len(message["overlay"]) == 4 * rows * cols
        assert len(explorer.view["ramp"]) == 4 * 256


def test_the_picture_without_a_browser_has_every_panel(explorers):
    for explorer in explorers:
        picture = explorer.render()
        assert picture.mode == "RGB" and picture.width >= min(4, len(explorer.panels)) * SIDE
        assert len(picture.getcolors(1 << 20)) > 10


@pytest.mark.slow
def test_choosing_leaves_no_figures_and_no_memory_behind(explorers):
    import tracemalloc

    import matplotlib.pyplot as plt

    def move(times):
        for k in range(times):
            for explorer in explorers:
                name, value = list(other_values(explorer).items())[k % len(other_values(explorer))]
                before = getattr(explorer, name)
                setattr(explorer, name, value)
                setattr(explorer, name, before)

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


# ---------------------------------------------------------------- patches and masks


def test_patches_that_do_not_divide_are_refused(images):
    with pytest.raises(ConfigError, match="5 does not divide an image of 32 x 32"):
        PatchExplorer(images[0], patch_sizes=(4, 5))


def test_what_cannot_even_begin_is_an_error(cfg, images):
    wrong = cfg.copy()
    wrong.mask.context_share = 0.99
    with pytest.raises(ConfigError, match="mask.target_scale"):
        MaskExplorer(wrong, images[0])
    with pytest.raises(ConfigError, match="no patch size"):
        PatchExplorer(torch.rand(3, 127, 127))


def test_the_line_counts_tokens_and_numbers_the_patch(images):
    explorer = PatchExplorer(images[0])
    explorer.size, explorer.patch = explorer.patch_sizes.index(8), (2, 1)
    text = (
        "4 x 4 = 16 tokens of 192 numbers each; attention compares 256 pairs. Row 2, column 1 is number 9 in raster order, counted from 0."
    )
    assert explorer.view["caption"] == text
    explorer.size = explorer.patch_sizes.index(16)  # the patch is moved onto the coarser grid
    assert "Row 1, column 1 is number 3" in explorer.view["caption"]


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 16, 32), (3, 48, 16)])
def test_grey_and_colour_square_and_not(shape):
    explorer = PatchExplorer(torch.randn(shape))
    assert explorer.grid_size[0] / explorer.grid_size[1] == shape[1] / shape[2]
    assert explorer.panels[1].overlay.shape == (*explorer.grid_size, 4)
    assert explorer.render().mode == "RGB"


def test_there_is_an_explained_control_for_every_setting_that_a_mask_depends_on(cfg, images):
    explorer = MaskExplorer(cfg, images[0])
    assert {c["name"] for c in explorer.controls} == {field.name for field in fields(MaskConfig)} - {"num_contexts"} | {"seed"}
    assert all(len(control["help"]) > 20 for control in explorer.controls)
    assert explorer.mask_config == cfg.mask
    explorer.num_target_blocks = 2
    assert explorer.mask_config.num_target_blocks == 2 and cfg.mask.num_target_blocks == 4  # the caller's is left alone
    assert "predicts 2 blocks" in explorer.view["caption"]


def test_masks_are_the_samplers(cfg, images):
    explorer = MaskExplorer(cfg, images[0])
    masks = sample_block_masks(3, cfg.grid_size, cfg.mask, torch.Generator().manual_seed(0))
    for k, panel in enumerate(explorer.panels):
        assert (panel.overlay[..., 3] == 0).flatten().nonzero()[0].tolist() == masks.context[k].tolist()
        for (row, col, down, across, *_), target in zip(panel.frames, masks.targets[k], strict=True):
            assert (target == torch.tensor([8 * r + c for r in range(row, row + down) for c in range(col, col + across)])).all()


def test_the_student_sees_the_context_as_it_is_and_the_rest_tinted(cfg):
    white = torch.ones(3, 32, 32)
    white[:, 0, 0] = 0  # so that the range is known
    explorer = MaskExplorer(cfg, white, draws=1)
    explorer.num_target_blocks = 1
    picture = np.asarray(explorer.render())[24:]
    context = sample_block_masks(1, (8, 8), explorer.mask_config, torch.Generator().manual_seed(0)).context[0].tolist()
    side = SIDE // 8
    centres = {p: tuple(picture[(p // 8) * side + side // 2, (p % 8) * side + side // 2]) for p in range(1, 64)}
    assert all((centres[p] == (255, 255, 255)) == (p in context) for p in centres)


# ---------------------------------------------------------------- painting


def test_what_is_painted_is_predicted(models, images):
    explorer = MaskPainter(models["one"], images[:2], images)
    explorer.context = [0, 1, 8, 9]
    expected = predict_hidden(models["one"], images[:1], torch.tensor([0, 1, 8, 9]))
    assert explorer.hidden.places.tolist() == [p for p in range(64) if p not in (0, 1, 8, 9)]
    torch.testing.assert_close(explorer.hidden.predictions, expected.predictions)
    student, imagined, wrong = explorer.panels
    assert student.acts == "paint" and (student.overlay[..., 3] == 0).sum() == 4
    torch.testing.assert_close(wrong.values.flatten()[expected.places], expected.errors)
    assert wrong.values.flatten()[[0, 1, 8, 9]].isnan().all()
    pictures = widgets.as_pictures(images)
    nearest = nearest_tokens(expected.predictions, explorer.targets.flatten(0, 1))
    for place, token in zip(expected.places.tolist(), nearest.tolist(), strict=True):
        number, other = divmod(token, 64)
        part, there = ((slice(p // 8 * 4, p // 8 * 4 + 4), slice(p % 8 * 4, p % 8 * 4 + 4)) for p in (place, other))
        own = np.asarray(pictures[number])[there]
        assert (imagined.overlay[part][..., :3] == own).all() and (imagined.overlay[part][..., 3] == 255).all()
    assert (imagined.overlay[:8, :8, 3] == 0).all()


def test_a_change_asks_the_model_once(models, images, monkeypatch):
    explorer, calls = MaskPainter(models["one"], images, images), []
    forward = IJEPA_base.forward
    monkeypatch.setattr(IJEPA_base, "forward", lambda self, *args: calls.append(1) or forward(self, *args))
    for count, context in enumerate(([5], [5, 6], [5, 6, 14]), 1):
        explorer.set_state({"context": context})
        assert len(calls) == count
    explorer.set_state({"context": [5, 6, 14]})
    assert len(calls) == 3
    explorer.sampled = 1
    assert len(calls) == 4 and len(explorer.context) == 21
    explorer.image = 1
    assert len(calls) == 5


def test_all_and_nothing_can_be_painted(models, images):
    explorer = MaskPainter(models["one"], images, images)
    explorer.context = list(range(64))
    assert explorer.hidden is None and len(explorer.panels) == 1 and "nothing is left to predict" in explorer.view["caption"]
    explorer.context = []
    assert len(explorer.hidden.places) == 64 and explorer.hidden.errors.isfinite().all() and explorer.view["problem"] == ""
    for wrong in ([64], [-1], [3, 3]):
        explorer.context = wrong
        assert explorer.view["problem"].startswith("Not possible: context")


def test_a_wide_image_can_be_painted(models):
    wide = torch.randn(2, 3, 16, 32)
    explorer = MaskPainter(models["one"], wide, wide)
    assert explorer.grid_size == (4, 8) and explorer.panels[1].overlay.shape == (16, 32, 4)
    with pytest.raises(ConfigError, match="stock"):
        MaskPainter(models["one"], wide, wide[:, :, :, :16])


# ---------------------------------------------------------------- tokens


def test_attention_is_that_of_the_layer_and_head(models, images):
    explorer = TokenExplorer(models, images)
    explorer.image, explorer.patch, explorer.layer, explorer.head = 2, (3, 5), 2, 1
    weights = {name: record_attention(model, images[2:3]) for name, model in models.items()}
    for name in models:
        torch.testing.assert_close(explorer.values[name, 2], 64 * weights[name][1][0, 0, 3 * 8 + 5].view(8, 8))
    explorer.head = 0
    torch.testing.assert_close(explorer.values["one", 2], 64 * weights["one"][1][0, :, 3 * 8 + 5].mean(0).view(8, 8))
    explorer.layer = 0
    torch.testing.assert_close(explorer.values["one", 2], 64 * attention_rollout(weights["one"])[0, 3 * 8 + 5].view(8, 8))


def test_similarity_is_to_the_patch_in_both_images(models, images):
    explorer = TokenExplorer(models, images)
    explorer.mode, explorer.image, explorer.second, explorer.patch, explorer.asked = "similarity", 0, 3, (2, 2), 1
    tokens = models["other"].encode(images[[0, 3]]).flatten(0, 1)
    expected = token_similarity(tokens, tokens)[64 + 18].view(2, 8, 8)
    torch.testing.assert_close(explorer.values["other", 0], expected[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(explorer.values["other", 3], expected[1], atol=1e-5, rtol=1e-4)
    assert explorer.values["other", 3][2, 2] == pytest.approx(1, abs=1e-4)
    best = int(expected[0].argmax())
    assert explorer.panels[2].frames[0][:2] == (best // 8, best % 8)  # the match in the first image
    assert explorer.panels[3].frames[0][:2] == (2, 2)


def test_components_are_the_token_colours(models, images):
    explorer = TokenExplorer({"one": models["one"]}, images)
    explorer.mode, explorer.image, explorer.locked = "components", 1, False
    colours = token_colours(models["one"].encode(images[1:2]), (8, 8))[0]
    assert (np.abs(explorer.panels[0].overlay[..., :3].astype(int) - (colours * 255).byte().numpy()) <= 1).all()


def test_errors_are_the_prediction_errors(models, images):
    explorer = TokenExplorer(models, images)
    explorer.mode, explorer.image = "error", 2
    generator = torch.Generator().manual_seed(2)
    expected = prediction_errors(models["one"], images[2:3], models["one"].cfg.mask, samples=32, generator=generator)[0]
    torch.testing.assert_close(explorer.values["one", 2], expected, equal_nan=True)
    assert "averaged over 32 masks" in explorer.view["caption"]


def test_the_nearest_patches_are_nearest(models, images):
    explorer = TokenExplorer({"one": models["one"]}, images)
    explorer.mode, explorer.image, explorer.patch = "nearest", 1, (4, 4)
    tokens = models["one"].encode(images).flatten(0, 1)
    likeness = token_similarity(tokens[64 + 36][None], tokens)[0]
    likeness[64 + 36] = -1
    best = likeness.topk(widgets.MATCHES).indices.tolist()
    assert [64 * c.picture + 8 * c.row + c.col for c in explorer.panels[0].crops] == best
    explorer.second = 3
    assert {c.picture for c in explorer.panels[1].crops} == {3} and len(explorer.panels[1].marks) == widgets.MATCHES


def test_pairs_are_mutual(models, images):
    explorer = TokenExplorer({"one": models["one"]}, images)
    explorer.mode = "pairs"
    assert "two images" in explorer.view["problem"]
    explorer.second = 1
    tokens = models["one"].encode(images[:2])
    pairs = mutual_matches(token_similarity(tokens[0], tokens[1]))[: widgets.MATCHES]
    for side, panel in enumerate(explorer.panels):
        assert [8 * row + col for row, col, *_ in panel.marks] == pairs[:, side].tolist()


def test_a_locked_scale_is_one_scale(models, images):
    explorer = TokenExplorer(models, images)
    assert len({panel.scale for panel in explorer.panels}) == 1
    before = explorer.panels[0].scale
    explorer.patch = (0, 0)
    assert explorer.panels[0].scale == before
    explorer.locked = False
    assert len({panel.scale for panel in explorer.panels}) == 2


def test_any_function_that_gives_tokens_is_an_encoder(images):
    wide = torch.randn(2, 3, 16, 32)

    def pixels(x):  # (B, C, H, W) -> (B, N, D), patches of 4 x 4
        return torch.nn.functional.unfold(x, 4, stride=4).transpose(1, 2)

    explorer = TokenExplorer({"pixels": pixels}, wide)
    assert explorer.grids == {"pixels": (4, 8)} and explorer.mode == "similarity"
    modes = next(c for c in explorer.controls if c["name"] == "mode")["options"]
    assert [mode for mode, _ in modes] == ["similarity", "components", "nearest", "pairs"]
    for mode, _ in modes:
        explorer.second, explorer.mode = 1, mode
        assert explorer.view["problem"] == "" and explorer.render().width > SIDE
    with pytest.raises(ConfigError, match="class token"):
        TokenExplorer({"with a class token": lambda x: torch.randn(len(x), 33, 8)}, wide)


def test_encoders_of_other_sizes_show_the_same_place(models, images):
    large = torch.nn.functional.interpolate(images, size=(64, 64))
    explorer = TokenExplorer(models, {"one": images, "other": large})
    explorer.patch = (2, 7)
    assert explorer.place("one") == (2, 7) and explorer.place("other") == (5, 15)
    assert explorer.values["other", 0].shape == (16, 16) and explorer.panels[1].picture == 4
    assert Image.open(io.BytesIO(explorer.pictures[4])).size == (64, 64)


def test_pictures_are_shown_as_they_are_given(models, images):
    pictures = torch.randint(0, 256, (4, 3, 48, 48), dtype=torch.uint8)
    explorer = TokenExplorer(models, images, pictures)
    assert len(explorer.pictures) == 4 and [panel.picture for panel in explorer.panels] == [0, 0]
    assert (np.asarray(Image.open(io.BytesIO(explorer.pictures[2]))) == pictures[2].permute(1, 2, 0).numpy()).all()
    with pytest.raises(ConfigError, match="pictures"):
        TokenExplorer(models, images, pictures[:3])


def test_an_encoder_without_attention_says_so(models, images):
    explorer = TokenExplorer({"one": models["one"], "a function": models["other"].encode}, images)
    assert [panel.note for panel in explorer.panels] == ["layer 3, mean over heads", "it has no attention"] and list(explorer.values) == [
        ("one", 0)
    ]


def test_what_is_not_there_is_refused(models, images):
    explorer = TokenExplorer(models, images)
    for name, value in (("patch", (8, 0)), ("image", 4), ("mode", "dreams"), ("second", 4), ("layer", -1), ("head", -1)):
        before = getattr(explorer, name)
        setattr(explorer, name, value)
        assert explorer.view["problem"].startswith("Not possible"), name
        setattr(explorer, name, before)
    for encoders, given in (({}, images), (models, {"one": images}), (models, images[:0]), (models, {"one": images, "other": images[:2]})):
        with pytest.raises(ConfigError):
            TokenExplorer(encoders, given)


def test_the_browser_is_told_while_something_new_is_computed(models, images):
    explorer, told = TokenExplorer(models, images), []
    explorer.observe(lambda change: told.append((change.new, "predictor" in explorer.view["caption"])), names="busy")
    explorer.mode = "error"
    assert told == [(True, False), (False, True)]
    told.clear()
    explorer.patch = (0, 0)
    assert told == []


def test_an_image_is_encoded_once(models, images, monkeypatch):
    explorer, calls = TokenExplorer(models, images), []
    monkeypatch.setattr(widgets, "record_attention", lambda *args: calls.append(args) or record_attention(*args))
    for row in range(8):
        explorer.patch = (row, 0)
    assert not calls
    explorer.image, explorer.patch = 1, (0, 0)
    assert len(calls) == len(models)


def test_images_that_nobody_asks_for_are_not_encoded(models, images):
    encoded = []
    explorer = TokenExplorer({"one": lambda x: encoded.append(len(x)) or models["one"].encode(x)}, images)
    explorer.image = 2
    explorer.mode, explorer.second = "similarity", 3
    assert sum(encoded) <= 4  # for the grid, and three shown
    explorer.second, explorer.mode = -1, "nearest"
    assert sum(encoded) >= 4  # now all


def test_memory_is_bounded(models, images, monkeypatch):
    monkeypatch.setattr(widgets, "MEMORY", 2 * images.shape[0] * 64 * 64 * 4 // 2)  # tokens of half the images, for each of two encoders
    explorer = TokenExplorer(models, images)
    for mode in ("attention", "nearest", "similarity"):
        for number in range(4):
            explorer.mode, explorer.image = mode, number
    assert explorer.view["problem"] == "" and len(explorer._bank("one")) == 2
    explorer.mode = "nearest"
    assert "of 2 images" in explorer.view["caption"]
    kept = Kept(100)
    for k in range(5):
        kept.get(k, lambda: [torch.zeros(10)])
    assert kept.bytes == 80
    kept.get("large", lambda: [torch.zeros(1000)])
    assert kept.bytes == 4000 and kept.get("large", None)[0].shape == (1000,)
