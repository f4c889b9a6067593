"""What a user can get wrong: a ValueError that says what, on every rank that would otherwise wait for it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from overlap_mtp import SCHEDULES, SequenceLayout, make_roller, prepare, roll_reference, roll_tensor
from overlap_mtp.channel import channel_of

from rank_pool import RankPool, device_of
from strategies import same_bits

EXCHANGING = ("sync", "merged", "overlap", "prefetch")
WIRED = ("merged", "overlap", "prefetch")
NUM_DEPTHS = 2
PACKED_LEN = 24


def packed(cp_size: int) -> SequenceLayout:
    """Two documents of which every rank holds something."""
    return SequenceLayout.packed([0, 8 * cp_size, PACKED_LEN * cp_size], cp_size)


def full_batch(layout: SequenceLayout, rows: int = 2) -> dict[str, torch.Tensor]:
    tokens = torch.arange(rows * layout.seq_len).view(rows, layout.seq_len)
    return {"input_ids": tokens, "labels": tokens.int() + 7, "loss_mask": tokens.float() / 8}


def local_batch(
    schedule: str, layout: SequenceLayout, rank: int, rows: int = 2, num_depths: int = NUM_DEPTHS
) -> dict[str, torch.Tensor]:
    full = full_batch(layout, rows)
    if schedule == "prepared":
        full = prepare(full, layout, num_depths)
    return {name: layout.shard(tensor, rank) for name, tensor in full.items()}


def local_to(group: dist.ProcessGroup, schedule: str, layout: SequenceLayout, **options: int):
    device = device_of(group)
    return {name: t.to(device) for name, t in local_batch(schedule, layout, group.rank(), **options).items()}


def wrong_rolls(rolls, layout: SequenceLayout, rank: int, rows: int = 2) -> list[str]:
    """Names and depths that differ from the oracle."""
    wrong = []
    for depth in range(1, NUM_DEPTHS + 1):
        rolled = rolls.at(depth)
        for name, tensor in full_batch(layout, rows).items():
            expected = layout.shard(roll_reference(tensor, layout, depth), rank)
            if not same_bits(rolled[name].cpu(), expected):
                wrong.append(f"{name} at depth {depth}")
    return wrong


def error_of(call: Callable[[], object]) -> str:
    """What `call` raises, as "Type: message", or "nothing"."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def assert_names(message: str, *words: str) -> None:
    assert message.startswith("ValueError: "), message
    for word in words:
        assert re.search(rf"(?<![\w.]){re.escape(word)}(?!\w)", message), f"{word!r} is not in {message!r}"


def test_unknown_schedules_are_refused():
    for schedule in ("fastest", "", "Prefetch"):
        message = error_of(lambda schedule=schedule: make_roller(schedule, None, 2))
        assert_names(message, *SCHEDULES)
        assert repr(schedule) in message


def test_unknown_transports_are_refused():
    message = error_of(lambda: make_roller("prefetch", None, 2, transport="carrier_pigeon"))
    assert_names(message, "auto", "process_group", "carrier_pigeon")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("value", [0, -1])
def test_sizes_below_one_are_refused(schedule, value):
    assert_names(error_of(lambda: make_roller(schedule, None, value)), "num_depths", "1", str(value))
    message = error_of(lambda: make_roller(schedule, None, 2, max_documents=value))
    assert_names(message, "max_documents", "1", str(value))


@pytest.mark.parametrize("value", [0, -1])
def test_prepare_refuses_num_depths_below_one(value):
    layout = packed(1)
    message = error_of(lambda: prepare(full_batch(layout), layout, value))
    assert_names(message, "num_depths", "1", str(value))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_depths_outside_the_rollers_are_refused(schedule):
    layout = packed(1)
    rolls = make_roller(schedule, None, NUM_DEPTHS).start(local_batch(schedule, layout, 0), layout)
    for depth in (0, NUM_DEPTHS + 1, -1):
        assert_names(error_of(lambda depth=depth: rolls.at(depth)), "1", str(NUM_DEPTHS), str(depth))
    assert wrong_rolls(rolls, layout, 0) == []


def replaced(batch: dict[str, torch.Tensor], make: Callable[[torch.Tensor], torch.Tensor]):
    """The batch with another tensor for labels; a prepared batch with others for all its rolls too."""
    return {name: make(t) if name.startswith("labels") else t for name, t in batch.items()}


