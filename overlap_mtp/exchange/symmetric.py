"""Tokens between GPUs of one host by their own stores: symmetric memory, and two kernels for an exchange.

`put_pack` packs into the peers' memory, signals it, and waits for the peers' signals, so that the join need not.
`unroll_acknowledge` unrolls, and acknowledges the exchange that was unrolled before.
All counting is done on the device, so an exchange can be captured in a CUDA graph and replayed:

- exchanges are numbered from 1 (`seq_no`), in the order in which `put_pack` runs. The tokens go to buffer
  seq_no % num_buffers of the peer;
- the flag of a buffer and a source holds the sequence number that was last put there. It is never reset;
- before a buffer is written again, the peer must acknowledge the exchange before in it, even if tokens travel one way
  only;
- the exchange that was unrolled last is not acknowledged yet. At most half of the buffers are under way, so before its
  buffer is needed another exchange is unrolled or dropped, and that acknowledges it.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed._symmetric_memory as symmetric_memory

from overlap_mtp.device_layout import Layout
from overlap_mtp.exchange.cuda import CudaTransport, ExchangeBuffers
from overlap_mtp.exchange.plan import ExchangePlan
from overlap_mtp.exchange.transport import WORD_BYTES, PendingExchange, Rolled, TransportConfig
from overlap_mtp.kernels.common import FLAG_WORDS, ExchangeConstants
from overlap_mtp.kernels.put_pack import put_pack
from overlap_mtp.kernels.unroll_acknowledge import acknowledge, unroll_acknowledge

NUM_BUFFERS = 128
MAX_UNDER_WAY = NUM_BUFFERS // 2  # exchanges that may be under way at a time
DEFAULT_TIMEOUT = timedelta(minutes=10)  # as NCCL's


@dataclass(frozen=True)
class MemoryLayout:
    """Where things are in a rank's symmetric memory, in int64 words. It is the same on all ranks."""

    cp_size: int
    buffer_words: int
    num_buffers: int

    @classmethod
    def of(
        cls, plans: list[ExchangePlan], words_per_token: int, num_buffers: int = NUM_BUFFERS
    ) -> MemoryLayout:
        """For ranks with these plans, in rank order."""
        words = max(plan.num_recv_rows for plan in plans) * words_per_token
        return cls(len(plans), -(-words // FLAG_WORDS) * FLAG_WORDS, num_buffers)

    @property
    def signals_at(self) -> int:
        return self.num_buffers * self.buffer_words

    @property
    def acknowledgements_at(self) -> int:
        return self.signals_at + self.num_buffers * self.cp_size * FLAG_WORDS

    @property
    def num_words(self) -> int:
        return self.acknowledgements_at + self.num_buffers * self.cp_size * FLAG_WORDS

    @property
    def constants(self) -> tuple[int, int, int, int]:
        """What ExchangeConstants holds of it."""
        return self.num_buffers, self.buffer_words, self.signals_at, self.acknowledgements_at


def peer_table(plans: list[ExchangePlan], cp_rank: int, addresses: list[int]) -> tuple[list[int], int]:
    """The words of `peers` as `put_pack` takes them, and where those of `sources` begin in it.

    `addresses`: where each rank's memory is, as this rank sees it.
    """
    plan = plans[cp_rank]
    peers: list[int] = []
    for peer in plan.destinations:
        rows = plans[peer].first_recv_row(cp_rank), plan.first_send_row(peer), plan.send_stride[peer]
        peers += [addresses[peer], peer, *rows]
    sources = [word for peer in plan.sources for word in (addresses[peer], peer)]
    return [*peers, *sources, 0], len(peers)  # 0: `sources` is not empty, even if there are none


class SymmetricTransport(CudaTransport):
    """Two kernels for an exchange and no library call. It needs GPUs that can write to each other's memory.

    If a peer never comes, the wait ends after the exchange group's timeout, and `raise_if_failed` then raises.
    """

    name = "symmetric"

    def __init__(self, config: TransportConfig, memory: torch.Tensor) -> None:
        """Collective over the cp group. It raises if the memory, from `allocate` on all ranks, cannot be shared."""
        super().__init__(config)
        self._memory_layout = MemoryLayout.of(config.plans, self.spec.words_per_token)
        self._memory = memory
        self._mapping: Any = symmetric_memory.rendezvous(memory, self.group.process_group)
        offset = getattr(self._mapping, "offset", 0)
        addresses = [address + offset for address in self._mapping.buffer_ptrs]
        peers, sources_at = peer_table(config.plans, self.group.cp_rank, addresses)
        self._peers = torch.tensor(peers, dtype=torch.int64, device=self.device)
        self._sources = self._peers[sources_at:]
        self._seq_nos = torch.zeros(len(self.plan.destinations) + 1, dtype=torch.int64, device=self.device)
        timeout_ns = (self.group.timeout or DEFAULT_TIMEOUT) / timedelta(microseconds=1) * 1000
        self._timeout = torch.tensor([int(timeout_ns)], dtype=torch.int64, device=self.device)
        self._under_way: dict[int, None] = {}  # numbers of exchanges, oldest first
        self._unrolled = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._last_join: torch.cuda.Event | None = None  # after the last unroll outside of graphs
        row_bytes, sent_to = WORD_BYTES * self.spec.words_per_token, self.plan.destinations
        strides = sum(self.plan.send_stride[peer] for peer in sent_to)
        self._sent_bytes = row_bytes * len(sent_to), row_bytes * strides  # for the headers; for each sequence
        self._make_buffers()

    def _constants(self, is_replayable: bool) -> ExchangeConstants:
        return ExchangeConstants.of(self.spec, self.plan, is_replayable, self._memory_layout.constants)

    def start(
        self,
        tensors: list[torch.Tensor],
        layout: Layout,
        mark: int,
        ready: torch.cuda.Event | None = None,
    ) -> PendingExchange:
        oldest = next(iter(self._under_way), self.num_started)
        if oldest <= self.num_started - MAX_UNDER_WAY:
            raise RuntimeError(
                f"exchange {oldest} must be joined (`at`) or dropped before exchange {self.num_started} can start: at "
                f"most {MAX_UNDER_WAY} in a row may be under way over symmetric memory"
            )
        exchange = super().start(tensors, layout, mark, ready)
        self._under_way[exchange.number] = None
        return exchange

    def finish(self, exchange: PendingExchange) -> Rolled:
        rolled = super().finish(exchange)
        if not exchange.buffers.is_captured:
            self._last_join = exchange.buffers.unrolled
        self._under_way.pop(exchange.number, None)
        return rolled

    def take_back(self, exchange: PendingExchange) -> None:
        self._under_way.pop(exchange.number, None)
        super().take_back(exchange)

    def close(self) -> None:
        try:
            super().close()
        finally:
            del self._memory, self._mapping  # now: a later garbage collection may hit a capture

    def _send(self, buffers: ExchangeBuffers, number: int) -> None:
        with self._send_span:
            self._launch(buffers.send, buffers)

    def _count(self, layout: Layout) -> None:
        header_bytes, sequence_bytes = self._sent_bytes
        self.traffic.add(
            len(self.plan.destinations), header_bytes + self.plan.num_sequences(layout) * sequence_bytes
        )

    def _recover(self, buffers: ExchangeBuffers) -> None:
        compute = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._side if self._is_overlapped else None):
            stream = torch.cuda.current_stream(self.device)
            stream.wait_stream(compute)  # the last unroll may be a graph's
            if self._last_join is not None:
                stream.wait_event(self._last_join)
            acknowledge(buffers.metadata, self._sources, self._unrolled, buffers.constants)()
        super()._recover(buffers)

    def _bind(self, buffers: ExchangeBuffers) -> None:
        buffers.shared = self._mapping
        metadata, replay_metadata = buffers.metadata, buffers.replay_metadata
        send_own = (self._peers, self._memory, self._seq_nos, self.error_flags, self._timeout)
        buffers.send = put_pack(
            (buffers.source, replay_metadata, metadata, *self._tables, *send_own), buffers.constants
        )
        unroll_own = (self._sources, self._memory, self._unrolled, self.error_flags)
        buffers.unroll = unroll_acknowledge(
            (metadata, replay_metadata, *self._tables, *unroll_own), buffers.constants
        )


def allocate(config: TransportConfig) -> torch.Tensor:
    """Allocate zeroed int64 memory that the ranks can share."""
    size = MemoryLayout.of(config.plans, config.spec.words_per_token).num_words
    memory = symmetric_memory.empty(size, dtype=torch.int64, device=config.spec.device)
    memory.zero_()
    torch.cuda.synchronize(config.spec.device)
    return memory
