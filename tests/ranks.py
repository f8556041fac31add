"""What test_distributed.py starts on several processes: the same short runs in one group, their losses and weights written to a folder.

torchrun --standalone --nproc-per-node=2 tests/ranks.py FOLDER
"""

import json
import os
import sys
import time
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

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
from wejepa.model import IJepaLoss
from wejepa.train.folder import CheckpointFolder
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


def train(cfg: IJepaConfig, resume=None, break_synchronisation=False) -> dict:
    """Run to the end; the loss of every step, the history, and whether all processes hold the same weights."""
    run = Pretraining(cfg, resume)
    if break_synchronisation:
        run.loss = IJepaLoss(run.model)
    losses, step = [], run.train_step

    def recorded(images):
        losses.append(run.ranks.sum(value := step(images))[0] / run.ranks.world)
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


def slow_save(self, state: dict, save=CheckpointFolder.save) -> Path:
    time.sleep(0.5)
    return save(self, state)


def main(folder: Path) -> None:
    results = {}
    cfg = tiny_config(folder / "plain")
    results["plain"] = train(cfg)
    cfg = tiny_config(folder / "accumulated")
    cfg.optimizer.accumulation_steps = 2
    results["accumulated"] = train(cfg)
    results["broken"] = train(tiny_config(folder / "broken"), break_synchronisation=True)
    cfg = tiny_config(folder / "sharded")
    cfg.hardware.shard_model = True
    cfg.hardware.checkpoint_every, cfg.hardware.keep_checkpoints = 1, 5
    results["sharded"] = train(cfg)
    cfg = tiny_config(folder / "slowly written")  # its one checkpoint is not there yet when the other process looks for it
    cfg.hardware.shard_model = True
    with mock.patch.object(CheckpointFolder, "save", slow_save):
        results["slowly written"] = train(cfg)
    cfg = tiny_config(folder / "sharded")
    cfg.hardware.shard_model = True
    results["resumed sharded"] = train(cfg, resume=folder / "sharded" / f"step_{STEPS // 2:08d}.pt")
    cfg = adapt_config_for_backbone(default_config(), "mobilenet_v3_small")
    cfg.data = DataConfig(use_fake_data=True, fake_data_size=20, train_batch_size=8, eval_batch_size=16)
    cfg.optimizer.epochs = 2
    for name, sharded in (("batch normalised", False), ("batch normalised and sharded", True)):
        cfg.hardware = HardwareConfig(device="cpu", mixed_precision=False, shard_model=sharded, output_dir=str(folder / name))
        results[name] = train(cfg)
    if dist.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(results))
    Ranks(dist.get_rank(), dist.get_world_size(), torch.device("cpu")).leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # as wejepa.train.pretrain ends under torchrun
