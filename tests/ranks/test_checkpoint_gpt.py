"""Checkpoints of a GPT with experts load at other sizes, and are bit-equal at the same sizes."""

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

End = tuple[float, dict[str, np.ndarray]]
CONFIG = replace(parity.CONFIG, num_experts=4)
ROWS = 2  # of a step, divided among the dp ranks
LOADED_AT = {
    ParallelDims(2, 1, 2): [ParallelDims(2, 1, 2), ParallelDims(1, 2, 2)],
    ParallelDims(1, 2, 2): [ParallelDims(2, 2, 1), ParallelDims(1, 1, 4)],
}  # by the sizes that it was saved at


class Run:
    """A run in float64 on packed documents."""

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

        self.parts = self.model, optimizer, self.trainer.scheduler

    def train(self) -> float:
        return self.trainer.step(self.batches).loss

    def end(self) -> End:
        """Take a step. Return its loss, and the weights and moments afterwards. Collective."""
        loss = self.train()
        self.model.mtp.roller.close()
        found = weights_and_moments(self.model, self.trainer.optimizer)
        return loss, {name: whole(value) for name, value in found.items()}


def save_and_continue(_group: dist.ProcessGroup, sizes: ParallelDims, folder: Path) -> End:
    run = Run(sizes, folder, seed=0)
    run.train()
    run.train()
    run.checkpoints.save(2, *run.parts, {}, {"model": "GPT"})
    return run.end()


def load_and_continue(_group: dist.ProcessGroup, sizes: ParallelDims, folder: Path) -> End:
    run = Run(sizes, folder, seed=1)
    run.train()  # loading must replace this state
    run.checkpoints.load(*run.parts, {"model": "GPT"})
    return run.end()


@pytest.mark.slow
@pytest.mark.parametrize("saved_at", LOADED_AT, ids=str)
def test_a_model_continues_at_other_sizes(ranks: RankPool, tmp_path, saved_at):
    expected, state = ranks.run(save_and_continue, 4, saved_at, tmp_path)[0]
    for sizes in LOADED_AT[saved_at]:
        for loss, found in ranks.run(load_and_continue, 4, sizes, tmp_path):
            if sizes == saved_at:
                assert loss == expected
                assert_same(found, state)
            assert loss == pytest.approx(expected, rel=1e-10)
            for name, value in state.items():
                np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-10, err_msg=name)
