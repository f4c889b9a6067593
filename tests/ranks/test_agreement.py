"""Ranks that do not start the same exchange: an error on all of them, and none that waits."""

from __future__ import annotations

from typing import NoReturn

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from overlap_mtp import SCHEDULES, SequenceLayout, make_activation_roller, make_roller

from cases import (
    ILLEGAL,
    NUM_DEPTHS,
    ODD_RANK,
    PACKED,
    Batch,
    Microbatch,
    assert_names,
    error_of,
    packed,
    replace_labels,
)
from rank_pool import RankPool, device_of


def without_labels(batch: Batch) -> Batch:
    return {name: tensor for name, tensor in batch.items() if not name.startswith("labels")}


def contiguous(layout: SequenceLayout) -> SequenceLayout:
    return SequenceLayout.packed(layout.cu_seqlens, layout.cp_size, "contiguous")


def many_documents(layout: SequenceLayout) -> SequenceLayout:
    return SequenceLayout.packed(range(0, layout.seq_len + 1, layout.num_chunks), layout.cp_size)


class BrokenBatch(dict):
    """A batch whose tensors cannot be had."""

    def __getitem__(self, name: str) -> torch.Tensor:
        raise RuntimeError(f"no {name} in this file")

    def items(self) -> NoReturn:
        raise RuntimeError("no items in this file")


# What one rank starts instead of (batch, layout), and what the error says on all ranks.
DIFFERENT = {
    "dtype": (lambda b, at: (replace_labels(b, torch.Tensor.long), at), ["labels int32", "labels int64"]),
    "names": (lambda b, at: (without_labels(b), at), ["labels"]),
    "batch size": (lambda b, at: ({name: t[:1] for name, t in b.items()}, at), ["1", "2"]),
    "layout kind": (lambda b, at: (b, contiguous(at)), ["zigzag", "contiguous"]),
    "packed or dense": (lambda b, at: (b, SequenceLayout.dense(at.seq_len, at.cp_size)), ["packed", "dense"]),
}
# The same for what no rank could start.
WRONG = {
    "documents": (lambda b, at: (b, many_documents(at)), ["max_documents", "12", "8"]),
    "cp_size": (lambda b, at: (b, packed(5)), ["cp_size", "5"]),
    "no layout": (lambda b, at: (b, None), ["SequenceLayout", "NoneType"]),
    "broken batch": (lambda b, at: (BrokenBatch(b), at), ["in this file"]),
    **{case: (lambda b, at, make=make: (make(b), at), words) for case, (make, words) in ILLEGAL.items()},
}


def refused_starts(group: dist.ProcessGroup, case: str) -> list[tuple[str, list[str]]]:
    """By schedule: what the first start raises, and what is wrong after a second, good one."""
    change, _ = (DIFFERENT | WRONG)[case]
    good, results = Microbatch.of(group), []
    for schedule in SCHEDULES:
        roller = make_roller(schedule, group, NUM_DEPTHS, max_documents=8)
        mine = good.shards(schedule), good.layout
        if group.rank() == ODD_RANK:
            mine = change(*mine)
        error = error_of(roller.start, *mine)
        results.append((error, good.wrong(good.start(roller))))
        roller.close()
    return results


@pytest.mark.parametrize("cp_size", [2, 3])
@pytest.mark.parametrize("case", [*DIFFERENT, *WRONG])
def test_all_ranks_refuse_what_one_rank_starts(ranks: RankPool, cp_size, case):
    for results in ranks.run(refused_starts, cp_size, case):
        for error, wrong in results:
            if case in DIFFERENT:
                assert_names(error, *(f"rank {rank}" for rank in range(cp_size)), *DIFFERENT[case][1])
            else:
                assert_names(error, f"rank {ODD_RANK}", *WRONG[case][1])
            assert wrong == []


def refused_rollers(group: dist.ProcessGroup, usual: dict, odd: dict, schedules: list[str]) -> list[str]:
    """By schedule, what the first start raises."""
    good, errors = Microbatch.of(group), []
    for schedule in schedules:
        mine = {"schedule": schedule, "num_depths": NUM_DEPTHS} | (odd if group.rank() == ODD_RANK else usual)
        roller = make_roller(cp_group=group, **mine)
        errors.append(error_of(good.start, roller))
        roller.close()
    return errors


@pytest.mark.parametrize("cp_size", [2, 3])
@pytest.mark.parametrize(
    ("usual", "odd", "schedules", "words"),
    [
        ({}, {"num_depths": 1}, SCHEDULES, ["num_depths", "1", "2"]),
        ({"max_documents": 50}, {"max_documents": 60}, SCHEDULES, ["max_documents", "50", "60"]),
        ({}, {"ignore_index": -1}, SCHEDULES, ["ignore_index", "-100", "-1"]),
        ({}, {"fills": {"input_ids": 7}}, SCHEDULES, ["fills", "0", "7"]),
        ({}, {"depths": {"input_ids": 1}}, SCHEDULES, ["depths", "1", "2"]),
        ({}, {"schedule": "overlap"}, ["prefetch"], ["overlap", "prefetch"]),
        ({"check_layouts": False}, {"check_layouts": True}, ["sync"], ["check_layouts", "False", "True"]),
        ({}, {"transport": "process_group"}, PACKED, ["transport", "auto", "process_group"]),
    ],
)
def test_all_ranks_refuse_rollers_that_differ(ranks: RankPool, cp_size, usual, odd, schedules, words):
    for errors in ranks.run(refused_rollers, cp_size, usual, odd, schedules):
        for error in errors:
            assert_names(error, *(f"rank {rank}" for rank in range(cp_size)), *words)


