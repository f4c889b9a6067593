"""The loss and every gradient of the context-parallel model, against one process with the whole sequence."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from overlap_mtp import SCHEDULES, SequenceLayout, prepare
from overlap_mtp.model.config import ModelConfig
from overlap_mtp.model.gpt import GPT
from overlap_mtp.model.loss import combine, count_tokens
from overlap_mtp.model.mtp import MultiTokenPrediction
from overlap_mtp.model.reference import loss_reference
from overlap_mtp.reference import roll_reference
from overlap_mtp.training.trainer import global_counts, reduce_gradients

from rank_pool import RankPool, device_of

SMALL = ModelConfig(
    hidden_size=32, num_layers=2, num_depths=2, num_heads=4, num_kv_heads=2, ffn_size=48, vocab_size=61
)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
MASKS = ("none", "uneven", "empty rank", "all empty", "bool", "bfloat16", "fractional")


def layout_of(documents: str, cp_size: int, kind: str) -> SequenceLayout:
    n = 8 * cp_size
    if documents == "dense":
        return SequenceLayout.dense(4 * n, cp_size, kind)
    return SequenceLayout.packed([0, n, n, 3 * n, 4 * n], cp_size, kind, [n - 3, 0, 2 * n, 1])


def make_batch(layout: SequenceLayout, rows: int = 2, mask: str = "uneven") -> dict[str, torch.Tensor]:
    """A full batch. `uneven`: half of the first rank's positions do not count. `fractional`: sums to less than 1."""
    generator = torch.Generator().manual_seed(3)
    shape = (rows, layout.seq_len)
    ids = torch.randint(0, SMALL.vocab_size, shape, generator=generator)
    lengths = (layout.cu_seqlens[1:] - layout.cu_seqlens[:-1]).tolist()
    batch = {
        "input_ids": ids,
        "labels": roll_reference(ids, layout, 1),
        "position_ids": torch.cat([torch.arange(n) for n in lengths]).expand(shape).contiguous(),
    }
    if mask == "none":
        return batch
    some = torch.rand(shape, generator=generator) < 0.7
    known = {"bool": some, "bfloat16": some.bfloat16(), "fractional": some / 2.0**12, "all empty": 0.0 * some}
    weight = known.get(mask, torch.ones(shape))
    if mask == "uneven":
        weight[:, layout.positions(0)[::2]] = 0
    elif mask == "empty rank":
        weight[:, layout.positions(layout.cp_size - 1)] = 0
    return {**batch, "loss_mask": weight}


def make_model(dtype: torch.dtype, group: dist.ProcessGroup | None, schedule: str = "prefetch") -> GPT:
    torch.manual_seed(0)
    return GPT(SMALL, group, schedule).to(dtype)


def local_shards(
    group: dist.ProcessGroup, schedule: str, layout: SequenceLayout, batch: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """This rank's part of a full batch, as the schedule takes it."""
    full = prepare(batch, layout, SMALL.num_depths) if schedule == "prepared" else batch
    return {name: layout.shard(t, group.rank()).to(device_of(group)) for name, t in full.items()}


def loss_and_gradients(
    model: GPT, local: dict[str, torch.Tensor], layout: SequenceLayout
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The loss and its gradients, added up over the cp ranks. Closes the model's roller."""
    group = model.cp_group
    counts = global_counts(model, [(local, layout)], group)
    loss = combine(model(local, layout), counts, model.config.mtp_loss_factor)
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total, group=group)
    reduce_gradients(model.parameters(), group)
    model.mtp.roller.close()
    return total, [p.grad for p in model.parameters()]


def wrong_gradients(
    group: dist.ProcessGroup,
    layout: SequenceLayout,
    mask: str,
    dtype: torch.dtype,
    schedules: tuple[str, ...] = SCHEDULES,
) -> dict[str, float]:
    """Relative errors beyond the tolerance, of the loss and of each gradient, by schedule and name."""
    batch = make_batch(layout, mask=mask)
    single = make_model(dtype, None)
    expected_loss = loss_reference(single, batch, layout)
    expected_loss.backward()
    names = ["loss", *(name for name, _ in single.named_parameters())]
    expected = [expected_loss.detach(), *(p.grad for p in single.parameters())]
    wrong = {}
    for schedule in schedules:
        model = make_model(dtype, group, schedule).to(device_of(group))
        loss, gradients = loss_and_gradients(model, local_shards(group, schedule, layout, batch), layout)
        for name, found, right in zip(names, [loss, *gradients], expected, strict=True):
            error = float((found.cpu() - right).norm() / right.norm().clamp(min=1e-30))
            if not error <= TOLERANCE[dtype]:
                wrong[f"{schedule}: {name}"] = error
    return wrong


@pytest.mark.parametrize("kind", ["zigzag", "contiguous", "zigzag_stream"])
@pytest.mark.parametrize("documents", ["dense", "packed"])
@pytest.mark.parametrize("cp_size", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_loss_and_every_gradient_equal_one_process(ranks: RankPool, dtype, cp_size, documents, kind):
    layout = layout_of(documents, cp_size, kind)
    assert ranks.run(wrong_gradients, cp_size, layout, "uneven", dtype, ("prefetch",)) == [{}] * cp_size


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("documents", ["dense", "packed"])
def test_gradients_are_right_with_any_mask_under_every_schedule(ranks: RankPool, documents, mask):
    layout = layout_of(documents, 2, "zigzag")
    assert ranks.run(wrong_gradients, 2, layout, mask, torch.float64) == [{}] * 2


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("documents", ["dense", "packed"])
@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_counts_equal_the_rolled_masks(cp_size, documents, mask):
    layout = layout_of(documents, cp_size, "zigzag")
    batch, ranks = make_batch(layout, mask=mask), range(cp_size)
    shards = [{name: layout.shard(t, rank) for name, t in batch.items()} for rank in ranks]
    counts = sum(count_tokens(shard, layout, rank, 3) for rank, shard in enumerate(shards))
    full = batch.get("loss_mask", torch.ones_like(batch["input_ids"])).double()
    inside = torch.tensor(layout.unshard([layout.valid(rank) for rank in ranks]))
    expected = [(full * inside).sum()] + [roll_reference(full, layout, k).sum() for k in (1, 2, 3)]
    assert counts.tolist() == [float(one) for one in expected]
    assert counts.dtype in (torch.int64, torch.float32)


def test_block_serves_a_model_that_is_not_ours():
    embedding, head = torch.nn.Embedding(11, 8), torch.nn.Linear(8, 11)
    mtp = MultiTokenPrediction(8, 3, lambda depth: torch.nn.Linear(8, 8))
    with pytest.raises(ValueError, match="transport must be one of auto"):
        MultiTokenPrediction(8, 3, lambda depth: torch.nn.Linear(8, 8), transport="pigeon")
    ids = torch.arange(1, 7)[None]
    rolls = mtp.start({"input_ids": ids, "labels": ids}, SequenceLayout.dense(6, 1, "contiguous"))
    predictions = mtp(embedding(ids), rolls, embedding)
    assert [p.depth for p in predictions] == [1, 2, 3]
    assert predictions[2].tokens["labels"].tolist() == [[4, 5, 6, -100, -100, -100]]
    head(predictions[2].hidden).sum().backward()
    assert all(p.grad is not None for p in mtp.depths[0].layer.parameters())
