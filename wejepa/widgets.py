"""Explorers for a notebook: point at a patch, and see what the model makes of it.

    display(TokenExplorer({"trained": trained, "untrained": untrained}, images))
    display(MaskExplorer(cfg, images[0]))
    display(MaskPainter(model, images, train_images))

Every choice is a trait, so that a program can choose as a hand does: `explorer.patch = (3, 5)`. `render()` gives the picture of the moment
for those who read without a kernel. What is shown is computed in `wejepa.analysis`, `wejepa.masking` and `wejepa.patches`; the browser's
side, `widgets.js`, draws it and loads nothing from elsewhere.
"""

from __future__ import annotations

import inspect
import io
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import anywidget
import numpy as np
import torch
import traitlets
from matplotlib import colormaps
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from wejepa.analysis.attention import (
    attention_rollout,
    mutual_matches,
    nearest_tokens,
    predict_hidden,
    prediction_errors,
    record_attention,
    token_colours,
    token_errors,
    token_similarity,
)
from wejepa.analysis.features import extract_tokens
from wejepa.analysis.visualization import HIDDEN, PALETTE, TARGET, to_picture
from wejepa.config import IJepaConfig, MaskConfig
from wejepa.errors import ConfigError
from wejepa.masking import sample_block_masks
from wejepa.model import IJEPA_base

__all__ = ["MaskExplorer", "MaskPainter", "PatchExplorer", "TokenExplorer"]

SIDE = 288  # pixels of a panel's width
TINT = [round(255 * part) for part in HIDDEN]
HEAT = (np.array(colormaps["cividis"].colors) * 255).astype(np.uint8)  # (256, 3)
RAMP = np.concatenate([HEAT, np.full((256, 1), 255, np.uint8)], axis=1).tobytes()
MEMORY = 64 * 2**20  # bytes of tokens that are kept, and of attention maps as many
ERRORS = 2048  # an error map of N patches is averaged over this many over N masks, so that large encoders do not take minutes
MATCHES = 8  # patches that are shown as nearest, or as pairs

Encoder = IJEPA_base | Callable[[Tensor], Tensor]


@dataclass
class Crop:
    """A patch and what is around it, shown below a panel."""

    picture: int  # which of the explorer's
    grid_size: tuple[int, int]
    row: int
    col: int
    text: str
    margin: int = 1  # patches on each side
    side: int = 60  # pixels


@dataclass
class Panel:
    """A picture, and what is laid over its patches."""

    title: str
    picture: int  # which of the explorer's
    grid_size: tuple[int, int]
    overlay: np.ndarray | None = None  # (H, W, 4) bytes
    whole: bool = False  # the overlay has its own opacity
    values: Tensor | None = None  # (H, W), what the overlay shows
    scale: tuple[str, str] | None = None  # what the two ends of the colours mean
    frames: list[tuple[int, int, int, int, str, int]] = field(default_factory=list)  # row, column, rows, columns, colour, inset
    marks: list[tuple[int, int, str, str]] = field(default_factory=list)  # row, column, text, colour
    crops: list[Crop] = field(default_factory=list)
    lines: bool = False  # between the patches
    note: str = ""
    label: str = ""  # for those who listen
    acts: str = ""  # "look": a patch may be chosen
    which: int = 0  # the picture that a patch is chosen in: the first, or the second

    def message(self) -> dict[str, Any]:
        """What the browser gets."""
        return {
            "title": self.title, "picture": self.picture, "grid": list(self.grid_size), "whole": self.whole,
            "overlay": None if self.overlay is None else np.ascontiguousarray(self.overlay).tobytes(),
            "size": None if self.overlay is None else list(self.overlay.shape[:2]),
            "scale": self.scale, "frames": self.frames, "marks": self.marks, "lines": self.lines, "note": self.note, "label": self.label,
            "acts": self.acts, "which": self.which, "colour": TARGET, "tint": f"rgba({TINT[0]}, {TINT[1]}, {TINT[2]}, 0.85)",
            "crops": [(c.picture, list(c.grid_size), c.row, c.col, c.margin, c.text, c.side) for c in self.crops],
        }  # fmt: skip


class Explorer(anywidget.AnyWidget):
    """Choices, the panels they redraw, and a line that says what is shown.

    Attributes:
        view: what the browser draws, with `caption` and `problem`, which says why a choice cannot be drawn.
        panels: the same as objects.
    """

    _esm = Path(__file__).parent / "widgets.js"
    _css = Path(__file__).parent / "widgets.css"

    controls = traitlets.List().tag(sync=True)
    pictures = traitlets.List().tag(sync=True)
    view = traitlets.Dict().tag(sync=True)
    named = traitlets.Unicode().tag(sync=True)
    busy = traitlets.Bool(False).tag(sync=True)  # something is computed for the first time, which may take seconds
    choices: tuple[str, ...] = ()  # the traits that a picture depends on

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        taken = inspect.signature(cls.__init__)  # traitlets would have help and documentation show (*args, **kwargs)
        cls.__signature__ = taken.replace(parameters=list(taken.parameters.values())[1:])

    def __init__(self, pictures: list[Image.Image], controls: list[dict[str, Any]], **values):
        self._shown, self._drawn, self.panels = pictures, None, []
        super().__init__(pictures=[encoded(picture) for picture in pictures], controls=controls, **values)
        self.observe(self._redraw, names=list(self.choices))
        self._redraw()

    def _draw(self) -> tuple[list[Panel], str]:
        raise NotImplementedError

    def _redraw(self, change=None) -> None:
        chosen = {name: getattr(self, name) for name in self.choices}
        if chosen == self._drawn:  # choices that arrive together are told of one by one
            return
        self._drawn = chosen
        try:
            self.panels, caption = self._draw()
        except ConfigError as error:
            if not self.panels:  # it could not even begin
                raise
            # A choice that cannot be: the last good picture stays.
            self.view = self.view | {"problem": f"Not possible: {error}"}
        except Exception as error:  # a front end keeps exceptions in its log, so the reader is told here as well
            self.view = self.view | {"problem": f"{type(error).__name__}: {error}"}
            raise
        else:
            messages = [panel.message() for panel in self.panels]
            self.view = {"panels": messages, "caption": caption, "problem": "", "ramp": RAMP} | self._beside()
        finally:
            self.busy = False

    def _beside(self) -> dict[str, Any]:
        """What the browser needs beside the panels."""
        return {}

    def render(self) -> Image.Image:
        """The picture of the moment.

        Raises:
            ConfigError: what is chosen cannot be drawn.
        """
        panels, _ = self._draw()
        return sheet([self._picture(panel) for panel in panels])

    def _picture(self, panel: Panel) -> Image.Image:
        return drawn(panel, self._shown, getattr(self, "opacity", 1.0))


