"""What a user can get wrong: a ValueError that says what. And what makes two batches the same to an exchange."""

from __future__ import annotations

import math

import pytest
import torch

from overlap_mtp import (
    SCHEDULES,
    DeviceLayout,
    SequenceLayout,
    make_activation_roller,
    make_roller,
    prepare,
    roll_reference,
    roll_tensor,
)
from overlap_mtp.exchange.group import ExchangeGroup
from overlap_mtp.exchange.spec import ExchangeSpec, RollOptions
from overlap_mtp.schedules.timed import TimedRoller

from cases import ILLEGAL, NUM_DEPTHS, Microbatch, assert_names, error_of, full_batch, packed
from strategies import KINDS, same_bits


def test_specs_are_equal_if_only_documents_or_the_packed_length_differ():
    def spec(batch=None, layout=None, **options):
        layout = layout or packed(1)
        asked = [options.pop(name, "auto") for name in ("schedule", "transport")]
        options = {"num_depths": 2, "max_documents": 8, "fills": {}, "depths": {}} | options
        group = ExchangeGroup(None)
        return ExchangeSpec.of(batch or full_batch(layout), layout, group, *asked, RollOptions(**options))

    batch, bounds = full_batch(packed(1)), packed(1).cu_seqlens
    same = [packed(1, 1), SequenceLayout.packed([0, 30], 1), SequenceLayout.packed([0, 8], 1, "zigzag", [3])]
    assert {spec(layout=layout) for layout in same} == {spec()}
    others = [
        spec({"tokens" if name == "labels" else name: t for name, t in batch.items()}),
        spec(batch | {"labels": batch["labels"].long()}),
        spec(full_batch(packed(1), rows=3)),
        spec({name: t[0] for name, t in batch.items()}),
        spec(layout=SequenceLayout.packed(bounds, 1, "contiguous")),
        spec(layout=DeviceLayout(torch.from_numpy(bounds), packed(1).seq_len, 1)),
        *(spec(layout=SequenceLayout.dense(length, 1)) for length in (24, 32)),
        *(spec(**{name: "other"}) for name in ("schedule", "transport")),
        *(spec(**{name: 9}) for name in ("num_depths", "max_documents")),
        *(spec(**{name: {"labels": 1}}) for name in ("fills", "depths")),
    ]
    assert len({spec(), *others}) == 1 + len(others)


