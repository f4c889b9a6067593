"""Plans and kernels without any process: the ranks of a layout are simulated, their wires carried by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from overlap_mtp.exchange.plan import PlanShape, new_record, plan_shape
from overlap_mtp.exchange.spec import Cargo
from overlap_mtp.kernels import pack as triton_pack
from overlap_mtp.kernels import reference
from overlap_mtp.kernels import unroll as triton_unroll
from overlap_mtp.layout import SequenceLayout
from overlap_mtp.reference import roll_reference

from strategies import DTYPES, layouts, random_tensor, same_bits

POISON = 0x5A
Batch = dict[str, torch.Tensor]


def poisoned(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.full((*shape, dtype.itemsize), POISON, dtype=torch.uint8).view(dtype).reshape(shape)


def poisoned_outputs(cargo: Cargo, tensors: list[torch.Tensor], num_depths: int, length: int):
    (outputs,) = cargo.outputs(tensors, num_depths, length)
    for rolled in outputs.depths:
        for tensor in rolled.values():
            tensor.view(torch.uint8).fill_(POISON)
    return outputs


def carry(shapes: list[PlanShape], sent: list[torch.Tensor]) -> list[torch.Tensor]:
    """What all_to_all_single does: message p -> r is the rows that p has for r."""
    received = []
    for r, receiver in enumerate(shapes):
        rows = [
            wire[shape.first_send_row(r) :][: shape.send_rows[r]]
            for shape, wire in zip(shapes, sent, strict=True)
        ]
        assert [len(one) for one in rows] == list(receiver.recv_rows)
        received.append(torch.cat(rows))
    return received


class Plain:
    """One rank's part in an exchange, by the reference."""

    def __init__(self, layout: SequenceLayout, shape: PlanShape, batch: Batch) -> None:
        self.shape, self.cargo = shape, Cargo.of(batch)
        self.record, self.table = (
            torch.from_numpy(new_record(layout, shape)),
            torch.from_numpy(shape.table),
        )
        self.given = [batch[name] for name in self.cargo.names]
        self.tensors = [self.cargo.integers(tensor) for tensor in self.given]
        self.cargo_table = torch.from_numpy(self.cargo.table)
        self.length = layout.local_len

    def pack(self, wire: torch.Tensor) -> None:
        reference.pack(self.tensors, self.record, self.table, self.shape, wire)

    def unroll(self, wire: torch.Tensor, trouble: torch.Tensor) -> list[Batch]:
        outputs = poisoned_outputs(self.cargo, self.given, self.shape.num_depths, self.length)
        integers = [
            [self.cargo.integers(rolled[name]) for rolled in outputs.depths] for name in self.cargo.names
        ]
        reference.unroll(
            self.tensors, integers, self.cargo.fills, self.record, self.table, self.shape, wire, trouble
        )
        return outputs.depths


class Interpreted(Plain):
    """The same by the Triton kernels."""

    def pack(self, wire: torch.Tensor) -> None:
        self.outputs = poisoned_outputs(self.cargo, self.given, self.shape.num_depths, self.length)
        addresses = [t.data_ptr() for t in self.tensors] + self.outputs.bases
        given = torch.cat([self.record, torch.tensor(addresses)])
        self.device_record = poisoned(len(given))
        self.override = torch.full_like(given, -1)
        buffers = (given, self.override, self.device_record, self.table, self.cargo_table, wire)
        triton_pack.pack(buffers, self.shape, self.cargo, block=64)(None)

    def unroll(self, wire: torch.Tensor, trouble: torch.Tensor) -> list[Batch]:
        buffers = (self.device_record, self.override, self.table, self.cargo_table, wire, trouble)
        launch = triton_unroll.unroll(buffers, self.shape, self.cargo, block=64)
        launch(None, triton_unroll.unroll_grid(self.length, self.shape, self.cargo, block=64))
        return self.outputs.depths


def roll_by_plan(
    layout: SequenceLayout, batch: Batch, num_depths: int, max_documents: int, by: type[Plain]
) -> list[Batch]:
    """Rolls of full tensors [B, S] through plans and kernels, by depth."""
    ranks = range(layout.cp_size)
    shapes = [plan_shape(layout, rank, num_depths, max_documents) for rank in ranks]
    parts = [
        by(layout, shapes[rank], {name: layout.shard(t, rank) for name, t in batch.items()}) for rank in ranks
    ]
    sent = []
    for part in parts:
        sent.append(poisoned(part.shape.num_send_rows, part.cargo.words))
        part.pack(sent[-1])
    shards = []
    for part, wire in zip(parts, carry(shapes, sent), strict=True):
        trouble = torch.zeros(4, dtype=torch.int32)
        shards.append(part.unroll(wire, trouble))
        assert not trouble.any()
    return [
        {name: layout.unshard([shard[depth][name] for shard in shards]) for name in batch}
        for depth in range(num_depths)
    ]


def random_batch(layout: SequenceLayout, rows: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    batch = {
        f"t{i}": random_tensor((rows, layout.seq_len), dtype, generator) for i, dtype in enumerate(DTYPES)
    }
    return {**batch, "padding_mask": random_tensor((rows, layout.seq_len), torch.bool, generator)}


@settings(max_examples=200, deadline=None)
@given(layout=layouts(), num_depths=st.integers(1, 9), rows=st.integers(1, 3), seed=st.integers(0, 999))
def test_plan_gives_the_reference_rolls(layout, num_depths, rows, seed):
    batch = random_batch(layout, rows, seed)
    rolled = roll_by_plan(layout, batch, num_depths, layout.num_documents, Plain)
    for depth in range(1, num_depths + 1):
        for name, tensor in batch.items():
            expected = roll_reference(tensor, layout, depth, fill=int(name == "padding_mask"))
            assert same_bits(rolled[depth - 1][name], expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled here, not interpreted")
@settings(max_examples=25, deadline=None)
@given(
    layout=layouts(cp_sizes=(1, 2, 3)),
    num_depths=st.integers(1, 4),
    rows=st.integers(1, 2),
    spare=st.integers(0, 3),
    seed=st.integers(0, 999),
)
def test_interpreted_kernels_equal_their_reference(layout, num_depths, rows, spare, seed):
    batch = random_batch(layout, rows, seed)
    documents = layout.num_documents + spare
    plain = roll_by_plan(layout, batch, num_depths, documents, Plain)
    interpreted = roll_by_plan(layout, batch, num_depths, documents, Interpreted)
    for a, b in zip(plain, interpreted, strict=True):
        assert all(same_bits(a[name], b[name]) for name in batch)
