"""Figures from tensors, on any device: images, masks, training curves, comparisons, attention. Each returns a matplotlib figure.

Colours are of Okabe and Ito's palette and the map is cividis: both read the same to colour-blind eyes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

if TYPE_CHECKING:
    from wejepa.masking import Masks

__all__ = [
    "plot_bands",
    "plot_comparison",
    "plot_confusion",
    "plot_coverage",
    "plot_curves",
    "plot_error_maps",
    "plot_histories",
    "plot_history",
    "plot_images",
    "plot_maps",
    "plot_masks",
    "plot_patches",
    "plot_similarity_maps",
    "plot_token_colours",
    "plot_tsne_embeddings",
    "visualize_attention_scores",
]

CONTEXT, TARGET = "#0072B2", "#D55E00"
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442", "#999999", "#6A3D9A")
MARKERS, LINES = "os^Dv*PX<>", ("-", "--", ":", "-.")
BAR_COLOURS = (PALETTE[0], "#999999", PALETTE[4], PALETTE[2], PALETTE[3])


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


def to_picture(image: Tensor) -> Tensor:
    """An image (C, H, W) of any range as (H, W, 3) from 0 to 1."""
    image = image.detach().float().cpu()
    image = (image - image.min()) / (image.max() - image.min()).clamp(min=1e-6)
    return image.expand(3, -1, -1).permute(1, 2, 0) if image.shape[0] == 1 else image[:3].permute(1, 2, 0)


def plot_images(images: Tensor, titles: Sequence[str] = (), *, columns: int = 10, title: str = "") -> Figure:
    """A grid of images (B, C, H, W), with a line above each."""
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    fig, axes = plt.subplots(rows, columns, figsize=(1.15 * columns, 1.35 * rows), squeeze=False, layout="constrained")
    for i, ax in enumerate(axes.flat):
        ax.axis("off")
        if i < len(images):
            ax.imshow(to_picture(images[i]))
            ax.set_title(titles[i] if i < len(titles) else "", fontsize=9)
    fig.suptitle(title)
    plt.close(fig)  # shown once, by the cell that returns it
    return fig


def plot_masks(images: Tensor, masks: Masks, grid_size: tuple[int, int], *, title: str = "What is seen, what is asked") -> Figure:
    """For each image (B, C, H, W): the whole, what the student sees, and the target blocks it must predict."""
    columns, masks = len(images), masks.to("cpu")
    fig, axes = plt.subplots(3, columns, figsize=(1.5 * columns + 0.9, 5.2), squeeze=False, layout="constrained")
    high, wide = images.shape[-2] // grid_size[0], images.shape[-1] // grid_size[1]
    for column in range(columns):
        picture = to_picture(images[column])
        visible = torch.zeros(grid_size[0] * grid_size[1])
        visible[masks.context[column]] = 1
        visible = F.interpolate(visible.view(1, 1, *grid_size), scale_factor=(high, wide)).squeeze()[..., None]
        axes[0, column].imshow(picture)
        axes[1, column].imshow(picture * visible + 0.82 * (1 - visible))
        axes[2, column].imshow(0.35 * picture + 0.65)
        for block, target in enumerate(masks.targets[column]):
            row, col = target // grid_size[1], target % grid_size[1]
            corner = (col.min() * wide - 0.5, row.min() * high - 0.5)
            size = ((col.max() - col.min() + 1) * wide, (row.max() - row.min() + 1) * high)
            colour = PALETTE[(block + 1) % len(PALETTE)]
            axes[2, column].add_patch(Rectangle(corner, *size, fill=False, edgecolor=colour, linewidth=2))
    for row, name in enumerate(
        ("image", f"context\n({masks.context.shape[1]} patches)", f"targets\n({masks.targets.shape[1]} blocks of {masks.targets.shape[2]})")
    ):
        axes[row, 0].set_ylabel(name)
    for ax in axes.flat:
        ax.set_xticks([])
        ax.set_yticks([])
    fig.suptitle(title)
    plt.close(fig)
    return fig


def plot_history(history: list[dict[str, Any]], *, title: str = "Pretraining") -> Figure:
    """Loss, teacher variance, RankMe and nearest-neighbour accuracy over the epochs of a run's history."""
    panels = (("loss", "smooth-L1 loss"), ("teacher_variance", "teacher variance"), ("rankme", "RankMe"), ("knn", "k-NN accuracy"))
    panels = [(key, name) for key, name in panels if history[0].get(key) is not None]
    fig, axes = plt.subplots(1, len(panels), figsize=(2.9 * len(panels), 2.7), squeeze=False, layout="constrained")
    epochs = [entry["epoch"] for entry in history]
    for ax, (key, name), colour in zip(axes[0], panels, PALETTE, strict=False):
        ax.plot(epochs, [entry[key] for entry in history], color=colour, marker="." if len(epochs) < 40 else None)
        ax.set(title=name, xlabel="epoch")
        ax.grid(alpha=0.3)
    fig.suptitle(title)
    plt.close(fig)
    return fig


