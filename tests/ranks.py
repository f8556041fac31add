"""What test_distributed.py starts on several processes: the same short runs in one group, their losses and weights written to a folder.

torchrun --standalone --nproc-per-node=2 tests/ranks.py FOLDER
torchrun --standalone --nproc-per-node=3 tests/ranks.py FOLDER twelve    # goes on from what the two have written
"""

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from wejepa import devices
from wejepa.config import (
    DataConfig,
    HardwareConfig,
    IJepaConfig,
    MaskConfig,
    ModelConfig,
    OptimizerConfig,
    adapt_config_for_backbone,
    default_config,
)
from wejepa.errors import CheckpointError
from wejepa.model import Block, IJepaLoss
from wejepa.train import checkpoints, sharded
from wejepa.train.folder import CheckpointFolder
from wejepa.train.lock import LOCK
from wejepa.train.loop import Pretraining
from wejepa.train.ranks import Ranks, gathered

STEPS = 20


def tiny_config(output: Path) -> IJepaConfig:
    """Twenty steps of eight images, in two epochs."""
    return IJepaConfig(
        data=DataConfig(use_fake_data=True, fake_data_size=STEPS // 2 * 8, train_batch_size=8, eval_batch_size=16),
        mask=MaskConfig(target_scale=(0.1, 0.2), num_target_blocks=2, context_share=0.3),
        model=ModelConfig(img_size=16, patch_size=4, in_chans=1, embed_dim=16, enc_depth=2, pred_depth=1, pred_dim=12, num_heads=2),
        optimizer=OptimizerConfig(epochs=2, warmup_epochs=1, base_learning_rate=5e-3, momentum_teacher=0.5),
        hardware=HardwareConfig(device="cpu", mixed_precision=False, output_dir=str(output)),
    )


def train(cfg: IJepaConfig, resume=None, break_synchronisation=False, **parts) -> dict:
    """Run to the end; the loss of every step, the history, and whether all processes hold the same weights."""
    run = Pretraining(cfg, resume, **parts)
    if break_synchronisation:
        run.loss = IJepaLoss(run.model)
    losses, step = [], run.train_step

    def recorded(images):
        losses.append(run.ranks.sum(float(value := step(images)))[0] / run.ranks.world)
        return value

    run.train_step = recorded
    run.run()
    flat = torch.cat([gathered(p.detach()).flatten() for p in run.model.parameters()]).double()
    mine, firsts = flat.clone(), flat.clone()
    if run.ranks.world > 1:
        dist.broadcast(firsts, 0)
    same = run.ranks.sum(float(torch.equal(mine, firsts)))[0] == run.ranks.world
    told = run.ranks.sum(float(len(run.history[-1])))[0] == run.ranks.world * len(run.history[-1])
    return {
        "every_process_knows_the_history": told,
        "losses": losses,
        "history": run.history,
        "same_weights": same,
        "weights": flat.tolist(),
    }


@contextlib.contextmanager
def heard(types: set[str]):
    """Note the types in which a block has its matrices as it computes, and gives its tokens."""
    mlp, block = nn.Sequential.forward, Block.forward

    def noted_weights(layers, x):
        types.add(f"weights {layers[0].weight.dtype}")
        return mlp(layers, x)

    def noted_tokens(self, x, skip=0):
        result = block(self, x, skip)
        types.add(f"tokens {result.dtype}")
        return result

    with mock.patch.object(nn.Sequential, "forward", noted_weights), mock.patch.object(Block, "forward", noted_tokens):
        yield


def twelve_config(output: Path) -> IJepaConfig:
    """Six steps of twelve images, which two and three processes can share, in two epochs."""
    cfg = tiny_config(output)
    cfg.data.train_batch_size, cfg.data.fake_data_size = 12, 36
    cfg.hardware.shard_model, cfg.hardware.checkpoint_every, cfg.hardware.keep_checkpoints = True, 1, 5
    return cfg


def slow_save(self, state: dict, ranks: Ranks, save=CheckpointFolder.save) -> Path:
    if ranks.first:
        time.sleep(0.5)
    return save(self, state, ranks)


def refusal(ranks: Ranks, work) -> list[str]:
    """The error of every process."""
    try:
        work()
    except CheckpointError as error:
        return ranks.gather(str(error))
    return ranks.gather("nothing was refused")


def befallen(folder: Path) -> dict:
    """What becomes of a sharded run whose second process cannot write, and of one whose second process's part is damaged."""
    cfg = tiny_config(folder / "befallen")
    cfg.hardware.shard_model = True
    run, full = Pretraining(cfg), OSError(28, "No space left on device")
    results = {}
    for name, owner, method in (("while the parts are written", os, "fsync"), ("afterwards", sharded, "signature")):
        with mock.patch.object(owner, method, side_effect=full) if run.ranks.rank == 1 else contextlib.nullcontext():
            results[name] = refusal(run.ranks, run.save)
    results["left"] = sorted(path.name for path in run.output.iterdir() if path.name != LOCK)

    cfg = tiny_config(folder / "sharded")
    cfg.hardware.shard_model = True
    newest = folder / "sharded" / f"step_{STEPS:08d}.pt"
    if run.ranks.first:
        content = bytearray((newest / "__1_0.distcp").read_bytes())
        content[len(content) // 2] ^= 1
        (newest / "__1_0.distcp").write_bytes(content)
    run.ranks.sum(0)
    results["damaged"] = refusal(run.ranks, lambda: Pretraining(cfg, resume=newest))
    return results


def write_unlike(folder: Path, ranks: Ranks) -> None:
    """Tensors that every process has whole and each another, as batch normalisation's running averages are."""
    unlike = {f"model/{number}": torch.full((3,), float(ranks.rank)) for number in range(10)}
    sharded.write_shards(folder / "unlike.pt", unlike, {"format": checkpoints.FORMAT}, ranks)


def never_whole(folder: Path) -> bool:
    """Write and read a sharded checkpoint where putting a tensor's parts together is an error."""
    cfg = tiny_config(folder / "never whole")
    cfg.hardware.shard_model = True
    forbidden = {"side_effect": AssertionError("the whole state")}
    with mock.patch.object(DTensor, "full_tensor", **forbidden), mock.patch.object(checkpoints, "load_checkpoint", **forbidden):
        run = Pretraining(cfg)
        run.step, run.losses = 1, [0.5]
        run.save()
        weights = Pretraining(cfg, "auto").model.state_dict().items()
    mine = run.model.state_dict()
    return all(isinstance(value, DTensor) and torch.equal(value.to_local(), mine[name].to_local()) for name, value in weights)


def main(folder: Path) -> None:
    results = {}
    cfg = tiny_config(folder / "plain")
    cfg.hardware.checkpoint_every, cfg.hardware.keep_checkpoints = 1, 5
    results["plain"] = train(cfg)
    cfg = tiny_config(folder / "sharded from a file")
    cfg.hardware.shard_model = True
    results["sharded from a file"] = train(cfg, resume=folder / "plain" / f"step_{STEPS // 2:08d}.pt")
    cfg = tiny_config(folder / "accumulated")
    cfg.optimizer.accumulation_steps = 2
    results["accumulated"] = train(cfg)
    cfg = tiny_config(folder / "muon")
    cfg.optimizer.kind = "muon"
    results["muon"] = train(cfg)
    results["broken"] = train(tiny_config(folder / "broken"), break_synchronisation=True)
    cfg = tiny_config(folder / "sharded")
    cfg.hardware.shard_model = True
    cfg.hardware.checkpoint_every, cfg.hardware.keep_checkpoints = 1, 5
    results["sharded"] = train(cfg)
    cfg = tiny_config(folder / "sharded in bfloat16")
    cfg.hardware.shard_model, cfg.hardware.mixed_precision = True, True
    types = set()
    allowed = mock.patch.dict(os.environ, {"WEJEPA_MIXED_PRECISION": "1"})  # the suite may be run in float32
    with mock.patch.object(devices, "computes_bfloat16", lambda device: True), allowed, heard(types):
        results["sharded in bfloat16"] = train(cfg) | {"types": sorted(types)}
    cfg = tiny_config(folder / "slowly written")  # its one checkpoint is not there yet when the other process looks for it
    cfg.hardware.shard_model = True
    with mock.patch.object(CheckpointFolder, "save", slow_save):
        results["slowly written"] = train(cfg)
    cfg = tiny_config(folder / "sharded")
    cfg.hardware.shard_model = True
    results["resumed sharded"] = train(cfg, resume=folder / "sharded" / f"step_{STEPS // 2:08d}.pt")
    results["befallen"], results["never whole"] = befallen(folder), never_whole(folder)
    write_unlike(folder, Ranks(dist.get_rank(), dist.get_world_size(), torch.device("cpu")))
    results["past the damaged one"] = train(cfg, resume="auto")
    results["twelve"] = train(twelve_config(folder / "twelve"))
    cfg = adapt_config_for_backbone(default_config(), "mobilenet_v3_small")
    cfg.data = DataConfig(use_fake_data=True, fake_data_size=20, train_batch_size=8, eval_batch_size=16)
    cfg.optimizer.epochs = 2
    for name, shards in (("batch normalised", False), ("batch normalised and sharded", True)):
        cfg.hardware = HardwareConfig(device="cpu", mixed_precision=False, shard_model=shards, output_dir=str(folder / name))
        results[name] = train(cfg)
    leave(results, folder / "results.json")


def go_on(folder: Path) -> None:
    """On another number of processes."""
    cfg = twelve_config(folder / "twelve on three")
    leave(train(cfg, resume=folder / "twelve" / "step_00000003.pt"), folder / "three.json")


def leave(results: dict, path: Path) -> None:
    if dist.get_rank() == 0:
        path.write_text(json.dumps(results))
    Ranks(dist.get_rank(), dist.get_world_size(), torch.device("cpu")).leave()


if __name__ == "__main__":
    (go_on if sys.argv[2:] else main)(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # as wejepa.train.pretrain ends under torchrun
