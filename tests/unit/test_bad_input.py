"""What a user can get wrong: a ValueError that says what."""

from __future__ import annotations

import pytest
import torch

from overlap_mtp import SCHEDULES, SequenceLayout, make_roller, prepare, roll_tensor

from cases import (
    ILLEGAL,
    NUM_DEPTHS,
    assert_names,
    error_of,
    full_batch,
    local_batch,
    packed,
    wrong_rolls,
)


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
