"""Figures from tensors, on any device: images, masks, training curves, comparisons, attention. Each returns a matplotlib figure.

Images are (C, H, W): bytes or floats from 0 to 1, which are shown as they are, or floats of another range, which are stretched. What is
not a number is hidden, and shown in one tint everywhere. Colours are of Okabe and Ito's palette and the map is cividis: both read the
same to colour-blind eyes. A figure is no wider than a page's text, and no letter in it is smaller than 7 points.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, PercentFormatter, ScalarFormatter
from torch import Tensor

if TYPE_CHECKING:
    from wejepa.masking import Masks

__all__ = [
    "hide",
    "plot_bands",
    "plot_comparison",
    "plot_confusion",
    "plot_correspondences",
    "plot_coverage",
    "plot_curves",
    "plot_error_maps",
    "plot_histories",
    "plot_history",
    "plot_images",
    "plot_maps",
    "plot_mask_steps",
    "plot_masks",
    "plot_panels",
    "plot_patches",
    "plot_queries",
    "plot_rows",
    "plot_similarity_maps",
    "plot_token_colours",
    "plot_tsne_embeddings",
    "to_picture",
    "visualize_attention_scores",
]

CONTEXT, TARGET = "#0072B2", "#D55E00"
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442", "#999999", "#6A3D9A")
MARKERS, LINES = "os^Dv*PX<>", ("-", "--", ":", "-.")
BAR_COLOURS = (PALETTE[0], "#999999", PALETTE[4], PALETTE[2], PALETTE[3], PALETTE[5])
HIDDEN = (150 / 255, 178 / 255, 209 / 255)  # red, green, blue of a hidden patch: a tint that neither black nor white clothes have
WIDTH = 6.5  # inches between a page's margins
STYLE = {
    "figure.dpi": 150,
    "font.size": 8,
    "figure.titlesize": 9.5,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 7.5,
    "lines.linewidth": 1.3,
    "lines.markersize": 4.5,
}


def figure(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """A function that draws, in the style that all figures have; what it returns is shown once, by the cell that returns it."""

    @functools.wraps(draw)
    def styled(*args, **kwargs) -> Figure:
        with plt.rc_context(STYLE):
            fig = draw(*args, **kwargs)
            for ax in fig.axes:  # ticks are made when a figure is rendered, after the style is gone
                ax.tick_params(labelsize=STYLE["xtick.labelsize"])
        plt.close(fig)
        return fig

    return styled


def line_styles(names: Collection[str]) -> list[dict[str, str]]:
    """For each name a colour, marker and line of its own, as `Axes.plot` takes them.

    Raises:
        ValueError: more names than can be told apart.
    """
    _check_count(names, len(PALETTE), "curves")
    return [{"color": PALETTE[i], "marker": MARKERS[i], "linestyle": LINES[i % len(LINES)]} for i in range(len(names))]


def _check_count(names: Collection[str], most: int, what: str) -> None:
    if len(names) > most:
        raise ValueError(f"{len(names)} {what} in one figure: {most} can be told apart, so draw the rest in another")


def to_picture(image: Tensor, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> Tensor:
    """An image (C, H, W) as (H, W, 3) from 0 to 1; pixels that are not a number get the tint HIDDEN.

    Args:
        image: bytes, or floats.
        mean, std: of each channel: the normalisation to undo, for floats. Without them floats from 0 to 1 are shown as they are, and
            those of another range are stretched to it.
    """
    image = image.detach().cpu()
    hidden = image.isnan().any(0) if image.is_floating_point() else torch.zeros(image.shape[1:], dtype=torch.bool)
    if image.dtype == torch.uint8:
        image = image.float() / 255
    elif mean is not None and std is not None:
        image = (image.float() * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)).clamp(0, 1)
    else:
        image = image.float()
        seen = image[:, ~hidden] if not hidden.all() else torch.zeros(1)
        if seen.min() < 0 or seen.max() > 1:
            image = (image - seen.min()) / (seen.max() - seen.min()).clamp(min=1e-6)
    image = image.expand(3, -1, -1) if image.shape[0] == 1 else image[:3]
    return torch.where(hidden[..., None], torch.tensor(HIDDEN), image.permute(1, 2, 0))


def hide(images: Tensor, keep: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Images (B, C, H, W), bytes or floats, of which only the patches `keep` (B, K) are left: floats, not a number where they are hidden.

    Bytes become floats from 0 to 1.
    """
    rows, cols = grid_size
    kept = torch.zeros(len(images), rows * cols, device=images.device).scatter_(1, keep.to(images.device), 1.0).view(-1, 1, rows, cols)
    kept = kept.repeat_interleave(images.shape[-2] // rows, 2).repeat_interleave(images.shape[-1] // cols, 3)
    shown = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    return shown.masked_fill(kept == 0, torch.nan)


def _canvas(rows: int, columns: int, side: float, *, beside: float = 0.1, above: float = 0.3) -> tuple[Figure, np.ndarray]:
    """Axes for rows and columns of pictures of that side, in inches, without ticks, or smaller ones if the page is not wide enough.

    Args:
        beside: width that names and colour bars take, in inches.
        above: height that the title takes, and a line above each picture.
    """
    side = min(side, (WIDTH - beside) / columns)
    size = (side * columns + beside, side * rows + above)
    fig, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    fig.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.02, hspace=0.02)
    for ax in axes.flat:
        ax.set_xticks([])
        ax.set_yticks([])
    return fig, axes


