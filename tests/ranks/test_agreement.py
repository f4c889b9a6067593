"""Ranks that do not start alike: an error on all of them, and none that waits."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from overlap_mtp import SCHEDULES, SequenceLayout, make_roller, prepare, roll_reference

from cases import (
    ILLEGAL,
    NUM_DEPTHS,
    ODD_RANK,
    PACKED,
    assert_names,
    error_of,
    local_to,
    other_dtype,
    packed,
    wrong_rolls,
)
from rank_pool import RankPool, device_of
from strategies import same_bits


def other_names(batch, layout):
    return {name: t for name, t in batch.items() if not name.startswith("labels")}, layout


def other_rows(batch, layout):
    return {name: t[:1] for name, t in batch.items()}, layout


def other_kind(batch, layout):
    return batch, SequenceLayout.packed(layout.cu_seqlens, layout.cp_size, "contiguous")


def dense_instead(batch, layout):
    return batch, SequenceLayout.dense(layout.seq_len, layout.cp_size)


DIFFERENT_BATCHES = {
    "dtype": (other_dtype, ["labels int32", "labels int64"]),
    "names": (other_names, ["labels"]),
    "batch size": (other_rows, ["1", "2"]),
    "layout kind": (other_kind, ["zigzag", "contiguous"]),
    "packed or dense": (dense_instead, ["packed", "dense"]),
}
DIFFERENT_ROLLERS = {
    "num_depths": ({"num_depths": NUM_DEPTHS}, {"num_depths": NUM_DEPTHS - 1}, ["num_depths", "1", "2"]),
    "max_documents": (
        {"num_depths": NUM_DEPTHS, "max_documents": 50},
        {"num_depths": NUM_DEPTHS, "max_documents": 60},
        ["max_documents", "50", "60"],
    ),
}
RANK_NAMES = {2: ["rank 0", "rank 1"], 3: ["rank 0", "rank 1", "rank 2"]}


def start_unlike_the_others(group: dist.ProcessGroup, case: str) -> list[tuple[str, list[str]]]:
    """By schedule: what the first start raises, and what is wrong after a second, good one."""
    change, _ = DIFFERENT_BATCHES[case]
    layout = packed(group.size())
    results = []
    for schedule in SCHEDULES:
        roller = make_roller(schedule, group, NUM_DEPTHS)
        batch = local_to(group, schedule, layout)
        mine = change(batch, layout) if group.rank() == ODD_RANK else (batch, layout)
        error = error_of(lambda roller=roller, mine=mine: roller.start(*mine))
        results.append((error, wrong_rolls(roller.start(batch, layout), layout, group.rank())))
        roller.close()
    return results


@pytest.mark.parametrize("cp_size", [2, 3])
@pytest.mark.parametrize("case", DIFFERENT_BATCHES)
def test_all_ranks_refuse_batches_that_differ(pool: RankPool, cp_size, case):
    for results in pool.run(start_unlike_the_others, cp_size, case):
        for error, wrong in results:
            assert_names(error, *RANK_NAMES[cp_size], *DIFFERENT_BATCHES[case][1])
            assert wrong == []


def make_unlike_the_others(group: dist.ProcessGroup, case: str) -> list[str]:
    usual, odd, _ = DIFFERENT_ROLLERS[case]
    layout = packed(group.size())
    errors = []
    for schedule in SCHEDULES:
        mine = odd if group.rank() == ODD_RANK else usual
        roller = make_roller(schedule, group, **mine)
        batch = local_to(group, schedule, layout, num_depths=mine["num_depths"])
        errors.append(error_of(lambda roller=roller, batch=batch: roller.start(batch, layout)))
        roller.close()
    return errors


def ask_for_another_transport(group: dist.ProcessGroup, schedule: str) -> str:
    layout = packed(group.size())
    wanted = "process_group" if group.rank() == ODD_RANK else "auto"
    roller = make_roller(schedule, group, NUM_DEPTHS, wanted)
    return error_of(lambda: roller.start(local_to(group, schedule, layout), layout))


@pytest.mark.parametrize("schedule", PACKED)
def test_all_ranks_refuse_transports_that_differ(pool: RankPool, schedule):
    for error in pool.run(ask_for_another_transport, 2, schedule):
        assert_names(error, "transport", "rank 0", "rank 1", "auto", "process_group")


@pytest.mark.parametrize("cp_size", [2, 3])
@pytest.mark.parametrize("case", DIFFERENT_ROLLERS)
def test_all_ranks_refuse_rollers_that_differ(pool: RankPool, cp_size, case):
    for errors in pool.run(make_unlike_the_others, cp_size, case):
        for schedule, error in zip(SCHEDULES, errors, strict=True):
            words = DIFFERENT_ROLLERS[case][2]
            assert_names(error, *RANK_NAMES[cp_size], *words), schedule


def schedules_differ(group: dist.ProcessGroup) -> str:
    schedule = "overlap" if group.rank() == ODD_RANK else "prefetch"
    layout = packed(group.size())
    roller = make_roller(schedule, group, NUM_DEPTHS)
    return error_of(lambda: roller.start(local_to(group, schedule, layout), layout))


def test_all_ranks_refuse_schedules_that_differ(pool: RankPool):
    for error in pool.run(schedules_differ, 2):
        assert_names(error, *RANK_NAMES[2], "overlap", "prefetch")


def start_illegally(group: dist.ProcessGroup, case: str) -> list[tuple[str, list[str]]]:
    """As `start_unlike_the_others`, with a batch on one rank that no rank could roll."""
    make_illegal, _ = ILLEGAL[case]
    layout = packed(group.size())
    results = []
    for schedule in SCHEDULES:
        roller = make_roller(schedule, group, NUM_DEPTHS)
        batch = local_to(group, schedule, layout)
        mine = make_illegal(batch) if group.rank() == ODD_RANK else batch
        error = error_of(lambda roller=roller, mine=mine: roller.start(mine, layout))
        results.append((error, wrong_rolls(roller.start(batch, layout), layout, group.rank())))
        roller.close()
    return results


@pytest.mark.parametrize("cp_size", [2, 3])
@pytest.mark.parametrize("case", ILLEGAL)
def test_one_ranks_illegal_batch_is_an_error_on_all(pool: RankPool, cp_size, case):
    for results in pool.run(start_illegally, cp_size, case):
        for error, wrong in results:
            assert_names(error, f"rank {ODD_RANK}", *ILLEGAL[case][1])
            assert wrong == []


def too_many_documents(group: dist.ProcessGroup) -> list[tuple[str, list[str]]]:
    layout, unit = packed(group.size()), 2 * group.size()
    crowded = SequenceLayout.packed(range(0, layout.seq_len + 1, unit), group.size())
    results = []
    for schedule in SCHEDULES:
        roller = make_roller(schedule, group, NUM_DEPTHS, max_documents=2)
        batch = local_to(group, schedule, layout)
        mine = crowded if group.rank() == ODD_RANK else layout
        error = error_of(lambda roller=roller, batch=batch, mine=mine: roller.start(batch, mine))
        results.append((error, wrong_rolls(roller.start(batch, layout), layout, group.rank())))
        roller.close()
    return results


def test_one_ranks_documents_beyond_max_documents_are_an_error_on_all(pool: RankPool):
    for results in pool.run(too_many_documents, 2):
        for error, wrong in results:
            assert_names(error, f"rank {ODD_RANK}", "max_documents", "12", "2")
            assert wrong == []


def layout_of_another_cp_size(group: dist.ProcessGroup) -> list[str]:
    layout = packed(group.size())
    errors = []
    for schedule in SCHEDULES:
        other = packed(1) if group.rank() == ODD_RANK else layout
        roller = make_roller(schedule, group, NUM_DEPTHS)
        batch = local_to(group, schedule, layout)
        errors.append(error_of(lambda roller=roller, batch=batch, other=other: roller.start(batch, other)))
    return errors


def test_one_ranks_layout_of_another_cp_size_is_an_error_on_all(pool: RankPool):
    for errors in pool.run(layout_of_another_cp_size, 2):
        for error in errors:
            assert_names(error, f"rank {ODD_RANK}", "cp_size", "1", "2")


def two_illegal_batches(group: dist.ProcessGroup) -> str:
    layout = packed(group.size())
    batch = local_to(group, "prefetch", layout)
    if group.rank() == 0:
        batch = {name: t.double() for name, t in batch.items()}
    elif group.rank() == 1:
        batch = {name: t[..., 1:] for name, t in batch.items()}
    return error_of(lambda: make_roller("prefetch", group, 1).start(batch, layout))


def test_every_ranks_own_error_reaches_all(pool: RankPool):
    for error in pool.run(two_illegal_batches, 3):
        assert_names(error, "rank 0", "float64", "rank 1", "23", "24")


def names_in_another_order(group: dist.ProcessGroup) -> list[list[str]]:
    """By schedule, what differs from the oracle. All tensors are int64: no message's length gives the swap away."""
    layout = packed(group.size())
    tokens = torch.arange(layout.seq_len)
    full = {"input_ids": tokens, "labels": tokens + 1000, "position_ids": tokens + 2000}
    results = []
    for schedule in SCHEDULES:
        whole = prepare(full, layout, NUM_DEPTHS) if schedule == "prepared" else full
        batch = {name: layout.shard(t, group.rank()).to(device_of(group)) for name, t in whole.items()}
        if group.rank() == ODD_RANK:
            batch = dict(reversed(batch.items()))
        roller = make_roller(schedule, group, NUM_DEPTHS)
        rolls = roller.start(batch, layout)
        wrong = []
        for depth in range(1, NUM_DEPTHS + 1):
            for name, rolled in rolls.at(depth).items():
                expected = layout.shard(roll_reference(full[name], layout, depth), group.rank())
                if not same_bits(rolled.cpu(), expected):
                    wrong.append(f"{name} at depth {depth}")
        results.append(wrong)
        roller.close()
    return results


