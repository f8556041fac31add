"""Weights from elsewhere and to elsewhere: Meta's and Hugging Face's I-JEPA checkpoints, safetensors, torch.export and ONNX.

    model = from_huggingface("facebook/ijepa_vith14_1k")          # or a folder, or a transformers.IJepaModel
    model = from_meta("IN1K-vit.h.14-300e.pth.tar")
    export(model, "ijepa.onnx")                                   # .safetensors, .pt2, .onnx, or a folder for transformers

    python -m wejepa.interop convert SOURCE TARGET

Reading is strict: a key too many, too few or of another shape is an error that names it. Weights are mapped from the file, not copied
out of it, so a large checkpoint takes memory as it is used. Needs the extra: pip install 'wejepa[interop]'.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wejepa.config import IJepaConfig, hf224_config
from wejepa.errors import CheckpointError, ConfigError, exit_code, optional
from wejepa.model import Encoder, IJEPA_base, Predictor
from wejepa.paths import path_of, print_line
from wejepa.pretrained import PRETRAINED
from wejepa.train.checkpoints import describe, first_fault, load_model, save_model
from wejepa.train.classifier import Classifier

__all__ = ["export", "from_huggingface", "from_meta", "to_huggingface"]

Names = dict[str, tuple[str, ...]]  # our tensor -> theirs, joined along their first axis where there are several

# One block's modules in our names, and in theirs.
META_BLOCK = {m: (m,) for m in ("norm1", "attn.qkv", "attn.proj", "norm2")} | {"mlp.0": ("mlp.fc1",), "mlp.2": ("mlp.fc2",)}
HUGGINGFACE_BLOCK = {
    "norm1": ("layernorm_before",),
    "attn.qkv": ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    "attn.proj": ("attention.output.dense",),
    "norm2": ("layernorm_after",),
    "mlp.0": ("intermediate.dense",),
    "mlp.2": ("output.dense",),
}
# A transformers model in memory has other names than its files, which keep the first ones.
IN_MEMORY = (
    (r"^layers\.", "encoder.layer."),
    (r"\.attention\.(q|k|v)_proj\.", lambda found: f".attention.attention.{ {'q': 'query', 'k': 'key', 'v': 'value'}[found[1]] }."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)
FILE = re.compile(r"\.(pt|pth|pt2|tar|bin|ckpt|onnx|safetensors|json)$")  # what a file of weights is called
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16}  # of the published vision transformers, by their width


def read_weights(source: str | Path, num_heads: int | None = None) -> tuple[IJEPA_base, str]:
    """Weights of any kind that is read here, as a model in evaluation mode whose predictor is None where they have none.

    Args:
        source: our checkpoint, or the name of a model that ships with wejepa; a file in Meta's layout (.pth.tar, .pth); a folder in
            Hugging Face's format, or a name on the hub.
        num_heads: see `from_meta`.

    Returns:
        The model, and which of its parts the weights became, in words.

    Raises:
        CheckpointError, ConfigError: see `load_model`, `from_meta` and `from_huggingface`.
    """
    path = path_of(source)
    if path.name.endswith((".pth.tar", ".pth")):
        return read_meta(path, "target_encoder", num_heads)
    if path.name.endswith(".pt") or path.is_file() or (str(source) in PRETRAINED and not path.exists()):
        model = load_model(path)
        return model, "teacher taken as teacher, student as student" + (", predictor as predictor" if model.predictor else "")
    return read_huggingface(source)


def told(where: Any, model: IJEPA_base, taken: str) -> IJEPA_base:
    """The model, with a predictor in any case, once it is said where its parts come from."""
    if model.predictor is None:
        model.predictor, taken = Predictor(model.cfg).eval(), f"{taken}; the predictor is freshly initialised"
    print_line(f"{where}: {taken}")
    return model


# ---------------------------------------------------------------- Hugging Face


def from_huggingface(model_or_folder: nn.Module | str | Path) -> IJEPA_base:
    """An I-JEPA of Hugging Face's, as a model in evaluation mode.

    Hugging Face's format has one encoder. In the checkpoints that were converted from Meta's (facebook/ijepa_vith14_1k and others) it is
    Meta's context encoder, `encoder`: what we call the student, and not the target encoder that the paper evaluates. Here it becomes both:
    the teacher and, in memory of its own, the student. For Meta's target encoder read Meta's file, see `from_meta`.

    The predictor, which these checkpoints lack, is freshly initialised: half as wide as the encoder, 6 deep, asked for all target blocks in
    one sequence.

    Args:
        model_or_folder: a transformers.IJepaModel; a folder with config.json and safetensors; or a name on the hub, which is downloaded.

    Raises:
        CheckpointError: no such folder or name, a key that is missing, unexpected or of another shape, or a variant that is not I-JEPA's.
        ConfigError: a package of the extra is not installed.
    """
    if isinstance(model_or_folder, nn.Module):
        return told(type(model_or_folder).__name__, *read_huggingface(model_or_folder))
    folder = local_folder(model_or_folder)
    return told(folder, *read_huggingface(folder))


def read_huggingface(model_or_folder: nn.Module | str | Path) -> tuple[IJEPA_base, str]:
    """As `from_huggingface`, without a predictor; and what was taken as what, in words."""
    if isinstance(model_or_folder, nn.Module):
        where, config = type(model_or_folder).__name__, model_or_folder.config.to_dict()
        found = {name: value.to("cpu", copy=True) for name, value in in_file_names(model_or_folder.state_dict()).items()}
    else:
        folder = where = local_folder(model_or_folder)
        config, found = read_json(folder / "config.json"), read_safetensors(folder)
    cfg = config_of_huggingface(config, where)
    model = IJEPA_base.without_weights(cfg)
    names = huggingface_names(cfg.model.enc_depth)
    weights = under_our_names(found, names, model.teacher_encoder.state_dict(), where)
    model.teacher_encoder.load_state_dict(weights, assign=True)
    # The student's is a second private map of the file, which takes memory only when it is trained; but for what was joined already.
    again = {} if isinstance(model_or_folder, nn.Module) else read_safetensors(folder)
    own = {o: again[t[0]].float() if again and len(t) == 1 else weights[o].clone() for o, t in names.items()}
    model.student_encoder.load_state_dict(own, assign=True)
    model.predictor = None
    return model.eval(), "its one encoder (in Meta's published weights the context encoder) taken as teacher and student"


def to_huggingface(model: IJEPA_base, folder: str | Path, encoder: str = "teacher") -> Path:
    """Write an encoder as a folder that `transformers.IJepaModel.from_pretrained` reads: config.json and model.safetensors.

    Args:
        model: its encoder must be a vision transformer; a network of stages has no place in that format.
        folder: made if need be.
        encoder: "teacher", as in the paper, or "student".

    Raises:
        ConfigError: the encoder is a network of stages, or `safetensors` is not installed.
        CheckpointError: the folder cannot be written to.
    """
    net, m, folder = model.encoder(encoder), model.cfg.model, path_of(folder)
    if not isinstance(net, Encoder):
        raise ConfigError(f"model.classification_backbone = {m.classification_backbone!r} is no I-JEPA encoder: export it to .safetensors")
    config = {
        "architectures": ["IJepaModel"],
        "model_type": "ijepa",
        "image_size": m.img_size,
        "patch_size": m.patch_size,
        "num_channels": m.in_chans,
        "hidden_size": m.embed_dim,
        "num_hidden_layers": m.enc_depth,
        "num_attention_heads": m.num_heads,
        "intermediate_size": net.blocks[0].mlp[0].out_features,
        "layer_norm_eps": m.norm_eps,
        "hidden_act": "gelu",
        "qkv_bias": True,
    }
    weights, names = {name: value.cpu() for name, value in net.state_dict().items()}, huggingface_names(m.enc_depth)
    theirs = {t: part.contiguous() for o, ts in names.items() for t, part in zip(ts, weights[o].chunk(len(ts)), strict=True)}
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        optional("safetensors.torch", "'wejepa[interop]'").save_file(theirs, folder / "model.safetensors", metadata={"format": "pt"})
    compare(read_safetensors(folder), theirs, folder)
    return folder


def huggingface_names(depth: int) -> Names:
    """Our encoder's tensors in the names of Hugging Face's files."""
    names = pairs("patch_embed.proj", "embeddings.patch_embeddings.projection") | pairs("norm", "layernorm")
    names["pos_embed"] = ("embeddings.position_embeddings",)
    return names | blocks("blocks.{}.", "encoder.layer.{}.", HUGGINGFACE_BLOCK, depth)


def in_file_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A transformers model's tensors under the names of its files."""
    renamed = {}
    for name, value in tensors.items():
        for pattern, replacement in IN_MEMORY:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    return renamed


