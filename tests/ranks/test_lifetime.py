"""What outlives what: rollers leave nothing behind, and tensors belong to the caller."""

from __future__ import annotations

import gc
import os
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from overlap_mtp import SCHEDULES, SequenceLayout, make_roller, roll_reference, roll_tensor

from cases import PACKED, error_of
from rank_bodies import DEPTHS, LIFETIMES, OWNERSHIP, gradients_differ, interleave, random_microbatch
from rank_pool import TIMEOUT_S, RankPool


def held_resources() -> dict[str, int]:
    return {
        "process groups": len(dist.distributed_c10d._world.pg_map),
        "threads": len(os.listdir("/proc/self/task")),
        "file descriptors": len(os.listdir("/proc/self/fd")),
    }


def make_use_and_close(group: dist.ProcessGroup, count: int, use_every: int) -> list[str]:
    """What was rolled wrongly, and which resources were held that the first roller had not left."""
    wrong: list[str] = []
    after_first: dict[str, int] = {}
    for i in range(count):
        roller = make_roller(SCHEDULES[i // use_every % len(SCHEDULES)], group, DEPTHS)
        if i % use_every == 0:
            batch = random_microbatch(group, i)
            wrong += batch.wrong(batch.start(roller), DEPTHS)
        roller.close()
        after_first = after_first or held_resources()
    after_all = held_resources()
    return wrong if after_all == after_first else [*wrong, f"{after_first} became {after_all}"]


def roll_once(group: dist.ProcessGroup) -> list[str]:
    batch, roller = random_microbatch(group, 0), make_roller("prefetch", group, DEPTHS)
    wrong = batch.wrong(batch.start(roller), DEPTHS)
    roller.close()
    return wrong


def make_and_destroy_cp_groups(world: dist.ProcessGroup, count: int) -> list[str]:
    """What was rolled wrongly in new cp groups of the same ranks, and which resources the later ones left."""
    wrong: list[str] = []
    after_second: dict[str, int] = {}
    for number in range(count):
        group = dist.new_group([0, 1])
        if dist.get_rank(group) >= 0:
            wrong += roll_once(group)
            dist.destroy_process_group(group)
        del group
        gc.collect()
        if number == 1:
            after_second = held_resources()
    after_all = held_resources()
    return wrong if after_all == after_second else [*wrong, f"{after_second} became {after_all}"]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts what /proc lists")
def test_cp_groups_that_come_and_go_leak_nothing(ranks: RankPool):
    ranks.check(make_and_destroy_cp_groups, 4, 12)


def roll_among_other_groups(world: dist.ProcessGroup) -> list[str]:
    """Every rank is a member of another number of groups when the exchange group of a cp group is made."""
    for members in ([0], [0, 2], [0, 1]):
        dist.new_group(members)
    groups = [dist.new_group(members) for members in ([0, 1], [2], [0, 1, 2], [1, 2])]
    return [one for group in groups if dist.get_rank(group) >= 0 for one in roll_once(group)]


def test_cp_groups_work_whatever_other_groups_their_ranks_are_in():
    with RankPool(3, sizes=()) as three:
        three.check(roll_among_other_groups, 3)


def roll_where_two_ranks_send_nothing(world: dist.ProcessGroup) -> list[str]:
    """A new cp group's first roll, and then another collective. Only tokens of rank 1 are asked for, by rank 0."""
    group = dist.new_group(list(range(4)), timeout=timedelta(seconds=TIMEOUT_S))
    layout = SequenceLayout.packed([0, 16], 4, valid_lengths=[3])
    packed = SimpleNamespace(cu_seqlens_q=[0, 3], cu_seqlens_q_padded=[0, 16])
    full, ones = torch.arange(1, 17), torch.ones(1)
    rolled, _ = roll_tensor(layout.shard(full, group.rank()), -1, -1, group, packed)
    dist.all_reduce(ones, group=group)
    wanted = layout.shard(roll_reference(full, layout, 1), group.rank())
    return [] if torch.equal(rolled, wanted) and ones == 4 else [f"{rolled} in place of {wanted}"]


def test_roll_tensor_may_come_first_where_a_rank_sends_nothing(ranks: RankPool):
    ranks.check(roll_where_two_ranks_send_nothing, 4)


def start_again(world: dist.ProcessGroup, folder: str) -> list[str]:
    """What was rolled wrongly before and after all process groups were destroyed and made again."""
    wrong = roll_once(dist.group.WORLD)
    rank = dist.get_rank()
    dist.barrier()
    dist.destroy_process_group()
    del world
    gc.collect()
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    return wrong + roll_once(dist.group.WORLD)


def test_process_groups_can_be_destroyed_and_made_again(tmp_path):
    with RankPool(2, sizes=()) as two:
        two.check(start_again, 2, str(tmp_path))


def use_after_destruction(world: dist.ProcessGroup) -> str:
    group = dist.new_group([0, 1])
    if dist.get_rank(group) < 0:
        return "no member"
    roller = make_roller("prefetch", group, DEPTHS)
    batch = random_microbatch(group, 0)
    dist.barrier(group)  # a rank that destroys it while another still connects would end that one in an error
    dist.destroy_process_group(group)
    batch.group, group = None, None
    gc.collect()
    return error_of(roller.start, batch.full, batch.layout)


def test_a_roller_of_a_destroyed_cp_group_says_so(ranks: RankPool):
    for error in ranks.run(use_after_destruction, 4)[:2]:
        assert "the cp group was destroyed" in error


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts what /proc lists")
def test_a_thousand_rollers_leak_nothing(ranks: RankPool):
    ranks.check(make_use_and_close, 2, 1000, 50)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("cp_size", [2, 3])
def test_gradients_accumulate_over_microbatches(ranks: RankPool, cp_size, schedule):
    ranks.check(gradients_differ, cp_size, schedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("body", LIFETIMES)
def test_rolls_of_microbatches_do_not_disturb_each_other(ranks: RankPool, body, schedule):
    ranks.check(body, 3, schedule)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("prefetch", "prefetch"),
        ("prefetch", "sync"),
        ("overlap", "prefetch"),
        ("sync", "overlap"),
        ("merged", "overlap"),
        ("prepared", "merged"),
    ],
)
def test_two_rollers_share_a_cp_group(ranks: RankPool, first, second):
    ranks.check(interleave, 3, first, second)


@pytest.mark.parametrize("schedule", PACKED)
@pytest.mark.parametrize("body", OWNERSHIP)
def test_tensors_are_the_callers(ranks: RankPool, body, schedule):
    ranks.check(body, 2, schedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_closed_roller_is_refused(schedule):
    batch, roller = random_microbatch(None, 0), make_roller(schedule, None, DEPTHS)
    batch.start(roller).at(1)
    roller.close()
    with pytest.raises(RuntimeError, match="closed"):
        batch.start(roller)
    roller.close()