def _beside(count: int, side: float, bar: float) -> tuple[float, float]:
    """Size, in inches, of a figure of square maps side by side that have titles, axes, and a bar of that width."""
    side = min(side, (WIDTH - bar) / count)
    return side * count + bar, side + 0.55


@figure
def plot_images(
    images: Tensor | Sequence[Tensor], titles: Sequence[str] = (), *, columns: int = 5, side: float = 1.2, title: str = ""
) -> Figure:
    """A grid of images (C, H, W), with a line above each; `side` is an image's in inches, less where the page is not wide enough."""
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    side = min(side, WIDTH / columns)
    lines = max((text.count("\n") + 1 for text in titles), default=0)
    fig, axes = _canvas(rows, columns, side, above=0.16 * rows * lines + (0.25 if title else 0.05))
    for i, ax in enumerate(axes.flat):
        ax.axis("off")
        if i < len(images):
            ax.imshow(to_picture(images[i]))
            ax.set_title(titles[i] if i < len(titles) else "", fontsize=8, pad=2)
    fig.suptitle(title)
    return fig


@figure
def plot_rows(rows: Mapping[str, Sequence[Tensor]], *, side: float = 1.2, titles: Sequence[str] = (), title: str = "") -> Figure:
    """Rows of images by name, as many in each: what is made of an image stands below it.

    Args:
        rows: by the name that stands beside each, its images, (C, H, W) each.
        side: an image's, in inches; less where the page is not wide enough.
        titles: a line above each column.
        title: above the figure.
    """
    columns = len(next(iter(rows.values())))
    fig, axes = _canvas(len(rows), columns, side, beside=0.35, above=0.3 + (0.2 if titles else 0))
    for (name, images), line in zip(rows.items(), axes, strict=True):
        line[0].set_ylabel(name)
        for ax, image in zip(line, images, strict=True):
            ax.imshow(to_picture(image))
    for ax, text in zip(axes[0], titles, strict=False):
        ax.set_title(text)
    fig.suptitle(title)
    return fig


def _frame_block(ax: Axes, block: int, row: Tensor, col: Tensor, patch: tuple[float, float]) -> None:
    """Frame the block of that number, whose patches lie at `row` and `col`; `patch` is the height and width of one, in pixels.

    Each frame lies a little further in than the one before it: blocks may share an edge, or be the same, and one would hide the other.
    """
    high, wide = patch
    inset = 0.12 * (block % 4)  # in patches
    corner = ((float(col.min()) + inset) * wide - 0.5, (float(row.min()) + inset) * high - 0.5)
    size = ((float(col.max() - col.min() + 1) - 2 * inset) * wide, (float(row.max() - row.min() + 1) - 2 * inset) * high)
    colour = PALETTE[(block + 1) % len(PALETTE)]
    ax.add_patch(Rectangle(corner, *size, fill=False, edgecolor=colour, linewidth=1.4))


