"""Every setting of wejepa: five small sections, checked when set.

Nothing here imports torch, so reading, printing and checking a config is immediate.

>>> cfg = default_config()
>>> cfg.optimizer.epochs = 2            # a wrong name, type or range is refused here
>>> cfg = IJepaConfig.from_dict({"model": {"embed_dim": 64}})
>>> print(cfg.summary())                # doctest: +SKIP
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

from wejepa.errors import ConfigError, did_you_mean
from wejepa.presets import BACKBONES, PRESETS, STAGE_WIDTHS, adapt_config_for_backbone, check_backbone

__all__ = [
    "BACKBONES",
    "DataConfig",
    "HardwareConfig",
    "IJepaConfig",
    "MaskConfig",
    "ModelConfig",
    "OptimizerConfig",
    "adapt_config_for_backbone",
    "default_config",
    "hf224_config",
    "parse_override",
    "parse_value",
    "photos96_config",
    "setting",
    "settings",
]


def setting(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
    optional: bool = False,
):
    """A field of a section: its default, one line of help, and the closed range its value must lie in, or the names it may have."""
    metadata = {"help": help, "low": low, "high": high, "choices": choices, "optional": optional}
    return dataclasses.field(default=default, metadata=metadata)


class Section:
    """A group of settings that refuses unknown names, wrong types and values out of range when they are set."""

    def __setattr__(self, name: str, value: Any) -> None:
        fields = {f.name: f for f in dataclasses.fields(self)}
        where = f"{_SECTION_NAMES.get(type(self), type(self).__name__)}.{name}"
        if name not in fields:
            section = _SECTION_NAMES.get(type(self))  # None for the probe's settings
            near = nearest_setting(section, name, list(fields)) if section else did_you_mean(name, list(fields))
            raise ConfigError(f"{where} is not a setting; {near}")
        super().__setattr__(name, _checked(where, value, fields[name]))


def _checked(where: str, value: Any, field: dataclasses.Field) -> Any:
    """`value` in the type of the field's default, or a `ConfigError` that says what is wanted."""
    if value is None and field.metadata["optional"]:
        return None
    default, low, high = field.default, field.metadata["low"], field.metadata["high"]
    if isinstance(default, tuple):
        if not isinstance(value, (list, tuple)) or len(value) != 2:
            raise ConfigError(f"{where} = {value!r}: give two numbers, [smallest, largest], such as {list(default)}")
        pair = tuple(_number(where, v, float, low, high) for v in value)
        if pair[0] > pair[1]:
            raise ConfigError(f"{where} = {list(pair)}: the first number must not be larger than the second; swap them")
        return pair
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise ConfigError(f"{where} = {value!r}: give true or false")
        return value
    if isinstance(default, (int, float)):
        return _number(where, value, type(default), low, high)
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{where} = {value!r}: give a name in quotes" + (" or null" if field.metadata["optional"] else ""))
    if (choices := field.metadata["choices"]) and value not in choices:
        raise ConfigError(f"{where} = {value!r}: give {' or '.join(map(repr, choices))}")
    return value


def _number(where: str, value: Any, kind: type, low: float | None, high: float | None) -> int | float:
    what = "a whole number" if kind is int else "a number"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{where} = {value!r}: give {what}")
    if not -1e300 < value < 1e300 or (kind is int and value != int(value)):  # NaN compares false
        raise ConfigError(f"{where} = {value!r}: give {'a finite number' if kind is float else what}")
    if (low is not None and value < low) or (high is not None and value > high):
        span = f"from {low} to {high}" if low is not None and high is not None else f"of {low} or more"
        raise ConfigError(f"{where} = {value!r} is out of range: give {what} {span}")
    return kind(value)