def config_of_huggingface(config: dict[str, Any], where: Any) -> IJepaConfig:
    """hf224_config at the sizes of a transformers config."""
    needed = {"model_type": "ijepa", "hidden_act": "gelu", "qkv_bias": True}
    for key, value in needed.items():
        if config.get(key, needed[key] if key != "model_type" else None) != value:
            raise CheckpointError(f"{where}: {key} is {config.get(key)!r}, and only {value!r} is I-JEPA's: take a checkpoint that has it")
    sizes = {
        "img_size": "image_size",
        "patch_size": "patch_size",
        "in_chans": "num_channels",
        "embed_dim": "hidden_size",
        "enc_depth": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "norm_eps": "layer_norm_eps",
    }
    # What transformers leaves out of a file is the default of its IJepaConfig.
    defaults = {"image_size": 224, "patch_size": 16, "num_channels": 3, "hidden_size": 768, "num_hidden_layers": 12}
    config = {**defaults, "num_attention_heads": 12, "intermediate_size": 3072, "layer_norm_eps": 1e-12, **config}
    found = {our: config[their] for our, their in sizes.items()}
    found["mlp_ratio"] = ratio(config["intermediate_size"], config["hidden_size"])
    return config_of_sizes(found, where, pred_dim=max(1, found["embed_dim"] // found["num_heads"] // 2) * found["num_heads"], pred_depth=6)


def local_folder(name: str | Path) -> Path:
    """A folder as it is; a name on the hub once it is downloaded."""
    folder = path_of(name)
    if folder.is_dir():
        return folder
    if looks_local(str(name)) or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        raise CheckpointError(
            f"there is no folder {name}: give one with config.json and safetensors, or a name such as 'facebook/ijepa_vith14_1k'"
        )
    hub = optional("huggingface_hub", "'wejepa[interop]'")
    try:
        return Path(hub.snapshot_download(str(name), allow_patterns=["config.json", "*.safetensors"]))
    except Exception as error:  # offline, no such name, no permission: the hub has a type for each
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{name} is no folder here and could not be downloaded ({reason}): go online once, or give a folder"
        ) from error


def local_copy(source: str | Path) -> str | Path:
    """A path as it was given; a name on the hub as the folder that it was downloaded into."""
    return source if path_of(source).exists() or looks_local(str(source)) or str(source) in PRETRAINED else local_folder(source)


def looks_local(name: str) -> bool:
    """Whether a name is meant as a path, though nothing is there: the hub is never asked for a path that was mistyped."""
    parent = path_of(name).parent
    return name.startswith((".", "/", "~", "\\")) or (parent != Path() and parent.is_dir()) or bool(FILE.search(name))


def read_safetensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files, mapped from them."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} holds no .safetensors: take a folder that save_pretrained wrote")
    safetensors, found = optional("safetensors", "'wejepa[interop]'"), {}
    for file in files:
        try:
            with safetensors.safe_open(file, "pt") as tensors:
                found |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118  (no mapping)
        except Exception as error:  # a truncated header, a file of another kind
            raise CheckpointError(f"{file} is truncated, damaged or no safetensors file ({error}): take another one") from error
    return found