def plot_histories(runs: dict[str, Sequence[list[dict[str, Any]]]], *, title: str = "") -> Figure:
    """Loss (logarithmic), teacher variance, RankMe and nearest-neighbour accuracy over the steps of several runs.

    Args:
        runs: by name one or more histories, drawn in one colour: lists of dicts with step, loss, teacher_variance, rankme, knn, where a
            loss may be NaN.
        title: above the figure.
    """
    panels = (("loss", "smooth-L1 loss"), ("teacher_variance", "teacher variance"), ("rankme", "RankMe"), ("knn", "k-NN accuracy"))
    styles = line_styles(runs)
    fig, axes = plt.subplots(2, 2, figsize=(10, 6.6), layout="constrained")
    for ax, (key, name) in zip(axes.flat, panels, strict=True):
        for (run, histories), style in zip(runs.items(), styles, strict=True):
            for i, history in enumerate(histories):
                values = [entry[key] for entry in history]
                label = run if i == 0 else None
                ax.plot([e["step"] for e in history], values, markersize=4, label=label, **style)
        ax.set(title=name, xlabel="step", ylabel=name)
        ax.grid(alpha=0.3)
    axes[0, 0].set_yscale("log")
    for ax in axes.flat[1:]:
        ax.set_ylim(0, None)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    fig.suptitle(title)
    plt.close(fig)
    return fig


def plot_comparison(rows: dict[str, dict[str, float]], *, title: str = "Test accuracy under one protocol") -> Figure:
    """Bars for each row of a `Comparison`, one group for each way of reading the tokens."""
    from wejepa.analysis.features import READINGS  # here, since no other figure needs a model

    groups = [(key, name) for key, name in READINGS.items() if any(key in row for row in rows.values())]
    _check_count(rows, len(BAR_COLOURS), "encoders")
    fig, ax = plt.subplots(figsize=(9.5, 3.8), layout="constrained")
    width = 0.8 / len(rows)
    for i, ((name, row), colour) in enumerate(zip(rows.items(), BAR_COLOURS[: len(rows)], strict=True)):
        found = [(g, 100 * row[key]) for g, (key, _) in enumerate(groups) if key in row]
        at = [g + (i - (len(rows) - 1) / 2) * width for g, _ in found]
        bars = ax.bar(at, [value for _, value in found], width * 0.92, color=colour, label=name)
        ax.bar_label(bars, fmt="%.1f", fontsize=8)
    ax.set_xticks(range(len(groups)), [name for _, name in groups])
    ax.set(ylabel="accuracy, %", ylim=(0, 100), title=title)
    ax.legend(ncols=len(rows), fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.1), frameon=False)
    plt.close(fig)
    return fig


def plot_bands(x_values: Sequence[float], curves: dict[str, Tensor], *, x: str, y: str, title: str = "") -> Figure:
    """For each name values (draws, X): the mean over the draws as a line, from smallest to largest as a band; x in powers of ten."""
    styles = line_styles(curves)
    fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    for (name, values), style in zip(curves.items(), styles, strict=True):
        values = torch.as_tensor(values).float().cpu()
        ax.fill_between(x_values, values.amin(0), values.amax(0), color=style["color"], alpha=0.18, linewidth=0)
        ax.plot(x_values, values.mean(0), label=name, **style)
    ax.set_xscale("log")
    ax.set_xticks(x_values, [f"{v:g}" for v in x_values])
    ax.minorticks_off()
    ax.set(xlabel=x, ylabel=y, title=title)
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    plt.close(fig)
    return fig


