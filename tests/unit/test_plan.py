"""Plans and kernels without any process: the ranks of a layout are simulated, their messages carried by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import Batch, poisoned, random_batch, shards_of, spec_of

from overlap_mtp.exchange.outputs import Outputs, allocate_outputs
from overlap_mtp.exchange.plan import ExchangePlan, make_metadata, make_plans
from overlap_mtp.exchange.spec import ExchangeSpec
from overlap_mtp.kernels import pack as triton_pack
from overlap_mtp.kernels import reference
from overlap_mtp.kernels import unroll as triton_unroll
from overlap_mtp.kernels.common import ExchangeConstants
from overlap_mtp.layout import SequenceLayout
from overlap_mtp.reference import roll_reference

from strategies import layouts, same_bits


def carry(plans: list[ExchangePlan], sent: list[torch.Tensor]) -> list[torch.Tensor]:
    """What all_to_all_single does: message p -> r is the rows that p has for r."""
    received = []
    for r, receiver in enumerate(plans):
        rows = [
            buffer[plan.first_send_row(r) :][: plan.send_rows[r]]
            for plan, buffer in zip(plans, sent, strict=True)
        ]
        assert [len(one) for one in rows] == list(receiver.recv_rows)
        received.append(torch.cat(rows))
    return received


class Plain:
    """One rank's part in an exchange, by the reference."""

    def __init__(self, layout: SequenceLayout, plan: ExchangePlan, spec: ExchangeSpec, batch: Batch) -> None:
        self.plan, self.spec, self.local_len = plan, spec, layout.local_len
        self.metadata = torch.from_numpy(make_metadata(layout, plan))
        self.tensors = spec.tensors(batch)
        self.outputs = poisoned_outputs(spec, self.tensors, plan.num_depths)

    def pack(self, send_buffer: torch.Tensor) -> None:
        views = [self.spec.as_integers(one) for one in self.tensors]
        reference.pack(views, self.metadata, self.plan, send_buffer)

    def unroll(self, recv_buffer: torch.Tensor, error_flags: torch.Tensor) -> list[Batch]:
        reference.unroll(
            [self.spec.as_integers(one) for one in self.tensors],
            [
                [self.spec.as_integers(rolled[name]) for rolled in self.outputs.depths]
                for name in self.spec.names
            ],
            self.spec.fills,
            self.metadata,
            self.plan,
            recv_buffer,
            error_flags,
        )
        return self.outputs.depths


class Interpreted(Plain):
    """The same by the Triton kernels."""

    def _bound(self) -> tuple[torch.Tensor, torch.Tensor, ExchangeConstants]:
        tables = (torch.from_numpy(self.plan.table), torch.from_numpy(self.spec.table))
        return *tables, ExchangeConstants.of(self.spec, self.plan)

    def pack(self, send_buffer: torch.Tensor) -> None:
        *tables, constants = self._bound()
        addresses = [one.data_ptr() for one in self.tensors] + self.outputs.addresses
        host_metadata = torch.cat([self.metadata, torch.tensor(addresses)])
        self.device_metadata = poisoned(len(host_metadata))
        self.replay_metadata = torch.full_like(host_metadata, -1)
        buffers = (host_metadata, self.replay_metadata, self.device_metadata, *tables, send_buffer)
        triton_pack.pack(buffers, constants, block=64)()

    def unroll(self, recv_buffer: torch.Tensor, error_flags: torch.Tensor) -> list[Batch]:
        *tables, constants = self._bound()
        buffers = (self.device_metadata, self.replay_metadata, *tables, recv_buffer, error_flags)
        grid = triton_unroll.unroll_grid(self.local_len, constants, block=64)
        triton_unroll.unroll(buffers, constants, block=64)(grid)
        return self.outputs.depths


def poisoned_outputs(spec: ExchangeSpec, tensors: list[torch.Tensor], num_depths: int) -> Outputs:
    (outputs,) = allocate_outputs(spec, tensors, num_depths)
    for rolled in outputs.depths:
        for tensor in rolled.values():
            tensor.view(torch.uint8).fill_(0x5A)
    return outputs


def roll_by_plan(
    layout: SequenceLayout, batch: Batch, num_depths: int, max_documents: int, by: type[Plain]
) -> list[Batch]:
    """Rolls of full tensors [B, S] through plans and kernels, by depth."""
    plans, shards = make_plans(layout, num_depths, max_documents), shards_of(layout, batch)
    spec = spec_of(shards[0], layout, num_depths, max_documents)
    parts = [by(layout, plan, spec, shard) for plan, shard in zip(plans, shards, strict=True)]
    sent = []
    for part in parts:
        sent.append(poisoned(part.plan.num_send_rows, spec.words_per_token))
        part.pack(sent[-1])
    rolled = []
    for part, received in zip(parts, carry(plans, sent), strict=True):
        error_flags = torch.zeros(4, dtype=torch.int32)
        rolled.append(part.unroll(received, error_flags))
        assert not error_flags.any()
    return [
        {name: layout.unshard([one[depth][name] for one in rolled]) for name in batch}
        for depth in range(num_depths)
    ]


@settings(max_examples=200)
@given(layout=layouts(), num_depths=st.integers(1, 9), rows=st.integers(1, 3), seed=st.integers(0, 999))
def test_plan_gives_the_reference_rolls(layout, num_depths, rows, seed):
    batch = random_batch(layout, rows, seed)
    rolled = roll_by_plan(layout, batch, num_depths, layout.num_documents, Plain)
    for depth in range(1, num_depths + 1):
        for name, tensor in batch.items():
            expected = roll_reference(tensor, layout, depth, fill=int(name == "padding_mask"))
            assert same_bits(rolled[depth - 1][name], expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled here, not interpreted")
@settings(max_examples=25)
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