def read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}): take a folder that save_pretrained wrote") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a {type(values).__name__}, not a config: take a folder that save_pretrained wrote")
    return values


# ---------------------------------------------------------------- Meta


def from_meta(path: str | Path, encoder: str = "target_encoder", num_heads: int | None = None) -> IJEPA_base:
    """An I-JEPA in the layout of Meta's published checkpoints, as a model in evaluation mode: student, teacher and predictor.

    All sizes are those of the tensors. The predictor has as many heads as the encoder. `model.blockwise_prediction` is true, so that what
    it predicts is what Meta's does, and `model.positions` is "sincos": the file's own, which stay fixed.

    Args:
        path: a .pth.tar file with `encoder`, `target_encoder` and `predictor`, their keys with or without "module."; its optimizer's state
            and what else it holds is left where it is.
        encoder: which becomes the teacher, the one that is evaluated: "target_encoder", as in the paper, or "encoder". The student is
            `encoder` in any case.
        num_heads: attention heads, which no tensor's shape tells; None for those of the published width (ViT-H 16, ViT-g 16).

    Raises:
        CheckpointError: no such file or part, or a key that is missing, unexpected or of another shape.
        ConfigError: an encoder that is not known, or a width whose heads are not.
    """
    path = path_of(path)
    return told(path, *read_meta(path, encoder, num_heads))