class PatchExplorer(Explorer):
    """An image cut into patches of a size that is chosen, and one of its patches.

    Args:
        image: (C, H, W).
        patch_sizes: the sizes offered, in pixels; by default those that divide both sides and leave a grid of 2 x 2 to 64 x 64.

    Attributes:
        size: which of `patch_sizes`, from 0.
        patch: row and column of the patch shown.

    Raises:
        ConfigError: a size does not divide the image, or there is none.
    """

    size = traitlets.Int().tag(sync=True)
    patch = traitlets.Tuple(traitlets.Int(), traitlets.Int()).tag(sync=True)
    asked = traitlets.Int(0).tag(sync=True)
    pinned = traitlets.Bool(False).tag(sync=True)
    choices = ("size", "patch")

    def __init__(self, image: Tensor, patch_sizes: tuple[int, ...] | None = None):
        self.image = image.cpu()
        high, wide = image.shape[-2:]
        divides = (p for p in range(1, min(high, wide) // 2 + 1) if high % p == 0 and wide % p == 0 and max(high, wide) // p <= 64)
        self.patch_sizes = tuple(patch_sizes or divides)
        if not self.patch_sizes:
            raise ConfigError(f"image: no patch size leaves {high} x {wide} a grid of at most 64 x 64: crop it, or give patch_sizes")
        for size in self.patch_sizes:
            if high % size or wide % size:
                raise ConfigError(f"patch_sizes: {size} does not divide an image of {high} x {wide}: leave it out")
        names = [f"{p} x {p} pixels" for p in self.patch_sizes]
        help = "Half the side makes four times the tokens, and sixteen times the pairs that attention compares."
        controls = [slider("size", "patch size", low=0, high=len(names) - 1, names=names, help=help)]
        size = len(self.patch_sizes) // 2
        patch = (high // self.patch_sizes[size] // 2, wide // self.patch_sizes[size] // 2)
        super().__init__(as_pictures(image[None]), controls, size=size, patch=patch, named="Patch explorer")

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches of the size chosen."""
        size = self.patch_sizes[self.size]
        return self.image.shape[-2] // size, self.image.shape[-1] // size

    def _draw(self) -> tuple[list[Panel], str]:
        size, (rows, cols) = self.patch_sizes[self.size], self.grid_size
        row, col = (min(max(0, at), end - 1) for at, end in zip(self.patch, (rows, cols), strict=True))  # the last grid may have been finer
        low, high = self.image.min(), self.image.max()
        means = torch.nn.functional.avg_pool2d((self.image[None] - low) / (high - low).clamp(min=1e-6), size)[0]
        tokens, numbers = rows * cols, self.image.shape[0] * size * size
        number, frame = row * cols + col, [(row, col, 1, 1, TARGET, 0)]
        shared = {"picture": 0, "grid_size": (rows, cols), "frames": frame, "acts": "look"}
        label = f"{rows} rows and {cols} columns of patches; row {row}, column {col} is chosen, counted from 0"
        large = Crop(0, (rows, cols), row, col, f"patch {number}: {numbers} numbers", margin=0, side=120)
        panels = [
            Panel("the image in patches", lines=True, label=label, crops=[large], **shared),
            Panel("each patch's mean", overlay=coloured(means.expand(3, -1, -1).permute(1, 2, 0)), whole=True, label=label, **shared),
        ]
        return panels, (
            f"{rows} x {cols} = {tokens:,} tokens of {numbers:,} numbers each; attention compares {tokens**2:,} pairs. "
            f"Row {row}, column {col} is number {number} in raster order, counted from 0."
        )

    def _beside(self) -> dict[str, Any]:
        return {"grid": list(self.grid_size)}


class MaskExplorer(Explorer):
    """Masks under settings that are chosen: every field of `MaskConfig` that one draw depends on, and the draw.

    Args:
        cfg: where the settings begin; its grid is the masks'.
        image: (C, H, W), what the masks are laid over.
        draws: masks shown side by side.

    Attributes:
        seed: which draw. The settings are traits by their own names, as in `MaskConfig`.
    """

    # Contexts beside one another are draws.
    settings = tuple(field for field in fields(MaskConfig) if field.name != "num_contexts")
    choices = (*(field.name for field in settings), "seed")

    target_scale, target_aspect_ratio, context_scale, context_aspect_ratio = (
        traitlets.Tuple(traitlets.Float(), traitlets.Float()).tag(sync=True) for _ in range(4)
    )
    num_target_blocks = traitlets.Int().tag(sync=True)
    context_share = traitlets.Float().tag(sync=True)
    seed = traitlets.Int(0).tag(sync=True)

    def __init__(self, cfg: IJepaConfig, image: Tensor, draws: int = 3):
        self.grid_size, self.draws = cfg.grid_size, draws
        controls = [mask_slider(field, getattr(cfg.mask, field.name)) for field in self.settings]
        controls.append(slider("seed", "draw", low=0, high=99, help="Other blocks under the same settings."))
        values = {field.name: getattr(cfg.mask, field.name) for field in self.settings}
        super().__init__(as_pictures(image[None]), controls, named="Mask explorer", **values)

    @property
    def mask_config(self) -> MaskConfig:
        """The settings of the moment."""
        return MaskConfig(**{field.name: getattr(self, field.name) for field in self.settings})

    def _draw(self) -> tuple[list[Panel], str]:
        rows, cols = self.grid_size
        masks = sample_block_masks(self.draws, self.grid_size, self.mask_config, torch.Generator().manual_seed(self.seed))
        panels = []
        for k in range(self.draws):
            frames = []
            for block, target in enumerate(masks.targets[k]):  # blocks may overlap, and repeat: each frame lies further in
                row, col = target // cols, target % cols
                corner, size = (int(row.min()), int(col.min())), (int(row.max() - row.min()) + 1, int(col.max() - col.min()) + 1)
                frames.append((*corner, *size, PALETTE[(block + 1) % len(PALETTE)], 2 * block))
            overlay = tinted(masks.context[k], self.grid_size)
            places = "; ".join(f"{down} x {across} at row {row}, column {col}" for row, col, down, across, *_ in frames)
            label = f"draw {k + 1}: {masks.context.shape[1]} of {rows * cols} patches are seen, target blocks are {places}"
            panels.append(Panel(f"draw {k + 1}", 0, self.grid_size, overlay=overlay, whole=True, frames=frames, label=label))
        (blocks, patches), n = masks.targets.shape[1:], rows * cols
        covered = sum(len(t.unique()) for t in masks.targets) / self.draws
        return panels, (
            f"The student sees {masks.context.shape[1]} of {n} patches and predicts {blocks} blocks of {patches}. "
            f"Together they cover {covered:.1f} patches on average over these {self.draws} draws. The tint hides patches from the student."
        )


class MaskPainter(Explorer):
    """A context that is painted by hand, and the real patches nearest to what the predictor answers.

    Args:
        model: student, predictor and teacher.
        images: (B, C, H, W), to choose from.
        stock: (M, C, H, W), of the same size: images whose patches stand for predicted tokens, some hundred of the training images.

    Attributes:
        context: the patches that the student sees, in raster order.
        image: number of the image.
        sampled: set it to another number, and the context is drawn as in training, with that number as the seed.
        hidden: what the predictor made of the rest, a `wejepa.analysis.attention.Hidden`; None if nothing is hidden.

    Raises:
        ConfigError: the images and the stock are not of one size.
    """

    image = traitlets.Int(0).tag(sync=True)
    context = traitlets.List(traitlets.Int()).tag(sync=True)
    sampled = traitlets.Int(0).tag(sync=True)
    choices = ("image", "context")

    def __init__(self, model: IJEPA_base, images: Tensor, stock: Tensor):
        if images.shape[1:] != stock.shape[1:]:
            raise ConfigError(
                f"stock: give images of {tuple(images.shape[1:])} like those that are painted on, not {tuple(stock.shape[1:])}"
            )
        self.model, self.images, self.hidden = model, images, None
        self.grid_size = rows, cols = model.teacher_encoder.token_grid(images)
        with torch.no_grad():
            tokens = extract_tokens(model.encode, stock.split(64))
        self.targets = torch.nn.functional.layer_norm(tokens, tokens.shape[-1:])  # (M, N, D), as in the loss
        self.usual = self.targets.mean(0)  # (N, D), the guess of one who knows the place alone
        self.largest = float(token_errors(self.targets, self.usual.expand_as(self.targets)).flatten()[:1_000_000].quantile(0.9))
        both = torch.cat([images, stock])
        self._stock = np.stack([np.asarray(picture) for picture in as_pictures(stock, both)])  # (M, H, W, 3)
        places = np.arange(rows * cols).reshape(rows, cols)
        ready = [(places[:, : cols // 2], "left half"), (places[: rows // 2], "upper half"), (places, "show all"), (places[:0], "hide all")]
        options = [("sampled", None, "a mask as in training")]
        options += [("context", part.flatten().tolist(), label) for part, label in ready]
        controls = [{"name": "context", "kind": "buttons", "label": "contexts", "options": options, "place": "above"}]
        if len(images) > 1:
            every = [(k, f"image {k}", k) for k in range(len(images))]
            controls.append({"name": "image", "kind": "thumbnails", "label": "image", "options": every})
        self.observe(self._sample, names="sampled")
        start = places[:, : cols // 2].flatten().tolist()
        super().__init__(as_pictures(images, both), controls, context=start, named="Mask painter")

    def _sample(self, change) -> None:
        masks = sample_block_masks(1, self.grid_size, self.model.cfg.mask, torch.Generator().manual_seed(self.sampled))
        self.context = masks.context[0].tolist()

    def _draw(self) -> tuple[list[Panel], str]:
        (rows, cols), n = self.grid_size, self.grid_size[0] * self.grid_size[1]
        if not 0 <= self.image < len(self.images):
            raise ConfigError(f"image = {self.image}: there are images 0 to {len(self.images) - 1}")
        shared = {"picture": self.image, "grid_size": self.grid_size, "whole": True}
        seen = torch.tensor(self.context, dtype=torch.long)
        label = f"{rows} rows and {cols} columns of patches. Arrow keys move, Space shows or hides the patch, Shift and arrow keys paint."
        student = Panel("what the student sees", acts="paint", label=label, **shared)
        if len(set(self.context)) == n:
            self.hidden = None
            return [student], "The student sees everything, so nothing is left to predict: hide some patches."
        self.hidden = places, predictions, targets, errors = predict_hidden(self.model, self.images[self.image : self.image + 1], seen)
        student.overlay = tinted(seen, self.grid_size)
        wrong = torch.full((n,), torch.nan)
        wrong[places] = errors
        wrong = wrong.view(rows, cols)
        scale = ("0", f"{self.largest:.2f} or more")
        panels = [
            student,
            Panel("the nearest real patches", overlay=self._imagined(places, predictions), **shared),
            Panel("error (smooth-L1)", overlay=heat(wrong / self.largest), values=wrong, scale=scale, **shared),
        ]
        usual = token_errors(self.usual[places], targets).mean()
        return panels, (
            f"The student sees {len(seen)} of {n} patches. At each hidden place stands a real patch: of all patches of {len(self._stock)} "
            f"images, the one whose token is nearest to the prediction. The predictions' mean error (smooth-L1) is "
            f"{float(errors.mean()):.2f}; always guessing the mean token of the place would give {float(usual):.2f}."
        )

    def _imagined(self, places: Tensor, predictions: Tensor) -> np.ndarray:
        """Real patches at the hidden places, as bytes (height, width, 4)."""
        (rows, cols), (high, wide) = self.grid_size, self._stock.shape[1:3]
        down, across = high // rows, wide // cols
        picture = np.zeros((high, wide, 4), np.uint8)
        nearest = nearest_tokens(predictions, self.targets.flatten(0, 1)).tolist()
        for place, token in zip(places.tolist(), nearest, strict=True):
            number, other = divmod(token, rows * cols)
            here, there = (
                (slice(p // cols * down, (p // cols + 1) * down), slice(p % cols * across, (p % cols + 1) * across)) for p in (place, other)
            )
            picture[here][..., :3], picture[here][..., 3] = self._stock[number][there], 255
        return picture


class TokenExplorer(Explorer):
    """What encoders make of images, patch by patch, each encoder beside the others.

    Args:
        encoders: by name, one or more: a model, of which the teacher is shown; or any function from images (B, C, H, W) to tokens
            (B, N, D) in raster order, of which everything is shown but attention and prediction error.
        images: (B, C, H, W), square or not; or such images for each encoder's name, of its own size and normalisation.
        pictures: (B, C, H, W), bytes or floats from 0 to 1, of any size: the same images as they are to be shown. By default those that the
            encoders get, stretched to their range, so that normalised colours come out a little wrong.

    Attributes:
        mode: "attention" of the patch, "similarity" of all tokens to the patch's, "components", "error", "nearest" patches to the patch, or
            "pairs", patches of two images that are each other's nearest.
        image, second: numbers of the images shown; -1 is no second one.
        patch: row and column on the first encoder's grid. Other grids show the patch at the same place.
        asked: 0 if the patch is one of the first image, 1 of the second.
        layer, head: of "attention"; layer 0 is the rollout over all layers, head 0 the mean over the heads. An encoder with fewer shows its
            last.
        locked: one colour scale for all panels and all patches. Otherwise each panel has its own, from its smallest value to its largest.
        opacity: of the colours over the image, from 0 to 1.

    At most 64 MiB of tokens and 64 MiB of attention weights are kept; other images are computed again when they are chosen.

    Raises:
        ConfigError: there are no encoders or no images, or tokens do not form a grid of the image's shape.
    """

    mode = traitlets.Unicode().tag(sync=True)
    image = traitlets.Int(0).tag(sync=True)
    second = traitlets.Int(-1).tag(sync=True)
    patch = traitlets.Tuple(traitlets.Int(), traitlets.Int()).tag(sync=True)
    asked = traitlets.Int(0).tag(sync=True)
    pinned = traitlets.Bool(False).tag(sync=True)
    layer = traitlets.Int().tag(sync=True)
    head = traitlets.Int(0).tag(sync=True)
    locked = traitlets.Bool(True).tag(sync=True)
    opacity = traitlets.Float(0.75).tag(sync=True)
    choices = ("mode", "image", "second", "patch", "asked", "layer", "head", "locked")
    two_images = ("similarity", "components", "error", "nearest", "pairs")

    def __init__(self, encoders: Mapping[str, Encoder], images: Tensor | Mapping[str, Tensor], pictures: Tensor | None = None):
        if not encoders:
            raise ConfigError("encoders: give one or more by name")
        self.encoders = dict(encoders)
        self.images = dict(images) if isinstance(images, Mapping) else dict.fromkeys(encoders, images)
        counts = {len(self.images[name]) if name in self.images else 0 for name in encoders}
        if len(counts) > 1 or counts == {0} or (pictures is not None and len(pictures) not in counts):
            raise ConfigError(f"images: give each of {', '.join(encoders)} the same images, one or more, and as many pictures if any")
        self.count = counts.pop()
        self.grids = {name: self._grid(name) for name in encoders}
        self._kept = Kept(MEMORY)
        self._banks: dict[str, Tensor] = {}
        recorded = {name: self._attention(name, 0) for name, encoder in encoders.items() if attends(encoder)}
        self.depths = {name: (len(layers), layers[0].shape[1]) for name, layers in recorded.items()}
        super().__init__(self._pictures(pictures), self._controls(), **self._start(), named="Token explorer")

    # ------------------------------------------------------------ what is offered

    def _start(self) -> dict[str, Any]:
        rows, cols = next(iter(self.grids.values()))
        depth = max((depth for depth, _ in self.depths.values()), default=0)
        return {"mode": "attention" if self.depths else "similarity", "patch": (rows // 2, cols // 2), "layer": depth}

    def _controls(self) -> list[dict[str, Any]]:
        modes = [("similarity", "token similarity"), ("components", "principal components"), ("nearest", "nearest patches")]
        if self.depths:
            modes.insert(0, ("attention", "attention"))
        if any(isinstance(encoder, IJEPA_base) for encoder in self.encoders.values()):
            modes.append(("error", "prediction error"))
        if self.count > 1:
            modes.append(("pairs", "pairs in two images"))
        depth = max((depth for depth, _ in self.depths.values()), default=0)
        heads = max((heads for _, heads in self.depths.values()), default=0)
        layers = [(k, f"{k} of {depth}") for k in range(1, depth + 1)] + [(0, "rollout over all")]
        every = [(k, f"image {k}", k) for k in range(self.count)]
        controls = [{"name": "mode", "kind": "tabs", "label": "show", "options": modes, "place": "above"}]
        if self.count > 1:
            controls.append({"name": "image", "kind": "thumbnails", "label": "image", "options": every})
            other = [(-1, "none", None), *every]
            controls.append({"name": "second", "kind": "thumbnails", "label": "second image", "options": other, "when": self.two_images})
        if self.depths:
            only = {"when": ["attention"]}
            controls.append({"name": "layer", "kind": "choice", "label": "layer", "options": layers} | only)
            options = [(0, "mean over heads"), *((k, f"head {k}") for k in range(1, heads + 1))]
            controls.append({"name": "head", "kind": "choice", "label": "head", "options": options} | only)
        coloured = {"when": ["attention", "similarity", "components", "error"]}
        help = "One scale for all pictures and patches, so that colours can be compared. Without it each picture uses all colours."
        controls.append({"name": "locked", "kind": "toggle", "label": "locked scale", "help": help} | coloured)
        controls.append(slider("opacity", "opacity of the colours", low=0, high=1, step=0.05, percent=True) | coloured)
        return controls

    def _pictures(self, given: Tensor | None) -> list[Image.Image]:
        """All that can be shown; `_first_picture` has where an encoder's begin."""
        if given is not None:
            self._first_picture = dict.fromkeys(self.encoders, 0)
            return [smaller(picture) for picture in as_pictures(given)]
        self._first_picture, pictures, known = {}, [], {}
        for name in self.encoders:
            images = self.images[name]
            if id(images) not in known:
                known[id(images)] = len(pictures)
                pictures += [smaller(picture) for picture in as_pictures(images)]
            self._first_picture[name] = known[id(images)]
        return pictures

    # ------------------------------------------------------------ what is known of an image

    def _grid(self, name: str) -> tuple[int, int]:
        """Rows and columns of an encoder's tokens: a model says so; of a function's they have the image's shape."""
        encoder, first = self.encoders[name], self.images[name][:1]
        if isinstance(encoder, IJEPA_base):
            return encoder.teacher_encoder.token_grid(first)
        tokens = self._encode(name, first)
        count, (high, wide) = tokens.shape[1], first.shape[-2:]
        rows = round(math.sqrt(count * high / wide))
        if tokens.dim() != 3 or rows == 0 or count % rows or abs(count // rows - rows * wide / high) >= 1:
            raise ConfigError(
                f"encoders: {name!r} gives {count} tokens for an image of {high} x {wide}, which is no grid of that shape: "
                f"give a function whose tokens (B, N, D) are those of the patches alone, without a class token"
            )
        return rows, count // rows

    def _encode(self, name: str, images: Tensor) -> Tensor:
        encoder = self.encoders[name]
        with torch.no_grad():
            return extract_tokens(encoder.encode if isinstance(encoder, IJEPA_base) else encoder, images.split(16))

    def _bank(self, name: str) -> Tensor:
        """Tokens (B, N, D) of the first images: all, or as many as there is memory for."""
        if name not in self._banks:
            self.busy = True
            first = self._encode(name, self.images[name][:1])
            room = max(1, MEMORY // len(self.encoders) // first.nbytes)
            self._banks[name] = self._encode(name, self.images[name][:room])
        return self._banks[name]

    def _tokens(self, name: str, number: int) -> Tensor:
        """Tokens (N, D) of an image."""
        bank = self._banks.get(name, ())
        if number < len(bank):
            return bank[number]
        return self._known(("tokens", name, number), lambda: [self._encode(name, self.images[name][number : number + 1])[0]])[0]

    def _attention(self, name: str, number: int) -> list[Tensor]:
        """The weights (1, heads, N, N) of each layer."""
        image = self.images[name][number : number + 1]
        return self._known(("attention", name, number), lambda: record_attention(self.encoders[name], image))

    def _rollout(self, name: str, number: int) -> Tensor:
        recorded = self._attention(name, number)
        return self._known(("rollout", name, number), lambda: [attention_rollout(recorded)[0]])[0]

    def _known(self, key: tuple, compute: Callable[[], list[Tensor]]) -> list[Tensor]:
        """What is kept, or is computed now while the browser says so."""
        if key not in self._kept:
            self.busy = True
        return self._kept.get(key, compute)

    def _most(self, name: str, weights: Tensor) -> float:
        """What all but one in a hundred of an image's weights (N, N) stay below: the few would outshine all others."""
        some = weights.flatten()[:: max(1, weights.numel() // 1_000_000)]
        return float(self._known(("most", name, self.image, self.layer, self.head), lambda: [some.quantile(0.99)])[0])

    def _masks(self, name: str) -> int:
        """How many masks an error map is averaged over."""
        return max(8, ERRORS // math.prod(self.grids[name]))

    def _errors(self, name: str, number: int) -> Tensor:
        model, image = self.encoders[name], self.images[name][number : number + 1]

        def compute() -> list[Tensor]:
            generator = torch.Generator().manual_seed(number)
            return [prediction_errors(model, image, model.cfg.mask, samples=self._masks(name), generator=generator)[0]]

        return self._known(("errors", name, number), compute)[0]

    # ------------------------------------------------------------ the panels

    @property
    def shown(self) -> list[int]:
        """Numbers of the images shown."""
        second = self.second if self.mode in self.two_images and self.second >= 0 else None
        return [self.image] if second is None else [self.image, second]

    def place(self, name: str) -> tuple[int, int]:
        """Row and column of the chosen patch on an encoder's grid."""
        (rows, cols), (own_rows, own_cols) = next(iter(self.grids.values())), self.grids[name]
        return int((self.patch[0] + 0.5) * own_rows / rows), int((self.patch[1] + 0.5) * own_cols / cols)

    @property
    def values(self) -> dict[tuple[str, int], Tensor]:
        """What the colours show, (H, W), by the encoder's name and the image's number; where they show values."""
        names = [(name, number) for name in self.encoders for number in self.shown]
        return {key: panel.values for key, panel in zip(names, self.panels, strict=True) if panel.values is not None}

    def _beside(self) -> dict[str, Any]:
        return {"grid": list(next(iter(self.grids.values())))}

    def _draw(self) -> tuple[list[Panel], str]:
        rows, cols = next(iter(self.grids.values()))
        if not (0 <= self.patch[0] < rows and 0 <= self.patch[1] < cols):
            raise ConfigError(f"patch = {self.patch}: the grid has {rows} rows and {cols} columns, counted from 0")
        if not (0 <= self.image < self.count and -1 <= self.second < self.count):
            raise ConfigError(f"image = {self.image}, second = {self.second}: there are images 0 to {self.count - 1}")
        if self.layer < 0 or self.head < 0:
            raise ConfigError(f"layer = {self.layer}, head = {self.head}: both are counted from 1, and 0 stands for all")
        if self.mode == "pairs" and self.second < 0:
            raise ConfigError("pairs need two images: choose a second one")
        draw = getattr(self, f"_{self.mode}_panels", None)
        if draw is None:
            raise ConfigError(f"mode = {self.mode!r} is not known")
        return draw()

    @property
    def _query_image(self) -> int:
        """Which of the shown images the patch is one of."""
        return self.asked if self.asked < len(self.shown) else 0

    def _panel(self, name: str, which: int, **more) -> Panel:
        number, (row, col) = self.shown[which], self.place(name)
        title = name if len(self.shown) == 1 else f"{name}, {('first', 'second')[which]} image"
        frames = [(row, col, 1, 1, TARGET, 0)] if which == self._query_image else []
        rows, cols = self.grids[name]
        label = f"{title}: {rows} rows and {cols} columns of patches; row {row}, column {col} is chosen, counted from 0"
        more.setdefault("frames", frames)
        return Panel(title, self._first_picture[name] + number, self.grids[name], label=label, acts="look", which=which, **more)

    def _heat(
        self, maps: dict[tuple[str, int], Tensor], limits: dict[tuple[str, int], tuple[float, float]], say: Callable, without: str = ""
    ) -> list[Panel]:
        """Panels of values (H, W) between limits, with a locked scale the widest of all; `without` is said where there are none."""
        if self.locked and limits:
            widest = min(low for low, _ in limits.values()), max(high for _, high in limits.values())
            limits = dict.fromkeys(limits, widest)
        panels = []
        for name in self.encoders:
            for which, number in enumerate(self.shown):
                if (name, number) not in maps:
                    panels.append(self._panel(name, which, note=without))
                    continue
                values = maps[name, number]
                low, high = limits[name, number] if self.locked else (float(values.nan_to_num(0).min()), float(values.nan_to_num(0).max()))
                overlay = heat((values - low) / max(high - low, 1e-9))
                panels.append(self._panel(name, which, values=values, overlay=overlay, scale=(say(low), say(high))))
        return panels

    def _attention_panels(self) -> tuple[list[Panel], str]:
        maps, limits, titles = {}, {}, {}
        for name, (depth, heads) in self.depths.items():
            if self.layer == 0:
                weights, titles[name] = self._rollout(name, self.image), "rollout"
            else:
                layer, head = min(self.layer, depth), min(self.head, heads)
                weights = self._attention(name, self.image)[layer - 1][0]  # (heads, N, N)
                weights = weights[head - 1] if head else weights.mean(0)
                titles[name] = f"layer {layer}, " + (f"head {head}" if head else "mean over heads")
            (rows, cols), (row, col) = self.grids[name], self.place(name)
            weights = weights * len(weights)  # 1 is an even share
            maps[name, self.image] = weights[row * cols + col].view(rows, cols)
            limits[name, self.image] = 0.0, self._most(name, weights)
        panels = self._heat(
            maps, limits, lambda value: f"{value:.1f}" if value == 0 or not self.locked else f"{value:.1f} or more", "it has no attention"
        )
        for panel, name in zip(panels, self.encoders, strict=True):
            panel.note = titles.get(name, panel.note)
        own = " Its own patch outshines the others, because half of each layer passes a token on as it is." if self.layer == 0 else ""
        return (
            panels,
            f"Where the framed patch looks. The colours are times an even share: 1 is what every patch would get from equal weights.{own}",
        )

    def _similarity_panels(self) -> tuple[list[Panel], str]:
        maps, marks = {}, {}
        for name in self.encoders:
            (rows, cols), (row, col) = self.grids[name], self.place(name)
            tokens = torch.cat([self._tokens(name, number) for number in self.shown])
            query = self._query_image * rows * cols + row * cols + col
            likeness = token_similarity(tokens, tokens)[query].view(-1, rows, cols)
            for which, number in enumerate(self.shown):
                maps[name, number] = likeness[which]
                if which != self._query_image:
                    best = int(likeness[which].argmax())
                    marks[name, which] = (best // cols, best % cols, 1, 1, PALETTE[2], 0)
        panels = self._heat(maps, dict.fromkeys(maps, (-1.0, 1.0)), lambda value: f"{value:.2f}")
        for panel, (name, which) in zip(panels, ((n, w) for n in self.encoders for w in range(len(self.shown))), strict=True):
            if (name, which) in marks:
                panel.frames = [marks[name, which]]
        match = " In the other image, the most similar token is framed in green." if marks else ""
        return panels, f"How similar each token is to the framed one: cosine, after the mean of the tokens shown is taken out.{match}"

    def _colours(self, name: str) -> Tensor:
        """Colours (B, H, W, 3) of the images shown."""

        def compute() -> list[Tensor]:
            shown = torch.stack([self._tokens(name, number) for number in self.shown])
            others = self._bank(name) if self.locked else shown[:0]
            return [token_colours(torch.cat([shown, others]), self.grids[name])[: len(shown)].clone()]

        return self._known(("colours", name, *self.shown, self.locked), compute)[0]

    def _components_panels(self) -> tuple[list[Panel], str]:
        panels = []
        for name in self.encoders:
            colours = self._colours(name)
            panels += [self._panel(name, which, overlay=coloured(colours[which])) for which in range(len(self.shown))]
        over = "all images" if self.locked else "the images shown"
        return panels, f"The tokens' first three principal components over {over}, as red, green and blue. Like colours are like tokens."

    def _error_panels(self) -> tuple[list[Panel], str]:
        models = [name for name, encoder in self.encoders.items() if isinstance(encoder, IJEPA_base)]
        maps = {(name, number): self._errors(name, number) for name in models for number in self.shown}
        limits = {key: (0.0, float(values.nan_to_num(0).max())) for key, values in maps.items()}
        panels, said = self._heat(maps, limits, lambda value: f"{value:.2f}", "it has no predictor"), []
        masks = " or ".join(map(str, sorted({self._masks(name) for name in models})))
        for name in models:
            values, (row, col) = maps[name, self.shown[self._query_image]], self.place(name)
            said.append(f"{name} {float(values[row, col]):.2f} (mean of the image {float(values.nanmean()):.2f})")
        return panels, (
            f"How far the predictor is from each patch's target: smooth-L1, averaged over {masks} masks. "
            f"The framed patch: {'; '.join(said)}."
        )

    def _nearest_panels(self) -> tuple[list[Panel], str]:
        panels, searched = [], self.count
        for name in self.encoders:
            (rows, cols), (row, col) = self.grids[name], self.place(name)
            if len(self.shown) == 2:  # then in the other image alone
                numbers = [self.shown[1 - self._query_image]]
                bank = self._tokens(name, numbers[0])[None]
            else:
                bank = self._bank(name)
                numbers = list(range(len(bank)))
                searched = min(searched, len(bank))
            asked = self.shown[self._query_image]
            likeness = token_similarity(self._tokens(name, asked)[None, row * cols + col], bank.flatten(0, 1))[0]
            if asked in numbers:
                likeness[numbers.index(asked) * rows * cols + row * cols + col] = -torch.inf  # itself
            best = likeness.topk(min(MATCHES, len(likeness)))
            crops, marks = [], {0: [], 1: []}
            for rank, (similarity, index) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True), 1):
                number, patch = numbers[index // (rows * cols)], index % (rows * cols)
                crops.append(
                    Crop(self._first_picture[name] + number, (rows, cols), patch // cols, patch % cols, f"{rank}: {similarity:.2f}")
                )
                for which, shown in enumerate(self.shown):
                    if shown == number:
                        marks[which].append((patch // cols, patch % cols, str(rank), PALETTE[2]))
            for which in range(len(self.shown)):
                last = which == len(self.shown) - 1
                panels.append(self._panel(name, which, marks=marks[which], crops=crops if last else []))
        where = "the other image" if len(self.shown) == 2 else f"{searched} image{'s' if searched > 1 else ''}"
        return panels, f"The {MATCHES} patches of {where} whose tokens are nearest to the framed one's, with their cosine similarity."

    def _pairs_panels(self) -> tuple[list[Panel], str]:
        panels = []
        for name in self.encoders:
            cols = self.grids[name][1]
            similarity = token_similarity(self._tokens(name, self.image), self._tokens(name, self.second))  # (N, N)
            pairs = mutual_matches(similarity)
            row, col = self.place(name)
            which = self._query_image
            own = (similarity if which == 0 else similarity.T)[row * cols + col]
            best = int(own.argmax())
            for side in range(2):
                marks = [(int(p) // cols, int(p) % cols, str(k), PALETTE[k % 6]) for k, p in enumerate(pairs[:MATCHES, side], 1)]
                frames = [(row, col, 1, 1, TARGET, 0)] if side == which else [(best // cols, best % cols, 1, 1, TARGET, 0)]
                note = f"{len(pairs)} patches are each other's nearest" if side == 0 else ""
                panels.append(self._panel(name, side, marks=marks, frames=frames, note=note))
        return panels, (
            f"Numbers join the {MATCHES} most similar pairs of patches that are each other's nearest in the two images. "
            f"Frames join the chosen patch to its nearest one."
        )


# ---------------------------------------------------------------- the parts


class Kept:
    """The last results, by key, as many as take less than so many bytes; the very last one is kept whatever it takes."""

    def __init__(self, most: int):
        self.most, self._kept = most, OrderedDict()

    def __contains__(self, key) -> bool:
        return key in self._kept

    def get(self, key, compute: Callable[[], list[Tensor]]) -> list[Tensor]:
        """What is kept under a key, or is now computed."""
        if key not in self._kept:
            self._kept[key] = compute()
            while len(self._kept) > 1 and self.bytes > self.most:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    @property
    def bytes(self) -> int:
        """Memory of what is kept."""
        return sum(tensor.nbytes for result in self._kept.values() for tensor in result)


def attends(encoder: Encoder) -> bool:
    """Whether there is attention to be shown."""
    if not isinstance(encoder, IJEPA_base):
        return False
    try:
        return bool(encoder.teacher_encoder.attention_layers)
    except ConfigError:  # a convolutional network
        return False


def slider(name: str, label: str, *, low: float, high: float, step: float = 1, **more) -> dict[str, Any]:
    """A slider for the browser."""
    return {"name": name, "kind": "number", "label": label, "min": low, "max": high, "step": step, "help": "", **more}


EFFECT = {
    "target_scale": "Larger blocks hide whole parts, so that guessing from the neighbours does not help.",
    "target_aspect_ratio": "Below 1 blocks are wide, above 1 they are high.",
    "context_scale": "The context is drawn from this block. A small one is compact, the whole grid scatters it.",
    "context_aspect_ratio": "Below 1 the block is wide, above 1 it is high.",
    "num_target_blocks": "More blocks cover more of the image, and leave less to choose the context from.",
    "context_share": "Less context is harder, and faster to compute.",
}


def mask_slider(field, value) -> dict[str, Any]:
    """The slider for a field of `MaskConfig`, over the part of its range that is of use."""
    low, high, label = field.metadata["low"], field.metadata["high"], field.name.replace("_", " ").removeprefix("num ")
    text = field.metadata["help"]
    help = f"{text[0].upper()}{text[1:]}. {EFFECT[field.name]}"
    if isinstance(value, tuple):
        low, high = (0.3, 3.0) if "aspect" in field.name else (max(low, 0.01), high)
        spec = slider(field.name, label, low=min(low, value[0]), high=max(high, value[1]), step=0.01, help=help)
        return spec | {"kind": "pair"}
    if isinstance(value, int):
        return slider(field.name, label, low=low, high=max(8, value), help=help)
    return slider(field.name, label, low=low, high=high, step=0.01, help=help)


def as_pictures(images: Tensor, like: Tensor | None = None) -> list[Image.Image]:
    """Images (B, C, H, W) as pictures: bytes and floats from 0 to 1 as they are, others stretched to the range of all, or of `like`."""
    low, high = (images if like is None else like).aminmax()
    if images.is_floating_point() and not 0 <= low <= high <= 1:
        images = (images - low) / (high - low).clamp(min=1e-6)
    return [Image.fromarray((to_picture(image) * 255).round().byte().numpy()) for image in images]


def smaller(picture: Image.Image) -> Image.Image:
    """A picture no larger than it can be shown on a dense screen."""
    picture.thumbnail((2 * SIDE, 2 * SIDE))
    return picture


def encoded(picture: Image.Image) -> bytes:
    """A picture as the browser takes it: small ones without loss."""
    file = io.BytesIO()
    if max(picture.size) <= 64:
        picture.save(file, "png")
    else:
        picture.save(file, "webp", quality=90)
    return file.getvalue()


def coloured(colours: Tensor) -> np.ndarray:
    """Colours (H, W, 3) from 0 to 1 as bytes (H, W, 4)."""
    rgb = (colours.clamp(0, 1) * 255).byte().numpy()
    return np.concatenate([rgb, np.full((*rgb.shape[:2], 1), 255, np.uint8)], axis=2)


def heat(values: Tensor) -> np.ndarray:
    """Values (H, W) from 0 to 1 in cividis, blue to yellow, as bytes (H, W, 4); not-a-number is transparent."""
    known = ~values.isnan().numpy()
    rgb = HEAT[(values.nan_to_num(0).clamp(0, 1) * 255).byte().numpy()]
    return np.concatenate([rgb, (known * 255).astype(np.uint8)[..., None]], axis=2)


def tinted(context: Tensor, grid_size: tuple[int, int]) -> np.ndarray:
    """A tint over all patches but the context's (K,), as bytes (H, W, 4)."""
    alpha = np.full(grid_size[0] * grid_size[1], 217, np.uint8)
    alpha[context.numpy()] = 0
    tint = np.broadcast_to(np.array(TINT, np.uint8), (*grid_size, 3))
    return np.concatenate([tint, alpha.reshape(*grid_size, 1)], axis=2)


# ---------------------------------------------------------------- without a browser


def drawn(panel: Panel, pictures: list[Image.Image], opacity: float) -> Image.Image:
    """A panel as the browser shows it: title, picture with its overlay, frames and marks, scale, crops."""
    picture = pictures[panel.picture]
    size = (SIDE, round(SIDE * picture.height / picture.width))
    way = Image.Resampling.NEAREST if picture.width * 2 <= SIDE else Image.Resampling.BILINEAR
    image = picture.resize(size, way)
    if panel.overlay is not None:
        over = Image.fromarray(panel.overlay, "RGBA").resize(size, Image.Resampling.NEAREST)
        alpha = over.getchannel("A").point(lambda a: round(a * (1 if panel.whole else opacity)))
        image.paste(over.convert("RGB"), mask=alpha)
    draw, (rows, cols) = ImageDraw.Draw(image), panel.grid_size
    wide, high = size[0] / cols, size[1] / rows
    if panel.lines and wide >= 6:  # finer lines would hide the picture
        for k in range(1, cols):
            draw.line([(k * wide, 0), (k * wide, size[1])], "white")
        for k in range(1, rows):
            draw.line([(0, k * high), (size[0], k * high)], "white")
    for row, col, down, across, colour, inset in panel.frames:
        box = [col * wide + inset, row * high + inset, (col + across) * wide - 1 - inset, (row + down) * high - 1 - inset]
        draw.rectangle(box, outline="white", width=4)
        draw.rectangle([box[0] + 1, box[1] + 1, box[2] - 1, box[3] - 1], outline=colour, width=2)
    for row, col, text, colour in panel.marks:
        x, y = (col + 0.5) * wide, (row + 0.5) * high
        draw.ellipse([x - 10, y - 10, x + 10, y + 10], fill=colour, outline="white", width=1)
        draw.text((x, y), text, "white", font(13), anchor="mm")
    parts = [titled(panel.title, image)]
    if panel.scale:
        parts.append(colour_bar(*panel.scale))
    if panel.crops:
        parts.append(strip([cropped(crop, pictures) for crop in panel.crops]))
    if panel.note:
        parts.append(written(panel.note))
    return stacked(parts)


def font(size: int):
    """Pillow's own, which is there on every machine."""
    return ImageFont.load_default(size)


def titled(title: str, picture: Image.Image) -> Image.Image:
    canvas = Image.new("RGB", (picture.width, picture.height + 24), "white")
    draw, size = ImageDraw.Draw(canvas), 15
    while draw.textlength(title, font(size)) > picture.width and size > 10:
        size -= 1
    draw.text((0, 3), title, "black", font(size))
    canvas.paste(picture, (0, 24))
    return canvas


def written(text: str) -> Image.Image:
    canvas = Image.new("RGB", (SIDE, 22), "white")
    ImageDraw.Draw(canvas).text((0, 4), text, "black", font(13))
    return canvas


def colour_bar(low: str, high: str) -> Image.Image:
    canvas = Image.new("RGB", (SIDE, 22), "white")
    draw = ImageDraw.Draw(canvas)
    left, right = draw.textlength(low, font(13)) + 8, SIDE - draw.textlength(high, font(13)) - 8
    draw.text((0, 5), low, "black", font(13))
    draw.text((SIDE, 5), high, "black", font(13), anchor="ra")
    bar = Image.fromarray(HEAT[None]).resize((round(right - left), 9))
    canvas.paste(bar, (round(left), 8))
    return canvas


def cropped(crop: Crop, pictures: list[Image.Image]) -> Image.Image:
    """A patch with its surroundings, and its text below."""
    picture, (rows, cols), whole = pictures[crop.picture], crop.grid_size, 2 * crop.margin + 1
    wide, high = picture.width / cols, picture.height / rows
    box = [round(v) for v in ((crop.col - crop.margin) * wide, (crop.row - crop.margin) * high)]
    box += [box[0] + round(whole * wide), box[1] + round(whole * high)]
    image = picture.crop(box).resize((crop.side, crop.side), Image.Resampling.NEAREST)
    if crop.margin:
        edge = [crop.margin * crop.side / whole, (crop.margin + 1) * crop.side / whole]
        ImageDraw.Draw(image).rectangle([edge[0], edge[0], edge[1], edge[1]], outline=TARGET, width=2)
    draw = ImageDraw.Draw(image)
    width = max(crop.side, round(draw.textlength(crop.text, font(13))))
    canvas = Image.new("RGB", (width, crop.side + 20), "white")
    canvas.paste(image, ((width - crop.side) // 2, 0))
    ImageDraw.Draw(canvas).text((width / 2, crop.side + 3), crop.text, "black", font(13), anchor="ma")
    return canvas


def strip(pictures: list[Image.Image], gap: int = 8) -> Image.Image:
    """Pictures of like size in rows that are no wider than a panel."""
    wide, high = max(p.width for p in pictures), max(p.height for p in pictures)
    columns = max(1, (SIDE + gap) // (wide + gap))
    canvas = Image.new("RGB", (SIDE, math.ceil(len(pictures) / columns) * (high + gap)), "white")
    for k, picture in enumerate(pictures):
        canvas.paste(picture, (k % columns * (wide + gap), gap + k // columns * (high + gap)))
    return canvas


def stacked(parts: list[Image.Image]) -> Image.Image:
    canvas = Image.new("RGB", (SIDE, sum(part.height for part in parts)), "white")
    top = 0
    for part in parts:
        canvas.paste(part, (0, top))
        top += part.height
    return canvas


def sheet(pictures: list[Image.Image], columns: int = 4, gap: int = 14) -> Image.Image:
    """Panels side by side."""
    columns = min(columns, len(pictures))
    rows = [pictures[k : k + columns] for k in range(0, len(pictures), columns)]
    heights = [max(p.height for p in row) for row in rows]
    canvas = Image.new("RGB", (columns * (SIDE + gap) - gap, sum(heights) + gap * (len(rows) - 1)), "white")
    top = 0
    for row, height in zip(rows, heights, strict=True):
        for k, picture in enumerate(row):
            canvas.paste(picture, (k * (SIDE + gap), top))
        top += height + gap
    return canvas
