"""A whole training step: masks, forward, backward, clipping, optimizer, teacher. What it costs, and what the processor could do.

    python -m benchmarks.step                  # both configurations, in float32 and bfloat16
    python -m benchmarks.step --compiled       # torch.compile as well, and when it pays
    python -m benchmarks.step --profile        # where the time of a step goes
    python -m benchmarks.step --avx2           # as on a processor without bfloat16
    python -m benchmarks.step --before PATH    # beside another checkout's step (git worktree add PATH COMMIT)

The share is of the rate of products of 1024 x 1024 matrices in the same run, in bfloat16 or, where there is none, in float32. It counts
only the arithmetic that the model needs: products of the student on its context, of the teacher on all patches, of the predictor on
context and targets; twice that again for the backward pass of what is trained. Norms, softmax, activations, masks and updates count as
nothing.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import (
    Contender,
    asked,
    in_turn,
    matrix_products,
    milliseconds,
    native_precision,
    parser,
    plain,
    product_arithmetic,
    ratio,
    tell,
)
from wejepa.config import DataConfig, HardwareConfig, IJepaConfig, MaskConfig, ModelConfig
from wejepa.masking import sample_block_masks
from wejepa.memory import freed_memory_kept
from wejepa.train.loop import Pretraining

CONFIGURATIONS = ("32 x 32", "224 x 224")
HERE = Path(__file__).resolve().parents[1]


def configuration(name: str, bfloat16: bool = True, compiled: bool = False) -> IJepaConfig:
    """The two that are measured, with targets of one shape, so that each step does the same work; or the "default" one, as it is.

    32 x 32 has patches of 4, width 192, depth 6, a predictor of 96 x 4, batches of 128, 10 context patches and 4 targets of 12;
    224 x 224 has patches of 16, width 384, depth 12, a predictor of 192 x 6, batches of 16, 65 context patches and 4 targets of 36.
    """
    if name == "default":
        model, mask, batch = ModelConfig(), MaskConfig(), DataConfig().train_batch_size
    elif name == "32 x 32":
        model = ModelConfig(img_size=32, patch_size=4, embed_dim=192, enc_depth=6, pred_dim=96, pred_depth=4, num_heads=6)
        mask = MaskConfig(target_scale=(12 / 64, 12 / 64), target_aspect_ratio=(0.75, 0.75), context_share=10 / 64)
        batch = 128
    else:
        model = ModelConfig(img_size=224, patch_size=16, embed_dim=384, enc_depth=12, pred_dim=192, pred_depth=6, num_heads=6)
        mask = MaskConfig(target_scale=(36 / 196, 36 / 196), target_aspect_ratio=(1.0, 1.0))
        batch = 16
    data = DataConfig(use_fake_data=True, fake_data_size=2 * batch, train_batch_size=batch)
    hardware = HardwareConfig(device="cpu", mixed_precision=bfloat16, compile_model=compiled, output_dir="outputs/benchmark")
    return IJepaConfig(data=data, mask=mask, model=model, hardware=hardware)


def images_of(cfg: IJepaConfig) -> torch.Tensor:
    return torch.randn(cfg.data.train_batch_size, cfg.model.in_chans, cfg.model.img_size, cfg.model.img_size)


def make_step(cfg: IJepaConfig) -> Callable[[], Any]:
    """The package's own step, as `Pretraining.run` takes it."""
    cfg = cfg.copy()
    cfg.hardware.output_dir += f"/{os.getpid()}"  # a run keeps others from its folder
    kept, run, images = freed_memory_kept(), Pretraining(cfg), images_of(cfg)
    kept.__enter__()

    def step(kept=kept) -> float:  # which lasts as long as the function
        return run.train_step(images)

    return step


def make_step_of(checkout: Path, cfg: dict[str, Any]) -> Callable[[], Any]:
    """The step of another checkout, in a process that has taken nothing from it yet."""
    for name in [name for name in sys.modules if name.split(".")[0] in ("wejepa", "benchmarks")]:
        del sys.modules[name]
    sys.path.insert(0, str(checkout))
    return importlib.import_module("benchmarks.step").make_step(importlib.import_module("wejepa.config").IJepaConfig.from_dict(cfg))


def beside(checkout: Path, args) -> None:
    """How many times as fast a step is here as in the other checkout, in turn, for each configuration and type."""
    rows, figures = [], {}
    for name in ("default", *args.only):
        for kind in dict.fromkeys((native_precision(), "float32")):
            cfg = configuration(name, kind == "bfloat16").to_dict()
            contenders = [
                Contender(when, make_step_of, (there, cfg), args.threads) for when, there in (("before", checkout), ("now", HERE))
            ]
            times = in_turn(contenders, args.repeats, clock=args.clock)
            gain = ratio(times["before"], times["now"])
            rows.append([f"{name}, {kind}", *milliseconds(times["before"]), *milliseconds(times["now"]), f"{gain:.2f}"])
            figures[rows[-1][0]] = plain(times) | {"ratio": gain}
    head = ["", "before, median, ms", "10 to 90 %, ms", "now, median, ms", "10 to 90 %, ms", "times as fast"]
    tell(f"A step before and now, {args.threads} thread(s), {args.clock} time", head, rows, figures, args)