def read_meta(path: Path, encoder: str, num_heads: int | None) -> tuple[IJEPA_base, str]:
    """As `from_meta`; and what was taken as what, in words."""
    if encoder not in ("target_encoder", "encoder"):
        raise ConfigError(f"encoder = {encoder!r}: give 'target_encoder' or 'encoder'")
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}: check the path")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # the unpickler raises whatever a damaged byte makes it stumble over
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is truncated, damaged or no checkpoint ({reason}): take another one") from error
    parts = {}
    for part in ("encoder", "target_encoder", "predictor"):
        if not isinstance(state, dict) or not isinstance(state.get(part), dict):
            raise CheckpointError(f"{path} has no part {part!r}: take a checkpoint of I-JEPA's in Meta's layout")
        parts[part] = {name.removeprefix("module."): value for name, value in state[part].items() if isinstance(value, Tensor)}
    cfg = config_of_meta(parts, num_heads, path)
    model = IJEPA_base.without_weights(cfg)
    of_encoder = pairs("patch_embed.proj", "patch_embed.proj") | pairs("norm", "norm") | {"pos_embed": ("pos_embed",)}
    of_encoder |= blocks("blocks.{}.", "blocks.{}.", META_BLOCK, cfg.model.enc_depth)
    of_predictor = pairs("embed", "predictor_embed") | pairs("norm", "predictor_norm") | pairs("proj", "predictor_proj")
    of_predictor |= {"mask_token": ("mask_token",), "pos_embed": ("predictor_pos_embed",)}
    of_predictor |= blocks("blocks.{}.", "predictor_blocks.{}.", META_BLOCK, cfg.model.pred_depth)
    loads = [(model.student_encoder, "encoder", of_encoder), (model.teacher_encoder, "target_encoder", of_encoder)]
    loads.append((model.predictor, "predictor", of_predictor))
    for module, part, names in loads:
        module.load_state_dict(under_our_names(parts[part], names, module.state_dict(), f"{path}, {part}"), assign=True)
    if encoder == "encoder":
        model.teacher_encoder.load_state_dict(
            {name: value.clone() for name, value in model.student_encoder.state_dict().items()}, assign=True
        )
    return model.eval(), f"{encoder} taken as teacher, encoder as student, predictor as predictor"