@dataclass
class DataConfig(Section):
    """What is learnt from, and in what portions."""

    dataset: str = setting(
        "fashion_mnist_mini", "name of the data set; wejepa.data.available_datasets() lists them; hf:NAME for Hugging Face's"
    )
    train_split: str | None = setting(None, "of a Hugging Face data set: what is trained on, if not its split train", optional=True)
    test_split: str | None = setting(None, "of a Hugging Face data set: what is tested on, if not its test or validation", optional=True)
    streamed: int = setting(
        0, "of a Hugging Face data set: images of each split that are read into memory, without downloading the rest; 0 downloads it", low=0
    )
    root: str = setting(
        "data", "folder of the data set's files; for imagefolder with train/ and test/, or of images alone, or a list of files"
    )
    use_fake_data: bool = setting(False, "replace the data set by noise of the same shape: for testing the plumbing only")
    fake_data_size: int = setting(256, "number of noise images, for training and again for testing", low=20)
    train_batch_size: int = setting(64, "images per update, over all processes together", low=2)
    eval_batch_size: int = setting(500, "images per forward pass when nothing is learnt", low=1)
    num_workers: int = setting(0, "processes that decode images; data sets held in memory need none", low=0, high=256)
    max_unreadable_share: float = setting(
        0.05, "share of an image folder's files that may be unreadable; they are passed over", low=0, high=1
    )
    num_crops: int = setting(1, "crops of each image in an update, each with masks of its own", low=1, high=64)
    crop_scale: tuple[float, float] = setting(
        (0.8, 1.0), "share of the image that a random crop keeps; [1, 1] for no crops", low=0.01, high=1
    )
    horizontal_flip: bool = setting(True, "mirror every second training image")


@dataclass
class MaskConfig(Section):
    """Which patches the student sees and which it must predict (I-JEPA, section 3 and appendix A.1)."""

    target_scale: tuple[float, float] = setting((0.15, 0.2), "area of a target block, as a share of the grid", low=0.001, high=1)
    target_aspect_ratio: tuple[float, float] = setting((0.75, 1.5), "height over width of a target block", low=0.1, high=10)
    context_scale: tuple[float, float] = setting((0.85, 1.0), "area of the context block, as a share of the grid", low=0.01, high=1)
    context_aspect_ratio: tuple[float, float] = setting((1.0, 1.0), "height over width of the context block", low=0.1, high=10)
    num_target_blocks: int = setting(4, "target blocks per image", low=1, high=64)
    num_contexts: int = setting(1, "contexts per crop, each with target blocks of its own; the teacher sees the crop once", low=1, high=64)
    context_share: float = setting(0.33, "share of the grid that the student sees: the same number in every image", low=0.01, high=0.99)

    def num_context_patches(self, grid_size: tuple[int, int]) -> int:
        """Patches that the student sees on a grid of (H, W): a constant, whatever the batch and wherever the targets fall."""
        return max(1, round(self.context_share * grid_size[0] * grid_size[1]))

    def check_grid(self, grid_size: tuple[int, int]) -> None:
        """Refuse a grid (H, W) that cannot hold one target block of every allowed shape beside the context.

        Raises:
            ConfigError: naming the setting, the grid and what would fit.
        """
        rows, cols = grid_size
        grid, patches = f"a grid of {rows} x {cols} patches", rows * cols
        if min(rows, cols) < 2:
            raise ConfigError(f"{grid} is too small to hide a part of it: take a larger model.img_size or a smaller model.patch_size")
        room = 1 - self.num_context_patches(grid_size) / patches
        if self.target_scale[1] > room:
            raise ConfigError(
                f"mask.target_scale = {list(self.target_scale)} does not fit {grid} beside a context of {1 - room:.2f} of it: "
                f"take at most {room:.2f}, or a smaller mask.context_share"
            )
        for name in ("target", "context"):
            scale, aspect = getattr(self, f"{name}_scale")[1], getattr(self, f"{name}_aspect_ratio")
            longest = math.sqrt(scale * max(aspect[1], 1 / aspect[0]))  # of the grid's own height or width
            if longest > 1 + 0.5 / max(rows, cols):
                raise ConfigError(
                    f"mask.{name}_aspect_ratio = {list(aspect)} makes blocks of area {scale:g} longer than {grid}: "
                    f"take ratios nearer to 1, or a mask.{name}_scale of at most {scale / longest**2:.2f}"
                )