@figure
def plot_masks(images: Tensor, masks: Masks, grid_size: tuple[int, int], *, title: str = "What is seen, what is asked") -> Figure:
    """For each image (B, C, H, W): the whole, what the student sees, and the target blocks it must predict.

    Frames of several blocks lie one inside another, so that none hides another.
    """
    columns, masks = len(images), masks.to("cpu")
    fig, axes = _canvas(3, columns, 1.5, beside=0.5)
    high, wide = images.shape[-2] / grid_size[0], images.shape[-1] / grid_size[1]
    seen = hide(images, masks.context, grid_size)
    for column in range(columns):
        picture = to_picture(images[column])
        visible = torch.where(seen[column].isnan().any(0).cpu()[..., None], torch.tensor(HIDDEN), picture)
        axes[0, column].imshow(picture)
        axes[1, column].imshow(visible)
        axes[2, column].imshow(0.35 * picture + 0.65)
        for block, target in enumerate(masks.targets[column]):
            _frame_block(axes[2, column], block, target // grid_size[1], target % grid_size[1], (high, wide))
    for row, name in enumerate(
        ("image", f"context\n({masks.context.shape[1]} patches)", f"targets\n({masks.targets.shape[1]} blocks of {masks.targets.shape[2]})")
    ):
        axes[row, 0].set_ylabel(name)
    fig.suptitle(title)
    return fig


@figure
def plot_mask_steps(image: Tensor, steps: Mapping[str, tuple[Tensor, Sequence[Tensor]]], *, title: str = "A mask, step by step") -> Figure:
    """An image (C, H, W) at each step, under the step's name: which patches are left, (rows, columns) of booleans, and the blocks to
    frame, each (rows, columns) of booleans as well. Patches that are not left get the tint HIDDEN.
    """
    fig, axes = _canvas(1, len(steps), 1.5, above=0.75)
    for ax, (name, (left, blocks)) in zip(axes[0], steps.items(), strict=True):
        grid_size, keep = left.shape, left.flatten().nonzero()[None, :, 0]
        high, wide = image.shape[-2] / grid_size[0], image.shape[-1] / grid_size[1]
        ax.imshow(to_picture(hide(image[None], keep, grid_size)[0]))
        for k, block in enumerate(blocks):
            _frame_block(ax, k, *block.nonzero().unbind(1), (high, wide))
        ax.set_title(name)
    fig.suptitle(title)
    return fig


@figure
def plot_history(history: list[dict[str, Any]], *, title: str = "Pretraining") -> Figure:
    """Loss, teacher variance, RankMe and nearest-neighbour accuracy over the epochs of a run's history."""
    panels = (("loss", "smooth-L1 loss"), ("teacher_variance", "teacher variance"), ("rankme", "RankMe"), ("knn", "k-NN, as logged"))
    panels = [(key, name) for key, name in panels if history[0].get(key) is not None]
    fig, axes = plt.subplots(1, len(panels), figsize=(WIDTH * len(panels) / 4, 2.2), squeeze=False, layout="constrained")
    epochs = [entry["epoch"] for entry in history]
    for ax, (key, name), colour in zip(axes[0], panels, PALETTE, strict=False):
        ax.plot(epochs, [entry[key] for entry in history], color=colour, marker="." if len(epochs) < 40 else None)
        ax.set(title=name, xlabel="epoch", ylim=(0, None))
        ax.yaxis.set_major_locator(MaxNLocator(4))
        ax.grid(alpha=0.3)
    fig.suptitle(title)
    return fig


@figure
def plot_histories(runs: dict[str, Sequence[list[dict[str, Any]]]], *, title: str = "") -> Figure:
    """Loss (logarithmic), teacher variance, RankMe and nearest-neighbour accuracy over the steps of several runs.

    Args:
        runs: by name one or more histories measured after the same steps, drawn as their median and a band from the smallest to the
            largest: lists of dicts with step, loss, teacher_variance, rankme, knn, where a loss may be NaN.
        title: above the figure.
    """
    panels = (("loss", "smooth-L1 loss"), ("teacher_variance", "teacher variance"), ("rankme", "RankMe"), ("knn", "k-NN accuracy"))
    styles = line_styles(runs)
    fig, axes = plt.subplots(2, 2, figsize=(WIDTH, 4.6), layout="constrained")
    for ax, (key, name) in zip(axes.flat, panels, strict=True):
        for (run, histories), style in zip(runs.items(), styles, strict=True):
            steps = [entry["step"] for entry in histories[0]]
            values = np.array([[entry[key] for entry in history] for history in histories], dtype=float)  # (runs, steps)
            ax.fill_between(steps, values.min(0), values.max(0), color=style["color"], alpha=0.2, linewidth=0)
            ax.plot(steps, np.median(values, 0), markersize=3, label=run, **style)
        ax.set_xscale("symlog", linthresh=10)  # most happens in the first steps
        ax.xaxis.set_major_formatter(ScalarFormatter())
        ax.set(title=name, xlabel="step", xlim=(0, None))
        ax.grid(alpha=0.3)
    axes[0, 0].set_yscale("log")
    for ax in axes.flat[1:]:
        ax.set_ylim(0, None)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    fig.suptitle(title)
    return fig


@figure
def plot_comparison(
    rows: Mapping[str, Mapping[str, float]],
    whiskers: Mapping[str, Mapping[str, float]] | None = None,
    *,
    title: str = "Test accuracy under one protocol",
) -> Figure:
    """Bars for each row of a `Comparison`, one group for each way of reading the tokens; a row without one has no bar in its group.

    Args:
        rows: by the encoder's name, accuracies from 0 to 1.
        whiskers: how far error bars reach up and down, from 0 to 1, for each of them.
        title: above the figure.
    """
    from wejepa.analysis.features import READINGS  # here, since no other figure needs a model

    groups = [(key, name) for key, name in READINGS.items() if any(key in row for row in rows.values())]
    _check_count(rows, len(BAR_COLOURS), "encoders")
    fig, ax = plt.subplots(figsize=(WIDTH, 2.9), layout="constrained")
    width = 0.8 / len(rows)
    present = {key: [name for name, row in rows.items() if key in row] for key, _ in groups}
    for (name, row), colour in zip(rows.items(), BAR_COLOURS[: len(rows)], strict=True):
        found = [(g, key) for g, (key, _) in enumerate(groups) if key in row]
        at = [g + (present[key].index(name) - (len(present[key]) - 1) / 2) * width for g, key in found]
        reach = [100 * whiskers[name][key] for _, key in found] if whiskers else None
        ends = {"capsize": 2, "elinewidth": 0.8}
        bars = ax.bar(at, [100 * row[key] for _, key in found], width * 0.92, yerr=reach, error_kw=ends, color=colour, label=name)
        for bar, above in zip(bars, reach or [0] * len(found), strict=True):
            place = (bar.get_x() + bar.get_width() / 2, bar.get_height() + above + 1)
            ax.text(*place, f"{bar.get_height():.1f}", ha="center", va="bottom", fontsize=7)
    ax.set_xticks(range(len(groups)), [name for _, name in groups])
    ax.set(ylabel="accuracy, %", ylim=(0, 100), title=title)
    ax.legend(ncols=min(len(rows), 4), loc="upper center", bbox_to_anchor=(0.5, -0.1), frameon=False)
    return fig


@figure
def plot_bands(x_values: Sequence[float], curves: dict[str, Tensor], *, x: str, y: str, title: str = "") -> Figure:
    """For each name values (draws, X): the mean over the draws as a line, from smallest to largest as a band; x in powers of ten.

    Colours come in the order of `plot_comparison`, so that the same rows look the same in both.
    """
    colours = [*BAR_COLOURS, *(colour for colour in PALETTE if colour not in BAR_COLOURS)]
    styles = [style | {"color": colour} for style, colour in zip(line_styles(curves), colours, strict=False)]
    fig, ax = plt.subplots(figsize=(WIDTH * 0.85, 3.1), layout="constrained")
    for (name, values), style in zip(curves.items(), styles, strict=True):
        values = torch.as_tensor(values).float().cpu()
        ax.fill_between(x_values, values.amin(0), values.amax(0), color=style["color"], alpha=0.18, linewidth=0)
        ax.plot(x_values, values.mean(0), label=name, **style)
    ax.set_xscale("log")
    ax.set_xticks(x_values, [f"{v:g}" for v in x_values])
    ax.minorticks_off()
    ax.set(xlabel=x, ylabel=y, title=title, ylim=(0, None))
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    return fig


@figure
def plot_confusion(counts: Tensor, classes: Sequence[str], *, title: str = "What is taken for what") -> Figure:
    """How many images of each class (rows) were given each class (columns), (C, C), as shares of the row; the counts stand in the cells."""
    counts = counts.cpu()
    shares = counts.float() / counts.sum(1, keepdim=True).clamp(min=1)
    fig, ax = plt.subplots(figsize=(min(WIDTH, 0.5 * len(classes) + 1.8), min(WIDTH, 0.45 * len(classes) + 1.2)), layout="constrained")
    drawn = ax.imshow(shares, cmap="cividis", vmin=0, vmax=1)
    for (row, col), share in zip(np.ndindex(*shares.shape), shares.flatten().tolist(), strict=True):
        if counts[row, col]:
            ax.text(col, row, int(counts[row, col]), ha="center", va="center", fontsize=7, color="white" if share < 0.5 else "black")
    ax.set_xticks(range(len(classes)), classes, rotation=40, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(len(classes)), classes)
    ax.set(xlabel="predicted", ylabel="true", title=title)
    fig.colorbar(drawn, ax=ax, shrink=0.8, label="share of the true class", format=PercentFormatter(1.0, decimals=0))
    return fig


@figure
def visualize_attention_scores(
    image: Tensor,
    attentions: Sequence[Tensor] | Mapping[str, Sequence[Tensor]],
    grid_size: tuple[int, int],
    *,
    query: int | None = None,
    layers: Sequence[int] | None = None,
    heads: bool = False,
    overlay: bool = False,
    title: str = "",
) -> Figure:
    """Attention over an image, one heatmap a layer, averaged over the heads, all on one colour scale.

    Args:
        image: (C, H, W).
        attentions: for each layer (heads, N, N) of this one image, rows being the queries; or such lists by the name of their encoder,
            all with as many layers, for a row each.
        grid_size: patches down and across.
        query: the patch whose attention is shown and marked; None for the mean over all patches: how much each one is looked at.
        layers: which layers, all by default.
        heads: a row for each head, instead of their mean.
        overlay: lay the maps over the image, which shows through.
        title: above the figure.
    """
    encoders = attentions if isinstance(attentions, Mapping) else {"": attentions}
    depth = len(next(iter(encoders.values())))
    layers = range(depth) if layers is None else layers
    maps: dict[str, Tensor] = {}  # for each row (L, rows, columns)
    for name, found in encoders.items():
        weights = torch.stack([found[k].float().cpu() for k in layers])  # (L, heads, N, N)
        weights = weights if heads else weights.mean(1, keepdim=True)
        seen = (weights.mean(2) if query is None else weights[:, :, query]) * weights.shape[-1]  # 1 is an even share
        for head in range(seen.shape[1]):
            of_head = f"head {head + 1}" if heads else ""
            maps[", ".join(filter(None, (name, of_head)))] = seen[:, head].view(-1, *grid_size)
    largest = max(float(values.max()) for values in maps.values())

    fig, axes = _canvas(len(maps), 1 + len(layers), 1.5, beside=1.0, above=0.5)
    picture, corners = to_picture(image), (-0.5, image.shape[-1] - 0.5, image.shape[-2] - 0.5, -0.5)
    high, wide = image.shape[-2] / grid_size[0], image.shape[-1] / grid_size[1]
    for line, (name, values) in zip(axes, maps.items(), strict=True):
        line[0].set_ylabel(name)
        line[0].imshow(picture)
        for ax, heat in zip(line[1:], values, strict=True):
            if overlay:
                ax.imshow(picture)
            drawn = ax.imshow(heat, cmap="cividis", vmin=0, vmax=largest, extent=corners, alpha=0.7 if overlay else 1)
    for ax, text in zip(axes[0], ("image", *(f"layer {k % depth + 1}" for k in layers)), strict=True):
        ax.set_title(text)
    fig.colorbar(
        drawn, ax=list(axes.flat), shrink=0.8, label="attention (1 = even share)" if len(maps) > 1 else "attention\n(1 = even share)"
    )
    if query is not None:
        row, col = divmod(query, grid_size[1])
        for ax in axes.flat:
            frame = Rectangle((col * wide - 0.5, row * high - 0.5), wide, high, fill=False, edgecolor=TARGET, linewidth=1.6)
            ax.add_patch(frame)
    fig.suptitle(title)
    return fig


@figure
def plot_queries(
    images: Tensor, maps: Mapping[str, Tensor], grid_size: tuple[int, int], queries: Sequence[int], *, title: str = ""
) -> Figure:
    """What one patch of each image attends to: the images (B, C, H, W), and below them rows of maps (B, N) by name, all on one scale.

    Args:
        images: one a column.
        maps: for each row the attention of each image's query, which sums to 1; shown as multiples of an even share.
        grid_size: patches down and across.
        queries: for each image the patch that asks, framed.
        title: above the figure.
    """
    fig, axes = _canvas(1 + len(maps), len(images), 1.2, beside=1.0)
    high, wide = images.shape[-2] / grid_size[0], images.shape[-1] / grid_size[1]
    corners = (-0.5, images.shape[-1] - 0.5, images.shape[-2] - 0.5, -0.5)
    shares = {name: (values.float().cpu() * values.shape[-1]).view(-1, *grid_size) for name, values in maps.items()}
    largest = float(torch.stack(list(shares.values())).quantile(0.99))  # a single bright patch would darken the rest
    for column, query in enumerate(queries):
        axes[0, column].imshow(to_picture(images[column]))
        for ax, heat in zip(axes[1:, column], shares.values(), strict=True):
            drawn = ax.imshow(heat[column], cmap="cividis", vmin=0, vmax=largest, extent=corners)
        row, col = divmod(query, grid_size[1])
        for ax in axes[:, column]:
            ax.add_patch(Rectangle((col * wide - 0.5, row * high - 0.5), wide, high, fill=False, edgecolor=TARGET, linewidth=1.6))
    for ax, name in zip(axes[:, 0], ("image", *maps), strict=True):
        ax.set_ylabel(name)
    fig.colorbar(drawn, ax=list(axes[1:].flat), shrink=0.8, extend="max", label="attention (1 = even share)")
    fig.suptitle(title)
    return fig


@figure
def plot_correspondences(
    pairs: Sequence[tuple[Tensor, Tensor]],
    queries: Sequence[Sequence[int]],
    matches: Mapping[str, Sequence[Sequence[int]]],
    grid_size: tuple[int, int],
    *,
    side: float = 1.2,
    title: str = "",
) -> Figure:
    """Which patches of a second image are like some patches of a first one: frames of one colour belong together.

    Frames of the same patch lie one around another, so that none hides another.

    Args:
        pairs: in each column a first and a second image, (C, H, W) each.
        queries: for each pair the framed patches of its first image, ten at the most.
        matches: by name, for each pair, the patch of the second image for each of the queries; a row for each name.
        grid_size: patches down and across.
        side: an image's, in inches; less where the page is not wide enough.
        title: above the figure.
    """
    fig, axes = _canvas(1 + len(matches), len(pairs), side, beside=0.35)
    rows = {"patches": queries, **matches}
    for number, (line, (name, places)) in enumerate(zip(axes, rows.items(), strict=True)):
        line[0].set_ylabel(name)
        for ax, pair, framed in zip(line, pairs, places, strict=True):
            image = pair[min(number, 1)]
            high, wide = image.shape[-2] / grid_size[0], image.shape[-1] / grid_size[1]
            ax.imshow(to_picture(image))
            framed = [int(place) for place in framed]
            for k, place in enumerate(framed):
                row, col = divmod(place, grid_size[1])
                beyond = 0.45 * framed[:k].count(place)  # in patches
                corner = (col - beyond) * wide - 0.5, (row - beyond) * high - 0.5
                size = (1 + 2 * beyond) * wide, (1 + 2 * beyond) * high
                frame = Rectangle(corner, *size, fill=False, edgecolor=PALETTE[k], linewidth=1.8)
                frame.set_path_effects([withStroke(linewidth=3, foreground="white")])  # seen on any ground
                ax.add_patch(frame)
    fig.suptitle(title)
    return fig


@figure
def plot_tsne_embeddings(points: Tensor, labels: Tensor, classes: Sequence[str], *, title: str = "t-SNE of the features") -> Figure:
    """A scatter of points (N, 2), both axes on one scale: each class (N,) has a colour, a marker, and its name at its points' median."""
    points, labels = points.cpu(), labels.cpu()
    fig, ax = plt.subplots(figsize=(WIDTH, 4.6), layout="constrained")
    for i, name in enumerate(classes):
        own = points[labels == i]
        if len(own):
            colour, marker = PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)]
            ax.scatter(own[:, 0], own[:, 1], color=colour, marker=marker, s=14, linewidths=0.3, edgecolors="black", label=name)
            outline = [withStroke(linewidth=2.5, foreground="white")]  # readable on any point
            ax.text(*own.median(0).values.tolist(), name, fontsize=8, ha="center", va="center", path_effects=outline, zorder=3)
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    ax.set_aspect("equal", adjustable="datalim")  # a distance means the same along both axes
    ax.set(xlabel="t-SNE 1", ylabel="t-SNE 2", title=title)
    return fig


