"""The symmetric-memory kernels under the interpreter: ranks are simulated, each one's memory is a CPU tensor."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_plan import Batch, poisoned, poisoned_outputs, random_batch

from overlap_mtp.exchange.plan import PlanShape, new_record
from overlap_mtp.exchange.select import shapes_of
from overlap_mtp.exchange.spec import Cargo
from overlap_mtp.exchange.symmetric import SymmetricLayout, peer_tables
from overlap_mtp.kernels.put_pack import put
from overlap_mtp.kernels.signals import WORDS as FLAG_WORDS
from overlap_mtp.kernels.unroll import unroll_grid
from overlap_mtp.kernels.wait_unroll import discard, take
from overlap_mtp.layout import SequenceLayout
from overlap_mtp.reference import roll_reference

from strategies import layouts, same_bits

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the kernels are compiled here, not interpreted"
)
SLOTS = 4
PATIENCE = 3  # turns: nothing changes while a program waits under the interpreter


class Rank:
    """One simulated rank: its memory and what its launches share."""

    def __init__(self, shape: PlanShape, cargo: Cargo, memories: list[torch.Tensor], shapes: list[PlanShape]):
        self.shape, self.cargo = shape, cargo
        self.places = SymmetricLayout.of(shapes, cargo.words, SLOTS)
        self.memory = memories[shape.cp_rank]
        tables = peer_tables(shapes, shape.cp_rank, [memory.data_ptr() for memory in memories])
        self.peers, self.sources = (torch.tensor(one or [0]) for one in tables)
        self.epochs = torch.zeros(len(shape.destinations) + 1, dtype=torch.int64)
        self.trouble = torch.zeros(4, dtype=torch.int32)
        self.patience = torch.tensor([PATIENCE])
        self.table, self.cargo_table = torch.from_numpy(shape.table), torch.from_numpy(cargo.table)

    def put(self, layout: SequenceLayout, batch: Batch):
        """Launches a put; what is needed to take."""
        tensors = [batch[name] for name in self.cargo.names]
        outputs = poisoned_outputs(self.cargo, tensors, self.shape.num_depths, layout.local_len)
        record = torch.from_numpy(new_record(layout, self.shape))
        given = torch.cat([record, torch.tensor([t.data_ptr() for t in tensors] + outputs.bases)])
        kept, override = poisoned(len(given)), torch.full_like(given, -1)
        own = (self.memory, self.epochs, self.trouble, self.patience)
        buffers = (given, override, kept, self.table, self.cargo_table, self.peers, *own)
        put(buffers, self.shape, self.cargo, self.places.constants(timed=False), block=64)(None)
        return kept, outputs, layout.local_len, tensors, override

    def take(self, flight) -> list[Batch]:
        kept, outputs, length, _, override = flight
        buffers = (
            kept,
            override,
            self.table,
            self.cargo_table,
            self.sources,
            self.memory,
            self.trouble,
            self.patience,
        )
        launch = take(buffers, self.shape, self.cargo, self.places.constants(timed=False), block=64)
        launch(None, unroll_grid(length, self.shape, self.cargo, block=64))
        return outputs.depths

    def discard(self, flight) -> None:
        discard(flight[0], self.sources, self.shape, SLOTS, self.places.acknowledgements_at)(None)


def ranks_for(layout: SequenceLayout, batch: Batch, num_depths: int, max_documents: int) -> list[Rank]:
    shapes = shapes_of(layout, num_depths, max_documents)
    cargo = Cargo.of(layout_shards(layout, batch)[0])
    words = SymmetricLayout.of(shapes, cargo.words, SLOTS).num_words
    memories = [torch.zeros(words + FLAG_WORDS, dtype=torch.int64) for _ in shapes]
    return [Rank(shape, cargo, memories, shapes) for shape in shapes]


def layout_shards(layout: SequenceLayout, batch: Batch) -> list[Batch]:
    return [{name: layout.shard(t, rank) for name, t in batch.items()} for rank in range(layout.cp_size)]


def assert_rolls(layout: SequenceLayout, batch: Batch, shards: list[list[Batch]]) -> None:
    for depth in range(1, len(shards[0]) + 1):
        for name, tensor in batch.items():
            rolled = layout.unshard([shard[depth - 1][name] for shard in shards])
            expected = roll_reference(tensor, layout, depth, fill=int(name == "padding_mask"))
            assert same_bits(rolled, expected), (name, depth)


@settings(max_examples=15, deadline=None)
@given(
    layout=layouts(cp_sizes=(2, 3)),
    num_depths=st.integers(1, 3),
    rows=st.integers(1, 2),
    spare=st.integers(0, 3),
    seed=st.integers(0, 999),
)
def test_put_and_take_give_the_reference_rolls(layout, num_depths, rows, spare, seed):
    batch = random_batch(layout, rows, seed)
    ranks = ranks_for(layout, batch, num_depths, layout.num_documents + spare)
    shards = layout_shards(layout, batch)
    flights = [rank.put(layout, shard) for rank, shard in zip(ranks, shards, strict=True)]
    assert_rolls(layout, batch, [rank.take(flight) for rank, flight in zip(ranks, flights, strict=True)])
    assert not any(rank.trouble.any() for rank in ranks)


@pytest.mark.parametrize("kind", ["zigzag", "contiguous"])  # contiguous: tokens travel one way only
def test_slots_are_used_again_once_acknowledged(kind):
    """Several exchanges under way, taken out of order, one of them dropped, over three laps of the ring."""
    layout = SequenceLayout.dense(24, 3, kind)
    batches = [random_batch(layout, 1, seed) for seed in range(3 * SLOTS)]
    ranks = ranks_for(layout, batches[0], num_depths=2, max_documents=1)
    for lap in range(3):
        part = batches[lap * SLOTS : (lap + 1) * SLOTS]
        flights = [
            [rank.put(layout, shard) for rank, shard in zip(ranks, layout_shards(layout, batch), strict=True)]
            for batch in part
        ]
        for index in (2, 0, 3):
            taken = [rank.take(flight) for rank, flight in zip(ranks, flights[index], strict=True)]
            assert_rolls(layout, part[index], taken)
        for rank, flight in zip(ranks, flights[1], strict=True):
            rank.discard(flight)
    assert not any(rank.trouble.any() for rank in ranks)


def test_a_slot_that_was_not_acknowledged_is_not_written_again():
    layout = SequenceLayout.dense(16, 2)
    batch = random_batch(layout, 1, 0)
    ranks = ranks_for(layout, batch, num_depths=1, max_documents=1)
    shards = layout_shards(layout, batch)
    for _ in range(SLOTS):
        ranks[0].put(layout, shards[0])
    before = ranks[1].memory.clone()
    assert not ranks[0].trouble.any()
    ranks[0].put(layout, shards[0])
    assert ranks[0].trouble.tolist() == [0, 0, 1 + 1, 0]  # rank 1 is late with an acknowledgement
    assert torch.equal(ranks[1].memory, before)
    assert ranks[0].patience.item() == 0


def test_a_peer_that_never_puts_is_named_and_its_tokens_are_filled():
    layout = SequenceLayout.dense(16, 2)
    batch = random_batch(layout, 1, 0)
    ranks = ranks_for(layout, batch, num_depths=1, max_documents=1)
    shards = layout_shards(layout, batch)
    ranks[0].memory[: ranks[0].places.signals_at] = 77  # what must not be taken for tokens
    (rolled,) = ranks[0].take(ranks[0].put(layout, shards[0]))
    assert ranks[0].trouble.tolist() == [0, 1 + 1, 0, 0]
    assert rolled["t0"][0, 3] == 0  # the chunk's last slot, whose next token rank 1 holds


def test_another_plan_is_noticed():
    layouts_ = [SequenceLayout.packed(bounds, 2) for bounds in ([0, 8, 24], [0, 12, 24])]
    batch = random_batch(layouts_[0], 1, 0)
    ranks = ranks_for(layouts_[0], batch, num_depths=1, max_documents=2)
    flights = [
        rank.put(layout, layout_shards(layout, batch)[rank.shape.cp_rank])
        for rank, layout in zip(ranks, layouts_, strict=True)
    ]
    for rank, flight in zip(ranks, flights, strict=True):
        rank.take(flight)
        assert rank.trouble.tolist() == [1, 0, 0, 0]
