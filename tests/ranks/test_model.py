"""Loss and every gradient of the context-parallel model against one process with the whole sequence."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.distributed as dist

from overlap_mtp import SCHEDULES, SequenceLayout, make_roller, prepare
from overlap_mtp.model.config import PRESETS, ModelConfig
from overlap_mtp.model.gpt import GPT
from overlap_mtp.model.loss import combine, count_tokens
from overlap_mtp.model.reference import loss_reference
from overlap_mtp.reference import roll_reference
from overlap_mtp.training.parallel import ParallelDims, ParallelMesh, parallelize
from overlap_mtp.training.trainer import TrainConfig, Trainer, global_counts, reduce_gradients

from rank_pool import RankPool, device_of

SMALL = ModelConfig(
    hidden_size=32, num_layers=2, num_depths=2, num_heads=4, num_kv_heads=2, ffn_size=48, vocab_size=61
)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def layout_of(documents: str, cp_size: int, kind: str) -> SequenceLayout:
    n = 8 * cp_size
    if documents == "dense":
        return SequenceLayout.dense(4 * n, cp_size, kind)
    return SequenceLayout.packed([0, n, n, 3 * n, 4 * n], cp_size, kind, [n - 3, 0, 2 * n, 1])


def make_batch(layout: SequenceLayout, rows: int = 2, mask: str = "uneven") -> dict[str, torch.Tensor]:
    """A full batch. `uneven`: half of the positions that the first rank holds do not count."""
    generator = torch.Generator().manual_seed(3)
    shape = (rows, layout.seq_len)
    ids = torch.randint(0, SMALL.vocab_size, shape, generator=generator)
    starts = torch.repeat_interleave(
        torch.tensor(layout.cu_seqlens[:-1]), torch.tensor(layout.cu_seqlens).diff()
    )
    batch = {
        "input_ids": ids,
        "labels": roll_reference(ids, layout, 1),
        "position_ids": (torch.arange(layout.seq_len) - starts).expand(shape).contiguous(),
    }
    if mask == "none":
        return batch
    weight = torch.ones(shape)
    if mask == "uneven":
        weight[:, layout.positions(0)[::2]] = 0
    elif mask == "empty rank":
        weight[:, layout.positions(layout.cp_size - 1)] = 0
    elif mask == "all empty":
        weight.zero_()
    elif mask == "bool":
        weight = torch.rand(shape, generator=generator) < 0.7
    elif mask == "fractional":  # sums to less than 1
        weight = (torch.rand(shape, generator=generator) < 0.7) / 2.0**12
    elif mask == "bfloat16":
        weight = (torch.rand(shape, generator=generator) < 0.7).bfloat16()
    return {**batch, "loss_mask": weight}


def make_model(dtype: torch.dtype, group: dist.ProcessGroup | None, schedule: str = "prefetch") -> GPT:
    torch.manual_seed(0)
    return GPT(SMALL, group, schedule).to(dtype)


def reference_gradients(layout, batch, dtype) -> tuple[float, dict[str, torch.Tensor]]:
    model = make_model(dtype, None)
    loss = loss_reference(model, batch, layout)
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters()}


def worst_errors(
    group: dist.ProcessGroup, layout: SequenceLayout, mask: str, dtype: torch.dtype, schedule: str
) -> dict[str, float]:
    """Relative errors of the loss and of each gradient against `loss_reference`, the largest by name."""
    batch = make_batch(layout, mask=mask)
    expected_loss, expected = reference_gradients(layout, batch, dtype)
    model = make_model(dtype, group, schedule).to(device_of(group))
    given = prepare(batch, layout, SMALL.num_depths) if schedule == "prepared" else batch
    local = {n: layout.shard(tensor, group.rank()).to(device_of(group)) for n, tensor in given.items()}
    counts = global_counts(model, [(local, layout)], group)
    loss = combine(model(local, layout), counts, SMALL.mtp_loss_factor)
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total, group=group)
    reduce_gradients(model.parameters(), group)
    model.mtp.roller.close()
    errors = {"loss": abs(float(total) - expected_loss) / max(abs(expected_loss), 1e-30)}
    for name, parameter in model.named_parameters():
        scale = expected[name].norm().clamp(min=1e-30)
        errors[name] = float((parameter.grad.cpu() - expected[name]).norm() / scale)
    return errors


@pytest.mark.parametrize("kind", ["zigzag", "contiguous"])
@pytest.mark.parametrize("documents", ["dense", "packed"])
@pytest.mark.parametrize("cp_size", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_loss_and_every_gradient_equal_one_process(pool: RankPool, dtype, cp_size, documents, kind):
    layout = layout_of(documents, cp_size, kind)
    for errors in pool.run(worst_errors, cp_size, layout, "uneven", dtype, "prefetch"):
        assert len(errors) == 1 + len(list(make_model(dtype, None).parameters()))
        assert max(errors.values()) <= TOLERANCE[dtype], errors


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_gradients_are_right_under_every_schedule(pool: RankPool, schedule):
    layout = layout_of("packed", 2, "zigzag")
    for errors in pool.run(worst_errors, 2, layout, "uneven", torch.float64, schedule):
        assert max(errors.values()) <= 1e-10, errors


@pytest.mark.parametrize("schedule", ["sync", "prefetch", "prepared"])
@pytest.mark.parametrize("mask", ["none", "empty rank", "bool", "bfloat16", "fractional"])
def test_gradients_are_right_with_any_mask(pool: RankPool, mask, schedule):
    for documents in ("dense", "packed"):
        layout = layout_of(documents, 2, "zigzag")
        for errors in pool.run(worst_errors, 2, layout, mask, torch.float64, schedule):
            assert max(errors.values()) <= 1e-10, errors


def loss_without_valid_tokens(group: dist.ProcessGroup) -> tuple[float, float]:
    layout = layout_of("packed", group.size(), "zigzag")
    batch = make_batch(layout, mask="all empty")
    local = {name: layout.shard(tensor, group.rank()) for name, tensor in batch.items()}
    model = make_model(torch.float32, group)
    counts = global_counts(model, [(local, layout)], group)
    loss = combine(model(local, layout), counts, SMALL.mtp_loss_factor)
    loss.backward()
    return float(loss.detach()), max(float(p.grad.abs().max()) for p in model.parameters())


def test_no_valid_token_anywhere_gives_zero_and_no_nan(pool: RankPool):
    assert pool.run(loss_without_valid_tokens, 2) == [(0.0, 0.0)] * 2


@pytest.mark.parametrize("documents", ["dense", "packed"])
@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_counts_equal_the_rolled_masks(cp_size, documents):
    layout = layout_of(documents, cp_size, "zigzag")
    for mask in ("uneven", "bool", "bfloat16", "none"):
        batch = make_batch(layout, mask=mask)
        shards = [{name: layout.shard(t, rank) for name, t in batch.items()} for rank in range(cp_size)]
        counts = sum(count_tokens(shard, layout, rank, 3) for rank, shard in enumerate(shards))
        full = batch.get("loss_mask", torch.ones_like(batch["input_ids"])).double()
        inside = torch.tensor(layout.unshard([layout.valid(rank) for rank in range(cp_size)]))
        expected = [(full * inside).sum()] + [roll_reference(full, layout, k).sum() for k in (1, 2, 3)]
        assert counts.tolist() == [float(one) for one in expected]
        assert counts.dtype in (torch.int64, torch.float32)


@cache
def pairs_of_ranks() -> ParallelMesh:
    """Made once: the threads of gloo's groups poll as long as the process lives."""
    return ParallelMesh.make(ParallelDims(dp=4, cp=2), "cpu")


