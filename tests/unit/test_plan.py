"""Plans and kernels without any process: the ranks of a layout are simulated, and a function carries their messages."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from overlap_mtp.exchange.plan import ExchangePlan, make_metadata, make_plans
from overlap_mtp.kernels import pack as triton_pack
from overlap_mtp.kernels import reference
from overlap_mtp.kernels import unroll as triton_unroll
from overlap_mtp.kernels.common import ExchangeConstants
from overlap_mtp.layout import SequenceLayout

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
    fills, metadata = batch.spec.fills, batch.host_metadata
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


def wrong_rolls(layout, full, num_depths, max_documents, pack, unroll) -> list[list[str]]:
    """What is wrong with each rank's rolls after an exchange by these two functions."""
    plans = make_plans(layout, num_depths, max_documents)
    spec = spec_of(full, layout, num_depths, max_documents)
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
