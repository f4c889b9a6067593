"""Exchange words between GPUs of one host by their own stores: what `all_to_all_single` does, in one kernel.

Messages are words that lie together in `sent` and in `received`. They travel in parts: each is put into a buffer in the
peer's symmetric memory and signalled, then copied from there to `received`. Buffers, signals and acknowledgements are
those of `put_unroll`: exchange n acknowledges exchange n - 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from overlap_mtp.kernels.common import FLAG_WORDS, as_pointer
from overlap_mtp.kernels.launch import Launch
from overlap_mtp.kernels.put_pack import LATE_ACKNOWLEDGEMENT, PEER_WORDS, SOURCE_WORDS, acknowledge
from overlap_mtp.kernels.signals import flag_of, give_up, signal, wait_signal
from overlap_mtp.kernels.wait_unroll import LATE_TOKENS

MAX_PUTTING = 128  # programs that put at a time: they wait only for peers that are two exchanges behind
MAX_TAKING = 16  # programs that wait for messages at a time: they keep their places on the device
PAIR = tl.constexpr(2)  # words: messages begin at multiples of 16 bytes


class AllToAllConstants(NamedTuple):
    """All that is fixed for an exchange of words. The kernel takes it as one constant, `C`."""

    cp_size: int
    cp_rank: int
    num_sources: int
    padded_sources: int  # the next power of two
    num_destinations: int
    num_buffers: int
    buffer_words: int
    signals_at: int
    acknowledgements_at: int
    part_words: int  # a power of two
    num_parts: int  # of the longest message of any rank
    put_shares: int  # programs for each destination that share the parts
    take_shares: int  # the same for each source
    first_late: int  # what `error_flags` say of cp rank 0, if it is late
    on_gpu: bool  # otherwise ranks run one after the other, and timeouts are turns of the waiting loop
    flag_words: int = FLAG_WORDS

    @classmethod
    def of(
        cls,
        cp_size: int,
        cp_rank: int,
        num_sources: int,
        num_destinations: int,
        memory: tuple[int, int, int, int, int, int],
        first_late: int = 1,
        on_gpu: bool = True,
    ) -> AllToAllConstants:
        """Collect the constants of one rank's exchanges.

        Args:
            cp_size, cp_rank: of the group.
            num_sources, num_destinations: the peers that it has messages from and to.
            memory: num_buffers to num_parts, of the symmetric memory.
            first_late: as above.
            on_gpu: False under the interpreter.

        Returns:
            The constants.
        """
        num_parts = memory[-1]
        put_shares = min(num_parts, max(1, MAX_PUTTING // max(1, num_destinations)))
        take_shares = min(num_parts, max(1, MAX_TAKING // max(1, num_sources)))
        padded = triton.next_power_of_2(max(1, num_sources))
        peers = num_sources, padded, num_destinations
        return cls(cp_size, cp_rank, *peers, *memory, put_shares, take_shares, first_late, on_gpu)

    @property
    def num_programs(self) -> int:
        """Programs that put, acknowledge or take."""
        return self.num_destinations * self.put_shares + 1 + self.num_sources * self.take_shares


@triton.jit
def put_parts(sent, peer, share, seq_no, memory, error_flags, timeout, C: tl.constexpr):
    """Put this program's parts of a message into the peer's memory, if it has acknowledged the buffer."""
    rank = tl.load(peer + 1)
    free = flag_of(memory + C.acknowledgements_at, seq_no, rank, 0, 1, C)
    if wait_signal(free, seq_no - C.num_buffers, tl.load(timeout), C.on_gpu):
        theirs = as_pointer(tl.load(peer), 8, 16)
        buffer = theirs + seq_no % C.num_buffers * C.buffer_words + tl.multiple_of(tl.load(peer + 2), PAIR)
        begin = tl.multiple_of(tl.load(peer + 3), PAIR)
        words = tl.multiple_of(tl.load(peer + 4), PAIR)
        for part in range(share, tl.cdiv(words, C.part_words), C.put_shares):
            at = part * C.part_words + tl.arange(0, C.part_words)
            inside = at < words
            tl.store(buffer + at, tl.load(sent + begin + at, mask=inside, other=0), mask=inside)
            signal(flag_of(theirs + C.signals_at, seq_no, C.cp_rank, part, C.num_parts, C), seq_no)
    else:
        give_up(error_flags + LATE_ACKNOWLEDGEMENT, C.first_late + rank, timeout)


@triton.jit
def take_parts(received, source, share, seq_no, memory, error_flags, timeout, C: tl.constexpr):
    """Wait for this program's parts of a message, and copy them to `received`."""
    rank = tl.load(source + 1)
    begin = tl.multiple_of(tl.load(source + 2), PAIR)
    words = tl.multiple_of(tl.load(source + 3), PAIR)
    buffer = memory + seq_no % C.num_buffers * C.buffer_words + begin
    for part in range(share, tl.cdiv(words, C.part_words), C.take_shares):
        flag = flag_of(memory + C.signals_at, seq_no, rank, part, C.num_parts, C)
        arrived = wait_signal(flag, seq_no, tl.load(timeout), C.on_gpu)
        at = part * C.part_words + tl.arange(0, C.part_words)
        inside = at < words
        found = tl.load(buffer + at, mask=inside & arrived, other=0)
        tl.store(received + begin + at, found, mask=inside)
        if not arrived:
            give_up(error_flags + LATE_TOKENS, C.first_late + rank, timeout)


@triton.jit
def all_to_all_kernel(
    sent,  # int64
    received,  # int64
    peers,  # int64 [num_destinations, PEER_WORDS], then [num_sources, SOURCE_WORDS]
    memory,  # this rank's symmetric memory
    seq_nos,  # int64 [num_programs]
    error_flags,
    timeout,  # int64 [1], 0 after something has failed
    C: tl.constexpr,
    FIRST: tl.constexpr,  # the first program that is launched
):
    PUTTING: tl.constexpr = C.num_destinations * C.put_shares
    program = tl.program_id(0) + FIRST
    sources = peers + C.num_destinations * PEER_WORDS
    seq_no = tl.load(seq_nos + program) + 1
    if program < PUTTING:
        peer = peers + program // C.put_shares * PEER_WORDS
        put_parts(sent, peer, program % C.put_shares, seq_no, memory, error_flags, timeout, C)
    elif program == PUTTING:
        acknowledge(sources, seq_no - 1, C)
    else:
        taking = program - PUTTING - 1
        source = sources + taking // C.take_shares * SOURCE_WORDS
        take_parts(received, source, taking % C.take_shares, seq_no, memory, error_flags, timeout, C)
    tl.store(seq_nos + program, seq_no)


def all_to_all(
    buffers: tuple[torch.Tensor, ...],
    constants: AllToAllConstants,
    first: int = 0,
    end: int | None = None,
) -> Launch:
    """Bind the kernel to its buffers. In torch it is `all_to_all_single`.

    `error_flags` says whose acknowledgement or message was late first. `received` gets zeros for a late one.

    Args:
        buffers: the arguments of the kernel. A row of `peers` for a destination holds the address of its memory, its cp
            rank, the word of its buffer and that of `sent` at which the message begins, and its words; for a source the
            address of its memory, its cp rank, the word of the buffer and of `received` at which the message begins,
            and its words. Words at which messages begin are even.
        constants: of the exchange.
        first, end: which programs are launched. Ranks that are simulated one after the other put before they take.

    Returns:
        The launch.
    """
    grid = ((constants.num_programs if end is None else end) - first, 1, 1)
    return Launch(all_to_all_kernel, buffers, grid, C=constants, FIRST=first)