def start_in_another_order(group: dist.ProcessGroup) -> list[str]:
    """What the first starts of a roller of tokens and one of activations raise: on one rank the second comes first."""
    good = Microbatch.of(group)
    states = torch.zeros(1, good.layout.local_len, 4)
    tokens = make_roller("prefetch", group, NUM_DEPTHS)
    activations = make_activation_roller("overlap", group, NUM_DEPTHS)
    if group.rank() == ODD_RANK:
        return [error_of(activations.start, {"states": states}, good.layout), error_of(good.start, tokens)]
    return [error_of(good.start, tokens), error_of(activations.start, {"states": states}, good.layout)]


def test_all_ranks_refuse_tokens_where_one_rank_starts_activations(ranks: RankPool):
    for errors in ranks.run(start_in_another_order, 3):
        for error in errors:
            assert_names(error, *(f"cp rank {rank}" for rank in range(3)), "tensors", "activations", "states")


def roll_dtensors(group: dist.ProcessGroup) -> list[str]:
    """What DTensors raise, before and after a tensor that is otherwise like them."""
    layout = packed(group.size())
    mesh = DeviceMesh.from_group(group, device_of(group).type)
    errors = []
    for roller, shape, dtype in (
        (make_roller("prefetch", group, NUM_DEPTHS), (1, layout.local_len), torch.int64),
        (make_activation_roller("overlap", group, NUM_DEPTHS), (1, layout.local_len, 4), torch.float32),
    ):
        local = torch.zeros(shape, dtype=dtype, device=device_of(group))
        sharded = DTensor.from_local(local, mesh, [Replicate()])
        errors += [error_of(roller.start, {"x": one}, layout) for one in (sharded, local, sharded)]
    return errors


def test_dtensors_are_refused(ranks: RankPool):
    first, *tokens, last, local, sharded = ranks.run(roll_dtensors, 2)[0]
    assert [tokens[0], local] == ["nothing", "nothing"]
    for error in (first, tokens[1], last, sharded):
        assert_names(error, "x is a DTensor", "its to_local")


def test_symmetric_memory_is_refused_on_cpu(ranks: RankPool):
    symmetric = {"transport": "symmetric"}
    for (error,) in ranks.run(refused_rollers, 2, symmetric, symmetric, ["prefetch"]):
        assert error.startswith("ValueError: transport symmetric needs GPUs"), error


def starts_after_a_refused_transport(group: dist.ProcessGroup) -> list[str]:
    roller, good = make_roller("prefetch", group, NUM_DEPTHS, "symmetric"), Microbatch.of(group)
    illegal = {name: t.short() for name, t in good.shards().items()}
    batches = [good.shards(), good.shards(), without_labels(good.shards()), illegal]
    return [error_of(roller.start, batch, good.layout) for batch in batches]


def test_ranks_agree_again_after_a_transport_was_refused(ranks: RankPool):
    for *errors, last in ranks.run(starts_after_a_refused_transport, 2):
        assert {*errors} == {
            "ValueError: transport symmetric needs GPUs that share memory, the batch is on the CPU"
        }
        assert_names(last, "rank 0", "rank 1", "int16")


def two_illegal_batches(group: dist.ProcessGroup) -> str:
    good = Microbatch.of(group)
    batch = good.shards()
    if group.rank() == 0:
        batch = {name: t.short() for name, t in batch.items()}
    elif group.rank() == 1:
        batch = {name: t[..., 1:] for name, t in batch.items()}
    return error_of(make_roller("prefetch", group, 1).start, batch, good.layout)


def test_every_ranks_own_error_reaches_all(ranks: RankPool):
    for error in ranks.run(two_illegal_batches, 3):
        assert_names(error, "rank 0", "int16", "rank 1", "23", "24")


def names_in_another_order(group: dist.ProcessGroup) -> list[str]:
    """All tensors are int64: no message's length gives the swap away."""
    layout, wrong = packed(group.size()), []
    tokens = torch.arange(layout.seq_len)
    full = {"input_ids": tokens, "labels": tokens + 1000, "position_ids": tokens + 2000}
    good = Microbatch(group, layout, full)
    for schedule in SCHEDULES:
        batch = good.shards(schedule)
        if group.rank() == ODD_RANK:
            batch = dict(reversed(batch.items()))
        roller = make_roller(schedule, group, NUM_DEPTHS)
        wrong += [f"{schedule}: {one}" for one in good.wrong(roller.start(batch, layout))]
        roller.close()
    return wrong


def test_the_order_of_a_ranks_names_does_not_matter(ranks: RankPool):
    """Names identify the tensors: a rank that lists them otherwise must not get another tensor's tokens."""
    ranks.check(names_in_another_order, 2)


def batches_of_other_sizes(group: dist.ProcessGroup) -> list[str]:
    """A last batch with fewer rows, then illegal ones everywhere, then the usual ones again."""
    wrong = []
    for schedule in SCHEDULES:
        roller = make_roller(schedule, group, NUM_DEPTHS)
        for rows in (2, 1, 3, 2):
            good = Microbatch.of(group, rows=rows)
            wrong += good.wrong(good.start(roller))
            illegal = {name: t.short() for name, t in good.shards(schedule).items()}
            if "ValueError" not in error_of(roller.start, illegal, good.layout):
                wrong.append(f"{schedule} takes int16")
        roller.close()
    return wrong


def test_batches_of_other_sizes_are_agreed_on_when_they_come(ranks: RankPool):
    ranks.check(batches_of_other_sizes, 2)
