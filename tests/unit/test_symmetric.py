"""The symmetric-memory kernels under the interpreter: ranks are simulated, each one's memory is a CPU tensor."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import Batch, poisoned, random_batch, shards_of, spec_of
from test_plan import poisoned_outputs

from overlap_mtp.exchange.plan import ExchangePlan, make_metadata, make_plans
from overlap_mtp.exchange.spec import ExchangeSpec
from overlap_mtp.exchange.symmetric import MemoryLayout, peer_tables
from overlap_mtp.kernels import reference
from overlap_mtp.kernels.common import FLAG_WORDS, ExchangeConstants
from overlap_mtp.kernels.put_pack import put_pack
from overlap_mtp.kernels.unroll import unroll_grid
from overlap_mtp.kernels.wait_unroll import acknowledge, wait_unroll
from overlap_mtp.layout import SequenceLayout
from overlap_mtp.reference import roll_reference

from strategies import layouts, same_bits

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the kernels are compiled here, not interpreted"
)
NUM_BUFFERS = 4
TIMEOUT = 3  # turns: nothing changes while a program waits under the interpreter


class Rank:
    """One simulated rank: its memory, and what its launches share."""

    def __init__(
        self, plans: list[ExchangePlan], rank: int, spec: ExchangeSpec, memories: list[torch.Tensor]
    ):
        self.plans, self.plan, self.spec, self.memories = plans, plans[rank], spec, memories
        self.places = MemoryLayout.of(plans, spec.words_per_token, NUM_BUFFERS)
        self.constants = ExchangeConstants.of(spec, self.plan, False, self.places.constants, is_timed=False)
        self.memory = memories[rank]
        tables = peer_tables(plans, rank, [memory.data_ptr() for memory in memories])
        self.peers, self.sources = (torch.tensor(one or [0]) for one in tables)
        self.seq_nos = torch.zeros(len(self.plan.destinations) + 1, dtype=torch.int64)
        self.error_flags = torch.zeros(4, dtype=torch.int32)
        self.timeout = torch.tensor([TIMEOUT])
        self.tables = torch.from_numpy(self.plan.table), torch.from_numpy(spec.table)

    def put(self, layout: SequenceLayout, batch: Batch):
        """Launch put_pack; return what wait_unroll needs."""
        tensors = self.spec.tensors(batch)
        outputs = poisoned_outputs(self.spec, tensors, self.plan.num_depths)
        addresses = [one.data_ptr() for one in tensors] + outputs.addresses
        host_metadata = torch.cat(
            [torch.from_numpy(make_metadata(layout, self.plan)), torch.tensor(addresses)]
        )
        metadata, replay = poisoned(len(host_metadata)), torch.full_like(host_metadata, -1)
        own = (self.peers, self.memory, self.seq_nos, self.error_flags, self.timeout)
        put_pack((host_metadata, replay, metadata, *self.tables, *own), self.constants, block=64)()
        return metadata, outputs, layout.local_len, tensors, replay

    def wait(self, exchange) -> list[Batch]:
        metadata, outputs, local_len, _, replay = exchange
        own = (self.sources, self.memory, self.error_flags, self.timeout)
        launch = wait_unroll((metadata, replay, *self.tables, *own), self.constants, block=64)
        launch(unroll_grid(local_len, self.constants, block=64))
        return outputs.depths

    def drop(self, exchange) -> None:
        acknowledge(exchange[0], self.sources, self.constants)()


class PlainRank(Rank):
    """The same by the reference."""

    def put(self, layout: SequenceLayout, batch: Batch):
        tensors = self.spec.tensors(batch)
        metadata = torch.from_numpy(make_metadata(layout, self.plan))
        self.seq_nos += 1
        seq_no = int(self.seq_nos[-1])
        views = [self.spec.as_integers(one) for one in tensors]
        reference.put_pack(views, metadata, self.plans, self.memories, seq_no, self.constants)
        return metadata, poisoned_outputs(self.spec, tensors, self.plan.num_depths), views, seq_no

    def wait(self, exchange) -> list[Batch]:
        metadata, outputs, views, seq_no = exchange
        reference.wait_unroll(
            views,
            [[self.spec.as_integers(one[name]) for one in outputs.depths] for name in self.spec.names],
            self.spec.fills,
            metadata,
            self.plan,
            self.memories,
            seq_no,
            self.constants,
            self.error_flags,
        )
        return outputs.depths


def ranks_for(
    layout: SequenceLayout,
    batch: Batch,
    num_depths: int,
    max_documents: int,
    kinds: tuple[type[Rank], ...] = (Rank,),
) -> list[Rank]:
    """Ranks of the given kinds, in turn."""
    plans = make_plans(layout, num_depths, max_documents)
    spec = spec_of(shards_of(layout, batch)[0], layout, num_depths, max_documents)
    words = MemoryLayout.of(plans, spec.words_per_token, NUM_BUFFERS).num_words
    memories = [torch.zeros(words + FLAG_WORDS, dtype=torch.int64) for _ in plans]
    return [kinds[rank % len(kinds)](plans, rank, spec, memories) for rank in range(len(plans))]


def assert_rolls(layout: SequenceLayout, batch: Batch, shards: list[list[Batch]]) -> None:
    for depth in range(1, len(shards[0]) + 1):
        for name, tensor in batch.items():
            rolled = layout.unshard([shard[depth - 1][name] for shard in shards])
            expected = roll_reference(tensor, layout, depth, fill=int(name == "padding_mask"))
            assert same_bits(rolled, expected), (name, depth)


@settings(max_examples=20)
@given(
    layout=layouts(cp_sizes=(2, 3)),
    num_depths=st.integers(1, 3),
    rows=st.integers(1, 2),
    spare=st.integers(0, 3),
    kinds=st.sampled_from([(Rank,), (Rank, PlainRank), (PlainRank, Rank)]),
    seed=st.integers(0, 999),
)
def test_kernels_and_their_references_give_the_rolls(layout, num_depths, rows, spare, kinds, seed):
    """Ranks that run the kernels exchange with ranks that run the references."""
    batch = random_batch(layout, rows, seed)
    ranks = ranks_for(layout, batch, num_depths, layout.num_documents + spare, kinds)
    shards = shards_of(layout, batch)
    started = [rank.put(layout, shard) for rank, shard in zip(ranks, shards, strict=True)]
    assert_rolls(layout, batch, [rank.wait(one) for rank, one in zip(ranks, started, strict=True)])
    assert not any(rank.error_flags.any() for rank in ranks)


@pytest.mark.parametrize("kind", ["zigzag", "contiguous"])  # contiguous: tokens travel one way only
def test_buffers_are_used_again_once_acknowledged(kind):
    """Several exchanges under way, waited for out of order, one of them dropped, over three laps of the buffers."""
    layout = SequenceLayout.dense(24, 3, kind)
    batches = [random_batch(layout, 1, seed) for seed in range(3 * NUM_BUFFERS)]
    ranks = ranks_for(layout, batches[0], num_depths=2, max_documents=1)
    for lap in range(3):
        part = batches[lap * NUM_BUFFERS : (lap + 1) * NUM_BUFFERS]
        started = [
            [rank.put(layout, shard) for rank, shard in zip(ranks, shards_of(layout, batch), strict=True)]
            for batch in part
        ]
        for index in (2, 0, 3):
            taken = [rank.wait(one) for rank, one in zip(ranks, started[index], strict=True)]
            assert_rolls(layout, part[index], taken)
        for rank, one in zip(ranks, started[1], strict=True):
            rank.drop(one)
    assert not any(rank.error_flags.any() for rank in ranks)


def test_a_buffer_that_was_not_acknowledged_is_not_written_again():
    layout = SequenceLayout.dense(16, 2)
    batch = random_batch(layout, 1, 0)
    ranks = ranks_for(layout, batch, num_depths=1, max_documents=1)
    shards = shards_of(layout, batch)
    for _ in range(NUM_BUFFERS):
        ranks[0].put(layout, shards[0])
    before = ranks[1].memory.clone()
    assert not ranks[0].error_flags.any()
    ranks[0].put(layout, shards[0])
    assert ranks[0].error_flags.tolist() == [0, 0, 1 + 1, 0]  # rank 1 is late with an acknowledgement
    assert torch.equal(ranks[1].memory, before)
    assert ranks[0].timeout.item() == 0


def test_a_peer_that_never_puts_is_named_and_its_tokens_are_filled():
    layout = SequenceLayout.dense(16, 2)
    batch = random_batch(layout, 1, 0)
    ranks = ranks_for(layout, batch, num_depths=1, max_documents=1)
    ranks[0].memory[: ranks[0].places.signals_at] = 77  # what must not be taken for tokens
    (rolled,) = ranks[0].wait(ranks[0].put(layout, shards_of(layout, batch)[0]))
    assert ranks[0].error_flags.tolist() == [0, 1 + 1, 0, 0]
    assert rolled["t0"][0, 3] == 0  # the chunk's last token, whose next one rank 1 holds


def test_another_plan_is_noticed():
    layouts_ = [SequenceLayout.packed(bounds, 2) for bounds in ([0, 8, 24], [0, 12, 24])]
    batch = random_batch(layouts_[0], 1, 0)
    ranks = ranks_for(layouts_[0], batch, num_depths=1, max_documents=2)
    started = [
        rank.put(layout, shards_of(layout, batch)[rank.plan.cp_rank])
        for rank, layout in zip(ranks, layouts_, strict=True)
    ]
    for rank, one in zip(ranks, started, strict=True):
        rank.wait(one)
        assert rank.error_flags.tolist() == [1, 0, 0, 0]