@dataclass
class ModelConfig(Section):
    """The size of the encoder and of the predictor."""

    img_size: int = setting(32, "height and width of an image, in pixels", low=2, high=4096)
    patch_size: int = setting(4, "height and width of a patch, in pixels", low=1, high=1024)
    in_chans: int = setting(3, "channels of an image: 1 for grey, 3 for colour", low=1, high=64)
    embed_dim: int = setting(64, "width of the encoder", low=4, high=16384)
    enc_depth: int = setting(3, "transformer blocks of the encoder", low=1, high=256)
    pred_depth: int = setting(2, "transformer blocks of the predictor", low=1, high=256)
    pred_dim: int = setting(64, "width of the predictor", low=4, high=16384)
    num_heads: int = setting(2, "attention heads, of the encoder and of the predictor", low=1, high=256)
    mlp_ratio: float = setting(4.0, "width of a block's hidden layer over its own width", low=0.1, high=16)
    pred_mlp_ratio: float = setting(0.0, "the same in the predictor; 0 for the encoder's", low=0, high=16)
    blockwise_prediction: bool = setting(False, "predict each target block in a sequence of its own, as the paper does; false: all in one")
    positions: str = setting(
        "learnt", "positional embeddings: learnt with the rest, or fixed sines and cosines", choices=("learnt", "sincos")
    )
    norm_eps: float = setting(1e-6, "what the encoder's layer norms add to the variance", low=0, high=0.1)
    start_from: str | None = setting(
        None,
        "weights that a new run begins with: our checkpoint, fashion or emoji (which ship), Meta's .pth.tar, a Hugging Face folder or name",
        optional=True,
    )
    classification_backbone: str | None = setting(None, "a torchvision classifier as encoder, or null for our own", optional=True)
    classification_pretrained: bool = setting(False, "start from torchvision's published weights")
    classification_frozen: bool = setting(False, "leave the encoder as it starts: the predictor alone learns")


@dataclass
class OptimizerConfig(Section):
    """AdamW, or Muon beside it, and the four schedules (I-JEPA, appendix A.1)."""

    kind: str = setting(
        "adamw",
        "adamw, as in the paper; or muon, which takes other steps for the matrices of transformer blocks",
        choices=("adamw", "muon"),
    )
    epochs: int = setting(30, "passes over the training images", low=1)
    warmup_epochs: float = setting(1.0, "epochs in which the learning rate rises from start to base", low=0)
    start_learning_rate: float = setting(1e-4, "learning rate at the first step", low=0, high=10)
    base_learning_rate: float = setting(1.5e-3, "learning rate after the warm-up", low=0, high=10)
    final_learning_rate: float = setting(1e-5, "learning rate at the last step", low=0, high=10)
    weight_decay: float = setting(0.2, "weight decay at the first step; biases and norms have none", low=0, high=10)
    final_weight_decay: float = setting(0.2, "weight decay at the last step", low=0, high=10)
    weight_decay_schedule: str = setting("cosine", "how the weight decay goes from the one to the other", choices=("cosine", "linear"))
    betas: tuple[float, float] = setting(
        (0.9, 0.95), "how much of themselves AdamW's means keep at a step: of the gradient, and of its square", low=0, high=0.99999
    )
    accumulation_steps: int = setting(1, "parts that a batch is computed in, one after another, where memory is short", low=1)
    grad_clip_norm: float = setting(1.0, "largest norm of the whole gradient; 0 switches clipping off", low=0)
    momentum_teacher: float = setting(0.99, "how much of itself the teacher keeps at the first step", low=0, high=1)
    momentum_teacher_final: float = setting(1.0, "how much of itself the teacher keeps at the last step", low=0, high=1)
    momentum_schedule: str = setting("cosine", "how the momentum goes from the one to the other", choices=("cosine", "linear"))


