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

CONFIG = replace(parity.CONFIG, num_experts=4)
ROWS = 2  # of a step, divided among the dp ranks
SAVED_AT = ParallelDims(1, 2, 2)


def third_step(_group: dist.ProcessGroup, sizes: ParallelDims, folder: Path, saves: bool):
    """Save after two steps in float64, or load. Return the third step's loss, and the weights and moments after it."""
    torch.manual_seed(0 if saves else 1)
    parallel = parity.mesh_of(sizes, "cpu")
    model = parallelize(GPT(CONFIG, parallel.cp_group).double(), parallel)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    config = TrainConfig(4, 1e-2, warmup_steps=2)
    trainer = Trainer(model, optimizer, config, parallel)
    full = parity.batch_of("packed", ROWS, CONFIG.vocab_size)
    layout = parity.layout_of("packed", sizes.cp)
    batches = parity.share_out(full, layout, parallel, torch.device("cpu"))
    checkpoints, parts = Checkpoints(folder, sizes=asdict(sizes)), (model, optimizer, trainer.scheduler)
    trainer.step(batches)  # loading must replace this state
    if saves:
        trainer.step(batches)
        checkpoints.save(2, *parts, {}, {"model": "GPT"})
    else:
        checkpoints.load(*parts, {"model": "GPT"})
    loss = trainer.step(batches).loss
    model.mtp.roller.close()
    return loss, {name: whole(value) for name, value in weights_and_moments(model, optimizer).items()}


@pytest.mark.slow
def test_a_model_continues_at_other_sizes(ranks: RankPool, tmp_path):
    expected, state = ranks.run(third_step, 4, SAVED_AT, tmp_path, True)[0]
    for sizes in (SAVED_AT, ParallelDims(2, 1, 2), ParallelDims(2, 2, 1)):
        for loss, found in ranks.run(third_step, 4, sizes, tmp_path, False):
            if sizes == SAVED_AT:
                assert loss == expected
                assert_same(found, state)
            assert loss == pytest.approx(expected, rel=1e-10)
            for name, value in state.items():
                np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-10, err_msg=name)