def config_of_meta(parts: dict[str, dict[str, Tensor]], num_heads: int | None, path: Path) -> IJepaConfig:
    """hf224_config at the sizes of the tensors. What several tensors tell is put to the vote, so that an odd one is named later."""
    everything = [(part, name, tuple(value.shape)) for part, tensors in parts.items() for name, value in tensors.items()]

    def most_common(*votes: tuple[str, int], part: str = "") -> int:
        """The size that most tensors tell: those whose name in a part matches, each along the axis that goes with it."""
        named = [(shape, axis) for name, axis in votes for of, key, shape in everything if of.endswith(part) and re.fullmatch(name, key)]
        sizes = [shape[axis] for shape, axis in named if len(shape) > axis]
        if not sizes:
            raise CheckpointError(f"{path}: {votes[0][0]} is missing, which tells a size: take another checkpoint")
        return Counter(sizes).most_common(1)[0][0]

    def hidden(prefix: str, part: str) -> int:
        votes = ((rf"{prefix}\..*fc1\.weight", 0), (rf"{prefix}\..*fc1\.bias", 0), (rf"{prefix}\..*fc2\.weight", 1))
        return most_common(*votes, part=part)

    def depth(part: str, prefix: str) -> int:
        numbers = [int(found[1]) for name in parts[part] if (found := re.match(prefix + r"\.(\d+)\.", name))]
        if not numbers:
            raise CheckpointError(f"{path}, {part}: {prefix}.0.norm1.weight is missing: take a checkpoint of I-JEPA's in Meta's layout")
        return 1 + max(numbers)

    width = most_common((r"(blocks\..*)?norm\d?\.weight", 0), part="encoder")
    if num_heads is None and width not in HEADS:
        raise ConfigError(
            f"{path}: num_heads cannot be told from a width of {width}: give it, for model.start_from as model.num_heads beside "
            f"model.embed_dim = {width}"
        )
    side = math.isqrt(most_common((r"(predictor_)?pos_embed", 1)))
    patch_size = most_common((r"patch_embed\.proj\.weight", 3), part="encoder")
    narrow = most_common((r"predictor_(blocks\..*)?norm\d?\.weight", 0), part="predictor")
    found = {
        "img_size": side * patch_size,
        "patch_size": patch_size,
        "in_chans": most_common((r"patch_embed\.proj\.weight", 1), part="encoder"),
        "embed_dim": width,
        "enc_depth": depth("encoder", "blocks"),
        "num_heads": num_heads or HEADS[width],
        "mlp_ratio": ratio(hidden("blocks", "encoder"), width),
        "pred_mlp_ratio": ratio(hidden("predictor_blocks", "predictor"), narrow),
        "blockwise_prediction": True,
        "positions": "sincos",
    }
    return config_of_sizes(found, path, pred_dim=narrow, pred_depth=depth("predictor", "predictor_blocks"))


# ---------------------------------------------------------------- to elsewhere


def export(model: IJEPA_base | Classifier, path: str | Path, encoder: str = "teacher") -> Path:
    """Write one encoder, or a classifier, in the format that the path's ending names, read it back, and compare.

    Args:
        model: the model.
        path: .safetensors, tensors in our names; .pt2, a program of torch.export; .onnx; or, of an encoder, a folder in Hugging Face's
            format. The programs take images (B, C, S, S) of the config's size in batches of any size and give tokens (B, N, D), or a
            classifier's scores (B, classes).
        encoder: "teacher", as in the paper, or "student"; without meaning for a classifier.

    Returns:
        The path.

    Raises:
        ConfigError: an ending or encoder that is not known; a package of the extra is not installed.
        CheckpointError: it cannot be written, or what is read back differs.
    """
    whole, path = isinstance(model, Classifier), path_of(path)
    net, gives = (model, "scores") if whole else (model.encoder(encoder), "tokens")
    if whole and path.suffix not in (".safetensors", ".pt2", ".onnx"):
        raise ConfigError(f"{path}: give an ending of .safetensors, .pt2 or .onnx for a classifier")
    if path.is_dir() or not re.fullmatch(r"\.[A-Za-z]\w*", path.suffix):  # "encoder_v1.0" has no ending
        return to_huggingface(model, path, encoder)
    if path.suffix not in (".safetensors", ".pt2", ".onnx"):
        raise ConfigError(f"{path}: give an ending of .safetensors, .pt2 or .onnx, or none for a folder in Hugging Face's format")
    m = model.cfg.model
    if model.device.type != "cpu":  # a file is for any machine
        net = copy.deepcopy(net).cpu()
    net = net.eval()
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            weights = {name: value.contiguous() for name, value in net.state_dict().items()}
            library, about = optional("safetensors.torch", "'wejepa[interop]'"), {"format": "pt", "config": json.dumps(model.cfg.to_dict())}
            about |= {"classes": json.dumps(model.classes)} if whole else {"encoder": encoder}
            library.save_file(weights, path, metadata=about)
            compare(library.load_file(path), weights, path)
            return path
        images = torch.randn(2, m.in_chans, m.img_size, m.img_size, generator=torch.Generator().manual_seed(0))
        batch = {0: torch.export.Dim("batch")}
        if path.suffix == ".pt2":
            torch.export.save(torch.export.export(net, (images,), dynamic_shapes=(batch,)), path)
            read = torch.export.load(path).module()
        else:
            optional("onnxscript", "'wejepa[interop]'")
            shapes = {"dynamic_shapes": (batch,), "input_names": ["images"], "output_names": [gives]}
            torch.onnx.export(net, (images,), path, dynamo=True, verbose=False, **shapes)
            session = optional("onnxruntime", "'wejepa[interop]'").InferenceSession(path, providers=["CPUExecutionProvider"])
            read = lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0])  # noqa: E731
        with torch.no_grad():
            for x in (images, images[:1]):
                compare({gives: read(x)}, {gives: net(x)}, path, tolerance=1e-3)
    return path


