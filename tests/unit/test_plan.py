"""Plans and kernels without any process: the ranks of a layout are simulated, and a function carries their messages."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from overlap_mtp import DeviceLayout
from overlap_mtp.exchange.plan import (
    CU_SEQLENS,
    FINGERPRINT,
    NO_DOCUMENT,
    NUM_DOCUMENTS,
    SEQ_LEN,
    ExchangePlan,
    make_metadata,
    make_plans,
    write_references,
)
from overlap_mtp.exchange.spec import column_addresses
from overlap_mtp.kernels import pack as triton_pack
from overlap_mtp.kernels import reference
from overlap_mtp.kernels import unroll as triton_unroll
from overlap_mtp.kernels.bounds import write_bounds
from overlap_mtp.kernels.common import ExchangeConstants
from overlap_mtp.layout import TAIL, SequenceLayout

from rank_bodies import device_layout_of
from simulated import RankBatch, poisoned, spec_of
from strategies import dtype_choices, layouts, random_batch


def carry(plans: list[ExchangePlan], sent: list[torch.Tensor]) -> list[torch.Tensor]:
    """Do what all_to_all_single does: message p -> r is the rows that p has for r."""
    received = []
    for r, receiver in enumerate(plans):
        rows = [
            buffer[plan.first_send_row(r) :][: plan.send_rows[r]]
            for plan, buffer in zip(plans, sent, strict=True)
        ]
        assert [len(one) for one in rows] == list(receiver.recv_rows)
        received.append(torch.cat(rows))
    return received


def pack(batch: RankBatch, send_buffer: torch.Tensor) -> None:
    reference.pack(batch.tensors, batch.host_metadata, batch.plan, send_buffer)


def unroll(batch: RankBatch, recv_buffer: torch.Tensor, error_flags: torch.Tensor) -> None:
    fills, metadata = batch.spec.fill_bits, batch.host_metadata
    reference.unroll(batch.tensors, batch.outputs, fills, metadata, batch.plan, recv_buffer, error_flags)


def tables_and_constants(batch: RankBatch) -> tuple[torch.Tensor, torch.Tensor, ExchangeConstants]:
    spec, plan = batch.spec, batch.plan
    return torch.from_numpy(plan.table), torch.from_numpy(spec.table), ExchangeConstants.of(spec, plan)


def interpreted_pack(batch: RankBatch, send_buffer: torch.Tensor) -> None:
    *tables, constants = tables_and_constants(batch)
    buffers = (batch.host_metadata, batch.replay_metadata, batch.metadata, *tables, send_buffer)
    triton_pack.pack(buffers, constants)()


def interpreted_unroll(batch: RankBatch, recv_buffer: torch.Tensor, error_flags: torch.Tensor) -> None:
    *tables, constants = tables_and_constants(batch)
    buffers = (batch.metadata, batch.replay_metadata, *tables, recv_buffer, error_flags)
    grid = triton_unroll.unroll_grid(batch.layout.local_len, constants, block=64)
    triton_unroll.unroll(buffers, constants, block=64)(grid)


def wrong_rolls(layout, full, num_depths, max_documents, pack, unroll, depths=None) -> list[list[str]]:
    """What is wrong with each rank's rolls after an exchange by these two functions."""
    plans = make_plans(layout, num_depths, max_documents)
    spec = spec_of(full, layout, num_depths, max_documents, depths)
    batches = [RankBatch(full, layout, plan, spec) for plan in plans]
    sent = [poisoned(plan.num_send_rows, spec.words_per_token) for plan in plans]
    for batch, send_buffer in zip(batches, sent, strict=True):
        pack(batch, send_buffer)
    for batch, received in zip(batches, carry(plans, sent), strict=True):
        error_flags = torch.zeros(4, dtype=torch.int32)
        unroll(batch, received, error_flags)
        assert not error_flags.any()
    return [batch.wrong() for batch in batches]


@settings(max_examples=200)
@given(layout=layouts(), num_depths=st.integers(1, 9), rows=st.integers(1, 3), seed=st.integers(0, 999))
def test_plan_gives_the_reference_rolls(layout, num_depths, rows, seed):
    full = random_batch(layout, rows, seed)
    assert not any(wrong_rolls(layout, full, num_depths, layout.num_documents, pack, unroll))