@figure
def plot_token_colours(
    images: Tensor, colours: dict[str, Tensor], *, side: float = 1.2, title: str = "Tokens as colours: like tokens, like colours"
) -> Figure:
    """Images (B, C, H, W) above rows of their tokens' colours, each (B, rows, columns, 3) from 0 to 1, by name; `side` is in inches."""
    fig, axes = _canvas(1 + len(colours), len(images), side, beside=0.35)
    for column, image in enumerate(images):
        axes[0, column].imshow(to_picture(image))
        for ax, shown in zip(axes[1:, column], colours.values(), strict=True):
            ax.imshow(shown[column].cpu())
    for ax, name in zip(axes[:, 0], ("image", *colours), strict=True):
        ax.set_ylabel(name)
    fig.suptitle(title)
    return fig


@figure
def plot_error_maps(images: Tensor, errors: Tensor | Mapping[str, Tensor], *, title: str = "Which patches are hard to predict") -> Figure:
    """Images (B, C, H, W) above the prediction errors of each of their patches, on one scale.

    Args:
        images: the images.
        errors: (B, rows, columns), or several such by the name that stands beside them; what is not a number gets the tint HIDDEN.
        title: above the figure.
    """
    rows = {name: values.cpu() for name, values in (errors if isinstance(errors, Mapping) else {"error": errors}).items()}
    fig, axes = _canvas(1 + len(rows), len(images), 1.2, beside=1.0)
    everything = torch.cat([values.flatten() for values in rows.values()])
    largest = float(everything[everything.isfinite()].quantile(0.99))  # a single hard patch would darken the rest
    colours = plt.get_cmap("cividis").with_extremes(bad=HIDDEN)
    for column, image in enumerate(images):
        axes[0, column].imshow(to_picture(image))
        for ax, values in zip(axes[1:, column], rows.values(), strict=True):
            drawn = ax.imshow(values[column], cmap=colours, vmin=0, vmax=largest)
    for ax, name in zip(axes[:, 0], ("image", *rows), strict=True):
        ax.set_ylabel(name)
    fig.colorbar(drawn, ax=list(axes.flat), shrink=0.9, extend="max", label="smooth-L1")
    fig.suptitle(title)
    return fig


