"""Figures show what they are given, and are closed."""

import matplotlib.colors as mcolors
import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.text import Text

from wejepa.analysis import visualization
from wejepa.config import MaskConfig
from wejepa.masking import Masks, sample_block_masks

GRID = (8, 8)
SCORES = {"mean": 0.81, "layers": 0.9, "grid": 0.87, "knn": 0.7}
LINE = {"loss": 0.1, "teacher_variance": 0.5, "rankme": 8, "knn": 0.1}


def random(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def attention(layers: int = 3, heads: int = 2) -> list[torch.Tensor]:
    return list((4 * random(layers, heads, 64, 64)).softmax(-1))


# A call of every figure, with as much in it as a notebook has, or more.
FIGURES = {
    "plot_bands": lambda f: f([1, 10], {"one": random(3, 2), "other": random(3, 2)}, x="labels", y="accuracy", title="Title"),
    "plot_comparison": lambda f: f({name: SCORES for name in ("trained", "random", "pixels", "with labels", "fine-tuned")}),
    "plot_confusion": lambda f: f((90 * random(10, 10)).long(), ["Ankle boot"] * 10),
    "plot_correspondences": lambda f: f(
        [(random(3, 32, 32), random(3, 32, 32))] * 6, [[3, 40]] * 6, {"trained": [[5, 6]] * 6, "random": [[7, 8]] * 6}, GRID, title="Title"
    ),
    "plot_coverage": lambda f: f({"published, as it is": random(8, 8), "without the bug": random(8, 8), "ours": random(8, 8)}),
    "plot_curves": lambda f: f([1, 2, 4], {"one": [3, 2, 1], "other": [1, 1, 1]}, x="size", y="patches", title="Title"),
    "plot_error_maps": lambda f: f(random(10, 1, 32, 32), {"model": random(10, 8, 8), "mean token": random(10, 8, 8)}),
    "plot_histories": lambda f: f({name: [[{"step": s, **LINE} for s in (0, 99)]] * 2 for name in ("healthy", "no predictor", "frozen")}),
    "plot_history": lambda f: f([{"epoch": e, **LINE} for e in range(30)]),
    "plot_images": lambda f: f(random(12, 3, 32, 32), ["Ankle boot\n0.91"] * 12, columns=6, title="Title"),
    "plot_maps": lambda f: f({"one": random(8, 8), "other": random(8, 8), "third": random(8, 8)}, label="value", numbers=".1f", title="T"),
    "plot_mask_steps": lambda f: f(
        random(1, 32, 32), {f"{k} · a step\nof 64": (random(8, 8) > 0.5, [random(8, 8) > 0.9] * 4) for k in range(5)}
    ),
    "plot_masks": lambda f: f(random(6, 1, 32, 32), sample_block_masks(6, GRID, MaskConfig()), GRID),
    "plot_panels": lambda f: f(
        {name: {f"objective {i}": ([1, 2], [i, 2]) for i in range(10)} for name in ("mean", "k-NN", "grid")}, x="s", y="accuracy", title="T"
    ),
    "plot_patches": lambda f: f(random(3, 32, 32), 4, title="Title"),
    "plot_queries": lambda f: f(random(5, 3, 32, 32), {"trained": random(5, 64), "random": random(5, 64)}, GRID, [3, 9, 27, 40, 63]),
    "plot_rows": lambda f: f({"image": random(8, 1, 32, 32), "imagined": random(8, 1, 32, 32)}, titles=["a", "b"], title="Title"),
    "plot_similarity_maps": lambda f: f({"untrained": random(64, 64), "trained": random(64, 64)}, GRID, title="Title"),
    "plot_token_colours": lambda f: f(random(10, 1, 32, 32), {"trained": random(10, 8, 8, 3), "untrained": random(10, 8, 8, 3)}),
    "plot_tsne_embeddings": lambda f: f(random(40, 2), torch.arange(40) % 10, ["Ankle boot"] * 10),
    "visualize_attention_scores": lambda f: f(
        random(1, 32, 32), {"trained": attention(), "untrained": attention()}, GRID, query=27, heads=True, title="Title"
    ),
}


def test_every_figure_has_an_example():
    assert set(FIGURES) == {name for name in visualization.__all__ if name.startswith(("plot", "visualize"))}


@pytest.mark.parametrize("name", FIGURES)
def test_figures_fit_a_page_and_can_be_read_in_print(name):
    fig = FIGURES[name](getattr(visualization, name))
    assert not plt.fignum_exists(fig.number)
    fig.draw_without_rendering()  # lays it out
    assert fig.get_figwidth() <= visualization.WIDTH + 0.01
    texts = [text for text in fig.findobj(Text) if text.get_visible() and text.get_text().strip()]
    assert texts and min(text.get_fontsize() for text in texts) >= 7
    if name not in ("plot_coverage", "plot_maps", "plot_confusion", "plot_tsne_embeddings"):  # where letters lie in the picture
        box, page = fig.get_tightbbox(), fig.bbox_inches
        assert box.width <= page.width + 0.05 and box.height <= page.height + 0.05, "something stands out of the figure"


def test_pictures_undo_what_was_done_to_them():
    pixels = (255 * random(3, 8, 8)).byte()
    assert torch.equal(visualization.to_picture(pixels), pixels.permute(1, 2, 0).float() / 255)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    normalised = (pixels.float() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert torch.allclose(visualization.to_picture(normalised, mean, std), visualization.to_picture(pixels), atol=1e-6)
    dim = random(3, 8, 8) / 3
    assert torch.equal(visualization.to_picture(dim), dim.permute(1, 2, 0))
    stretched = visualization.to_picture(5 * dim - 1)
    assert stretched.min() == 0 and stretched.max() == 1
    assert torch.equal(visualization.to_picture(dim[:1])[..., 2], dim[0])


def test_what_is_hidden_has_its_own_tint():
    images = (random(2, 1, 8, 8) * 255).byte()
    shown = visualization.hide(images, torch.tensor([[0], [3]]), (2, 2))
    assert shown[0, :, :4, :4].isfinite().all() and shown[1, :, 4:, 4:].isfinite().all() and shown.isnan().sum() == 2 * 48
    picture = visualization.to_picture(shown[0])
    assert torch.equal(picture[:4, :4], visualization.to_picture(images[0])[:4, :4])
    assert (picture[4:] == torch.tensor(visualization.HIDDEN)).all()
    red, green, blue = visualization.HIDDEN
    assert blue > green > red  # no shade of grey, as clothes are
    nothing = visualization.to_picture(torch.full((1, 4, 4), torch.nan))
    assert (nothing == torch.tensor(visualization.HIDDEN)).all()


def test_masks_hide_in_that_tint():
    images, masks = random(2, 1, 32, 32), sample_block_masks(2, GRID, MaskConfig(), torch.Generator().manual_seed(0))
    seen = torch.as_tensor(visualization.plot_masks(images, masks, GRID).axes[2].images[0].get_array())  # second row, first column
    hidden = (seen == torch.tensor(visualization.HIDDEN)).all(-1)
    assert int(hidden.sum()) == (64 - masks.context.shape[1]) * 16


def test_blocks_that_coincide_have_frames_of_their_own():
    block = torch.tensor([[9, 10, 17, 18]]).expand(1, 4, 4)
    fig = visualization.plot_masks(random(1, 1, 32, 32), Masks(torch.tensor([[0, 1]]), block), GRID)
    frames = [patch.get_bbox() for patch in fig.axes[2].patches]
    assert len({frame.x0 for frame in frames}) == 4  # one inside another
    assert all(3.5 <= frame.x0 < 5.5 and 9.5 < frame.x1 <= 11.5 for frame in frames)  # and less than half a patch inside the block


def test_attention_that_is_compared_has_one_scale():
    weak, strong = [torch.full((2, 64, 64), 1 / 64)] * 2, attention(2)
    fig = visualization.visualize_attention_scores(random(1, 32, 32), {"weak": weak, "strong": strong}, GRID, query=9)
    maps = [ax for ax in fig.axes if ax.get_ylabel() in ("weak", "strong", "") and ax.images and ax.images[-1].get_array().ndim == 2]
    assert len(maps) == 4 and len({ax.images[-1].get_clim() for ax in maps}) == 1
    low, high = maps[0].images[-1].get_clim()
    assert low == 0 and high == pytest.approx(float(torch.stack(strong).mean(1)[:, 9].max()) * 64)
    assert maps[0].images[-1].get_array().max() == pytest.approx(1)


def test_attention_by_head_over_the_image():
    weights = attention(2, 3)
    fig = visualization.visualize_attention_scores(random(1, 32, 32), weights, GRID, heads=True, overlay=True, layers=[1])
    assert [ax.get_ylabel() for ax in fig.axes[:6:2]] == ["head 1", "head 2", "head 3"]
    drawn = fig.axes[3].images  # the second head: the image, and its map above
    assert len(drawn) == 2 and drawn[1].get_alpha() < 1
    assert drawn[1].get_array()[2, 5] == pytest.approx(float(weights[1][1].mean(0)[2 * 8 + 5]) * 64)


@pytest.mark.parametrize("name", ["plot_bands", "plot_curves", "plot_history", "plot_comparison"])
def test_axes_begin_at_zero(name):
    fig = FIGURES[name](getattr(visualization, name))
    assert {ax.get_ylim()[0] for ax in fig.axes} == {0}


def test_images_are_as_large_as_told_and_no_larger_than_the_page():
    pictures = random(4, 1, 32, 32)
    assert visualization.plot_images(pictures, side=0.5).get_figwidth() < 2.3
    assert visualization.plot_images(pictures, side=9).get_figwidth() == pytest.approx(visualization.WIDTH, abs=0.11)


def test_rows_name_what_becomes_of_an_image():
    rows = {"image": random(3, 1, 16, 16), "imagined": list(random(3, 1, 16, 16))}
    fig = visualization.plot_rows(rows, titles=["a", "b", "c"])
    assert [fig.axes[i].get_ylabel() for i in (0, 3)] == list(rows) and [ax.get_title() for ax in fig.axes[:3]] == ["a", "b", "c"]
    assert torch.equal(torch.as_tensor(fig.axes[4].images[0].get_array()), visualization.to_picture(rows["imagined"][1]))


def test_correspondences_frame_both_images():
    first, second = random(3, 16, 16), random(3, 16, 16)
    fig = visualization.plot_correspondences([(first, second)], [[0, 5]], {"trained": [[3, 15]]}, (4, 4))
    upper, lower = fig.axes
    assert [p.get_xy() for p in lower.patches] == [(11.5, -0.5), (11.5, 11.5)]
    assert [p.get_edgecolor() for p in upper.patches] == [p.get_edgecolor() for p in lower.patches]
    assert torch.equal(torch.as_tensor(lower.images[0].get_array()), visualization.to_picture(second))
    fig = visualization.plot_correspondences([(first, second)], [[0, 5]], {"trained": [[15, 15]]}, (4, 4))
    inner, outer = (p.get_extents() for p in fig.axes[1].patches)
    assert outer.x0 < inner.x0 and inner.x1 < outer.x1, "one frame hides another"


def test_token_colours_stand_below_their_images():
    colours = {"one": torch.rand(3, 4, 4, 3), "other": torch.rand(3, 4, 4, 3)}
    fig = visualization.plot_token_colours(torch.randn(3, 1, 16, 16), colours)
    assert len(fig.axes) == 9 and not plt.fignum_exists(fig.number)
    assert [fig.axes[i].get_ylabel() for i in (0, 3, 6)] == ["image", "one", "other"]
    assert (fig.axes[3].images[0].get_array() == colours["one"][0].numpy()).all()


def test_error_maps_share_one_scale_and_bear_gaps():
    errors = torch.rand(2, 4, 4)
    errors[0, 0, 0] = torch.nan
    fig = visualization.plot_error_maps(torch.randn(2, 3, 16, 16), errors)
    assert not plt.fignum_exists(fig.number)
    (low, high), other = (fig.axes[i].images[0].get_clim() for i in (2, 3))
    assert (low, high) == other and low == 0 and 0 < high <= float(errors.nan_to_num(0).max())


def test_patches_stand_apart_and_none_is_missing():
    image = torch.rand(3, 8, 8)
    fig = visualization.plot_patches(image, 4)
    assert not plt.fignum_exists(fig.number)
    sheet = torch.as_tensor(fig.axes[1].images[0].get_array())
    assert sheet.shape == (9, 9, 3) and (sheet[4] == 1).all() and (sheet[:, 4] == 1).all()
    assert torch.allclose(sheet[5:, :4], visualization.to_picture(image)[4:, :4])


def test_maps_share_a_scale_unless_told_otherwise():
    maps = {"one": torch.tensor([[0.0, 1.0]]), "other": torch.tensor([[2.0, 5.0]])}
    shared, own = visualization.plot_maps(maps), visualization.plot_maps(maps, shared=False, numbers=".0f")
    assert not plt.fignum_exists(shared.number) and not plt.fignum_exists(own.number)
    assert [ax.images[0].get_clim() for ax in shared.axes[:2]] == [(0, 5), (0, 5)]
    assert [ax.images[0].get_clim() for ax in own.axes[:2]] == [(0, 1), (2, 5)]


def test_maps_of_blocks_have_their_names_and_lines_between_them():
    ax = visualization.plot_maps({"one": torch.rand(6, 6)}, blocks=["cat", "dog", "emu"]).axes[0]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["cat", "dog", "emu"] and list(ax.get_xticks()) == [0.5, 2.5, 4.5]
    assert sorted(line.get_ydata()[0] for line in ax.lines if line.get_ydata()[0] == line.get_ydata()[1]) == [1.5, 3.5]


def test_similarity_maps_are_laid_out_as_the_grid_is():
    similarity = torch.rand(6, 6)
    fig = visualization.plot_similarity_maps({"one": similarity}, (2, 3))
    assert not plt.fignum_exists(fig.number)
    sheet = torch.as_tensor(fig.axes[0].images[0].get_array().filled(float("nan")))
    assert sheet.shape == (5, 11) and sheet[2].isnan().all() and sheet[:, 3].isnan().all()
    assert torch.equal(sheet[3:, 4:7], similarity[4].view(2, 3))


def test_coverage_maps_share_one_scale_from_zero():
    fig = visualization.plot_coverage({"one": torch.full((2, 3), 0.25), "other": torch.full((2, 3), 0.5)})
    assert not plt.fignum_exists(fig.number)
    assert [ax.images[0].get_clim() for ax in fig.axes[:2]] == [(0, 0.5), (0, 0.5)]
    assert [t.get_text() for t in fig.axes[0].texts] == ["25"] * 6


def test_curves_go_through_their_points():
    fig = visualization.plot_curves([1, 2, 4], {"one": [3, 2, 1], "other": [1, 1, 1]}, x="size", y="patches")
    assert not plt.fignum_exists(fig.number)
    assert [list(line.get_ydata()) for line in fig.axes[0].lines] == [[3, 2, 1], [1, 1, 1]]
    assert fig.axes[0].get_xlabel() == "size" and fig.axes[0].get_ylim()[0] == 0


def test_what_patches_attend_to_is_on_one_scale_from_zero_and_the_query_is_framed():
    maps = {"trained": torch.eye(4)[:2], "untrained": torch.full((2, 4), 0.25)}
    fig = visualization.plot_queries(torch.rand(2, 3, 8, 8), maps, (2, 2), [0, 3])
    assert not plt.fignum_exists(fig.number)
    assert len({ax.images[0].get_clim() for ax in fig.axes[2:6]}) == 1 and fig.axes[2].images[0].get_clim()[0] == 0
    assert fig.axes[2].images[0].get_array().tolist() == [[4, 0], [0, 0]] and (fig.axes[5].images[0].get_array() == 1).all()
    assert [(patch.get_x(), patch.get_y(), patch.get_width()) for patch in fig.axes[1].patches] == [(3.5, 3.5, 4)]


def test_comparison_has_whiskers_where_they_are_given():
    rows = {"a": {"mean": 0.5, "grid": 0.6}, "b": {"grid": 0.7}}
    fig = visualization.plot_comparison(rows, {"a": {"mean": 0.1, "grid": 0.2}, "b": {"grid": 0.05}})
    spans = [[round(float(end), 6) for end in line.get_segments()[0][:, 1]] for line in fig.axes[0].collections]
    assert spans[0] == [40, 60] and fig.axes[0].get_ylim() == (0, 100) and not plt.fignum_exists(fig.number)
    assert not visualization.plot_comparison(rows).axes[0].collections


def test_a_name_looks_the_same_in_every_panel():
    one, other = ([1, 2], [0.1, 0.2]), ([5, 9], [0.3, 0.4])
    fig = visualization.plot_panels({"left": {"a": one, "b": other}, "right": {"b": one}}, x="seconds", y="accuracy")
    left, right = fig.axes
    assert [line.get_xydata().tolist() for line in left.lines] == [[[1, 0.1], [2, 0.2]], [[5, 0.3], [9, 0.4]]]
    assert right.lines[0].get_color() == left.lines[1].get_color() != left.lines[0].get_color()
    assert [text.get_text() for text in fig.legends[0].texts] == ["a", "b"]
    assert [ax.get_title() for ax in fig.axes] == ["left", "right"]


def test_more_than_can_be_told_apart_is_refused_and_ten_curves_differ():
    curves = {str(i): [i, i] for i in range(10)}
    lines = visualization.plot_curves([1, 2], curves, x="size", y="patches").axes[0].lines
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 10
    bands = {name: torch.tensor([values]) for name, values in curves.items()}
    assert len(visualization.plot_bands([1, 10], bands, x="labels", y="accuracy").axes[0].lines) == 10
    one = [{"step": 1, "loss": 0.1, "teacher_variance": 0.5, "rankme": 8, "knn": 0.1}]
    scores = {"mean": 0.1, "grid": 0.1, "knn": 0.1}
    for too_many in (
        lambda: visualization.plot_curves([1, 2], curves | {"more": [1, 1]}, x="size", y="patches"),
        lambda: visualization.plot_bands([1, 10], bands | {"more": torch.ones(1, 2)}, x="labels", y="accuracy"),
        lambda: visualization.plot_histories({str(i): [one] for i in range(11)}),
        lambda: visualization.plot_comparison({str(i): scores for i in range(7)}),
    ):
        with pytest.raises(ValueError, match="can be told apart"):
            too_many()
    assert not plt.get_fignums()  # what is refused leaves no figure open


def test_bands_hold_their_lines():
    values = torch.tensor([[1.0, 4.0], [3.0, 6.0]])
    fig = visualization.plot_bands([10, 100], {"one": values}, x="labels", y="accuracy")
    assert not plt.fignum_exists(fig.number)
    ax = fig.axes[0]
    assert list(ax.lines[0].get_ydata()) == [2, 5] and [t.get_text() for t in ax.get_xticklabels()] == ["10", "100"]
    edge = ax.collections[0].get_paths()[0].vertices
    assert edge[:, 1].min() == 1 and edge[:, 1].max() == 6


def test_the_same_rows_have_the_same_colours_as_bars_and_as_bands():
    names = ["teacher", "random encoder", "raw pixels"]
    bars = visualization.plot_comparison({name: {"grid": 0.5} for name in names}).axes[0].containers
    bands = visualization.plot_bands([10, 100], {name: torch.ones(2, 2) for name in names}, x="labels", y="accuracy").axes[0].lines
    assert [bar[0].get_facecolor() for bar in bars] == [mcolors.to_rgba(line.get_color()) for line in bands]
    assert [bar.get_label() for bar in bars] == [line.get_label() for line in bands] == names


def test_a_plane_has_one_scale_for_both_axes():
    points = torch.tensor([[-50.0, -1.0], [50.0, 1.0], [0.0, 0.0]])
    ax = visualization.plot_tsne_embeddings(points, torch.tensor([0, 1, 1]), ["one", "other"]).axes[0]
    assert ax.get_aspect() == 1 and ax.get_adjustable() == "datalim"


def test_confusion_is_coloured_by_the_row_and_bears_an_empty_class():
    fig = visualization.plot_confusion(torch.tensor([[3, 1, 0], [0, 0, 0], [0, 2, 2]]), ["one", "none", "other"])
    assert not plt.fignum_exists(fig.number)
    ax = fig.axes[0]
    assert ax.images[0].get_array().tolist() == [[0.75, 0.25, 0], [0, 0, 0], [0, 0.5, 0.5]]
    assert [t.get_text() for t in ax.texts] == ["3", "1", "2", "2"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("predicted", "true")
    assert [t.get_text() for t in ax.get_yticklabels()] == ["one", "none", "other"]


def test_histories_of_one_name_are_a_median_and_a_band():
    history, higher = (
        [{"step": s, "loss": v, "teacher_variance": 0.5, "rankme": 8, "knn": 0.1} for s, v in ((0, float("nan")), (9, end))]
        for end in (0.2, 0.4)
    )
    fig = visualization.plot_histories({"one": [history, higher], "other": [history]})
    assert not plt.fignum_exists(fig.number) and len(fig.axes) == 4
    first, second = fig.axes[0].lines
    assert first.get_color() != second.get_color()
    assert list(first.get_xdata()) == [0, 9] and first.get_ydata()[1] == pytest.approx(0.3) and fig.axes[0].get_yscale() == "log"
    edge = fig.axes[0].collections[0].get_paths()[0].vertices
    assert edge[:, 1].min() == 0.2 and edge[:, 1].max() == 0.4
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ["one", "other"]


def test_tsne_names_each_class_at_its_points_and_leaves_out_one_without():
    points, labels = torch.tensor([[0.0, 0], [2, 0], [1, 9], [50, 50]]), torch.tensor([0, 0, 0, 2])
    fig = visualization.plot_tsne_embeddings(points, labels, ["one", "none", "other"])
    assert not plt.fignum_exists(fig.number)
    ax = fig.axes[0]
    assert [(t.get_text(), t.get_position()) for t in ax.texts] == [("one", (1, 0)), ("other", (50, 50))]
    one, other = ax.collections
    assert len(one.get_offsets()) == 3 and one.get_facecolor().tolist() != other.get_facecolor().tolist()
    assert one.get_paths()[0].vertices.shape != other.get_paths()[0].vertices.shape  # told apart without colours as well