@settings(max_examples=60)
@given(layout=layouts(), num_depths=st.integers(1, 3), spare=st.integers(1, 300))
def test_empty_documents_at_the_end_take_no_room_and_change_no_word(layout, num_depths, spare):
    """As in a `cu_seqlens` of static size, whose last entry is repeated."""
    assume(layout.is_packed)
    bounds, used = layout.cu_seqlens.tolist(), layout.num_used_documents
    assert bounds[used] == layout.seq_len > bounds[used - 1]
    has_tail = layout.tail_len > 0
    documents = layout.num_documents - has_tail
    static = SequenceLayout.packed(
        bounds[: documents + 1] + [bounds[documents]] * spare,
        layout.cp_size,
        layout.kind,
        layout.valid_lengths.tolist()[:documents] + [0] * spare,
        layout.seq_len,
    )
    assert static.num_used_documents == used
    for one, other in zip(*(make_plans(each, num_depths, used) for each in (layout, static)), strict=True):
        assert (make_metadata(layout, one) == make_metadata(static, other)).all()
        assert one.num_sequences(layout) == other.num_sequences(static)
    assert not any(wrong_rolls(static, random_batch(static), num_depths, used, pack, unroll))
    if used > 1:
        with pytest.raises(ValueError, match=f"{used} documents, more than max_documents {used - 1}"):
            spec_of(random_batch(static), static, num_depths, used - 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled here, not interpreted")
@settings(max_examples=25)
@given(
    layout=layouts(cp_sizes=(1, 2, 3)),
    num_depths=st.integers(1, 4),
    rows=st.integers(1, 2),
    spare=st.integers(0, 3),
    dtypes=dtype_choices,
    seed=st.integers(0, 999),
)
def test_interpreted_kernels_give_the_reference_rolls(layout, num_depths, rows, spare, dtypes, seed):
    full, documents = random_batch(layout, rows, seed, dtypes), layout.num_documents + spare
    assert not any(wrong_rolls(layout, full, num_depths, documents, interpreted_pack, interpreted_unroll))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled here, not interpreted")
@settings(max_examples=5)
@given(layout=layouts(cp_sizes=(1, 2, 3)), rows=st.integers(1, 2), seed=st.integers(0, 999))
def test_kernels_take_tensors_of_other_shapes_and_depths(layout, rows, seed):
    full = random_batch(layout, rows, seed)
    more = random_batch(layout, 3 * rows, seed + 1)["position_ids"]
    full |= {"position_ids": more.view(3, rows, -1), "padding_mask": full["padding_mask"][0]}
    depths = {"position_ids": 1, "labels": 2}
    for carried_out in ((pack, unroll), (interpreted_pack, interpreted_unroll)):
        assert not any(wrong_rolls(layout, full, 3, layout.num_documents, *carried_out, depths))


def test_columns_have_equally_many_rows():
    """4 and 6 rows are two and three columns of two rows."""
    four, six = torch.arange(16, dtype=torch.int32).view(4, 4), torch.arange(24).view(2, 3, 4)
    spec = spec_of({"four": four, "six": six}, SequenceLayout.dense(4, 1), 1, 1)
    assert (spec.batch_rows, spec.parts, spec.num_columns, spec.words_per_token) == (2, (2, 3), 5, 10)
    assert spec.widths == (4, 4, 8, 8, 8)
    columns = spec.columns([four, six])
    assert torch.equal(torch.cat(columns[:2]), four)
    assert torch.equal(torch.cat(columns[2:]), six.view(6, 4))
    assert column_addresses([four, six], spec.parts) == [column.data_ptr() for column in columns]
    assert column_addresses([four, None], spec.parts) == [*(one.data_ptr() for one in columns[:2]), 0, 0, 0]


def bounds_written(layout: DeviceLayout, max_documents: int, mark: int = 0) -> tuple[np.ndarray, list[int]]:
    """(metadata, error flags) that the kernel makes of bounds on the device."""
    pattern = layout.pattern()
    plan = make_plans(pattern, 2, max_documents)[0]
    spec = spec_of(random_batch(pattern), pattern, 2, max_documents)
    host_metadata, metadata = poisoned(plan.metadata_len + 15), poisoned(plan.metadata_len + 15)
    write_references(layout, host_metadata.numpy(), mark)
    error_flags = torch.zeros(4, dtype=torch.int32)
    write_bounds(host_metadata, metadata, error_flags, ExchangeConstants.of(spec, plan))()
    assert torch.equal(metadata[plan.metadata_len :], host_metadata[plan.metadata_len :])
    return metadata[: plan.metadata_len].numpy(), error_flags.tolist()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled here, not interpreted")
@settings(max_examples=40)
@given(
    layout=layouts(),
    spare=st.integers(0, 4),
    dtype=st.sampled_from([torch.int32, torch.int64]),
    mark=st.integers(0, 2**31 - 1),
)
def test_the_device_makes_the_metadata_that_the_host_makes(layout, spare, dtype, mark):
    assume(layout.is_packed)
    on_device = device_layout_of(layout, torch.device("cpu"), dtype)
    max_documents = on_device.num_documents + spare
    found, error_flags = bounds_written(on_device, max_documents, mark)
    assert error_flags == [0, 0, 0, 0]
    assert 0 <= found[FINGERPRINT] >> 32 == mark
    plan = make_plans(layout, 2, max_documents)[0]
    expected = make_metadata(on_device.on_host(), plan)
    documents = int(found[NUM_DOCUMENTS])  # with empty ones at the end
    assert documents >= expected[NUM_DOCUMENTS]
    assert found[SEQ_LEN] == expected[SEQ_LEN]
    bounds = np.append(on_device.cu_seqlens.numpy(), layout.seq_len)[: documents + 1]
    assert found[CU_SEQLENS:][: max_documents + 1].tolist() == [
        *bounds.tolist(),
        *[NO_DOCUMENT] * (max_documents - documents),
    ]
    for one in (found, expected):  # empty documents need no valid end
        used = np.flatnonzero(np.diff(one[CU_SEQLENS:][: one[NUM_DOCUMENTS] + 1]))
        ends = one[plan.valid_ends_at + used].tolist()
        assert ends == layout.valid_ends[np.diff(layout.cu_seqlens) > 0].tolist()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled here, not interpreted")
def test_the_device_tells_bounds_apart():
    def fingerprint(bounds, valid=None, seq_len=24, name=""):
        cu_valid = None if valid is None else torch.tensor(valid)
        layout = DeviceLayout(torch.tensor(bounds), seq_len, 2, "zigzag", cu_valid)
        return int(bounds_written(layout.of_batch(name) if name else layout, 8)[0][FINGERPRINT])

    found = [
        fingerprint([0, 4, 24]),
        fingerprint([0, 8, 24]),
        fingerprint([0, 4, 8, 24]),
        fingerprint([0, 4, 20]),
        fingerprint([0, 4, 24], [0, 3, 23]),
        fingerprint([0, 4, 24], [0, 4, 23]),
        fingerprint([0, 4, 24], name="sample 3"),
        fingerprint([0, 4, 24], name="sample 4"),
    ]
    assert len(set(found)) == len(found)
    assert fingerprint([0, 4, 24], [0, 4, 24]) == found[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled here, not interpreted")
@pytest.mark.parametrize(
    ("bounds", "valid", "kind"),
    [
        ([0, 8, 4, 24], None, "zigzag"),
        ([4, 8, 24], None, "zigzag"),
        ([0, 6, 24], None, "zigzag"),
        ([0, 8, 28], None, "zigzag_stream"),
        ([0, -4, 24], None, "contiguous"),
        ([0, 1, -(2**63)], None, "contiguous"),  # its length overflows
        ([0, 8, 24], [0, 9, 20], "zigzag"),
        ([0, 8, 24], [0, 5, 4], "contiguous"),
    ],
)
def test_illegal_bounds_on_the_device_are_reported_and_roll_nothing(bounds, valid, kind):
    cu_valid = None if valid is None else torch.tensor(valid)
    layout = DeviceLayout(torch.tensor(bounds), 24, 2, kind, cu_valid)
    with pytest.raises(ValueError, match=r"cu_seqlens|document|valid_lengths|seq_len"):
        layout.on_host()
    metadata, error_flags = bounds_written(layout, 4)
    assert error_flags == [0, 0, 0, 1]
    assert metadata[NUM_DOCUMENTS] == 1
    assert metadata[CU_SEQLENS : CU_SEQLENS + 5].tolist() == [0, 24, *[NO_DOCUMENT] * 3]
    assert metadata[CU_SEQLENS + 5] == TAIL
