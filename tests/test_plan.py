"""Plans and kernels without any process: the ranks of a layout are simulated, their wires carried by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from overlap_mtp.kernels import pack as triton_pack
from overlap_mtp.kernels import reference
from overlap_mtp.kernels import unroll as triton_unroll
from overlap_mtp.layout import SequenceLayout
from overlap_mtp.plan import RollPlan, build_plan, plan_shape
from overlap_mtp.reference import roll_reference

from strategies import DTYPES, layouts, random_tensor, same_bits

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
POISON = 0x5A


def poisoned(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.full((*shape, dtype.itemsize), POISON, dtype=torch.uint8).view(dtype).reshape(shape)


def carry(layout: SequenceLayout, plans: list[RollPlan], sent: list[torch.Tensor]) -> list[torch.Tensor]:
    """What all_to_all_single does: message p -> r is the rows that p has for r."""
    received = []
    for r in range(layout.cp_size):
        rows = [
            sent[p][sum(plans[p].shape.send_rows[:r]) :][: plans[p].shape.send_rows[r]]
            for p in range(layout.cp_size)
        ]
        assert [len(one) for one in rows] == list(plans[r].shape.recv_rows)
        received.append(torch.cat(rows))
    return received


def roll_by_plan(layout, tensors, num_depths, max_documents, kernels, **launch):
    """Rolls of full tensors [B, S] through plans and kernels: list over tensors of [D, B, S]."""
    ranks = range(layout.cp_size)
    plans = [build_plan(layout, plan_shape(layout, rank, num_depths, max_documents)) for rank in ranks]
    tables = [torch.from_numpy(plan.table) for plan in plans]
    held = [[layout.shard(t, rank).view(INTEGERS[t.itemsize]) for t in tensors] for rank in ranks]
    words = len(tensors) * tensors[0].shape[0]
    sent = []
    for rank in ranks:
        wire = poisoned(plans[rank].shape.num_send_rows, words)
        if wire.numel():
            kernels["pack"](held[rank], tables[rank], plans[rank].shape, wire, **launch)
        sent.append(wire)
    shards = []
    for rank, wire in zip(ranks, carry(layout, plans, sent), strict=True):
        outputs = [poisoned(num_depths * len(t), t.shape[1], dtype=t.dtype) for t in held[rank]]
        mismatch = torch.zeros(1, dtype=torch.int32)
        fills = [0] * len(tensors)
        kernels["unroll"](
            held[rank], outputs, fills, tables[rank], plans[rank].shape, wire, mismatch, **launch
        )
        assert mismatch.item() == 0
        shards.append(outputs)
    return [
        layout.unshard([shard[i].view(t.dtype) for shard in shards]).view(num_depths, *t.shape)
        for i, t in enumerate(tensors)
    ]


PLAIN = {"pack": reference.pack, "unroll": reference.unroll}
TRITON = {"pack": triton_pack.pack, "unroll": triton_unroll.unroll}


@settings(max_examples=200, deadline=None)
@given(layout=layouts(), num_depths=st.integers(1, 9), batch=st.integers(1, 3), seed=st.integers(0, 999))
def test_plan_gives_the_reference_rolls(layout, num_depths, batch, seed):
    generator = torch.Generator().manual_seed(seed)
    tensors = [random_tensor((batch, layout.seq_len), dtype, generator) for dtype in DTYPES]
    rolled = roll_by_plan(layout, tensors, num_depths, layout.num_documents, PLAIN)
    for tensor, rolls in zip(tensors, rolled, strict=True):
        for depth in range(1, num_depths + 1):
            assert same_bits(rolls[depth - 1], roll_reference(tensor, layout, depth))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled here, not interpreted")
@settings(max_examples=25, deadline=None)
@given(
    layout=layouts(cp_sizes=(1, 2, 3)),
    num_depths=st.integers(1, 4),
    batch=st.integers(1, 2),
    spare=st.integers(0, 3),
    seed=st.integers(0, 999),
)
def test_interpreted_kernels_equal_their_reference(layout, num_depths, batch, spare, seed):
    generator = torch.Generator().manual_seed(seed)
    tensors = [random_tensor((batch, layout.seq_len), dtype, generator) for dtype in DTYPES]
    documents = layout.num_documents + spare
    plain = roll_by_plan(layout, tensors, num_depths, documents, PLAIN)
    compiled = roll_by_plan(layout, tensors, num_depths, documents, TRITON, block=64)
    for a, b in zip(plain, compiled, strict=True):
        assert same_bits(a, b)