ILLEGAL = {
    "float64": (
        lambda batch: replaced(batch, torch.Tensor.double),
        ["labels", "float64", "int64", "bfloat16"],
    ),
    "float16": (lambda batch: replaced(batch, torch.Tensor.half), ["labels", "float16", "float32"]),
    "one tensor too long": (
        lambda batch: replaced(batch, lambda t: torch.cat([t, t], -1)),
        ["labels", "24", "48"],
    ),
    "one tensor of more rows": (
        lambda batch: replaced(batch, lambda t: torch.cat([t, t])),
        ["labels", "2", "4"],
    ),
    "all tensors too long": (
        lambda batch: {n: torch.cat([t, t], -1) for n, t in batch.items()},
        ["24", "48"],
    ),
    "another device": (lambda batch: replaced(batch, lambda t: t.to("meta")), ["labels", "meta", "cpu"]),
    "no tensor": (lambda batch: {}, ["tensor"]),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("case", ILLEGAL)
def test_illegal_batches_are_refused(schedule, case):
    """At first use and later, and neither harms the next batch."""
    make_illegal, words = ILLEGAL[case]
    layout = packed(1)
    batch = local_batch(schedule, layout, 0)
    roller = make_roller(schedule, None, NUM_DEPTHS)
    for _ in range(2):
        assert_names(error_of(lambda: roller.start(make_illegal(batch), layout)), *words)
        assert wrong_rolls(roller.start(batch, layout), layout, 0) == []


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", ["zigzag", "contiguous"])
def test_more_documents_than_max_documents_are_refused(schedule, kind):
    layouts = [SequenceLayout.packed(range(0, 2 * n + 1, 2), 1, kind) for n in (3, 4)]
    roller = make_roller(schedule, None, NUM_DEPTHS, max_documents=3)
    batches = [local_batch(schedule, layout, 0) for layout in layouts]
    assert wrong_rolls(roller.start(batches[0], layouts[0]), layouts[0], 0) == []
    message = error_of(lambda: roller.start(batches[1], layouts[1]))
    assert_names(message, "4", "3", "max_documents")
    assert wrong_rolls(roller.start(batches[0], layouts[0]), layouts[0], 0) == []


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_layout_of_another_cp_size_is_refused(schedule):
    layout = packed(2)
    batch = local_batch(schedule, layout, 0)
    message = error_of(lambda: make_roller(schedule, None, NUM_DEPTHS).start(batch, layout))
    assert_names(message, "cp_size", "2", "1")


def test_cu_seqlens_that_do_not_end_at_the_batchs_length_are_refused():
    batch = local_batch("prefetch", packed(1), 0)
    message = error_of(
        lambda: make_roller("prefetch", None, 2).start(batch, SequenceLayout.packed([0, 20], 1))
    )
    assert_names(message, "20", "24")


def test_an_unprepared_batch_is_refused_by_prepared():
    layout = packed(1)
    roller = make_roller("prepared", None, NUM_DEPTHS)
    for batch in (full_batch(layout), prepare(full_batch(layout), layout, NUM_DEPTHS - 1)):
        message = error_of(lambda batch=batch: roller.start(batch, layout))
        assert_names(message, "prepare")


@pytest.mark.parametrize("shifts", [0, 1])
def test_roll_tensor_refuses_shifts_to_the_right(shifts):
    assert_names(error_of(lambda: roll_tensor(torch.arange(4), shifts=shifts)), "shifts", str(shifts))


ODD_RANK = 1  # differs from the others where ranks must be alike


def other_dtype(batch, layout):
    return replaced(batch, torch.Tensor.long), layout


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


TIMEOUT_S = 2
SLACK_S = 6


@pytest.fixture(scope="module")
def short_pool() -> Iterator[RankPool]:
    """Three ranks on which each test makes a group of its own, which it may break."""
    ranks = RankPool(3, timeout_s=30)
    yield ranks
    ranks.close()


def fresh_group(world: dist.ProcessGroup, timeout_s: float = TIMEOUT_S) -> dist.ProcessGroup:
    """A cp group with its exchange group made."""
    group = dist.new_group(list(range(world.size())), timeout=timedelta(seconds=timeout_s))
    assert group is not None
    assert channel_of(group).group is not None
    return group


def plans_differ(world: dist.ProcessGroup, schedule: str, kind: str) -> tuple[str, str]:
    """What the join of a good batch raises, then that of one whose documents are others on the last rank."""
    group = fresh_group(world, timeout_s=30)
    last, unit = group.size() - 1, 2 * group.size()
    bounds = [[0, 2 * unit, 6 * unit], [0, 3 * unit, 6 * unit]]
    layouts = [SequenceLayout.packed(one, group.size(), kind) for one in bounds]
    roller = make_roller(schedule, group, NUM_DEPTHS)
    first = error_of(lambda: roller.start(local_to(group, schedule, layouts[0]), layouts[0]).at(1))
    mine = layouts[group.rank() == last]
    second = error_of(lambda: roller.start(local_to(group, schedule, mine), mine).at(1))
    return first, second


def assert_sees_another_plan(error: str, *peers: int) -> None:
    assert error.startswith("RuntimeError: "), error
    assert "plan" in error
    assert any(f"rank {peer}" in error for peer in peers), error


@pytest.mark.parametrize("schedule", WIRED)
def test_plans_that_differ_raise_where_they_can_be_seen(short_pool: RankPool, schedule):
    """With three zigzag ranks, 2 hears from 1, 1 from 0 and 2, and 0 from 1 (and from 2 by depth 2)."""
    results = short_pool.run(plans_differ, 3, schedule, "zigzag")
    assert [first for first, _ in results] == ["nothing"] * 3
    _, of_middle, of_last = (second for _, second in results)
    assert_sees_another_plan(of_middle, 2)
    assert_sees_another_plan(of_last, 0, 1)


@pytest.mark.parametrize("schedule", WIRED)
def test_contiguous_plans_that_differ_raise_at_the_receiver(short_pool: RankPool, schedule):
    """Contiguous ranks hear from those above alone: the last one hears from nobody and cannot know."""
    results = short_pool.run(plans_differ, 3, schedule, "contiguous")
    assert [first for first, _ in results] == ["nothing"] * 3
    _, of_middle, of_last = (second for _, second in results)
    assert_sees_another_plan(of_middle, 2)
    assert of_last == "nothing"


def timed_error(call: Callable[[], object]) -> tuple[str, float]:
    begin = time.monotonic()
    return error_of(call), time.monotonic() - begin


def stay_away(world: dist.ProcessGroup, schedule: str) -> tuple[str, float]:
    """Rank 1, a neighbour of both others, takes part in the first microbatch and not in the second."""
    group = fresh_group(world)
    layout = packed(group.size())
    batch = local_to(group, schedule, layout)
    roller = make_roller(schedule, group, NUM_DEPTHS)
    assert wrong_rolls(roller.start(batch, layout), layout, group.rank()) == []
    if group.rank() == ODD_RANK:
        return "away", 0.0
    return timed_error(lambda: roller.start(batch, layout).at(1))


def assert_names_the_exchange(error: str, seconds: float, *words: str) -> None:
    assert error.startswith("RuntimeError: "), error
    assert "overlap_mtp" in error
    for word in words:
        assert word in error, error
    assert seconds < TIMEOUT_S + SLACK_S


@pytest.mark.parametrize("schedule", EXCHANGING)
def test_a_rank_that_never_comes_ends_in_an_error_that_names_the_exchange(short_pool: RankPool, schedule):
    results = short_pool.run(stay_away, 3, schedule)
    what = "roll of document" if schedule == "sync" else "exchange"
    for rank in (0, 2):
        assert_names_the_exchange(*results[rank], what, f"rank {rank}")


def miss_the_agreement(world: dist.ProcessGroup) -> tuple[str, float]:
    group = fresh_group(world)
    layout = packed(group.size())
    if group.rank() == ODD_RANK:
        return "away", 0.0
    roller = make_roller("prefetch", group, NUM_DEPTHS)
    return timed_error(lambda: roller.start(local_to(group, "prefetch", layout), layout))


def test_a_rank_that_misses_the_agreement_is_an_error_that_names_it(short_pool: RankPool):
    results = short_pool.run(miss_the_agreement, 3)
    for rank in (0, 2):
        assert_names_the_exchange(*results[rank], "agreement", "prefetch")


def come_with_another_dtype(world: dist.ProcessGroup) -> tuple[str, float]:
    """After the agreement one rank wants another, the others exchange: neither can know, both time out."""
    group = fresh_group(world)
    layout = packed(group.size())
    batch = local_to(group, "prefetch", layout)
    roller = make_roller("prefetch", group, NUM_DEPTHS)
    assert wrong_rolls(roller.start(batch, layout), layout, group.rank()) == []
    if group.rank() == ODD_RANK:
        batch, layout = other_dtype(batch, layout)
    return timed_error(lambda: roller.start(batch, layout).at(1))


def test_a_rank_that_changes_its_batch_alone_ends_in_a_named_error(short_pool: RankPool):
    results = short_pool.run(come_with_another_dtype, 3)
    for rank in range(3):
        assert_names_the_exchange(*results[rank], "agreement" if rank == ODD_RANK else "exchange")