def plot_confusion(counts: Tensor, classes: Sequence[str], *, title: str = "What is taken for what") -> Figure:
    """How many images of each class (rows) were given each class (columns), (C, C), as shares of the row; the counts stand in the cells."""
    counts = counts.cpu()
    shares = counts.float() / counts.sum(1, keepdim=True).clamp(min=1)
    fig, ax = plt.subplots(figsize=(0.62 * len(classes) + 1.8, 0.55 * len(classes) + 1.2), layout="constrained")
    drawn = ax.imshow(shares, cmap="cividis", vmin=0, vmax=1)
    for (row, col), share in zip(np.ndindex(*shares.shape), shares.flatten().tolist(), strict=True):
        if counts[row, col]:
            ax.text(col, row, int(counts[row, col]), ha="center", va="center", fontsize=8, color="white" if share < 0.5 else "black")
    ax.set_xticks(range(len(classes)), classes, rotation=40, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(len(classes)), classes)
    ax.set(xlabel="predicted", ylabel="true", title=title)
    fig.colorbar(drawn, ax=ax, shrink=0.8, label="share of the true class", format=PercentFormatter(1.0, decimals=0))
    plt.close(fig)
    return fig


def visualize_attention_scores(
    image: Tensor,
    attentions: Sequence[Tensor],
    grid_size: tuple[int, int],
    *,
    query: int | None = None,
    layers: Sequence[int] | None = None,
    title: str = "",
) -> Figure:
    """Attention over an image, one heatmap a layer, averaged over the heads.

    Args:
        image: (C, H, W).
        attentions: for each layer (heads, N, N) of this one image, rows being the queries.
        grid_size: patches down and across.
        query: the patch whose attention is shown and marked; None for the mean over all patches: how much each one is looked at.
        layers: which layers, all by default.
        title: above the figure.
    """
    layers = range(len(attentions)) if layers is None else layers
    fig, axes = plt.subplots(1, 1 + len(layers), figsize=(2.3 * (1 + len(layers)) + 0.6, 2.7), squeeze=False, layout="constrained")
    axes, picture = axes[0], to_picture(image)
    high, wide = image.shape[-2] / grid_size[0], image.shape[-1] / grid_size[1]
    maps = torch.stack([attentions[k].float().mean(0).cpu() for k in layers])  # (L, N, N)
    maps = (maps.mean(1) if query is None else maps[:, query]).view(-1, *grid_size) * maps.shape[-1]  # 1 is an even share
    axes[0].imshow(picture)
    axes[0].set_title("image")
    for ax, layer, heat in zip(axes[1:], layers, maps, strict=True):
        drawn = ax.imshow(
            heat, cmap="cividis", vmin=0, vmax=float(maps.max()), extent=(-0.5, image.shape[-1] - 0.5, image.shape[-2] - 0.5, -0.5)
        )
        ax.set_title(f"layer {layer % len(attentions) + 1}")
    fig.colorbar(drawn, ax=list(axes), shrink=0.8, label="attention\n(1 = even share)")
    for ax in axes:
        ax.set_xticks([])
        ax.set_yticks([])
        if query is not None:
            row, col = divmod(query, grid_size[1])
            ax.add_patch(Rectangle((col * wide - 0.5, row * high - 0.5), wide, high, fill=False, edgecolor=TARGET, linewidth=2))
    fig.suptitle(title)
    plt.close(fig)
    return fig


def plot_tsne_embeddings(points: Tensor, labels: Tensor, classes: Sequence[str], *, title: str = "t-SNE of the features") -> Figure:
    """A scatter of points (N, 2): each class (N,) has a colour, a marker, and its name at the median of its points."""
    points, labels = points.cpu(), labels.cpu()
    fig, ax = plt.subplots(figsize=(7.2, 5.4), layout="constrained")
    for i, name in enumerate(classes):
        own = points[labels == i]
        if len(own):
            colour, marker = PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)]
            ax.scatter(own[:, 0], own[:, 1], color=colour, marker=marker, s=14, linewidths=0, label=name)
            outline = [withStroke(linewidth=2.5, foreground="white")]  # readable on any point
            ax.text(*own.median(0).values.tolist(), name, fontsize=8, ha="center", va="center", path_effects=outline, zorder=3)
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    ax.set(xlabel="t-SNE 1", ylabel="t-SNE 2", title=title)
    plt.close(fig)
    return fig


