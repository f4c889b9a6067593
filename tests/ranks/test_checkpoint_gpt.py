"""Checkpoints of the model itself, with experts: saved at some sizes, loaded at others, bit-equal at the same."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import parity
import pytest
import torch
import torch.distributed as dist

from overlap_mtp.model.gpt import GPT
from overlap_mtp.training.checkpoint import Checkpoints
from overlap_mtp.training.parallel import ParallelDims, parallelize
from overlap_mtp.training.trainer import TrainConfig, Trainer

from rank_pool import RankPool
from tiny_runs import assert_same, weights_and_moments, whole

CONFIG = replace(parity.CONFIG, num_experts=4)
ROWS = 2  # of a step, shared out over the dp ranks
LOADED_AT = {
    ParallelDims(2, 1, 2): [ParallelDims(2, 1, 2), ParallelDims(1, 2, 2), ParallelDims(1, 1, 4)],
    ParallelDims(1, 2, 2): [ParallelDims(1, 2, 2), ParallelDims(2, 2, 1), ParallelDims(2, 1, 2)],
    ParallelDims(2, 2, 1): [ParallelDims(2, 2, 1), ParallelDims(1, 1, 4), ParallelDims(1, 4, 1)],
}  # by sizes saved at


class Run:
    """Two steps and two more, in float64, packed."""

    def __init__(self, sizes: ParallelDims, folder: Path, seed: int) -> None:
        torch.manual_seed(seed)
        parallel = parity.mesh_of(sizes, "cpu")
        self.model = parallelize(GPT(CONFIG, parallel.cp_group).double(), parallel)
        optimizer = torch.optim.AdamW(self.model.parameters(), 1e-2)
        recipe = TrainConfig(4, 1e-2, warmup_steps=2, accumulate=ROWS // sizes.dp)
        self.trainer = Trainer(self.model, optimizer, recipe, parallel)
        layout = parity.layout_of("packed", sizes.cp)
        full = parity.batch_of("packed", ROWS, CONFIG.vocab_size)
        self.batches = parity.share_out(full, layout, parallel, torch.device("cpu"))
        self.checkpoints = Checkpoints(folder, sizes=asdict(sizes))

    @property
    def parts(self) -> tuple[GPT, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        return self.model, self.trainer.optimizer, self.trainer.scheduler

    def train(self) -> list[float]:
        return [self.trainer.step(self.batches).loss for _ in range(2)]

    def end(self) -> dict[str, np.ndarray]:
        """The weights and moments. Collective."""
        self.model.mtp.roller.close()
        found = weights_and_moments(self.model, self.trainer.optimizer)
        return {name: whole(value) for name, value in found.items()}


def save_and_go_on(_group: dist.ProcessGroup, sizes: ParallelDims, folder: Path) -> tuple[list[float], dict]:
    run = Run(sizes, folder, seed=0)
    run.train()
    run.checkpoints.save(2, *run.parts, {}, {"model": "GPT"})
    return run.train(), run.end()


def load_and_go_on(_group: dist.ProcessGroup, sizes: ParallelDims, folder: Path) -> tuple[list[float], dict]:
    run = Run(sizes, folder, seed=1)
    run.train()  # what is there must go
    run.checkpoints.load(*run.parts, {"model": "GPT"})
    return run.train(), run.end()


@pytest.mark.slow
@pytest.mark.parametrize("saved_at", LOADED_AT, ids=str)
def test_a_model_goes_on_at_other_sizes(ranks: RankPool, tmp_path, saved_at):
    expected, state = ranks.run(save_and_go_on, 4, saved_at, tmp_path)[0]
    for sizes in LOADED_AT[saved_at]:
        for losses, found in ranks.run(load_and_go_on, 4, sizes, tmp_path):
            if sizes == saved_at:
                assert losses == expected
                assert_same(found, state)
            assert losses == pytest.approx(expected, rel=1e-10)
            for name, value in state.items():
                np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-10, err_msg=name)
