"""The drop-in for Megatron-LM on GPUs: the same bits, no wait for the device, CUDA graphs."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from overlap_mtp import roll_reference

from rank_pool import RankPool
from strategies import same_bits

pytestmark = pytest.mark.multi_gpu
pytest.importorskip("megatron.core")


@pytest.fixture(scope="module")
def megatron_pool() -> Iterator[RankPool]:
    """NCCL ranks of their own: Megatron-LM keeps global state."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two or more GPUs")
    names = {"TORCH_COMPILE_DISABLE": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    with pytest.MonkeyPatch.context() as patched:
        for name, value in names.items():
            patched.setenv(name, value)
        with RankPool(torch.cuda.device_count(), "nccl", sizes=()) as ranks:
            yield ranks


def make_model() -> Any:
    """A small model on this rank, with the attention of the benchmark."""
    os.environ.update(CUDA_DEVICE_MAX_CONNECTIONS="1")
    from megatron.core import parallel_state

    from dropin.model import MegatronModel, initialize
    from dropin.sizes import problem_of

    problem = problem_of("h2048", 2, dist.get_world_size(), 1, False, False, torch.bfloat16)
    if not parallel_state.model_parallel_is_initialized():
        initialize(problem)
    return problem, MegatronModel(problem, torch.device("cuda", torch.cuda.current_device()))


def forward_without_a_wait(world: dist.ProcessGroup, documents: int) -> list[str]:
    """torch raises at every call that waits for the device."""
    import overlap_mtp.megatron as drop_in
    from dropin.batches import Batch

    problem, model = make_model()
    wrong = []
    with drop_in.install():
        for step in range(4):
            batch = Batch(problem, documents, step, torch.device("cuda", torch.cuda.current_device()))
            packed = batch.packed_seq_params(on_host=False)
            model.load(batch)
            torch.cuda.synchronize()
            dist.barrier()
            if step >= 2:  # rollers are made in the first
                torch.cuda.set_sync_debug_mode("error")
            try:
                loss = model.loss(batch, packed)
            except RuntimeError as error:
                wrong.append(f"step {step}: {error}")
            finally:
                torch.cuda.set_sync_debug_mode("default")
            loss.backward()
        if drop_in.status().fallbacks:
            wrong.append(f"{drop_in.status()}")
    drop_in.close()
    return wrong


@pytest.mark.parametrize("documents", [0, 8])
def test_a_forward_never_waits_for_the_device(megatron_pool: RankPool, documents):
    megatron_pool.check(forward_without_a_wait, megatron_pool.world_size, documents)


def replay_a_captured_step(world: dist.ProcessGroup) -> list[str]:
    """Forward and backward in one CUDA graph, as for graphs of a full iteration: loss and gradients are those of the
    same step outside of a graph."""
    import overlap_mtp.megatron as drop_in
    from dropin.batches import Batch

    device = torch.device("cuda", torch.cuda.current_device())
    problem, model = make_model()
    batch = Batch(problem, 8, 1, device)
    packed = batch.packed_seq_params(on_host=False)
    wrong = []
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]

    def step() -> torch.Tensor:
        loss = model.loss(batch, packed)
        loss.backward()
        return loss

    with drop_in.install():
        model.load(batch)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                model.gpt.zero_grad(set_to_none=True)
                step()
        torch.cuda.current_stream().wait_stream(stream)
        model.gpt.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        gradients = {name: one.grad for name, one in model.gpt.named_parameters()}
        for shift in range(3):
            for tensor in (batch.input_ids, batch.labels):
                tensor.add_(shift).remainder_(1000)
            graph.replay()
            torch.cuda.synchronize()
            kept = captured.clone(), {name: one.clone() for name, one in gradients.items()}
            for one in model.gpt.parameters():
                one.grad = None
            eager = step()
            torch.cuda.synchronize()
            if not torch.equal(eager, kept[0]):
                wrong.append(f"replay {shift}: loss {kept[0].item()}, not {eager.item()}")
            wrong += [
                f"replay {shift}: {name}"
                for name, one in model.gpt.named_parameters()
                if not torch.equal(one.grad, kept[1][name])
            ]
        if drop_in.status().fallbacks:
            wrong.append(f"{drop_in.status()}")
    graph.reset()
    del graph, captured
    gc.collect()
    torch.cuda.synchronize()
    torch.use_deterministic_algorithms(False)
    drop_in.close()
    return wrong


def test_a_step_can_be_captured(megatron_pool: RankPool):
    megatron_pool.check(replay_a_captured_step, megatron_pool.world_size)


def padded_rolls_differ(world: dist.ProcessGroup) -> list[str]:
    """What a forward rolls of padded documents with a tail, all on the GPU, against the reference."""

    from megatron.core.packed_seq_params import PackedSeqParams

    import overlap_mtp.megatron as drop_in
    from overlap_mtp import SequenceLayout
    from overlap_mtp.megatron.prefetch import Prefetch, mark_of

    size, rank = world.size(), world.rank()
    device = torch.device("cuda", torch.cuda.current_device())
    bounds, valid = [0, 8 * size, 8 * size, 12 * size], [8 * size - 3, 0, 4 * size - 1]
    layout = SequenceLayout.packed(bounds, size, "zigzag", valid, 15 * size)
    ends = [sum(valid[:n]) for n in range(len(valid) + 1)]
    cu = [torch.tensor(one, dtype=torch.int32, device=device) for one in (ends, bounds)]
    packed = PackedSeqParams("thd", cu[0], cu[0], cu[1], cu[1])
    full = {
        "input_ids": torch.arange(1, 15 * size + 1)[None],
        "loss_mask": torch.rand(1, 15 * size, generator=torch.Generator().manual_seed(1)),
    }
    wrong = []
    with drop_in.install():
        tensors = {name: layout.shard(one, rank).to(device) for name, one in full.items()}
        prefetch = Prefetch(tensors, dict.fromkeys(full, 3), world, packed, drop_in.Settings())
        prefetch.start()
        for name in full:
            rolled = prefetch.mark(tensors[name], name, 0)
            for depth in (1, 2, 3):
                mark = mark_of(rolled)
                assert mark is not None
                rolled = prefetch.answer(mark)
                expected = layout.shard(roll_reference(full[name], layout, depth), rank)
                if not same_bits(rolled.cpu(), expected):
                    wrong.append(f"{name} at depth {depth}")
    drop_in.close()
    return wrong


def test_padded_documents_on_the_gpu_are_exact(megatron_pool: RankPool):
    megatron_pool.check(padded_rolls_differ, megatron_pool.world_size)