def test_the_order_of_a_ranks_names_does_not_matter(pool: RankPool):
    """Names identify the tensors: a rank that lists them otherwise must not get another tensor's tokens."""
    for results in pool.run(names_in_another_order, 2):
        assert dict(zip(SCHEDULES, results, strict=True)) == {schedule: [] for schedule in SCHEDULES}


def batches_of_other_sizes(group: dist.ProcessGroup) -> list[list[str]]:
    """A last batch with fewer rows, then illegal ones everywhere, then the usual ones again."""
    layout, rank = packed(group.size()), group.rank()
    wrong = []
    for schedule in SCHEDULES:
        roller = make_roller(schedule, group, NUM_DEPTHS)
        for rows in (2, 1, 3, 2):
            rolls = roller.start(local_to(group, schedule, layout, rows=rows), layout)
            wrong.append(wrong_rolls(rolls, layout, rank, rows))
            illegal = {name: t.double() for name, t in local_to(group, schedule, layout).items()}
            if "ValueError" not in error_of(lambda r=roller, b=illegal: r.start(b, layout)):
                wrong.append([f"{schedule} takes float64"])
        roller.close()
    return wrong


def test_batches_of_other_sizes_are_agreed_on_when_they_come(pool: RankPool):
    for results in pool.run(batches_of_other_sizes, 2):
        assert results == [[]] * 4 * len(SCHEDULES)
