"""Explorers for a notebook: sliders that redraw a picture at once.

    display(MaskExplorer(cfg, image))

Each holds its `controls` by name, the `picture` they redraw, and `render()`, which gives the picture of the moment as a PIL image for
those who read without a kernel. The mathematics is in `wejepa.patches`, `wejepa.masking` and `wejepa.analysis.attention`.
"""

from __future__ import annotations

import io
import math
from dataclasses import fields

import ipywidgets
import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from wejepa.analysis.attention import attention_rollout, record_attention
from wejepa.analysis.visualization import PALETTE, TARGET, to_picture
from wejepa.config import IJepaConfig, MaskConfig
from wejepa.errors import ConfigError
from wejepa.masking import sample_block_masks
from wejepa.model import IJEPA_base

__all__ = ["AttentionExplorer", "MaskExplorer", "PatchExplorer"]

SIDE = 288  # pixels of a picture on the screen
HIDDEN = (150, 178, 209)  # a tint that neither black nor white clothes have
HEAT = (np.array(colormaps["cividis"].colors) * 255).astype(np.uint8)  # (256, 3)


class Explorer:
    """Controls, the picture they redraw, and a line that says what it shows.

    Attributes:
        controls: the widgets by name.
        picture: the image widget.
        caption: the line below it; it also says why a choice cannot be drawn.
    """

    def __init__(self, controls: dict[str, ipywidgets.ValueWidget]):
        self.controls = controls
        self.picture = ipywidgets.Image(format="png")
        self.caption = ipywidgets.HTML()
        for control in controls.values():
            control.observe(self._redraw, names="value")
        rows = [ipywidgets.VBox(list(controls.values())), ipywidgets.VBox([self.picture, self.caption])]
        self.widget = ipywidgets.HBox(rows, layout={"flex_flow": "row wrap", "align_items": "flex-start"})
        self._redraw()

    def render(self) -> Image.Image:
        """The picture of the moment.

        Raises:
            ConfigError: the controls' values do not go together.
        """
        return self._draw()[0]

    def _draw(self) -> tuple[Image.Image, str]:
        raise NotImplementedError

    def _redraw(self, change=None) -> None:
        try:
            picture, caption = self._draw()
        except ConfigError as error:  # the last good picture stays
            self.caption.value = f"<b>not possible:</b> {error}"
            return
        file = io.BytesIO()
        picture.save(file, "png", compress_level=1)
        self.picture.value, self.caption.value = file.getvalue(), caption

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(self.widget)

    def __getitem__(self, name: str):
        """The value of a control."""
        return self.controls[name].value


