"""Parity of several ranks with one process on GPUs, and compiled layers."""

from __future__ import annotations

import parity
import pytest
import torch
import torch.distributed as dist

from overlap_mtp.training.parallel import ParallelDims, parallelize
from overlap_mtp.training.trainer import TrainConfig, Trainer

from rank_pool import RankPool, device_of

pytestmark = pytest.mark.multi_gpu


def test_four_ranks_equal_one_process_on_the_gpus_there_are(tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two or more GPUs")
    cases = [
        parity.Case(1, 4, 1, "packed", False, "float32", 4),
        parity.Case(2, 2, 1, "packed", True, "float32", 4),
        parity.Case(1, 4, 1, "dense", True, "bfloat16"),
        parity.Case(2, 1, 2, "dense", False, "bfloat16"),
    ]
    for row in parity.measure(cases, "cuda", tmp_path, share_gpus=True)["rows"]:
        assert 0 < row["gradient_error"] <= parity.TOLERANCE[row["dtype"]], row
        assert row["loss_error"] <= parity.TOLERANCE[row["dtype"]], row


def with_and_without_compiling(
    world: dist.ProcessGroup, dims: ParallelDims, recompute: bool
) -> dict[str, float]:
    """Return the relative differences of a step's loss and gradients with compiled layers to those without."""
    case = parity.Case(dims.tp, dims.cp, dims.dp, "packed", recompute, "float32", 4)
    device, layout = device_of(world), parity.layout_of("packed", dims.cp)
    found = []
    torch.compiler.reset()
    for compiled in (False, True):
        parallel = parity.mesh_of(dims, device.type)
        torch.manual_seed(0)
        model = parity.new_model(case, device, parallel.cp_group)
        model.recompute_layers(recompute)
        parallelize(model, parallel)
        if compiled:
            model.compile_layers()
        batches = parity.share_out(
            parity.batch_of("packed", 1, model.config.vocab_size), layout, parallel, device
        )
        trainer = Trainer(model, torch.optim.SGD(model.parameters(), 0.1), TrainConfig(1), parallel)
        loss = trainer.step(batches).loss
        model.mtp.roller.close()
        found.append({name: p.grad.full_tensor() for name, p in model.named_parameters()})
        found[-1]["loss"] = torch.tensor(loss)
    eager, fused = found
    return {name: float((fused[name] - eager[name]).norm() / eager[name].norm()) for name in eager}


@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_layers_train_to_the_same_on_gpus(gpu_pool: RankPool, recompute):
    size = gpu_pool.world_size
    dims = ParallelDims(1, size, 1)
    for found in gpu_pool.run(with_and_without_compiling, size, dims, recompute, limit_s=240):
        assert max(found.values()) <= parity.TOLERANCE["float32"], found
        assert max(found.values()) > 0  # compiled layers round differently