def accumulated_step(world: dist.ProcessGroup, schedule: str) -> tuple[float, list[torch.Tensor]]:
    """Three microbatches of unequal token counts in one optimizer step, by four pairs of ranks."""
    parallel = pairs_of_ranks()
    microbatches = []
    for documents, mask in [("dense", "uneven"), ("packed", "none"), ("packed", "uneven")]:
        layout = layout_of(documents, 2, "zigzag")
        batch = make_batch(layout, mask="uneven" if mask == "none" else mask)
        given = prepare(batch, layout, SMALL.num_depths) if schedule == "prepared" else batch
        microbatches.append(({n: layout.shard(t, parallel.cp_rank) for n, t in given.items()}, layout))
    model = parallelize(make_model(torch.float64, parallel.cp_group, schedule), parallel)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recipe = TrainConfig(steps=1, accumulate=len(microbatches))
    loss = Trainer(model, optimizer, recipe, parallel).step(microbatches).loss
    return loss, [p.full_tensor().detach() for p in model.parameters()]


def test_gradient_accumulation_is_alike_under_every_schedule(pool: RankPool):
    expected_loss, expected = pool.run(accumulated_step, 8, "prepared")[0]
    for schedule in ("sync", "merged", "overlap", "prefetch"):
        for loss, parameters in pool.run(accumulated_step, 8, schedule):
            assert loss == expected_loss
            assert all(torch.equal(a, b) for a, b in zip(parameters, expected, strict=True))