def plot_token_colours(
    images: Tensor, colours: dict[str, Tensor], *, title: str = "Tokens as colours: like colours, like tokens"
) -> Figure:
    """Images (B, C, H, W) above rows of their tokens' colours, each (B, rows, columns, 3) from 0 to 1, by name."""
    columns, rows = len(images), 1 + len(colours)
    fig, axes = plt.subplots(rows, columns, figsize=(1.15 * columns + 0.8, 1.2 * rows + 0.4), squeeze=False, layout="constrained")
    for column in range(columns):
        axes[0, column].imshow(to_picture(images[column]))
        for ax, shown in zip(axes[1:, column], colours.values(), strict=True):
            ax.imshow(shown[column].cpu())
    for ax, name in zip(axes[:, 0], ("image", *colours), strict=True):
        ax.set_ylabel(name)
    for ax in axes.flat:
        ax.set_xticks([])
        ax.set_yticks([])
    fig.suptitle(title)
    plt.close(fig)
    return fig


def plot_error_maps(images: Tensor, errors: Tensor, *, title: str = "Which patches are hard to predict") -> Figure:
    """Images (B, C, H, W) above the prediction error of each of their patches (B, rows, columns); not-a-number is left white."""
    columns, errors = len(images), errors.cpu()
    fig, axes = plt.subplots(2, columns, figsize=(1.15 * columns + 1.4, 2.9), squeeze=False, layout="constrained")
    largest = float(errors[errors.isfinite()].quantile(0.99))  # a single hard patch would darken the rest
    for column in range(columns):
        axes[0, column].imshow(to_picture(images[column]))
        drawn = axes[1, column].imshow(errors[column], cmap="cividis", vmin=0, vmax=largest)
    axes[0, 0].set_ylabel("image")
    axes[1, 0].set_ylabel("error")
    fig.colorbar(drawn, ax=list(axes.flat), shrink=0.9, extend="max", label="smooth-L1")
    for ax in axes.flat:
        ax.set_xticks([])
        ax.set_yticks([])
    fig.suptitle(title)
    plt.close(fig)
    return fig


def plot_coverage(maps: dict[str, Tensor], *, title: str = "How often each patch is drawn") -> Figure:
    """Heatmaps of shares (H, W) by name, on one scale that begins at 0, each patch's share written in it."""
    maps = {name: heat.cpu() for name, heat in maps.items()}
    fig, axes = plt.subplots(1, len(maps), figsize=(3.5 * len(maps) + 0.9, 3.7), squeeze=False, layout="constrained")
    highest = max(float(heat.max()) for heat in maps.values())
    for ax, (name, heat) in zip(axes[0], maps.items(), strict=True):
        drawn = ax.imshow(heat, cmap="cividis", vmin=0, vmax=highest)
        ax.set(title=name, xlabel="column of patches", ylabel="row of patches")
        if heat.numel() <= 100:
            for (row, col), share in zip(np.ndindex(*heat.shape), heat.flatten().tolist(), strict=True):
                colour = "white" if share < 0.6 * highest else "black"
                ax.text(col, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=colour)
    fig.colorbar(drawn, ax=list(axes[0]), shrink=0.85, label="share of images", format=PercentFormatter(1.0, decimals=0))
    fig.suptitle(title)
    plt.close(fig)
    return fig


def plot_curves(
    x_values: Sequence[float], curves: dict[str, Sequence[float]], *, x: str, y: str, title: str = "", log_x: bool = True
) -> Figure:
    """Lines by name over common x values."""
    styles = line_styles(curves)
    fig, ax = plt.subplots(figsize=(6.2, 3.5), layout="constrained")
    for (name, values), style in zip(curves.items(), styles, strict=True):
        ax.plot(x_values, values, label=name, **style)
    if log_x:
        ax.set_xscale("log", base=2)
        ax.set_xticks(x_values, [f"{v:g}" for v in x_values])
    ax.set(xlabel=x, ylabel=y, title=title, ylim=(0, None))
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    plt.close(fig)
    return fig


