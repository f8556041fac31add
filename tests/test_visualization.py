"""Figures show what they are given, and are closed."""

import matplotlib.pyplot as plt
import pytest
import torch

from wejepa.analysis import visualization


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
        lambda: visualization.plot_comparison({str(i): scores for i in range(6)}),
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


def test_confusion_is_coloured_by_the_row_and_bears_an_empty_class():
    fig = visualization.plot_confusion(torch.tensor([[3, 1, 0], [0, 0, 0], [0, 2, 2]]), ["one", "none", "other"])
    assert not plt.fignum_exists(fig.number)
    ax = fig.axes[0]
    assert ax.images[0].get_array().tolist() == [[0.75, 0.25, 0], [0, 0, 0], [0, 0.5, 0.5]]
    assert [t.get_text() for t in ax.texts] == ["3", "1", "2", "2"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("predicted", "true")
    assert [t.get_text() for t in ax.get_yticklabels()] == ["one", "none", "other"]


def test_histories_of_one_name_share_a_colour_and_one_entry_of_the_legend():
    history = [{"step": s, "loss": v, "teacher_variance": 0.5, "rankme": 8, "knn": 0.1} for s, v in ((0, float("nan")), (9, 0.2))]
    fig = visualization.plot_histories({"one": [history, history], "other": [history]})
    assert not plt.fignum_exists(fig.number) and len(fig.axes) == 4
    first, second, third = fig.axes[0].lines
    assert first.get_color() == second.get_color() != third.get_color()
    assert list(first.get_xdata()) == [0, 9] and first.get_ydata()[1] == 0.2 and fig.axes[0].get_yscale() == "log"
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
