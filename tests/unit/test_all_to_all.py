"""The exchange of words by stores, under the interpreter: ranks are simulated, each one's memory is a CPU tensor."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from overlap_mtp.exchange.symmetric import MemoryLayout
from overlap_mtp.kernels import all_to_all as all_to_all_module
from overlap_mtp.kernels.all_to_all import AllToAllConstants, put_words, take_words

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the kernels are compiled here, not interpreted"
)
TIMEOUT = 3  # turns
PART_WORDS = 4


class Ranks:
    """Simulated ranks with messages of `words[source][destination]` pairs of words."""

    def __init__(self, words: list[list[int]], num_buffers: int = 2) -> None:
        self.words, size = [[2 * one for one in row] for row in words], len(words)
        self.into = [[self.words[source][rank] for source in range(size)] for rank in range(size)]
        longest = max(map(max, self.words))
        buffer_words = -(-max(map(sum, self.into)) // 16) * 16
        self.places = MemoryLayout(
            size, buffer_words, num_buffers, PART_WORDS, max(1, -(-longest // PART_WORDS))
        )
        self.memories = [torch.zeros(self.places.num_words, dtype=torch.int64) for _ in words]
        self.seq_nos = [
            torch.zeros(self.constants(rank).num_putting, dtype=torch.int64) for rank in range(size)
        ]
        self.error_flags = [torch.zeros(4, dtype=torch.int32) for _ in words]
        self.timeouts = [torch.tensor([TIMEOUT]) for _ in words]

    def constants(self, rank: int, first_late: int = 1) -> AllToAllConstants:
        peers = sum(map(bool, self.into[rank])), sum(map(bool, self.words[rank]))
        return AllToAllConstants.of(
            len(self.words), rank, *peers, self.places.constants, first_late, on_gpu=False
        )

    def table(self, rank: int) -> torch.Tensor:
        """The kernel's `peers`."""
        destinations, sources = [], []
        for peer, words in enumerate(self.words[rank]):
            if words:
                there, here = sum(self.into[peer][:rank]), sum(self.words[rank][:peer])
                destinations.append([self.memories[peer].data_ptr(), peer, there, here, words])
        for peer, words in enumerate(self.into[rank]):
            if words:
                sources.append([self.memories[peer].data_ptr(), peer, sum(self.into[rank][:peer]), words])
        flat = [word for row in (*destinations, *sources) for word in row]
        return torch.tensor([*flat, 0])

    def run(
        self, rank: int, sent: torch.Tensor, received: torch.Tensor, puts: bool, first_late: int = 1
    ) -> None:
        constants = self.constants(rank, first_late)
        own = (
            self.table(rank),
            self.memories[rank],
            self.seq_nos[rank],
            self.error_flags[rank],
            self.timeouts[rank],
        )
        if puts:
            put_words((sent, received, *own), constants)()
        elif constants.num_sources:
            take_words((sent, received, *own), constants)()

    def exchange(self, seed: int) -> list[str]:
        """What is wrong after one exchange of random words."""
        generator, wrong = torch.Generator().manual_seed(seed), []
        sent = [torch.randint(-(2**62), 2**62, (sum(row) + 1,), generator=generator) for row in self.words]
        received = [torch.full((sum(row) + 1,), -1) for row in self.into]
        for puts in (True, False):
            for rank in range(len(self.words)):
                self.run(rank, sent[rank], received[rank], puts)
        for rank, row in enumerate(self.into):
            parts = [
                sent[source][sum(self.words[source][:rank]) :][:words] for source, words in enumerate(row)
            ]
            if received[rank].tolist() != [*torch.cat(parts).tolist(), -1]:
                wrong.append(f"rank {rank} received {received[rank].tolist()}")
        return wrong


@settings(max_examples=25)
@given(
    data=st.data(),
    size=st.integers(2, 4),
    num_buffers=st.integers(2, 3),
    programs=st.integers(1, 6),
    seed=st.integers(0, 999),
)
def test_every_word_arrives_in_its_place(data, size, num_buffers, programs, seed):
    """Programs have several parts if they are few, and others on ranks with more neighbours."""
    lengths = st.sampled_from([0, 1, 2, 3, 15])
    words = [[data.draw(lengths) if a != b else 0 for b in range(size)] for a in range(size)]
    words[0][1] = max(1, words[0][1])
    with mock.patch.object(all_to_all_module, "MAX_PROGRAMS", programs):
        ranks = Ranks(words, num_buffers)
        assert [ranks.exchange(seed + turn) for turn in range(4)] == [[]] * 4
    assert not any(flags.any() for flags in ranks.error_flags)


def test_a_rank_that_does_not_put_is_late():
    ranks = Ranks([[0, 3, 0], [0, 0, 2], [1, 0, 0]])
    assert ranks.exchange(0) == []
    sent, received = torch.zeros(7, dtype=torch.int64), torch.full((3,), -1)
    ranks.run(0, sent, received, puts=True)
    ranks.run(0, sent, received, puts=False, first_late=1 + 3)
    assert ranks.error_flags[0].tolist() == [0, 1 + 3 + 2, 0, 0]
    assert received.tolist() == [0, 0, -1]
    assert ranks.timeouts[0].item() == 0
    ranks.run(0, sent, received, puts=True)
    ranks.run(0, sent, received, puts=False)
    assert ranks.error_flags[0].tolist() == [0, 1 + 3 + 2, 0, 0]  # what is late then follows from the first


def test_a_rank_that_reads_nothing_keeps_its_buffers():
    """Two exchanges may be ahead of a peer. Nothing is put over what it has not read."""
    ranks = Ranks([[0, 2], [0, 0]])
    sent, received = torch.arange(5), torch.zeros(1, dtype=torch.int64)
    for _ in range(2):
        ranks.run(0, sent, received, puts=True)
    assert not ranks.error_flags[0].any()
    before = ranks.memories[1].clone()
    ranks.run(0, sent + 100, received, puts=True)
    assert ranks.error_flags[0].tolist() == [0, 0, 1 + 1, 0]
    assert torch.equal(ranks.memories[1], before)


def test_a_message_is_acknowledged_when_the_next_exchange_begins():
    """Not before: until then its reader may not have read it."""
    ranks = Ranks([[0, 2], [1, 0]])
    sent = torch.arange(5)
    mine, theirs = torch.zeros(3, dtype=torch.int64), torch.zeros(5, dtype=torch.int64)
    for _ in range(2):
        ranks.run(0, sent, mine, puts=True)
    ranks.run(1, sent, theirs, puts=True)  # its first exchange has begun, and has read nothing
    unread = ranks.memories[1][: ranks.places.signals_at].clone()
    ranks.run(0, sent + 100, mine, puts=True)
    assert ranks.error_flags[0].tolist() == [0, 0, 1 + 1, 0]
    assert torch.equal(ranks.memories[1][: len(unread)], unread)
    ranks.run(1, sent, theirs, puts=False)
    assert theirs.tolist() == [0, 1, 2, 3, 0]
    ranks.run(1, sent, theirs, puts=True)  # acknowledges the first
    ranks.seq_nos[0][: -ranks.constants(0).take_shares] -= 1
    ranks.error_flags[0].zero_()
    ranks.timeouts[0].fill_(TIMEOUT)
    ranks.run(0, sent + 100, mine, puts=True)
    assert not ranks.error_flags[0].any()
    assert not torch.equal(ranks.memories[1][: len(unread)], unread)