@dataclass
class HardwareConfig(Section):
    """Where it runs, how exactly it repeats, and what it leaves behind."""

    seed: int = setting(0, "the run's only source of randomness", low=0, high=2**31 - 1)
    device: str = setting("auto", "cpu, cuda, mps, or auto for the best one present")
    mixed_precision: bool = setting(True, "matrix products in bfloat16 wherever the device computes it natively, in float16 on other GPUs")
    compile_model: bool = setting(False, "torch.compile the step: slow to start; measure whether it pays")
    shard_model: bool = setting(False, "spread weights over the processes (FSDP2): for models too large for one device")
    checkpoint_every: int = setting(10, "epochs between checkpoints; the last epoch always writes one", low=1)
    checkpoint_minutes: float = setting(10.0, "minutes between checkpoints within an epoch; 0 for none", low=0)
    keep_checkpoints: int = setting(2, "newest checkpoints to keep: the rest of a run goes on where one is damaged", low=1)
    keep_every: int = setting(0, "epochs whose checkpoints are kept for good: every so many; 0 for none", low=0)
    tensorboard: bool = setting(False, "write every step for TensorBoard too, into output_dir/tensorboard; needs the package tensorboard")
    output_dir: str = setting("outputs/pretrain", "folder for the checkpoints and the log")


_SECTION_NAMES: dict[type, str] = {
    DataConfig: "data",
    MaskConfig: "mask",
    ModelConfig: "model",
    OptimizerConfig: "optimizer",
    HardwareConfig: "hardware",
}


