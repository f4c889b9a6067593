"""The symmetric-memory kernels under the interpreter: ranks are simulated, each one's memory is a CPU tensor."""

from __future__ import annotations

from datetime import timedelta
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from overlap_mtp.exchange.plan import ExchangePlan, make_plans
from overlap_mtp.exchange.spec import ExchangeSpec
from overlap_mtp.exchange.symmetric import MemoryLayout, peer_table, timeout_of
from overlap_mtp.kernels import common, reference
from overlap_mtp.kernels.common import FLAG_WORDS, MAX_WAITING, ExchangeConstants
from overlap_mtp.kernels.launch import Launch
from overlap_mtp.kernels.put_unroll import num_counting, put_unroll
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


def places_for(plans: list[ExchangePlan], spec: ExchangeSpec) -> MemoryLayout:
    """Few buffers, and small parts: most messages have several."""
    return MemoryLayout.of(plans, spec, NUM_BUFFERS, part_words=16)


class Rank:
    """One simulated rank: its memory, and what its launches share."""

    programs_for = 64  # local tokens: longer batches have more tokens than programs

    def __init__(
        self, plans: list[ExchangePlan], rank: int, spec: ExchangeSpec, memories: list[torch.Tensor]
    ):
        self.plans, self.plan, self.spec, self.memories = plans, plans[rank], spec, memories
        self.places = places_for(plans, spec)
        self.constants = ExchangeConstants.of(spec, self.plan, False, self.places.constants, on_gpu=False)
        self.memory = memories[rank]
        addresses = [memory.data_ptr() for memory in memories]
        self.peers = torch.tensor(peer_table(plans, rank, addresses))
        self.putting = len(self.plan.destinations) * self.constants.num_shares + 1  # that put or acknowledge
        self.seq_nos = torch.zeros(num_counting(self.constants), dtype=torch.int64)
        self.error_flags = torch.zeros(4, dtype=torch.int32)
        self.timeout = torch.tensor([TIMEOUT])
        asked = torch.from_numpy(self.plan.asked)
        plan_table = torch.cat([torch.from_numpy(self.plan.table), asked.flatten()])
        self.tables = plan_table, torch.from_numpy(spec.table)

    def put(self, layout: SequenceLayout, full: Batch) -> RankBatch:
        """Launch the programs of put_unroll that put; return what `wait` needs."""
        batch = RankBatch(full, layout, self.plan, self.spec)
        self.bind(batch)((self.putting, 1, 1))
        return batch

    def wait(self, batch: RankBatch) -> list[str]:
        """Launch the others; return what is wrong with the rolls. All ranks must have put: they run in turns here."""
        self.bind(batch, self.putting)()
        return batch.wrong()

    def bind(self, batch: RankBatch, first: int = 0) -> Launch:
        own = (self.peers, self.memory, self.seq_nos, self.error_flags, self.timeout)
        buffers = (batch.host_metadata, batch.replay_metadata, *self.tables, *own)
        return put_unroll(buffers, self.constants, self.programs_for, first, block=64)


class PlainRank(Rank):
    """The same by the reference."""

    def put(self, layout: SequenceLayout, full: Batch) -> RankBatch:
        batch = RankBatch(full, layout, self.plan, self.spec)
        self.seq_nos += 1
        seq_no = int(self.seq_nos[0])
        metadata, memories = batch.host_metadata, self.memories
        reference.put_pack(batch.tensors, metadata, self.plans, memories, seq_no, self.constants)
        return batch

    def wait(self, batch: RankBatch) -> list[str]:
        exchange = (self.plan, self.memories, int(self.seq_nos[0]), self.constants, self.error_flags)
        tensors = batch.tensors, batch.outputs, self.spec.fill_bits
        reference.wait_unroll(*tensors, batch.host_metadata, *exchange)
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
    words = places_for(plans, spec).num_words
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
    most=st.sampled_from([1, 16]),
    seed=st.integers(0, 999),
)
def test_kernels_and_their_references_give_the_rolls(
    layout, num_depths, rows, spare, kinds, dtypes, most, seed
):
    """Ranks that run the kernels exchange with ranks that run the references, with few programs and with many."""
    full = random_batch(layout, rows, seed, dtypes)
    with mock.patch.object(common, "MAX_WAITING", most):
        ranks = ranks_for(layout, full, num_depths, layout.num_documents + spare, kinds)
    wait_for_all(ranks, [rank.put(layout, full) for rank in ranks])


@pytest.mark.parametrize("kind", KINDS)  # contiguous: tokens travel one way only
def test_buffers_are_used_again_once_acknowledged(kind):
    """Over three laps of the buffers."""
    layout = SequenceLayout.dense(24, 3, kind)
    ranks = ranks_for(layout, random_batch(layout, 1, dtypes=ONE_TENSOR), num_depths=2)
    for number in range(3 * NUM_BUFFERS):
        full = random_batch(layout, 1, number, ONE_TENSOR)
        wait_for_all(ranks, [rank.put(layout, full) for rank in ranks])


@pytest.mark.parametrize("kind", [Rank, PlainRank])
def test_an_exchange_is_acknowledged_by_the_one_after_it(kind):
    """Not by itself: some programs of that launch may still read its buffer."""
    layout = SequenceLayout.dense(16, 2)
    full = random_batch(layout, 1, dtypes=ONE_TENSOR)
    ranks = ranks_for(layout, full, kinds=(kind,))
    flags = ranks[1].memory[ranks[1].places.acknowledgements_at :]

    def acknowledged() -> list[int]:
        """The exchanges whose tokens rank 0 has read."""
        return sorted(set(flags.tolist()) - {0})

    wait_for_all(ranks, [rank.put(layout, full) for rank in ranks])
    assert acknowledged() == []
    batches = [rank.put(layout, full) for rank in ranks]
    assert acknowledged() == [1]
    wait_for_all(ranks, batches)
    assert acknowledged() == [1]


