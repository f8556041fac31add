"""Write what the website's live pages load: weights, images and a training run, as safetensors files, which JavaScript reads easily.

    python scripts/make_live_data.py live FOLDER      # quick; every build of the website does it
    python scripts/make_live_data.py replay RUN       # from a run's ten checkpoints; what it writes is committed

`live` writes `weights.safetensors`, the model `fashion` as it ships, and `images.safetensors`: images to try, images whose patches stand
for predicted tokens, the same encoder untrained, and each place's mean token; and the page's first picture as four images, for the moment
before the page computes, and for browsers without JavaScript. Beside each file lies its copy as a script, because a page
that is opened from a folder instead of a server may load scripts and nothing else.

RUN is the folder in which `scripts/make_weights.py train fashion` left its checkpoints. From them, and from the weights that the run began
with, `replay` writes website/static/replay.safetensors.
"""

import argparse
import base64
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import save
from torch import Tensor

from wejepa import load_images, load_pretrained
from wejepa.analysis.attention import prediction_errors
from wejepa.config import IJepaConfig, MaskConfig
from wejepa.data.embedded import asset, emoji_images, emoji_index, fashion_images
from wejepa.data.sources import MemoryImages
from wejepa.files import replaced
from wejepa.masking import Masks
from wejepa.model import Encoder, IJEPA_base
from wejepa.pretrained import pretrained_facts
from wejepa.train.checkpoints import load_model

STATIC = Path(__file__).resolve().parent.parent / "website" / "static"
SHOWN = 3  # test images of each class of Fashion-MNIST
EMOJI = ("dog", "cat", "pizza", "rocket", "grinning", "car", "tulip", "guitar")
BANK = 320  # training images whose patches stand for predicted tokens
FIRST = 21  # of the images to try: a shoe, whose left half the page shows first
REPLAYED = 6  # images whose training is replayed
# As in website/static/ui.js.
SIDE, HIDDEN, SKIPPED, HATCH = 384, "#8aa4c4", "#d5d8dc", "#878f99"
CIVIDIS = ((0, 34, 78), (24, 55, 109), (59, 73, 108), (87, 92, 109), (112, 113, 115), (138, 134, 120), (165, 156, 116), (195, 179, 105))
CIVIDIS += ((225, 204, 85), (254, 232, 56))


def images_of_each(labels: Tensor, count: int) -> Tensor:
    """The first `count` images of every class, one class after the other."""
    return torch.cat([(labels == c).nonzero().flatten()[:count] for c in labels.unique()])


def untrained(cfg: IJepaConfig) -> IJEPA_base:
    """The model with the weights that its run began with, rounded as those that ship."""
    torch.manual_seed(cfg.hardware.seed)
    return IJEPA_base(cfg).half().float().eval()


@torch.no_grad()
def layer_tokens(encoder: Encoder, images: Tensor) -> list[Tensor]:
    """The tokens (B, N, D) after each block; those of the last one after the final norm as well."""
    x, layers = encoder.tokens(images), []
    for block in encoder.blocks:
        x = block(x)
        layers.append(x)
    return [*layers[:-1], encoder.norm(x)]


def emoji_to_try() -> tuple[Tensor, list[str]]:
    """Emoji by both vendors, one after the other: bytes (N, 3, 64, 64), and their names."""
    found, names = [], []
    for split in ("train", "test"):
        images, _, _ = emoji_images(split)
        for k, emoji in enumerate(emoji_index(split)):
            if emoji.name in EMOJI:
                found.append(images[k])
                names.append(f"{emoji.name.replace('_', ' ')}, drawn by {emoji.vendor.title()}")
    order = sorted(range(len(names)), key=lambda k: (EMOJI.index(names[k].split(",")[0].replace(" ", "_")), names[k]))
    return torch.stack([found[k] for k in order]), [names[k] for k in order]


def write(file: Path, tensors: dict[str, Tensor] | bytes, notes: dict | None = None) -> None:
    """A safetensors file, notes of any kind in its header."""
    content = tensors if isinstance(tensors, bytes) else save(tensors, {"notes": json.dumps(notes)} if notes else None)
    with replaced(file) as aside:
        aside.write_bytes(content)
    print(f"{file.name}: {len(content):,} bytes")


def write_script(file: Path, folder: Path) -> None:
    """The file's copy as a script that calls `wejepa.arrived` with it."""
    text = base64.b64encode(file.read_bytes()).decode()
    with replaced(folder / f"{file.stem}.data.js") as aside:
        aside.write_text(f'wejepa.arrived("{file.stem}", "{text}");\n')


