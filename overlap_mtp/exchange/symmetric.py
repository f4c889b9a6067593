"""Tokens between GPUs of one host by their own stores: symmetric memory, and one kernel for an exchange.

`put_unroll` packs into the peers' memory, signals it, waits for the peers' signals and writes the rolls. So the join
need only wait for an event.
All counting is done on the device, so an exchange can be captured in a CUDA graph and replayed:

- exchanges are numbered from 1 (`seq_no`), in the order in which the kernel runs. The tokens go to buffer
  seq_no % num_buffers of the peer;
- the flag of a buffer, a source and a part holds the sequence number that was last put there. It is never reset;
- before a buffer is written again, the peer must acknowledge the exchange before in it, even if tokens travel one way
  only;
- exchanges run one after the other, whether and in what order they are joined. So an exchange has been read when the
  next one begins. That acknowledges it.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed._symmetric_memory as symmetric_memory
from triton import next_power_of_2

from overlap_mtp.device_layout import Layout
from overlap_mtp.exchange.cuda import CudaTransport, ExchangeBuffers
from overlap_mtp.exchange.group import ExchangeGroup
from overlap_mtp.exchange.plan import ExchangePlan
from overlap_mtp.exchange.spec import ExchangeSpec
from overlap_mtp.exchange.transport import WORD_BYTES, TransportConfig
from overlap_mtp.kernels.common import FLAG_WORDS, ExchangeConstants
from overlap_mtp.kernels.launch import Launch
from overlap_mtp.kernels.put_unroll import num_counting, put_unroll
from overlap_mtp.kernels.upload import upload

NUM_BUFFERS = 8  # a rank that is further ahead of a peer waits on its side stream; 2 are needed
PART_WORDS = 512  # of a part of a message, for all depths: what the registers of a program hold
DEFAULT_TIMEOUT = timedelta(minutes=10)  # as NCCL's


@dataclass(frozen=True)
class MemoryLayout:
    """Where things are in a rank's symmetric memory, in int64 words. It is the same on all ranks."""

    cp_size: int
    buffer_words: int
    num_buffers: int
    part_rows: int  # rows (of activations: words) of a message that travel and are signalled together
    num_parts: int  # of the longest message

    @classmethod
    def of(
        cls,
        plans: list[ExchangePlan],
        spec: ExchangeSpec,
        num_buffers: int = NUM_BUFFERS,
        part_words: int = PART_WORDS,
    ) -> MemoryLayout:
        """For ranks with these plans, in rank order."""
        words = max(plan.num_recv_rows for plan in plans) * spec.words_per_token
        longest = max(max(plan.recv_rows) for plan in plans) - 1  # without the header
        row_words = next_power_of_2(spec.num_columns) * next_power_of_2(plans[0].num_depths)
        part_rows = max(1, min(part_words // row_words, next_power_of_2(longest)))
        num_parts = max(1, -(-longest // part_rows))
        return cls(len(plans), -(-words // FLAG_WORDS) * FLAG_WORDS, num_buffers, part_rows, num_parts)

    @property
    def signals_at(self) -> int:
        return self.num_buffers * self.buffer_words

    @property
    def acknowledgements_at(self) -> int:
        return self.signals_at + self.num_buffers * self.cp_size * self.num_parts * FLAG_WORDS

    @property
    def num_words(self) -> int:
        return self.acknowledgements_at + self.num_buffers * self.cp_size * FLAG_WORDS

    @property
    def constants(self) -> tuple[int, int, int, int, int, int]:
        """What ExchangeConstants or AllToAllConstants holds of it."""
        places = self.signals_at, self.acknowledgements_at
        return self.num_buffers, self.buffer_words, *places, self.part_rows, self.num_parts


def peer_table(plans: list[ExchangePlan], cp_rank: int, addresses: list[int]) -> list[int]:
    """The words of `peers` as `put_unroll` takes them.

    `addresses`: where each rank's memory is, as this rank sees it.
    """
    plan = plans[cp_rank]
    peers: list[int] = []
    for peer in plan.destinations:
        rows = plans[peer].first_recv_row(cp_rank), plan.first_send_row(peer), plan.send_stride[peer]
        peers += [addresses[peer], peer, *rows]
    for peer in plan.sources:
        peers += [addresses[peer], peer, plan.first_recv_row(peer), plan.recv_stride[peer]]
    return [*peers, 0]  # 0: it is not empty, even if there are none


class SymmetricTransport(CudaTransport):
    """One kernel for an exchange and no library call. It needs GPUs that can write to each other's memory.

    If a peer never comes, the wait ends after the exchange group's timeout, and `raise_if_failed` then raises.
    """

    name = "symmetric"
    writes_early = True

    def __init__(self, config: TransportConfig, memory: torch.Tensor) -> None:
        """Collective over the cp group. It raises if the memory, from `allocate` on all ranks, cannot be shared."""
        super().__init__(config)
        self._memory_layout = MemoryLayout.of(config.plans, self.spec)
        self._memory = memory
        self._mapping, addresses = share(memory, self.group)
        peers = peer_table(config.plans, self.group.cp_rank, addresses)
        self._peers = torch.tensor(peers, dtype=torch.int64, device=self.device)
        counting = num_counting(self._constants(is_replayable=False))
        self._seq_nos = torch.zeros(counting, dtype=torch.int64, device=self.device)
        self._timeout = timeout_of(self.group, self.device)
        plan_table, tensor_table = self._tables
        asked = torch.from_numpy(self.plan.asked).to(self.device)
        self._tables = torch.cat([plan_table, asked.flatten()]), tensor_table
        row_bytes, sent_to = WORD_BYTES * self.spec.words_per_token, self.plan.destinations
        strides = sum(self.plan.send_stride[peer] for peer in sent_to)
        self._sent_bytes = row_bytes * len(sent_to), row_bytes * strides  # for the headers; for each sequence
        self._make_buffers()

    def _constants(self, is_replayable: bool) -> ExchangeConstants:
        on_gpu = self.device.type == "cuda"  # tests run it on CPU ranks
        return ExchangeConstants.of(
            self.spec, self.plan, is_replayable, self._memory_layout.constants, on_gpu
        )

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

    def _bind(self, buffers: ExchangeBuffers, first: Launch | None) -> None:
        buffers.shared = self._mapping
        constants, metadata = buffers.constants, buffers.source
        # The first replay of a graph keeps on the device what it finds on the host.
        if first is None and not constants.is_replayable:
            metadata = buffers.metadata
            first = upload(buffers.source, metadata)
        shared = (self._peers, self._memory, self._seq_nos, self.error_flags, self._timeout)
        own = (metadata, buffers.replay_metadata, *self._tables, *shared)
        buffers.send = put_unroll(own, constants, self._local_len)
        buffers.send.first = first


def allocate(config: TransportConfig) -> torch.Tensor:
    """Allocate this rank's memory. It is not shared yet."""
    return allocate_words(MemoryLayout.of(config.plans, config.spec).num_words, config.spec.device)


def allocate_words(num_words: int, device: torch.device) -> torch.Tensor:
    """Allocate zeroed int64 memory that ranks can share."""
    memory: torch.Tensor = symmetric_memory.empty(num_words, dtype=torch.int64, device=device)
    memory.zero_()
    torch.cuda.synchronize(device)
    return memory


def share(memory: torch.Tensor, group: ExchangeGroup) -> tuple[Any, list[int]]:
    """Let the ranks of a group write to each other's memory. Collective.

    Args:
        memory: from `allocate_words`, of the same size on all ranks.
        group: the ranks.

    Returns:
        What keeps the peers' memory mapped, and where each rank's memory is, as this rank sees it.
    """
    mapping = symmetric_memory.rendezvous(memory, group.process_group)
    offset = getattr(mapping, "offset", 0)
    return mapping, [address + offset for address in mapping.buffer_ptrs]


def timeout_of(group: ExchangeGroup, device: torch.device) -> torch.Tensor:
    """How long kernels wait for peers: ns, int64 [1]."""
    timeout_ns = (group.timeout or DEFAULT_TIMEOUT) / timedelta(microseconds=1) * 1000
    return torch.tensor([int(timeout_ns)], dtype=torch.int64, device=device)