def arithmetic(cfg: IJepaConfig) -> int:
    """Floating-point operations that one step needs."""
    m, grid = cfg.model, cfg.grid_size
    patches, context = grid[0] * grid[1], cfg.mask.num_context_patches(grid)
    asked = sample_block_masks(2, grid, cfg.mask, torch.Generator().manual_seed(0)).targets[0].numel()

    def transformer(tokens: int, width: int, depth: int) -> int:
        a_token = (4 + 2 * m.mlp_ratio) * width**2 + 2 * tokens * width  # its six matrices; products with all keys and values
        return int(tokens * depth * a_token)

    patch = m.in_chans * m.patch_size**2 * m.embed_dim
    student = context * patch + transformer(context, m.embed_dim, m.enc_depth)
    teacher = patches * patch + transformer(patches, m.embed_dim, m.enc_depth)
    predictor = (context + asked) * m.embed_dim * m.pred_dim + transformer(context + asked, m.pred_dim, m.pred_depth)
    # The last block gives no answer to the context: neither queries, projections, perceptron, nor rows of the attention.
    predictor -= int(context * ((2 + 2 * m.mlp_ratio) * m.pred_dim**2 + 2 * (context + asked) * m.pred_dim))
    return 2 * cfg.data.train_batch_size * (3 * student + teacher + 3 * predictor)  # a product and a sum each


def profile(cfg: IJepaConfig, steps: int = 5, rows: int = 14) -> list[tuple[str, float]]:
    """The share of the time that each kind of operation takes by itself, the largest first."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    step = make_step(cfg)
    for _ in range(3):
        step()
    with record(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(steps):
            step()
    spent = {event.key: event.self_cpu_time_total for event in recorded.key_averages()}
    total = sum(spent.values())
    ordered = sorted(((name.removeprefix("aten::"), time / total) for name, time in spent.items()), key=lambda pair: -pair[1])
    return [*ordered[:rows], ("all others", sum(share for _, share in ordered[rows:]))]


def compile_seconds(cfg: IJepaConfig) -> float:
    """What the first two steps take, in which it compiles."""
    step, start = make_step(cfg), time.perf_counter()
    for _ in range(2):
        step()
    return time.perf_counter() - start


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--only", choices=CONFIGURATIONS, nargs="+", default=CONFIGURATIONS)
    options.add_argument("--compiled", action="store_true", help="torch.compile as well")
    options.add_argument("--profile", action="store_true", help="print a profile instead")
    options.add_argument("--before", type=Path, help="another checkout, to time its step beside this one's")
    args = asked(options)
    if args.before:
        return beside(args.before.resolve(), args)
    native = native_precision()
    for name in args.only:
        if args.profile:
            shares = profile(configuration(name))
            tell(
                f"Profile of a {native} step, {name}",
                ["operation", "share, %"],
                [[k, f"{100 * v:.1f}"] for k, v in shares],
                dict(shares),
                args,
            )
            continue
        kinds = {"bfloat16": configuration(name), "float32": configuration(name, bfloat16=False)}
        kinds |= {f"{native}, compiled": configuration(name, compiled=True)} if args.compiled else {}
        kinds = {kind: cfg for kind, cfg in kinds.items() if kind.startswith((native, "float32"))}
        contenders = [Contender(kind, make_step, (cfg,), args.threads) for kind, cfg in kinds.items()]
        contenders += [
            Contender(f"products, {kind}", matrix_products, (kind,), args.threads) for kind in dict.fromkeys((native, "float32"))
        ]
        times = in_turn(contenders, args.repeats, clock=args.clock)
        rate = product_arithmetic() / times[f"products, {native}"].median
        rows, figures = [], plain(times)
        for kind, taken in times.items():
            images, work = (
                (configuration(name).data.train_batch_size, arithmetic(configuration(name))) if kind in kinds else (0, product_arithmetic())
            )
            reached = work / taken.median
            figures[kind] |= {"gflops": reached / 1e9, "share": reached / rate}
            cells = [f"{images / taken.median:.0f}" if images else "", f"{reached / 1e9:.0f}", f"{100 * reached / rate:.0f}"]
            rows.append([kind, *milliseconds(taken), *cells, f"{taken.memory / 2**20:.0f}" if images else ""])
        head = ["", "median, ms", "10 to 90 %, ms", "images/s", "GFLOP/s", f"% of the {native} products' rate", "memory, MiB"]
        tell(f"A step at {name}, {args.threads} thread(s), {args.clock} time", head, rows, figures, args)
        if args.compiled:
            spent = compile_seconds(configuration(name, compiled=True))
            saved = times[native].median - times[f"{native}, compiled"].median
            gain = ratio(times[native], times[f"{native}, compiled"])
            pays = f"pays after {spent / saved:.0f} steps" if saved > 0 else "never pays"
            print(
                f"\ntorch.compile: {gain:.2f} times as fast; the first two steps take {spent:.0f} s (less where its cache is warm): {pays}"
            )


if __name__ == "__main__":
    main()