@torch.no_grad()
def first_prediction(model: IJEPA_base, image: Tensor, bank: Tensor) -> tuple[list[int | None], Tensor]:
    """What the page shows first: the left half of an image (3, 32, 32) is seen.

    Returns:
        For each place the image of `bank` (B, 3, 32, 32) whose token is nearest to the prediction, None where nothing is predicted; and
        the predictions' errors (N), 0 there.
    """
    places = torch.arange(64)
    left = places % 8 < 4
    predicted, targets = model(image[None], Masks(places[left][None], places[~left][None, None]))
    tokens = F.layer_norm(model.teacher_encoder(bank), (predicted.shape[-1],))[:, ~left]  # (B, 32, D)
    nearest: list[int | None] = [None] * 64
    for place, item in zip(places[~left].tolist(), (predicted[0, 0] - tokens).square().sum(-1).argmin(0).tolist(), strict=True):
        nearest[place] = item
    errors = torch.zeros(64)
    errors[~left] = F.smooth_l1_loss(predicted[0, 0], targets[0, 0], reduction="none").mean(-1)
    return nearest, errors


def first_pictures(image: Tensor, bank: Tensor, nearest: list[int | None], errors: Tensor) -> dict[str, Image.Image]:
    """The page's four boards as it draws them, of an image (32, 32) and others (B, 32, 32) in bytes."""
    whole = Image.fromarray(image.numpy()).convert("RGB").resize((SIDE, SIDE), Image.Resampling.NEAREST)
    boards = {"image": whole, "context": whole.copy(), "prediction": whole.copy(), "error": whole.copy()}
    draw, cell = {name: ImageDraw.Draw(board) for name, board in boards.items()}, SIDE // 8
    for place, item in enumerate(nearest):
        x, y = place % 8 * cell, place // 8 * cell
        box = (x, y, x + cell - 1, y + cell - 1)
        if item is None:
            draw["error"].rectangle(box, SKIPPED)
            for k in range(12, 2 * cell, 12):
                for name in ("prediction", "error"):
                    ends = (x + max(0, k - cell), y + min(k, cell) - 1, x + min(k, cell) - 1, y + max(0, k - cell))
                    draw[name].line(ends, HATCH, width=2)
            continue
        draw["context"].rectangle(box, HIDDEN)
        patch = Image.fromarray(bank[item].numpy()).crop((place % 8 * 4, place // 8 * 4, place % 8 * 4 + 4, place // 8 * 4 + 4))
        boards["prediction"].paste(patch.convert("RGB").resize((cell, cell), Image.Resampling.NEAREST), (x, y))
        at = min(0.9999, errors[place].item() / 0.6) * (len(CIVIDIS) - 1)
        low, high = CIVIDIS[int(at)], CIVIDIS[int(at) + 1]
        draw["error"].rectangle(box, tuple(round(a + at % 1 * (b - a)) for a, b in zip(low, high, strict=True)))
    return boards


def write_live(folder: Path) -> None:
    """Everything but the replay, which is committed; its copy as a script is written here."""
    model = load_pretrained("fashion")
    source, fresh = load_images(model.cfg, "train"), untrained(model.cfg)
    pixels, labels, classes = fashion_images("test")
    shown = images_of_each(labels, SHOWN)
    emoji, names = emoji_to_try()
    size = model.cfg.model.img_size
    small = F.interpolate(emoji.float(), size=(size, size), mode="bilinear", antialias=True).round().byte()
    bank, bank_labels, _ = fashion_images("train")
    bank_index = images_of_each(bank_labels, BANK // len(classes))
    typical = next(source.batches(torch.arange(1000), 1000))  # images in their given order are of all classes
    teacher = layer_tokens(model.teacher_encoder, typical)
    last = F.layer_norm(teacher[-1], teacher[-1].shape[-1:])
    means = [torch.stack([tokens.mean(0) for tokens in layers]) for layers in (teacher, layer_tokens(fresh.teacher_encoder, typical))]
    tensors = {
        "grey": pixels[shown, 0].contiguous(),  # (N, 32, 32)
        "colour": small,  # (N, 3, 32, 32)
        "bank": bank[bank_index, 0].contiguous(),
        "layer_means": torch.stack(means),  # (trained and not, layers, N, D)
        "target_means": last.mean(0),  # (N, D)
    }
    shoe = next(load_images(model.cfg, "test").batches(shown[FIRST : FIRST + 1], 1))[0]
    nearest, errors = first_prediction(model, shoe, next(source.batches(bank_index, len(bank_index))))
    tensors |= {f"untrained_encoder.{name}": value.half() for name, value in fresh.teacher_encoder.state_dict().items()}
    notes = {
        "names": [classes[c] for c in labels[shown].tolist()] + names,
        "mean": source.mean[0],
        "std": source.std[0],
        "heads": model.cfg.model.num_heads,
        "accuracy": pretrained_facts("fashion")["accuracy"],
        "first": {"image": FIRST, "nearest": nearest},
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, board in first_pictures(pixels[shown[FIRST], 0], bank[bank_index, 0], nearest, errors).items():
        with replaced(folder / f"first-{name}.png") as aside:
            board.quantize(64, dither=Image.Dither.NONE).save(aside, format="PNG")
    write(folder / "weights.safetensors", asset("fashion.safetensors"))
    write(folder / "images.safetensors", tensors, notes)
    for file in (folder / "weights.safetensors", folder / "images.safetensors", STATIC / "replay.safetensors"):
        write_script(file, folder)


def aligned_colours(tokens: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
    """Tokens (B, N, D) as bytes (B, N, 3): three principal components, rotated to match those before as closely as possible.

    The components of two checkpoints may come in another order, or with another sign, although little has changed.

    Returns:
        The bytes, and the components (B * N, 3) that the next checkpoint is turned to.
    """
    flat = tokens.flatten(0, 1)
    flat = flat - flat.mean(0)
    u, s, _ = torch.linalg.svd(flat, full_matrices=False)
    parts = u[:, :3] * s[:3]
    parts = parts / parts.std()
    if before is not None:
        left, _, right = torch.linalg.svd(parts.T @ before)
        parts = parts @ left @ right
    low, high = torch.quantile(parts, torch.tensor([0.02, 0.98]), dim=0)
    colours = ((parts - low) / (high - low)).clamp(0, 1).mul(255).round().byte()
    return colours.view(*tokens.shape[:2], 3), parts


def write_replay(run: Path) -> None:
    """Tokens, colours and prediction errors of a few images at each checkpoint, and the monitors of every epoch."""
    facts = pretrained_facts("fashion")
    cfg = IJepaConfig.from_dict(facts["config"])
    pixels, labels, classes = fashion_images("test")
    index = images_of_each(labels, 1)[[0, 1, 7, 5, 8, 9]][:REPLAYED]
    source = load_images(cfg, "test")
    assert isinstance(source, MemoryImages)
    images = next(source.batches(index, len(index)))
    epochs, tokens, colours, errors, before = [0], [], [], [], None
    checkpoints = sorted(run.glob("step_*.pt"))
    steps = {line["step"]: line["epoch"] for line in facts["history"]}
    for checkpoint in [None, *checkpoints]:
        model = untrained(cfg) if checkpoint is None else load_model(checkpoint)
        if checkpoint is not None:
            epochs.append(steps[int(checkpoint.stem.removeprefix("step_"))])
        found = model.encode(images).detach()
        painted, before = aligned_colours(found, before)
        error = prediction_errors(model, images, MaskConfig(), samples=400, generator=torch.Generator().manual_seed(0))
        scale = found.abs().amax((1, 2), keepdim=True) / 127
        tokens.append((found / scale).round().to(torch.int8))  # the scale does not matter: they are compared by their cosines
        colours.append(painted)
        errors.append(error.flatten(1).half())
    tensors = {"tokens": torch.stack(tokens), "colours": torch.stack(colours), "errors": torch.stack(errors)}
    tensors["images"] = pixels[index, 0].contiguous()
    monitors = {name: [round(line[name], 4) for line in facts["history"]] for name in ("loss", "teacher_variance", "rankme", "knn")}
    write(STATIC / "replay.safetensors", tensors, {"epochs": epochs, "names": [classes[c] for c in labels[index].tolist()], **monitors})


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the data of the website's live pages.")
    parser.add_argument("command", choices=("live", "replay"))
    parser.add_argument("folder", type=Path, help="where to write (live), or the run's folder (replay)")
    args = parser.parse_args()
    (write_live if args.command == "live" else write_replay)(args.folder)


if __name__ == "__main__":
    main()