def compare(read: dict[str, Tensor], written: dict[str, Tensor], path: Path, tolerance: float = 0.0) -> None:
    """Refuse what is read back differently from what was written; `tolerance` is relative to the largest number."""
    for name, value in written.items():
        same = name in read and read[name].shape == value.shape
        # Of NaN neither "more" nor "not more" is true.
        if not (same and float((read[name].to(value.device) - value).abs().max()) <= tolerance * float(value.abs().max())):
            raise CheckpointError(f"{path}: {name} is read back differently from what was written: write it elsewhere")


@contextlib.contextmanager
def writing(path: Path):
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot write {path} ({error}): choose another place") from error


# ---------------------------------------------------------------- what both readers share


def pairs(our: str, their: str) -> Names:
    """A module's weight and bias."""
    return {f"{our}.{part}": (f"{their}.{part}",) for part in ("weight", "bias")}


def blocks(our: str, their: str, modules: dict[str, tuple[str, ...]], depth: int) -> Names:
    """The weights and biases of all blocks; `our` and `their` are what stands before a module, with a place for the block's number."""
    return {
        f"{our.format(i)}{module}.{part}": tuple(f"{their.format(i)}{name}.{part}" for name in theirs)
        for i in range(depth)
        for module, theirs in modules.items()
        for part in ("weight", "bias")
    }


def under_our_names(found: dict[str, Tensor], names: Names, like: dict[str, Tensor], where: Any) -> dict[str, Tensor]:
    """Their tensors under our names, in float32, without a copy where they are that already.

    Raises:
        CheckpointError: naming the first key that is missing, unexpected or of another shape, and counting the others.
    """
    expected = {}
    for our, theirs in names.items():
        first, *rest = like[our].shape
        expected |= {their: f"{(first // len(theirs), *rest)}" for their in theirs}
    if fault := first_fault(describe(found), expected):
        raise CheckpointError(f"{where}: {fault}; take a checkpoint with exactly the keys of an I-JEPA of its size")
    parts: Iterable = ((our, [found[their].float() for their in theirs]) for our, theirs in names.items())
    return {our: tensors[0] if len(tensors) == 1 else torch.cat(tensors) for our, tensors in parts}


def ratio(hidden: int, width: int) -> float:
    """The mlp_ratio that makes `hidden` of `width`, rounding down."""
    value = hidden / width
    return value if int(width * value) == hidden else math.nextafter(value, math.inf)


def config_of_sizes(found: dict[str, Any], where: Any, **predictor: int) -> IJepaConfig:
    """hf224_config, whose images are normalised as the published encoders want it, at other sizes."""
    try:
        cfg = hf224_config().to_dict()
        cfg["model"] |= found | predictor
        return IJepaConfig.from_dict(cfg)
    except ConfigError as error:
        raise CheckpointError(f"{where} has sizes that wejepa does not take ({error})") from error


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0 done, 2 refused with one line on standard error."""
    parser = argparse.ArgumentParser(prog="python -m wejepa.interop", description="Convert I-JEPA checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True)
    convert = commands.add_parser("convert", help="read a checkpoint of one kind, write it as another")
    convert.add_argument("source", help="wejepa's .pt, Meta's .pth.tar, a Hugging Face folder, or a name on the hub")
    convert.add_argument("target", type=Path, help=".pt for wejepa; .safetensors, .pt2, .onnx, or a folder for transformers: one encoder")
    convert.add_argument("--encoder", choices=("teacher", "student"), default="teacher", help="which one, where one is written")
    convert.add_argument("--num-heads", type=int, help="attention heads of a .pth.tar whose width is none of the published ones")
    args = parser.parse_args(argv)

    def run() -> None:
        model = told(args.source, *read_weights(args.source, args.num_heads))
        if args.target.suffix == ".pt":
            save_model(args.target, model, source=args.source)
        else:
            export(model, args.target, args.encoder)
        print_line(f"written: {args.target}")

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