def plot_maps(
    maps: dict[str, Tensor],
    *,
    label: str = "",
    shared: bool = True,
    numbers: str = "",
    limits: tuple[float, float] | None = None,
    title: str = "",
) -> Figure:
    """Maps (H, W) over a token grid side by side, with colour bars.

    Args:
        maps: by the name that stands above each.
        label: what the colours mean.
        shared: one scale for all, with one bar; otherwise each has its own.
        numbers: a format such as ".0f" to write every value into its cell.
        limits: the scale's ends, by default the smallest and the largest value.
        title: above the figure.
    """
    maps = {name: values.detach().float().cpu() for name, values in maps.items()}
    fig, axes = plt.subplots(1, len(maps), figsize=(3.5 * len(maps) + 0.7, 3.9), squeeze=False, layout="constrained")
    everything = torch.cat([values.flatten() for values in maps.values()])
    for ax, (name, values) in zip(axes[0], maps.items(), strict=True):
        scale = everything if shared else values
        low, high = limits or (float(scale.min()), float(scale.max()))
        drawn = ax.imshow(values, cmap="cividis", vmin=low, vmax=high)
        for (row, col), value in (
            (((r, c), float(values[r, c])) for r in range(values.shape[0]) for c in range(values.shape[1])) if numbers else ()
        ):
            ink = "white" if value < (low + high) / 2 else "black"
            ax.text(col, row, format(value, numbers), ha="center", va="center", color=ink, fontsize=8)
        ax.set(title=name, xlabel="column")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        if not shared:
            fig.colorbar(drawn, ax=ax, shrink=0.8, label=label)
    axes[0, 0].set_ylabel("row")
    if shared:
        fig.colorbar(drawn, ax=list(axes[0]), shrink=0.8, label=label)
    fig.suptitle(title)
    plt.close(fig)
    return fig


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
    fig, axes = plt.subplots(1, 2, figsize=(7.6, 4.6), dpi=75, layout="constrained")  # photographs make large files
    axes[0].imshow(picture)
    axes[0].set(title=f"{picture.shape[0]} x {picture.shape[1]} pixels", xlabel="column", ylabel="row")
    axes[1].imshow(sheet)
    axes[1].set(title=f"{rows} x {cols} = {rows * cols} patches of {patch_size} x {patch_size}", xlabel="column of patches")
    places = [k * step + patch_size / 2 - 0.5 for k in range(max(rows, cols))]
    every = max(1, max(rows, cols) // 8)
    axes[1].set_xticks(places[:cols:every], range(0, cols, every))
    axes[1].set_yticks(places[:rows:every], range(0, rows, every))
    fig.suptitle(title)
    plt.close(fig)
    return fig


def plot_similarity_maps(similarities: dict[str, Tensor], grid_size: tuple[int, int], *, title: str = "") -> Figure:
    """For each (N, N) of cosine similarities a grid of maps: the map at row r and column c compares that position with all others.

    All are on one scale, from the smallest value to 1.
    """
    rows, cols = grid_size
    least = min(float(similarity.min()) for similarity in similarities.values())
    fig, axes = plt.subplots(1, len(similarities), figsize=(5.2 * len(similarities), 5.0), squeeze=False, layout="constrained")
    for ax, (name, similarity) in zip(axes[0], similarities.items(), strict=True):
        sheet = torch.full((rows * (rows + 1) - 1, cols * (cols + 1) - 1), float("nan"))
        for k, values in enumerate(similarity.detach().float().cpu().view(-1, rows, cols)):
            r, c = k // cols * (rows + 1), k % cols * (cols + 1)
            sheet[r : r + rows, c : c + cols] = values
        drawn = ax.imshow(sheet, cmap="cividis", vmin=least, vmax=1)
        ax.set_xticks([k * (cols + 1) + (cols - 1) / 2 for k in range(cols)], range(cols))
        ax.set_yticks([k * (rows + 1) + (rows - 1) / 2 for k in range(rows)], range(rows))
        ax.set(title=name, xlabel="column of the position")
    axes[0, 0].set_ylabel("row of the position")
    fig.colorbar(drawn, ax=list(axes[0]), shrink=0.75, label="cosine similarity")
    fig.suptitle(title)
    plt.close(fig)
    return fig
