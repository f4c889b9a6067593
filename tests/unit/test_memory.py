"""What a roller keeps: a bounded number of transports, and no batch."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from overlap_mtp import SCHEDULES, SequenceLayout, make_roller
from overlap_mtp.schedules.packed import MAX_TRANSPORTS

from cases import PACKED, Microbatch


def still_alive(references: list[weakref.ref[torch.Tensor]]) -> list[torch.Tensor]:
    gc.collect()
    return [one for reference in references if (one := reference()) is not None]


def dense(chunks: int) -> Microbatch:
    return Microbatch.of(None, layout=SequenceLayout.dense(2 * chunks, 1))


@pytest.mark.parametrize("schedule", PACKED)
def test_dense_lengths_share_a_bounded_number_of_transports(schedule):
    roller, used = make_roller(schedule, None, 2), weakref.WeakSet()
    lengths = range(4, 4 + 2 * MAX_TRANSPORTS)
    for chunks in (*lengths, *lengths[::5]):
        batch = dense(chunks)
        assert batch.wrong(batch.start(roller)) == []
        used.add(roller._transport)
    gc.collect()
    assert len(used) == MAX_TRANSPORTS
    kept = roller._transport
    batch.start(roller)
    assert roller._transport is kept
    roller.close()


def test_the_transport_that_was_used_least_recently_goes():
    roller = make_roller("prefetch", None, 2)
    first = dense(4)
    first.start(roller)
    transport = roller._transport
    for chunks in range(5, 5 + 3 * MAX_TRANSPORTS):
        dense(chunks).start(roller)
        first.start(roller)
        assert roller._transport is transport
    roller.close()


@pytest.mark.parametrize("schedule", PACKED)
def test_what_is_under_way_outlives_its_transport_in_the_roller(schedule):
    roller = make_roller(schedule, None, 2)
    batch = dense(4)
    rolls = batch.start(roller)
    for chunks in range(5, 5 + 2 * MAX_TRANSPORTS):
        dense(chunks).start(roller).at(1)
    assert batch.wrong(rolls) == []
    roller.close()


@pytest.mark.parametrize("schedule", PACKED)
def test_rolls_that_are_complete_keep_no_batch(schedule):
    roller, batch = make_roller(schedule, None, 2), dense(8)
    tensors = batch.shards(schedule, 2)
    rolls = roller.start(tensors, batch.layout)
    rolls.at(2)
    alive = [weakref.ref(one) for one in tensors.values()]
    del tensors
    assert still_alive(alive) == []
    assert batch.wrong(rolls) == []
    roller.close()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_batch_is_free_when_its_user_lets_go_of_it(schedule):
    roller, batch = make_roller(schedule, None, 2), dense(8)
    tensors = batch.shards(schedule, 2)
    rolls = roller.start(tensors, batch.layout)
    rolled = [rolls.at(depth) for depth in (1, 2)]
    alive = [weakref.ref(one) for some in (tensors, *rolled) for one in some.values()]
    del tensors, rolls, rolled
    assert still_alive(alive) == []
    assert isinstance(batch.full["labels"], torch.Tensor)
    roller.close()


@pytest.mark.parametrize("schedule", PACKED)
def test_a_write_to_one_roll_is_no_write_to_another(schedule):
    """Autograd keeps rolled ids, and refuses a backward pass after a write to them."""
    batch = Microbatch.of(None)
    rolls = batch.start(make_roller(schedule, None, 2))
    others = [rolls.at(1)["labels"], rolls.at(2)["input_ids"]]
    versions = [one._version for one in others]
    rolls.at(1)["input_ids"].fill_(3)
    assert [one._version for one in others] == versions