@dataclass
class IJepaConfig:
    """All settings of a run.

    Sections are plain attributes (``cfg.model.embed_dim``). A single value is checked when it is set; what concerns several
    values at once is checked by `validate`, which everything that takes a config calls first.
    """

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    mask: MaskConfig = dataclasses.field(default_factory=MaskConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    hardware: HardwareConfig = dataclasses.field(default_factory=HardwareConfig)

    def __setattr__(self, name: str, value: Any) -> None:
        kinds = {section: kind for kind, section in _SECTION_NAMES.items()}
        if name not in kinds:
            raise ConfigError(f"{name} is not a section of the config; {did_you_mean(name, list(kinds))}")
        if not isinstance(value, kinds[name]):
            raise ConfigError(f"{name}: give a {kinds[name].__name__}, not {type(value).__name__}")
        super().__setattr__(name, value)

    @property
    def grid_size(self) -> tuple[int, int]:
        """Patches down and across: (H, W)."""
        side = self.model.img_size // self.model.patch_size
        return side, side

    def copy(self) -> IJepaConfig:
        """An independent copy."""
        return copy.deepcopy(self)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain dicts, lists, numbers and strings: exactly what JSON can hold."""
        plain = dataclasses.asdict(self)
        return {s: {k: list(v) if isinstance(v, tuple) else v for k, v in vs.items()} for s, vs in plain.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> IJepaConfig:
        """A checked config from nested dicts; what is left out keeps its default.

        Raises:
            ConfigError: an unknown section or setting (with the nearest known one), a wrong type, a value out of range,
                or values that do not go together.
        """
        if not isinstance(values, dict):
            raise ConfigError(f"a config is a dict of sections, not {type(values).__name__}")
        cfg = cls()
        for section, settings in values.items():
            if section not in _SECTION_NAMES.values():
                known = list(_SECTION_NAMES.values())
                raise ConfigError(f"{section!r} is not a section of the config; {did_you_mean(section, known)}")
            if not isinstance(settings, dict):
                raise ConfigError(f"{section}: give a dict of settings, not {type(settings).__name__}")
            for name, value in settings.items():
                setattr(getattr(cfg, section), str(name), value)
        cfg.validate()
        return cfg

    def validate(self) -> None:
        """Check what concerns several settings at once.

        Raises:
            ConfigError: naming the setting, its value and the remedy.
        """
        m, o, k = self.model, self.optimizer, self.mask
        if m.img_size % m.patch_size:
            near = [d for d in range(1, m.img_size + 1) if m.img_size % d == 0]
            best = min(near, key=lambda d: abs(d - m.patch_size))
            raise ConfigError(
                f"model.patch_size = {m.patch_size} does not divide model.img_size = {m.img_size}: "
                f"take patch_size {best}, or img_size {max(1, round(m.img_size / m.patch_size)) * m.patch_size}"
            )
        if m.classification_backbone is not None:
            check_backbone(m)
        else:
            for name in ("classification_pretrained", "classification_frozen"):
                if getattr(m, name):
                    raise ConfigError(f"model.{name} = true needs model.classification_backbone: name one, such as 'vit_b_16'")
        if m.start_from and m.classification_pretrained:
            raise ConfigError(
                f"model.classification_pretrained = true and model.start_from = {m.start_from!r} both say what the encoder begins with: "
                f"set one of them"
            )
        # A network of stages has heads of its own, or none: only the predictor has the config's.
        widths = {n: getattr(m, n) for n in ("embed_dim", "pred_dim") if n == "pred_dim" or m.classification_backbone not in STAGE_WIDTHS}
        for name, width in widths.items():
            if width % m.num_heads:
                heads = max(h for h in range(1, m.num_heads) if not any(w % h for w in widths.values()))
                raise ConfigError(
                    f"model.num_heads = {m.num_heads} does not divide model.{name} = {width}: "
                    f"take num_heads {heads}, or {name} {math.ceil(width / m.num_heads) * m.num_heads}"
                )
            if m.positions == "sincos" and width % 4:
                step = math.lcm(4, m.num_heads)
                raise ConfigError(
                    f"model.{name} = {width} does not divide by 4, which model.positions = 'sincos' needs for sines and cosines of row and "
                    f"column: take {math.ceil(width / step) * step}, or positions 'learnt'"
                )
        if o.warmup_epochs > o.epochs:
            raise ConfigError(f"optimizer.warmup_epochs = {o.warmup_epochs} is longer than optimizer.epochs = {o.epochs}: make it shorter")
        if o.kind == "muon" and self.hardware.shard_model:
            raise ConfigError(
                "optimizer.kind = 'muon' needs whole matrices, which hardware.shard_model = true spreads over processes: "
                "take optimizer.kind 'adamw', or shard_model false"
            )
        if o.momentum_teacher > o.momentum_teacher_final:
            raise ConfigError(
                f"optimizer.momentum_teacher = {o.momentum_teacher} is above optimizer.momentum_teacher_final = "
                f"{o.momentum_teacher_final}: the teacher slows down over training, so swap them"
            )
        k.check_grid(self.grid_size)

    def summary(self) -> str:
        """A few readable lines: what is trained, on what, how the image is cut up, and for how long."""
        d, k, m, o, h = self.data, self.mask, self.model, self.optimizer, self.hardware
        rows, cols = self.grid_size
        source = f"FakeData ({d.fake_data_size} noise images)" if d.use_fake_data else d.dataset
        kind = m.classification_backbone or f"ViT, width {m.embed_dim}, depth {m.enc_depth}, {m.num_heads} heads"
        lines = {
            "data": f"{source}, batches of {d.train_batch_size}" + (f", {d.num_crops} crops of each image" if d.num_crops > 1 else ""),
            "image": f"{m.img_size} x {m.img_size} x {m.in_chans}, patch {m.patch_size} -> {rows} x {cols} = {rows * cols} patches",
            "masks": f"{k.num_context_patches((rows, cols))} context patches; {k.num_target_blocks} target blocks of "
            f"{k.target_scale[0]:g} to {k.target_scale[1]:g} of the image" + (f"; {k.num_contexts} times" if k.num_contexts > 1 else ""),
            "encoder": kind + (f", begun from {m.start_from}" if m.start_from else ""),
            "predictor": f"width {m.pred_dim}, depth {m.pred_depth}" + (", one sequence a target block" if m.blockwise_prediction else ""),
            "optimizer": ("Muon, " if o.kind == "muon" else "")
            + f"{o.epochs} epochs, rate {o.start_learning_rate:g} -> {o.base_learning_rate:g} -> {o.final_learning_rate:g}, "
            f"decay {o.weight_decay:g} -> {o.final_weight_decay:g}, momentum {o.momentum_teacher:g} -> {o.momentum_teacher_final:g}",
            "hardware": f"device {h.device}, {'bfloat16 where native' if h.mixed_precision else 'float32'}, seed {h.seed}, "
            f"output in {h.output_dir}",
        }
        return "\n".join(f"{name:<10} {text}" for name, text in lines.items())


def settings() -> dict[str, str]:
    """Every setting by its full name, such as "optimizer.epochs": its default, range and help in one line."""
    found = {}
    for kind, section in _SECTION_NAMES.items():
        for field in dataclasses.fields(kind):
            low, high = field.metadata["low"], field.metadata["high"]
            default = list(field.default) if isinstance(field.default, tuple) else field.default
            span = "" if low is None else f"; {low} or more" if high is None else f"; {low} to {high}"
            span = f"; {' or '.join(field.metadata['choices'])}" if field.metadata["choices"] else span
            span = "; true or false" if isinstance(default, bool) else "; a name or null" if field.metadata["optional"] else span
            found[f"{section}.{field.name}"] = f"{field.metadata['help']} (default {json.dumps(default)}{span})"
    return found


def settings_like(words: str) -> list[str]:
    """The full names of the settings whose name or help has these words."""
    words = words.replace("_", " ").lower()
    return [path for path, text in settings().items() if words in f"{path} {text}".replace("_", " ").lower()]


def nearest_setting(section: str, name: str, known: list[str]) -> str:
    """The tail of a message about a name that a section does not have: the nearest that it has, else what any setting says about it."""
    near = did_you_mean(name, known)
    path = next((f"{section}.{field}" for field in known if near == f"did you mean {field!r}?"), None)
    if path:
        return f"{near} {path}: {settings()[path]}"
    like = settings_like(name)
    return f"did you mean {like[0]}? {settings()[like[0]]}" if like else near


def parse_override(text: str) -> tuple[str, str, Any]:
    """``"section.field=value"`` as (section, field, value)."""
    path, equals, raw = text.partition("=")
    section, dot, name = path.strip().partition(".")
    if not (equals and dot and section and name):
        like = settings_like(section) if section else []
        raise ConfigError(f"{text!r}: write section.field=value, such as {like[0] if like else 'optimizer.epochs'}=5")
    return section, name, parse_value(raw)


def parse_value(raw: str) -> Any:
    """A setting's value as written on a command line: JSON where it is JSON, else the string itself."""
    try:
        return json.loads(raw)
    except json.JSONDecodeError:
        return {"True": True, "False": False, "None": None}.get(raw.strip(), raw.strip())


def default_config() -> IJepaConfig:
    """32 x 32 images, patch 4, on the embedded Fashion-MNIST: minutes on two CPU cores."""
    return IJepaConfig.from_dict(PRESETS["default"])


def photos96_config() -> IJepaConfig:
    """96 x 96 images, patch 8, from a folder of images: some 5,000 photographs in about half an hour on two CPU cores."""
    return IJepaConfig.from_dict(PRESETS["photos96"])


def hf224_config() -> IJepaConfig:
    """224 x 224 images, patch 16, from a folder of images: a ViT-S for one GPU or several (I-JEPA, appendix A.1).

    `data.dataset = "hf:NAME"` takes a Hugging Face data set instead, `adapt_config_for_backbone` another encoder.
    """
    return IJepaConfig.from_dict(PRESETS["hf224"])