@figure
def plot_coverage(maps: dict[str, Tensor], *, title: str = "How often each patch is drawn") -> Figure:
    """Heatmaps of shares (H, W) by name, on one scale that begins at 0, each patch's share written in it."""
    maps = {name: heat.cpu() for name, heat in maps.items()}
    fig, axes = plt.subplots(1, len(maps), figsize=_beside(len(maps), 3.2, 0.9), squeeze=False, layout="constrained")
    highest = max(float(heat.max()) for heat in maps.values())
    for ax, (name, heat) in zip(axes[0], maps.items(), strict=True):
        drawn = ax.imshow(heat, cmap="cividis", vmin=0, vmax=highest)
        ax.set(title=name, xlabel="column of patches", ylabel="row of patches")
        if heat.numel() <= 100:
            for (row, col), share in zip(np.ndindex(*heat.shape), heat.flatten().tolist(), strict=True):
                colour = "white" if share < 0.6 * highest else "black"
                ax.text(col, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=7, color=colour)
    fig.colorbar(drawn, ax=list(axes[0]), shrink=0.85, label="share of images", format=PercentFormatter(1.0, decimals=0))
    fig.suptitle(title)
    return fig


@figure
def plot_curves(
    x_values: Sequence[float], curves: dict[str, Sequence[float]], *, x: str, y: str, title: str = "", log_x: bool = True
) -> Figure:
    """Lines by name over common x values."""
    styles = line_styles(curves)
    fig, ax = plt.subplots(figsize=(WIDTH * 0.85, 2.9), layout="constrained")
    for (name, values), style in zip(curves.items(), styles, strict=True):
        ax.plot(x_values, values, label=name, **style)
    if log_x:
        ax.set_xscale("log", base=2)
        ax.set_xticks(x_values, [f"{v:g}" for v in x_values])
    ax.set(xlabel=x, ylabel=y, title=title, ylim=(0, None))
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    return fig


