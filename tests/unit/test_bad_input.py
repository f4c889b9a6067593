"""What a user can get wrong: a ValueError that says what. And what makes two batches the same to an exchange."""

from __future__ import annotations

import pytest
import torch

from overlap_mtp import SCHEDULES, SequenceLayout, make_roller, prepare, roll_tensor
from overlap_mtp.exchange.group import ExchangeGroup
from overlap_mtp.exchange.spec import ExchangeSpec
from overlap_mtp.schedules.timed import TimedRoller

from cases import ILLEGAL, NUM_DEPTHS, Microbatch, assert_names, error_of, full_batch, packed
from strategies import KINDS


def test_specs_are_equal_if_only_documents_or_the_packed_length_differ():
    def spec(batch=None, layout=None, **options):
        layout = layout or packed(1)
        options = {"schedule": "sync", "transport": "auto", "num_depths": 2, "max_documents": 8} | options
        return ExchangeSpec.of(batch or full_batch(layout), layout, ExchangeGroup(None), **options)

    batch, bounds = full_batch(packed(1)), packed(1).cu_seqlens
    same = [packed(1, 1), SequenceLayout.packed([0, 30], 1), SequenceLayout.packed([0, 8], 1, "zigzag", [3])]
    assert {spec(layout=layout) for layout in same} == {spec()}
    others = [
        spec({"tokens" if name == "labels" else name: t for name, t in batch.items()}),
        spec(batch | {"labels": batch["labels"].long()}),
        spec(full_batch(packed(1), rows=3)),
        spec({name: t[0] for name, t in batch.items()}),
        spec(layout=SequenceLayout.packed(bounds, 1, "contiguous")),
        *(spec(layout=SequenceLayout.dense(length, 1)) for length in (24, 32)),
        *(spec(**{name: "other"}) for name in ("schedule", "transport")),
        *(spec(**{name: 9}) for name in ("num_depths", "max_documents")),
    ]
    assert len({spec(), *others}) == 1 + len(others)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: make_roller("fastest", None, 2), [*SCHEDULES, "fastest"]),
        (lambda: make_roller("", None, 2), [*SCHEDULES, "''"]),
        (lambda: make_roller("Prefetch", None, 2), [*SCHEDULES, "Prefetch"]),
        (
            lambda: make_roller("prefetch", None, 2, "pigeon"),
            ["auto", "process_group", "symmetric", "pigeon"],
        ),
        (lambda: prepare(full_batch(packed(1)), packed(1), 0), ["num_depths", "1", "0"]),
        (lambda: prepare(full_batch(packed(1)), packed(1), -1), ["num_depths", "1", "-1"]),
        (lambda: roll_tensor(torch.arange(4), shifts=0), ["shifts", "0"]),
        (lambda: roll_tensor(torch.arange(4), shifts=1), ["shifts", "1"]),
    ],
)
def test_illegal_arguments_are_refused(call, words):
    assert_names(error_of(call), *words)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_illegal_arguments_of_every_schedule_are_refused(schedule):
    for value in (0, -1):
        assert_names(error_of(make_roller, schedule, None, value), "num_depths", "1", str(value))
        message = error_of(make_roller, schedule, None, 2, "auto", value)
        assert_names(message, "max_documents", "1", str(value))
    one, roller = Microbatch.of(None), make_roller(schedule, None, NUM_DEPTHS)
    rolls = one.start(roller)
    for depth in (0, NUM_DEPTHS + 1, -1):
        assert_names(error_of(rolls.at, depth), "1", str(NUM_DEPTHS), str(depth))
    assert one.wrong(rolls) == []
    assert error_of(rolls.set_replay_layout, one.layout).startswith("RuntimeError: only")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("case", ILLEGAL)
def test_illegal_batches_are_refused(schedule, case):
    """At first use and later, and neither harms the next batch."""
    make_illegal, words = ILLEGAL[case]
    one, roller = Microbatch.of(None), make_roller(schedule, None, NUM_DEPTHS)
    for _ in range(2):
        assert_names(error_of(roller.start, make_illegal(one.shards(schedule)), one.layout), *words)
        assert one.wrong(one.start(roller)) == []


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", KINDS)
def test_illegal_layouts_are_refused(schedule, kind):
    layouts = [SequenceLayout.packed(range(0, 2 * n + 1, 2), 1, kind) for n in (3, 4)]
    few, many = (Microbatch.of(None, layout=layout) for layout in layouts)
    roller = make_roller(schedule, None, NUM_DEPTHS, max_documents=3)
    for other, words in (
        (many.layout, ["4", "3", "max_documents"]),
        (SequenceLayout.packed([0, 4], 2, kind), ["cp_size", "2", "1"]),
        (SequenceLayout.packed([0, 20], 1, kind), ["20", "6"]),
    ):
        assert few.wrong(few.start(roller)) == []
        batch = many if other is many.layout else few
        assert_names(error_of(roller.start, batch.shards(schedule), other), *words)
    assert few.wrong(few.start(roller)) == []


def test_an_unprepared_batch_is_refused_by_prepared():
    layout = packed(1)
    roller = make_roller("prepared", None, NUM_DEPTHS)
    for batch in (full_batch(layout), prepare(full_batch(layout), layout, NUM_DEPTHS - 1)):
        assert_names(error_of(roller.start, batch, layout), "prepare")


def test_what_is_no_batch_is_refused_in_the_same_words_if_it_is_timed():
    roller, layout = make_roller("prefetch", None, NUM_DEPTHS), packed(1)
    for nothing in ([torch.ones(1, layout.local_len)], torch.ones(2, 2), {}, None):
        for one in (roller, TimedRoller(roller)):
            assert_names(error_of(one.start, nothing, layout), "ValueError", "dict")


def test_an_exchange_is_waited_for_once():
    one, roller = Microbatch.of(None), make_roller("prefetch", None, NUM_DEPTHS)
    rolls = one.start(roller)
    assert one.wrong(rolls) == []
    assert error_of(rolls._exchanges[0].wait).startswith("RuntimeError: exchange 0 was already waited for")