def test_bounds_on_another_device_than_the_batch_are_refused():
    """The kernels would read them at an address of another device."""
    batch, options = {"tokens": torch.ones(1, 8)}, RollOptions(1, 8, {}, {})
    for device, wrong in (("cpu", False), ("meta", True)):
        layout = DeviceLayout(torch.zeros(2, dtype=torch.int32, device=device), 8, 1)
        message = error_of(ExchangeSpec.of, batch, layout, ExchangeGroup(None), "prefetch", "auto", options)
        assert ("batch's device cpu, got meta" in message) == wrong


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_fills_have_the_precision_of_their_tensor(schedule):
    layout = SequenceLayout.dense(4, 1)
    for fill, dtype in ((0.1, torch.float64), (-(2**40) - 1, torch.int64), (float("inf"), torch.bfloat16)):
        batch = {"scores": torch.ones(1, 4, dtype=dtype)}
        roller = make_roller(schedule, None, 1, fills={"scores": fill})
        given = prepare(batch, layout, 1, fills={"scores": fill}) if schedule == "prepared" else batch
        assert roller.start(given, layout).at(1)["scores"].tolist() == [[1, 1, 1, fill]]
    for fill in (0.0, -0.0):  # two values, although they are equal
        batch = {"scores": torch.ones(1, 4)}
        given = prepare(batch, layout, 1, fills={"scores": fill}) if schedule == "prepared" else batch
        roller = make_roller(schedule, None, 1, fills={"scores": fill})
        (last,) = roller.start(given, layout).at(1)["scores"][:, -1].tolist()
        assert math.copysign(1, last) == math.copysign(1, fill)
    for fill, dtype in ((0.1, torch.float32), (0.5, torch.int64), (2, torch.bool), (300, torch.uint8)):
        batch = {"scores": torch.ones(1, 4).to(dtype)}
        roller = make_roller(schedule, None, 1, fills={"scores": fill})
        assert f"cannot hold {fill}," in error_of(roller.start, batch, layout)


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
        (
            lambda: prepare(full_batch(packed(1)), packed(1), 2, depths={"labels": 3}),
            ["depths", "labels", "2", "3"],
        ),
        (
            lambda: prepare({"labels": torch.ones(4).byte()}, SequenceLayout.dense(4, 1), 1),
            ["labels", "uint8", "-100", "int64"],
        ),
        (lambda: make_roller("prefetch", None, 2, ignore_index=2**63), ["ignore_index", str(2**63)]),
        (lambda: make_roller("prefetch", None, 2, depths={"labels": 3}), ["labels", "1, 2", "3"]),
        (lambda: make_roller("prefetch", None, 2, depths={"labels": 0}), ["labels", "1, 2", "0"]),
        (lambda: make_roller("prefetch", None, 2, fills={"mask": float("nan")}), ["mask", "number", "nan"]),
        (lambda: make_roller("prefetch", 0, 2), ["ProcessGroup", "not in the group"]),
        (lambda: make_activation_roller("overlap", "cp", 2), ["ProcessGroup", "get_group", "str"]),
        (lambda: make_activation_roller("prefetch", None, 2), ["activations", "overlap", "prefetch"]),
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


def test_a_replay_takes_no_layout_on_the_device():
    one = Microbatch.of(None)
    rolls = one.start(make_roller("prefetch", None, NUM_DEPTHS))
    bounds = DeviceLayout(torch.tensor([0, one.layout.seq_len]), one.layout.seq_len, 1)
    assert_names(error_of(rolls.set_replay_layout, bounds), "SequenceLayout", "layout.on_host")


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


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("ignore_index", "dtypes"),
    [
        (-100, (torch.int64, torch.int32, torch.int8, torch.bfloat16, torch.float16, torch.float64)),
        (-1, (torch.int64, torch.int8)),
        (0, (torch.uint8, torch.bool)),
        (255, (torch.uint8, torch.int32)),
        (-(2**40), (torch.int64, torch.float64)),
    ],
)
def test_rolled_labels_hold_the_ignore_index_past_the_end(schedule, ignore_index, dtypes):
    layout = SequenceLayout.packed([0, 4, 10], 1, valid_lengths=[3, 6])
    for dtype in dtypes:
        full = {"labels": torch.arange(1, 11).to(dtype), "tokens": torch.arange(1, 11)}
        batch = prepare(full, layout, 2, ignore_index) if schedule == "prepared" else full
        rolls = make_roller(schedule, None, 2, ignore_index=ignore_index).start(batch, layout)
        for depth in (1, 2):
            rolled, expected = rolls.at(depth), roll_reference(full["labels"], layout, depth, ignore_index)
            assert same_bits(rolled["labels"], expected)
            assert (rolled["labels"][~torch.from_numpy(layout.valid(0, depth))] == ignore_index).all()
            assert same_bits(rolled["tokens"], roll_reference(full["tokens"], layout, depth))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("ignore_index", "dtype"), [(-1, torch.uint8), (2, torch.bool), (-129, torch.int8), (2**40, torch.int32)]
)
def test_labels_must_be_able_to_hold_the_ignore_index(schedule, ignore_index, dtype):
    roller = make_roller(schedule, None, 2, ignore_index=ignore_index)
    batch = {"labels": torch.ones(2, packed(1).local_len).to(dtype)}
    for _ in range(2):
        assert_names(error_of(roller.start, batch, packed(1)), "labels", str(dtype)[6:], str(ignore_index))
