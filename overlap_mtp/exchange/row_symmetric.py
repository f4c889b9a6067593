"""Activations between GPUs of one host by their own stores: symmetric memory, and kernels that exchange rows."""

from __future__ import annotations

import torch
from triton import next_power_of_2

from overlap_mtp.exchange.row_buffers import RowBuffers
from overlap_mtp.exchange.row_cuda import CudaRowTransport
from overlap_mtp.exchange.row_transport import RowExchange
from overlap_mtp.exchange.rows import Round, RowPlan, message_rounds
from overlap_mtp.exchange.symmetric import MemoryLayout, allocate_words, share, timeout_of
from overlap_mtp.exchange.transport import WORD_BYTES, TransportConfig
from overlap_mtp.kernels.all_to_all import AllToAllConstants, all_to_all
from overlap_mtp.kernels.common import FLAG_WORDS
from overlap_mtp.kernels.launch import in_turn

NUM_BUFFERS = 2  # a rank that is further ahead of a peer waits on its side stream
PART_WORDS = 2048  # of a part of a message: 16 KiB


class Direction:
    """Where the messages of forward, or of backward, lie in the buffers of all ranks, in words."""

    def __init__(self, plans: list[RowPlan], row_words: int, is_backward: bool) -> None:
        self._plans, self._row_words, self._is_backward = plans, row_words, is_backward
        self._rounds = [self._round_of(plan) for plan in plans]
        longest = max((m.rows for one in self._rounds for m in one.sent), default=0) * row_words
        part_words = min(PART_WORDS, next_power_of_2(max(2, longest)))
        words = max(sum(m.rows for m in one.received) for one in self._rounds) * row_words
        words = -(-words // FLAG_WORDS) * FLAG_WORDS
        self.places = MemoryLayout(
            len(plans), words, NUM_BUFFERS, part_words, max(1, -(-longest // part_words))
        )

    def _round_of(self, plan: RowPlan) -> Round:
        (one,) = message_rounds(plan) or [Round([], [])]
        return one.reversed() if self._is_backward else one

    def first_received(self, rank: int) -> int:
        """The row of the buffer at which a rank's received rows begin."""
        plan = self._plans[rank]
        return 0 if self._is_backward else plan.in_rows.start + plan.num_heads

    def sent_rows(self, rank: int) -> tuple[int, int]:
        """(messages, rows) that a rank sends."""
        sent = self._rounds[rank].sent
        return len(sent), sum(message.rows for message in sent)

    def constants(self, rank: int, on_gpu: bool = True) -> AllToAllConstants:
        one = self._rounds[rank]
        sizes = len(self._plans), rank, len(one.received), len(one.sent)
        first_late = 1 + self._is_backward * len(self._plans)
        return AllToAllConstants.of(*sizes, self.places.constants, first_late, on_gpu)

    def peers(self, rank: int, addresses: list[int]) -> list[int]:
        """The words of `peers` as `all_to_all` takes them.

        Args:
            rank: whose.
            addresses: where each rank's memory for this direction is, as this rank sees it.

        Returns:
            The words, and a 0 at the end: it is not empty, even if there are no peers.
        """
        peers: list[int] = []
        for message in self._rounds[rank].sent:
            (there,) = (m.begin for m in self._rounds[message.peer].received if m.peer == rank)
            rows = there - self.first_received(message.peer), message.begin, message.rows
            peers += [addresses[message.peer], message.peer, *(self._row_words * one for one in rows)]
        for message in self._rounds[rank].received:
            rows_here = message.begin - self.first_received(rank), message.rows
            peers += [addresses[message.peer], message.peer, *(self._row_words * one for one in rows_here)]
        return [*peers, 0]


def directions_of(plans: list[RowPlan], row_words: int) -> tuple[Direction, Direction]:
    """Forward and backward."""
    return Direction(plans, row_words, False), Direction(plans, row_words, True)


class SymmetricRowTransport(CudaRowTransport):
    """`all_to_all` sends and receives in the graph that packs. Schedule `overlap` without tp ranks.

    It needs GPUs that can write to each other's memory. If a peer never comes, the wait ends after the exchange group's
    timeout, and `raise_if_failed` then raises. Forward and backward have memory and sequence numbers of their own.
    """

    name = "symmetric"

    def __init__(self, config: TransportConfig, plans: list[RowPlan], memory: torch.Tensor) -> None:
        """Collective over the cp group. It raises if the memory, from `allocate` on all ranks, cannot be shared."""
        self._mapping, addresses = share(memory, config.group)  # first: peers wait for it
        super().__init__(config, plans, None)
        rank, row_words = self.group.cp_rank, self.spec.words_per_token
        timeout = timeout_of(self.group, self.device)
        self._pack_span = self._send_span  # one graph packs and sends
        self._bound, self._sent, begin = [], [], 0
        for direction in directions_of(plans, row_words):
            constants = direction.constants(rank, on_gpu=self.device.type == "cuda")
            peers = direction.peers(rank, [address + WORD_BYTES * begin for address in addresses])
            end = begin + direction.places.num_words
            fixed = (
                torch.tensor(peers, dtype=torch.int64, device=self.device),
                memory[begin:end],
                torch.zeros(constants.num_putting, dtype=torch.int64, device=self.device),
                self.error_flags,
                timeout,
            )
            self._bound.append((direction.first_received(rank), constants, fixed))
            messages, rows = direction.sent_rows(rank)
            self._sent.append((messages, rows * row_words * WORD_BYTES))
            begin = end
        self._make_first_buffers()

    def close(self) -> None:
        try:
            super().close()
        finally:
            del self._bound, self._mapping  # now: a later garbage collection may hit a capture

    def _bind_sends(self, buffers: RowBuffers) -> None:
        launches = []
        packed = (buffers.rows, buffers.pack), (buffers.gradient_rows, buffers.pack_sums)
        for (buffer, pack), (first, constants, fixed) in zip(packed, self._bound, strict=True):
            words = buffer.view(torch.int64)
            send = all_to_all((words.view(-1), words[first:].view(-1), *fixed), constants)
            launches.append(in_turn(pack, send))
        buffers.pack, buffers.pack_sums = launches
        buffers.shared = self._mapping

    def _describe_failure(self, source: int, late: list[int], bounds: int) -> str:
        size = self.plan.cp_size
        said = super()._describe_failure(source, [one - size if one > size else one for one in late], bounds)
        is_backward = next(filter(None, late), 0) > size  # the one that is said
        return said + "; it was a backward, which every rank must run" * is_backward

    def _leave(self, exchange: RowExchange) -> None:
        """They have left with the graph that packs."""
        self.traffic.add(*self._sent[exchange.is_backward])


def allocate(config: TransportConfig, plans: list[RowPlan]) -> torch.Tensor:
    """Allocate this rank's memory. It is not shared yet."""
    both = directions_of(plans, config.spec.words_per_token)
    return allocate_words(sum(direction.places.num_words for direction in both), config.spec.device)