class PatchExplorer(Explorer):
    """An image cut into patches of a size that a slider sets.

    Args:
        image: (C, S, S).
        patch_sizes: the sizes offered; by default those that divide S and leave a grid of 2 x 2 to 64 x 64.

    Raises:
        ConfigError: a size does not divide the image.
    """

    def __init__(self, image: Tensor, patch_sizes: tuple[int, ...] | None = None):
        self.image, side = image.cpu(), image.shape[-1]
        sizes = patch_sizes or tuple(p for p in range(1, side // 2 + 1) if side % p == 0 and side // p <= 64)
        for size in sizes:
            if side % size or image.shape[-2] % size:
                raise ConfigError(f"patch_sizes: {size} does not divide an image of {image.shape[-2]} x {side}: leave it out")
        middle = sizes[len(sizes) // 2]
        super().__init__({"patch_size": slider(ipywidgets.SelectionSlider, "patch size", middle, options=sizes)})

    def _draw(self) -> tuple[Image.Image, str]:
        size = self["patch_size"]
        rows, cols = self.image.shape[-2] // size, self.image.shape[-1] // size
        canvas = enlarged(self.image, SIDE)
        draw, gap = ImageDraw.Draw(canvas), SIDE / cols
        if gap >= 6:  # finer lines would hide the picture
            for k in range(1, max(rows, cols)):
                draw.line([(k * gap, 0), (k * gap, SIDE)], "white")
                draw.line([(0, k * gap), (SIDE, k * gap)], "white")
        # Beside it what is left when each patch is one number a channel: its mean.
        plane = torch.nn.functional.avg_pool2d(self.image[None], size)[0]
        means = Image.fromarray(bytes_of(plane, like=self.image)).resize((SIDE, SIDE), Image.Resampling.NEAREST)
        tokens, numbers = rows * cols, self.image.shape[0] * size * size
        text = f"{rows} x {cols} = {tokens} tokens of {numbers} numbers; attention compares {tokens**2:,} pairs"
        return side_by_side([("image in patches", canvas), ("each patch's mean", means)]), text


class MaskExplorer(Explorer):
    """Masks under settings that sliders set: every field of `MaskConfig` that one draw depends on, and the draw.

    Args:
        cfg: where the sliders begin; its grid is the masks'.
        image: (C, S, S), what the masks are laid over.
        draws: masks shown side by side.
    """

    settings = tuple(field for field in fields(MaskConfig) if field.name != "num_contexts")  # contexts beside one another are draws

    def __init__(self, cfg: IJepaConfig, image: Tensor, draws: int = 3):
        self.cfg, self.image, self.draws = cfg.copy(), image.cpu(), draws
        controls = {field.name: mask_control(field, getattr(cfg.mask, field.name)) for field in self.settings}
        controls["seed"] = slider(ipywidgets.IntSlider, "draw", 0, min=0, max=99)
        super().__init__(controls)

    @property
    def mask_config(self) -> MaskConfig:
        """The settings of the moment."""
        return MaskConfig(**{field.name: self[field.name] for field in self.settings})

    def _draw(self) -> tuple[Image.Image, str]:
        grid_size = self.cfg.grid_size
        masks = sample_block_masks(self.draws, grid_size, self.mask_config, torch.Generator().manual_seed(self["seed"]))
        picture = enlarged(self.image, SIDE)
        panels = [(f"draw {k + 1}", masked(picture, masks.context[k], masks.targets[k], grid_size)) for k in range(self.draws)]
        (blocks, patches), n = masks.targets.shape[1:], grid_size[0] * grid_size[1]
        covered = sum(len(t.unique()) for t in masks.targets) / self.draws
        return side_by_side(panels), (
            f"the student sees {masks.context.shape[1]} of {n} patches and predicts {blocks} blocks of {patches}; "
            f"together they cover {covered:.1f} patches on average over these {self.draws}"
        )


class AttentionExplorer(Explorer):
    """Attention of one patch over an image, of a model and, beside it, of another.

    Args:
        models: the models by name, one or more, of the same grid and depth: a trained and an untrained one, for example.
        images: (B, C, S, S).
        encoder: "teacher" or "student".
    """

    def __init__(self, models: dict[str, IJEPA_base], images: Tensor, encoder: str = "teacher"):
        self.models, self.images, self.encoder = models, images, encoder
        first = next(iter(models.values()))
        self.grid_size = first.student_encoder.token_grid(images)
        self._recorded: dict[int, dict[str, list[Tensor]]] = {}
        of_first = self._of_image(0)[next(iter(models))]
        depth, heads = len(of_first), of_first[0].shape[1]
        rows, cols = self.grid_size
        super().__init__(
            {
                "image": slider(ipywidgets.IntSlider, "image", 0, min=0, max=len(images) - 1),
                "layer": slider(ipywidgets.SelectionSlider, "layer", depth, options=[*range(1, depth + 1), "rollout"]),
                "head": slider(ipywidgets.SelectionSlider, "head", "mean", options=["mean", *range(1, heads + 1)]),
                "row": slider(ipywidgets.IntSlider, "query row", rows // 2, min=0, max=rows - 1),
                "column": slider(ipywidgets.IntSlider, "query column", cols // 2, min=0, max=cols - 1),
            }
        )

    def attention(self, name: str) -> Tensor:
        """The weights (H, W) of the query over the image under the controls of the moment."""
        recorded = self._of_image(self["image"])[name]
        if self["layer"] == "rollout":
            weights = attention_rollout(recorded)[0]
        else:
            weights = recorded[self["layer"] - 1][0]
            weights = weights.mean(0) if self["head"] == "mean" else weights[self["head"] - 1]
        return weights[self["row"] * self.grid_size[1] + self["column"]].view(self.grid_size)

    def _of_image(self, number: int) -> dict[str, list[Tensor]]:
        """Recorded once for each image, and kept for the last few."""
        if number not in self._recorded:
            if len(self._recorded) >= 8:
                self._recorded.pop(next(iter(self._recorded)))
            image = self.images[number : number + 1]
            self._recorded[number] = {name: record_attention(model, image, self.encoder) for name, model in self.models.items()}
        return self._recorded[number]

    def _draw(self) -> tuple[Image.Image, str]:
        picture = enlarged(self.images[self["image"]], SIDE)
        maps = {name: self.attention(name) for name in self.models}
        largest = max(float(m.max()) for m in maps.values())
        panels = [("image", picture)] + [(name, heatmap(m / largest)) for name, m in maps.items()]
        rows, cols = self.grid_size
        box = [self["column"] * SIDE / cols, self["row"] * SIDE / rows, (self["column"] + 1) * SIDE / cols, (self["row"] + 1) * SIDE / rows]
        for _, panel in panels:
            ImageDraw.Draw(panel).rectangle(box, outline=TARGET, width=3)
        even = largest * rows * cols
        what = "rollout over all layers" if self["layer"] == "rollout" else f"layer {self['layer']}, head {self['head']}"
        return side_by_side(panels), f"{what}; yellow is {even:.1f} times an even share, blue is none"


# ---------------------------------------------------------------- the parts


def slider(kind: type, name: str, value, **choices):
    """A slider with room for its name; arrow keys move it."""
    style, layout = {"description_width": "11em"}, {"width": "28em"}
    return kind(value=value, description=name, style=style, layout=layout, continuous_update=True, **choices)


def mask_control(field, value):
    """The slider for a field of `MaskConfig`, over the part of its range that is of use."""
    low, high, name = field.metadata["low"], field.metadata["high"], field.name.replace("_", " ")
    if isinstance(value, tuple):
        high = 3.0 if "aspect" in field.name else high
        low = 0.3 if "aspect" in field.name else max(low, 0.01)
        return slider(ipywidgets.FloatRangeSlider, name, value, min=min(low, value[0]), max=max(high, value[1]), step=0.01)
    if isinstance(value, int):
        return slider(ipywidgets.IntSlider, name, value, min=low, max=max(8, value))
    return slider(ipywidgets.FloatSlider, name, value, min=low, max=high, step=0.01)


def bytes_of(image: Tensor, like: Tensor | None = None) -> np.ndarray:
    """An image (C, H, W) of any range as bytes (H, W, 3), in the range of another one if given."""
    if like is not None:
        low, high = like.min(), like.max()
        image = ((image - low) / (high - low).clamp(min=1e-6)).expand(3, -1, -1) if image.shape[0] == 1 else (image - low) / (high - low)
        return (image[:3].permute(1, 2, 0).clamp(0, 1) * 255).byte().numpy()
    return (to_picture(image) * 255).byte().numpy()


def enlarged(image: Tensor, side: int) -> Image.Image:
    """An image (C, H, W) as a square picture; small ones in crisp pixels."""
    way = Image.Resampling.NEAREST if image.shape[-1] * 2 <= side else Image.Resampling.BILINEAR
    return Image.fromarray(bytes_of(image)).resize((side, side), way)


def masked(picture: Image.Image, context: Tensor, targets: Tensor, grid_size: tuple[int, int]) -> Image.Image:
    """A picture with what the student sees left as it is, the rest paled, and a frame around each target block."""
    seen = torch.zeros(grid_size[0] * grid_size[1])
    seen[context] = 255
    mask = Image.fromarray(seen.view(grid_size).byte().numpy()).resize(picture.size, Image.Resampling.NEAREST)
    result = Image.composite(picture, Image.blend(picture, Image.new("RGB", picture.size, HIDDEN), 0.85), mask)
    draw, (rows, cols) = ImageDraw.Draw(result), grid_size
    for block, target in enumerate(targets):
        row, col = target // cols, target % cols
        box = [int(col.min()) / cols, int(row.min()) / rows, (int(col.max()) + 1) / cols, (int(row.max()) + 1) / rows]
        inset = 1 + 2 * block  # blocks may overlap, and repeat
        draw.rectangle(
            [box[0] * SIDE + inset, box[1] * SIDE + inset, box[2] * SIDE - inset, box[3] * SIDE - inset],
            outline=PALETTE[(block + 1) % len(PALETTE)],
            width=2,
        )
    return result


def heatmap(values: Tensor) -> Image.Image:
    """Values (H, W) from 0 to 1 in cividis, blue to yellow."""
    return Image.fromarray(HEAT[(values.clamp(0, 1) * 255).byte().numpy()]).resize((SIDE, SIDE), Image.Resampling.NEAREST)


def side_by_side(panels: list[tuple[str, Image.Image]], columns: int = 3) -> Image.Image:
    """Pictures with a title above each."""
    gap, head = 12, 24
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    sheet = Image.new("RGB", (columns * (SIDE + gap) - gap, rows * (SIDE + head)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for k, (title, picture) in enumerate(panels):
        x, y = k % columns * (SIDE + gap), k // columns * (SIDE + head)
        draw.text((x, y + 3), title, "black", font)
        sheet.paste(picture, (x, y + head))
    return sheet