@figure
def plot_panels(panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]], *, x: str, y: str, title: str = "") -> Figure:
    """Two panels in a row, each with lines by name: their x values and their y values. A name looks the same in all panels."""
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    styles = dict(zip(names, line_styles(names), strict=True))
    rows = -(-len(panels) // 2)
    fig, axes = plt.subplots(rows, 2, figsize=(WIDTH, 2.3 * rows + 0.5), squeeze=False, layout="constrained")
    for ax in axes.flat[len(panels) :]:
        ax.remove()
    for ax, (panel, lines) in zip(axes.flat, panels.items(), strict=False):
        for name, (x_values, y_values) in lines.items():
            ax.plot(x_values, y_values, label=name, **styles[name])
        ax.set(title=panel, xlabel=x, ylabel=y)
        ax.grid(alpha=0.3)
    handles = {label: handle for ax in fig.axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    fig.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
    fig.suptitle(title)
    return fig


@figure
def plot_maps(
    maps: dict[str, Tensor],
    *,
    label: str = "",
    shared: bool = True,
    numbers: str = "",
    limits: tuple[float, float] | None = None,
    blocks: Sequence[str] = (),
    title: str = "",
) -> Figure:
    """Maps (H, W) over a token grid side by side, with colour bars.

    Args:
        maps: by the name that stands above each.
        label: what the colours mean.
        shared: one scale for all, with one bar; otherwise each has its own.
        numbers: a format such as ".0f" to write every value into its cell.
        limits: the scale's ends, by default the smallest and the largest value.
        blocks: names of equal blocks that rows and columns consist of, with lines between them.
        title: above the figure.
    """
    maps = {name: values.detach().float().cpu() for name, values in maps.items()}
    fig, axes = plt.subplots(
        1, len(maps), figsize=_beside(len(maps), 3.2, 0.7 if shared else 0.7 * len(maps)), squeeze=False, layout="constrained"
    )
    everything = torch.cat([values.flatten() for values in maps.values()])
    for ax, (name, values) in zip(axes[0], maps.items(), strict=True):
        scale = everything if shared else values
        low, high = limits or (float(scale.min()), float(scale.max()))
        drawn = ax.imshow(values, cmap="cividis", vmin=low, vmax=high)
        for (row, col), value in (
            (((r, c), float(values[r, c])) for r in range(values.shape[0]) for c in range(values.shape[1])) if numbers else ()
        ):
            ink = "white" if value < (low + high) / 2 else "black"
            ax.text(col, row, format(value, numbers), ha="center", va="center", color=ink, fontsize=7)
        ax.set_title(name)
        if blocks:
            size = len(values) / len(blocks)
            middles = [(i + 0.5) * size - 0.5 for i in range(len(blocks))]
            ax.set_xticks(middles, blocks, rotation=45, ha="right")
            ax.set_yticks(middles, blocks if ax is axes[0, 0] else [])
            for i in range(1, len(blocks)):
                ax.axhline(i * size - 0.5, color="white", linewidth=0.6)
                ax.axvline(i * size - 0.5, color="white", linewidth=0.6)
        else:
            ax.set_xlabel("column")
            ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        if not shared:
            fig.colorbar(drawn, ax=ax, shrink=0.8, label=label)
    if not blocks:
        axes[0, 0].set_ylabel("row")
    if shared:
        fig.colorbar(drawn, ax=list(axes[0]), shrink=0.8, label=label)
    fig.suptitle(title)
    return fig


@figure
def plot_patches(image: Tensor, patch_size: int, *, title: str = "") -> Figure:
    """An image (C, H, W), and beside it the patches that it is cut into, a little apart."""
    picture = to_picture(image)
    rows, cols = picture.shape[0] // patch_size, picture.shape[1] // patch_size
    gap = max(1, round(patch_size / 6))
    step = patch_size + gap
    sheet = torch.ones(rows * step - gap, cols * step - gap, 3)
    for r in range(rows):
        for c in range(cols):
            patch = picture[r * patch_size : (r + 1) * patch_size, c * patch_size : (c + 1) * patch_size]
            sheet[r * step : r * step + patch_size, c * step : c * step + patch_size] = patch
    fig, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.6), dpi=100, layout="constrained")  # photographs make large files
    axes[0].imshow(picture)
    axes[0].set(title=f"{picture.shape[0]} x {picture.shape[1]} pixels", xlabel="column", ylabel="row")
    axes[1].imshow(sheet)
    axes[1].set(title=f"{rows} x {cols} = {rows * cols} patches of {patch_size} x {patch_size}", xlabel="column of patches")
    places = [k * step + patch_size / 2 - 0.5 for k in range(max(rows, cols))]
    every = max(1, max(rows, cols) // 8)
    axes[1].set_xticks(places[:cols:every], range(0, cols, every))
    axes[1].set_yticks(places[:rows:every], range(0, rows, every))
    fig.suptitle(title)
    return fig


@figure
def plot_similarity_maps(similarities: dict[str, Tensor], grid_size: tuple[int, int], *, title: str = "") -> Figure:
    """For each (N, N) of cosine similarities a grid of maps: the map at row r and column c compares that position with all others.

    All have one scale, from the smallest value of all to 1.
    """
    rows, cols = grid_size
    fig, axes = plt.subplots(1, len(similarities), figsize=_beside(len(similarities), 4.0, 0.8), squeeze=False, layout="constrained")
    lowest = min(float(similarity.min()) for similarity in similarities.values())
    for ax, (name, similarity) in zip(axes[0], similarities.items(), strict=True):
        sheet = torch.full((rows * (rows + 1) - 1, cols * (cols + 1) - 1), float("nan"))
        for k, values in enumerate(similarity.detach().float().cpu().view(-1, rows, cols)):
            r, c = k // cols * (rows + 1), k % cols * (cols + 1)
            sheet[r : r + rows, c : c + cols] = values
        drawn = ax.imshow(sheet, cmap="cividis", vmin=lowest, vmax=1)
        ax.set_xticks([k * (cols + 1) + (cols - 1) / 2 for k in range(cols)], range(cols))
        ax.set_yticks([k * (rows + 1) + (rows - 1) / 2 for k in range(rows)], range(rows))
        ax.set(title=name, xlabel="column of the position")
    axes[0, 0].set_ylabel("row of the position")
    fig.colorbar(drawn, ax=list(axes[0]), shrink=0.75, label="cosine similarity")
    fig.suptitle(title)
    return fig