def test_a_buffer_that_was_not_acknowledged_is_not_written_again():
    layout = SequenceLayout.dense(16, 2)
    full = random_batch(layout, 1, dtypes=ONE_TENSOR)
    ranks = ranks_for(layout, full)
    for _ in range(NUM_BUFFERS):
        ranks[0].put(layout, full)
    put = ranks[1].memory[: ranks[1].places.acknowledgements_at]  # tokens and signals
    before = put.clone()
    assert not ranks[0].error_flags.any()
    ranks[0].put(layout, full)
    assert ranks[0].error_flags.tolist() == [0, 0, 1 + 1, 0]  # rank 1 is late with an acknowledgement
    assert torch.equal(put, before)
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


def test_a_part_that_is_late_is_filled_and_the_others_are_not():
    layout = SequenceLayout.packed([0, 24, 48, 72, 96], 2)
    full = random_batch(layout, 1, 3, ONE_TENSOR)
    ranks = ranks_for(layout, full, num_depths=2, max_documents=8)
    places, rolled = ranks[0].places, []
    signals = ranks[0].memory[places.signals_at : places.acknowledgements_at : FLAG_WORDS]
    signals = signals.view(NUM_BUFFERS, len(ranks), places.num_parts)
    for seq_no, late in ((1, []), (2, [1]), (3, range(places.num_parts))):
        batch, _ = [rank.put(layout, full) for rank in ranks]
        signals[seq_no % NUM_BUFFERS, 1, late] = 0
        ranks[0].wait(batch)
        rolled.append(torch.stack([tokens["input_ids"] for tokens in batch.rolled]))
        assert ranks[0].error_flags.tolist() == [0, 2 * bool(late), 0, 0]
    right, one_late, all_late = rolled
    assert (one_late[one_late != right] == 0).all()
    assert 0 < (one_late != right).sum() < (all_late != right).sum()
    assert torch.equal(one_late == right, (one_late == right) | (all_late == right))


@pytest.mark.parametrize(("timeout", "ns"), [(timedelta(seconds=3), 3 * 10**9), (None, 600 * 10**9)])
def test_kernels_wait_as_long_as_the_group(timeout, ns):
    group = mock.Mock(timeout=timeout)
    assert timeout_of(group, torch.device("cpu")).tolist() == [ns]


def test_another_plan_is_noticed():
    layouts_ = [SequenceLayout.packed(bounds, 2) for bounds in ([0, 8, 24], [0, 12, 24])]
    full = random_batch(layouts_[0], 1, dtypes=ONE_TENSOR)
    ranks = ranks_for(layouts_[0], full, max_documents=2)
    started = [rank.put(layout, full) for rank, layout in zip(ranks, layouts_, strict=True)]
    for rank, batch in zip(ranks, started, strict=True):
        rank.wait(batch)
        assert rank.error_flags.tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("documents", [1, 40])
def test_a_message_has_parts_for_all_its_rows(documents):
    layout = SequenceLayout.packed([0, 24, 48], 2)
    plans = make_plans(layout, 2, documents + 2)
    spec = spec_of(random_batch(layout), layout, 2, documents + 2)
    for part_words in (1, 16, 10_000):
        places = MemoryLayout.of(plans, spec, part_words=part_words)
        longest = max(plans[0].recv_rows) - 1
        assert places.part_rows * (places.num_parts - 1) < longest <= places.part_rows * places.num_parts
        assert places.part_rows * spec.num_columns * 2 <= max(part_words, spec.num_columns * 2)


@pytest.mark.parametrize("kind", KINDS)
def test_few_programs_wait_for_peers(kind):
    for cp_size, num_depths in ((2, 2), (4, 2), (8, 8)):
        layout = SequenceLayout.packed([0, 64 * cp_size], cp_size, kind)
        plans = make_plans(layout, num_depths, 128)
        spec = spec_of(random_batch(layout), layout, num_depths, 128)
        places = MemoryLayout.of(plans, spec)
        for plan in plans:
            constants = ExchangeConstants.of(spec, plan, False, places.constants)
            assert constants.num_sources * constants.num_shares <= MAX_WAITING
            assert constants.num_destinations * constants.num_shares <= MAX_WAITING
            assert 1 <= constants.num_shares <= constants.num_parts


def test_replays_find_on_the_device_what_the_first_of_them_found_on_the_host():
    layout = SequenceLayout.packed([0, 24, 48], 2)
    full = random_batch(layout, 1, dtypes=ONE_TENSOR)
    ranks = ranks_for(layout, full, max_documents=4)
    batches = []
    for rank in ranks:
        rank.constants = rank.constants._replace(is_replayable=True)
        batches.append(rank.put(layout, full))
    wait_for_all(ranks, batches)
    for batch in batches:
        assert torch.equal(batch.replay_metadata, batch.host_metadata)
        batch.host_metadata.fill_(-1)
    for rank, batch in zip(ranks, batches, strict=True):
        rank.bind(batch)((rank.putting, 1, 1))
    wait_for_all(ranks, batches)
