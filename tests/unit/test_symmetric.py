"""The symmetric-memory kernels under the interpreter: ranks are simulated, each one's memory is a CPU tensor."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from overlap_mtp.exchange.plan import ExchangePlan, make_plans
from overlap_mtp.exchange.spec import ExchangeSpec
from overlap_mtp.exchange.symmetric import MemoryLayout, peer_table
from overlap_mtp.kernels import reference
from overlap_mtp.kernels.common import FLAG_WORDS, ExchangeConstants
from overlap_mtp.kernels.put_pack import SEQ_NO_AT, put_pack, wait_for_tokens
from overlap_mtp.kernels.unroll import unroll_grid
from overlap_mtp.kernels.unroll_acknowledge import acknowledge, unroll_acknowledge
from overlap_mtp.layout import SequenceLayout

from cases import Batch
from simulated import RankBatch, spec_of
from strategies import KINDS, dtype_choices, layouts, random_batch

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the kernels are compiled here, not interpreted"
)
NUM_BUFFERS = 4
TIMEOUT = 3  # turns: nothing changes while a program waits under the interpreter
ONE_TENSOR = {"input_ids": torch.int32}


@triton.jit
def wait_kernel(metadata, sources, memory, error_flags, timeout, C: tl.constexpr):  # noqa: N803
    """What put_pack does at its end. Ranks run one after the other here, so none may wait before all have put."""
    seq_no = tl.load(metadata + SEQ_NO_AT)
    tl.store(metadata + SEQ_NO_AT, wait_for_tokens(seq_no, sources, memory, error_flags, timeout, C))


class Rank:
    """One simulated rank: its memory, and what its launches share."""

    def __init__(
        self, plans: list[ExchangePlan], rank: int, spec: ExchangeSpec, memories: list[torch.Tensor]
    ):
        self.plans, self.plan, self.spec, self.memories = plans, plans[rank], spec, memories
        self.places = MemoryLayout.of(plans, spec.words_per_token, NUM_BUFFERS)
        self.constants = ExchangeConstants.of(spec, self.plan, False, self.places.constants, on_gpu=False)
        self.memory = memories[rank]
        peers, sources_at = peer_table(plans, rank, [memory.data_ptr() for memory in memories])
        self.peers = torch.tensor(peers)
        self.sources = self.peers[sources_at:]
        self.seq_nos = torch.zeros(len(self.plan.destinations) + 1, dtype=torch.int64)
        self.unrolled = torch.zeros(1, dtype=torch.int64)
        self.error_flags = torch.zeros(4, dtype=torch.int32)
        self.timeout = torch.tensor([TIMEOUT])
        self.tables = torch.from_numpy(self.plan.table), torch.from_numpy(spec.table)

    def put(self, layout: SequenceLayout, full: Batch) -> RankBatch:
        """Launch put_pack; return what `wait` needs."""
        batch = RankBatch(full, layout, self.plan, self.spec)
        metadata = (batch.host_metadata, batch.replay_metadata, batch.metadata)
        own = (self.peers, self.memory, self.seq_nos, self.error_flags, self.timeout)
        put_pack((*metadata, *self.tables, *own), self.constants, block=64)()
        return batch

    def wait(self, batch: RankBatch) -> list[str]:
        """Wait and launch unroll_acknowledge; return what is wrong with the rolls."""
        late = (self.error_flags, self.timeout)
        wait_kernel[(1,)](batch.metadata, self.sources, self.memory, *late, C=self.constants)
        own = (self.sources, self.memory, self.unrolled, self.error_flags)
        buffers = (batch.metadata, batch.replay_metadata, *self.tables, *own)
        launch = unroll_acknowledge(buffers, self.constants, block=64)
        launch(unroll_grid(batch.layout.local_len, self.constants, block=64))
        return batch.wrong()

    def drop(self, batch: RankBatch) -> None:
        acknowledge(batch.metadata, self.sources, self.unrolled, self.constants)()


class PlainRank(Rank):
    """The same by the reference."""

    def put(self, layout: SequenceLayout, full: Batch) -> RankBatch:
        batch = RankBatch(full, layout, self.plan, self.spec)
        self.seq_nos += 1
        seq_no = int(self.seq_nos[-1])
        metadata, memories = batch.host_metadata, self.memories
        reference.put_pack(batch.tensors, metadata, self.plans, memories, seq_no, self.constants)
        return batch

    def wait(self, batch: RankBatch) -> list[str]:
        exchange = (self.plan, self.memories, int(self.seq_nos[-1]), self.constants)
        shared = (*exchange, self.unrolled, self.error_flags)
        reference.unroll_acknowledge(
            batch.tensors, batch.outputs, self.spec.fill_bits, batch.host_metadata, *shared
        )
        return batch.wrong()


def ranks_for(
    layout: SequenceLayout,
    full: Batch,
    num_depths: int = 1,
    max_documents: int = 1,
    kinds: tuple[type[Rank], ...] = (Rank,),
) -> list[Rank]:
    """Ranks of the given kinds, in turn."""
    plans = make_plans(layout, num_depths, max_documents)
    spec = spec_of(full, layout, num_depths, max_documents)
    words = MemoryLayout.of(plans, spec.words_per_token, NUM_BUFFERS).num_words
    memories = [torch.zeros(words + FLAG_WORDS, dtype=torch.int64) for _ in plans]
    return [kinds[rank % len(kinds)](plans, rank, spec, memories) for rank in range(len(plans))]


def wait_for_all(ranks: list[Rank], batches: list[RankBatch]) -> None:
    """Wait on every rank and check that all rolls are right."""
    assert [rank.wait(batch) for rank, batch in zip(ranks, batches, strict=True)] == [[]] * len(ranks)
    assert not any(rank.error_flags.any() for rank in ranks)


@settings(max_examples=20)
@given(
    layout=layouts(cp_sizes=(2, 3)),
    num_depths=st.integers(1, 3),
    rows=st.integers(1, 2),
    spare=st.integers(0, 3),
    kinds=st.sampled_from([(Rank,), (Rank, PlainRank), (PlainRank, Rank)]),
    dtypes=dtype_choices,
    seed=st.integers(0, 999),
)
def test_kernels_and_their_references_give_the_rolls(layout, num_depths, rows, spare, kinds, dtypes, seed):
    """Ranks that run the kernels exchange with ranks that run the references."""
    full = random_batch(layout, rows, seed, dtypes)
    ranks = ranks_for(layout, full, num_depths, layout.num_documents + spare, kinds)
    wait_for_all(ranks, [rank.put(layout, full) for rank in ranks])


@pytest.mark.parametrize("kind", KINDS)  # contiguous: tokens travel one way only
def test_buffers_are_used_again_once_acknowledged(kind):
    """Several exchanges under way, waited for out of order, one of them dropped, over three laps of the buffers."""
    layout = SequenceLayout.dense(24, 3, kind)
    full = random_batch(layout, 1, dtypes=ONE_TENSOR)
    ranks = ranks_for(layout, full, num_depths=2)
    for lap in range(3):
        batches = [random_batch(layout, 1, lap * NUM_BUFFERS + i, ONE_TENSOR) for i in range(NUM_BUFFERS)]
        started = [[rank.put(layout, full) for rank in ranks] for full in batches]
        for index in (2, 0, 3):
            wait_for_all(ranks, started[index])
        for rank, dropped in zip(ranks, started[1], strict=True):
            rank.drop(dropped)
    assert not any(rank.error_flags.any() for rank in ranks)


@pytest.mark.parametrize("dropped", [False, True])
def test_an_exchange_is_acknowledged_by_the_one_after_it(dropped):
    """Not by its own join: some programs of that launch may still read its buffer."""
    layout = SequenceLayout.dense(16, 2)
    full = random_batch(layout, 1, dtypes=ONE_TENSOR)
    ranks = ranks_for(layout, full)
    flags = ranks[1].memory[ranks[1].places.acknowledgements_at :]

    def acknowledged() -> list[int]:
        """The exchanges whose tokens rank 0 has read."""
        return sorted(set(flags.tolist()) - {0})

    wait_for_all(ranks, [rank.put(layout, full) for rank in ranks])
    assert acknowledged() == []
    batches = [rank.put(layout, full) for rank in ranks]
    if dropped:
        ranks[0].drop(batches[0])
        assert acknowledged() == [1, 2]
    else:
        wait_for_all(ranks, batches)
        assert acknowledged() == [1]


def test_half_of_the_buffers_may_be_under_way():
    """Joined in the worst order: the exchange whose buffer is needed next comes last, and is not acknowledged yet."""
    layout = SequenceLayout.dense(24, 3)
    full = random_batch(layout, 1, dtypes=ONE_TENSOR)
    ranks = ranks_for(layout, full)
    for _ in range(3):
        started = [[rank.put(layout, full) for rank in ranks] for _ in range(NUM_BUFFERS // 2)]
        for batches in reversed(started):
            wait_for_all(ranks, batches)
    assert not any(rank.error_flags.any() for rank in ranks)


def test_a_buffer_that_was_not_acknowledged_is_not_written_again():
    layout = SequenceLayout.dense(16, 2)
    full = random_batch(layout, 1, dtypes=ONE_TENSOR)
    ranks = ranks_for(layout, full)
    for _ in range(NUM_BUFFERS):
        ranks[0].put(layout, full)
    before = ranks[1].memory.clone()
    assert not ranks[0].error_flags.any()
    ranks[0].put(layout, full)
    assert ranks[0].error_flags.tolist() == [0, 0, 1 + 1, 0]  # rank 1 is late with an acknowledgement
    assert torch.equal(ranks[1].memory, before)
    assert ranks[0].timeout.item() == 0


def test_a_peer_that_never_puts_is_named_and_its_tokens_are_filled():
    layout = SequenceLayout.dense(16, 2)
    full = random_batch(layout, 1, dtypes=ONE_TENSOR)
    rank = ranks_for(layout, full)[0]
    rank.memory[: rank.places.signals_at] = 77  # what must not be taken for tokens
    batch = rank.put(layout, full)
    rank.wait(batch)
    assert rank.error_flags.tolist() == [0, 1 + 1, 0, 0]
    assert batch.rolled[0]["input_ids"][0, 3] == 0  # the chunk's last token, whose next one rank 1 holds


def test_another_plan_is_noticed():
    layouts_ = [SequenceLayout.packed(bounds, 2) for bounds in ([0, 8, 24], [0, 12, 24])]
    full = random_batch(layouts_[0], 1, dtypes=ONE_TENSOR)
    ranks = ranks_for(layouts_[0], full, max_documents=2)
    started = [rank.put(layout, full) for rank, layout in zip(ranks, layouts_, strict=True)]
    for rank, batch in zip(ranks, started, strict=True):
        rank.wait(batch)
        assert rank.error_flags.tolist() == [1, 0, 0, 0]