def data_parallel_errors(world: dist.ProcessGroup) -> float:
    """Two cp groups of two ranks, each with a batch of its own; the largest relative error of a gradient."""
    pairs = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    dp_rank = world.rank() // 2
    group = pairs[dp_rank]
    layouts = [layout_of("packed", 2, "zigzag"), layout_of("dense", 2, "zigzag")]
    batches = [make_batch(layouts[0], mask="uneven"), make_batch(layouts[1], mask="empty rank")]

    single = make_model(torch.float64, None)
    counts = sum(
        count_tokens(b, SequenceLayout.packed(la.cu_seqlens, 1, "contiguous", la.valid_lengths), 0, 2)
        for b, la in zip(batches, layouts, strict=True)
    )
    for batch, layout in zip(batches, layouts, strict=True):
        whole = SequenceLayout.packed(layout.cu_seqlens, 1, "contiguous", layout.valid_lengths)
        combine(single(batch, whole), counts, SMALL.mtp_loss_factor).backward()

    model, layout = make_model(torch.float64, group), layouts[dp_rank]
    local = {n: layout.shard(t, group.rank()) for n, t in batches[dp_rank].items()}
    totals = global_counts(model, [(local, layout)], world)
    assert totals.tolist() == counts.tolist()
    combine(model(local, layout), totals, SMALL.mtp_loss_factor).backward()
    reduce_gradients(model.parameters(), world)
    pairs_of_gradients = zip(model.parameters(), single.parameters(), strict=True)
    return max(float((a.grad - b.grad).norm() / b.grad.norm()) for a, b in pairs_of_gradients)


def test_disjoint_cp_groups_under_data_parallelism():
    with RankPool(4) as pool:
        assert max(pool.run(data_parallel_errors, 4)) <= 1e-10


def test_block_serves_a_model_that_is_not_ours():
    from overlap_mtp.model.mtp import MultiTokenPrediction

    embedding, head = torch.nn.Embedding(11, 8), torch.nn.Linear(8, 11)
    mtp = MultiTokenPrediction(8, 3, lambda depth: torch.nn.Linear(8, 8))
    with pytest.raises(ValueError, match="transport must be one of auto"):
        MultiTokenPrediction(8, 3, lambda depth: torch.nn.Linear(8, 8), transport="pigeon")
    layout = SequenceLayout.dense(6, 1, "contiguous")
    ids = torch.arange(1, 7)[None]
    rolls = mtp.start({"input_ids": ids, "labels": ids}, layout)
    predictions = list(mtp(embedding(ids), rolls, embedding))
    assert [p.depth for p in predictions] == [1, 2, 3]
    assert predictions[2].tokens["labels"].tolist() == [[4, 5, 6, 0, 0, 0]]
    head(predictions[2].hidden).sum().backward()
    assert all(p.grad is not None for p in mtp.depths[0].layer.parameters())


def bf16_errors(group: dist.ProcessGroup, documents: str) -> dict[str, float]:
    """Loss and gradients of the bf16 flash path on GPUs against the mask path in fp32 on one."""
    config, device = PRESETS["tiny"].model, device_of(group)
    layout = layout_of(documents, group.size(), "zigzag")
    batch = make_batch(layout)
    local = {name: layout.shard(tensor, group.rank()).to(device) for name, tensor in batch.items()}
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = GPT(config, group).bfloat16().to(device, dtype)
        counts = global_counts(model, [(local, layout)], group)
        loss = combine(model(local, layout, make_roller("prefetch", group, 2)), counts, 0.3)
        loss.backward()
        total = loss.detach().clone()
        dist.all_reduce(total, group=group)
        reduce_gradients(model.parameters(), group)
        results.append((total.float(), [p.grad.float() for p in model.parameters()]))
    (loss, expected), (loss_16, gradients) = results
    return {
        "loss": float((loss_16 - loss).abs() / loss.abs()),
        "gradients": max(float((a - b).norm() / a.norm()) for a, b in zip(expected, gradients, strict=True)),
    }


@pytest.mark.multi_gpu
@pytest.mark.parametrize("documents", ["dense", "packed"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_gradients_are_right_under_every_schedule_on_gpus(gpu_pool: RankPool, schedule, documents):
    layout = layout_of(documents, gpu_pool.world_size, "zigzag")
    for errors in gpu_pool.run(worst_errors, gpu_pool.world_size, layout, "uneven", torch.float64, schedule):
        assert max(errors.values()) <= 1e-10, errors


@pytest.mark.multi_gpu
@pytest.mark.parametrize("documents", ["dense", "packed"])
def test_flash_path_agrees_with_fp32_on_gpus(gpu_pool: RankPool, documents):
    for errors in gpu_pool.run(bf16_errors, gpu_pool.world_size, documents):
        assert errors["loss"] < 2e-3, errors
        assert errors["gradients"] < 5e-2, errors
