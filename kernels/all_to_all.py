"""Exchange words between GPUs of one host by their own stores: what `all_to_all_single` does.

Messages are words that lie together in `sent` and in `received`. They travel in parts: each is put into a buffer in the
peer's symmetric memory and signalled, then copied from there to `received`. Buffers, signals and acknowledgements are
those of `put_unroll`: exchange n acknowledges exchange n - 1.

There are three kernels, one after the other: many programs put, one waits for all messages, many copy them. A program
that waits keeps its place on the device, and a matrix product beside it is the longer for each multiprocessor that it
lacks. Messages are larger than those of tokens, so that all the programs that copy them should not wait.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from overlap_mtp.kernels.common import FLAG_WORDS, as_pointer
from overlap_mtp.kernels.launch import Launch, in_turn
from overlap_mtp.kernels.put_pack import LATE_ACKNOWLEDGEMENT, PEER_WORDS, SOURCE_WORDS, acknowledge
from overlap_mtp.kernels.signals import THREADS, flag_of, give_up, signal, wait_signal
from overlap_mtp.kernels.wait_unroll import LATE_TOKENS

MAX_PROGRAMS = 128  # that put, or that copy; those that put wait only for peers that are two exchanges behind
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
        put_shares = min(num_parts, max(1, MAX_PROGRAMS // max(1, num_destinations)))
        take_shares = min(num_parts, max(1, MAX_PROGRAMS // max(1, num_sources)))
        padded = triton.next_power_of_2(max(1, num_sources))
        peers = num_sources, padded, num_destinations
        return cls(cp_size, cp_rank, *peers, *memory, put_shares, take_shares, first_late, on_gpu)

    @property
    def num_putting(self) -> int:
        """Programs that put or acknowledge. They count exchanges."""
        return self.num_destinations * self.put_shares + 1


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
def put_words_kernel(
    sent,  # int64
    peers,  # int64 [num_destinations, PEER_WORDS], then [num_sources, SOURCE_WORDS]
    memory,  # this rank's symmetric memory
    seq_nos,  # int64 [num_putting]
    error_flags,
    timeout,  # int64 [1], 0 after something has failed
    C: tl.constexpr,
):
    PUTTING: tl.constexpr = C.num_destinations * C.put_shares
    program = tl.program_id(0)
    seq_no = tl.load(seq_nos + program) + 1
    if program < PUTTING:
        peer = peers + program // C.put_shares * PEER_WORDS
        put_parts(sent, peer, program % C.put_shares, seq_no, memory, error_flags, timeout, C)
    else:
        acknowledge(peers + C.num_destinations * PEER_WORDS, seq_no - 1, C)
    tl.store(seq_nos + program, seq_no)


@triton.jit
def put_seq_no(seq_nos, C: tl.constexpr):
    """The exchange that this rank has put."""
    return tl.load(seq_nos + C.num_destinations * C.put_shares)


@triton.jit
def wait_words_kernel(peers, memory, seq_nos, error_flags, timeout, C: tl.constexpr):
    """Wait for all parts of all messages, in one program."""
    sources = peers + C.num_destinations * PEER_WORDS
    seq_no = put_seq_no(seq_nos, C)
    for number in range(C.num_sources):
        source = sources + number * SOURCE_WORDS
        rank = tl.load(source + 1)
        parts = tl.cdiv(tl.load(source + 3), C.part_words)
        for first in range(0, parts, THREADS):
            part = tl.minimum(first + tl.arange(0, THREADS), parts - 1)
            flags = flag_of(memory + C.signals_at, seq_no, rank, part, C.num_parts, C)
            arrived = wait_signal(flags, seq_no, tl.load(timeout), C.on_gpu)
            if tl.min(arrived.to(tl.int32), axis=0) == 0:
                give_up(error_flags + LATE_TOKENS, C.first_late + rank, timeout)


@triton.jit
def take_words_kernel(received, peers, memory, seq_nos, timeout, C: tl.constexpr):
    """Copy this program's parts of a message, which `wait_words_kernel` has waited for."""
    source = peers + C.num_destinations * PEER_WORDS + tl.program_id(0) // C.take_shares * SOURCE_WORDS
    begin = tl.multiple_of(tl.load(source + 2), PAIR)
    words = tl.multiple_of(tl.load(source + 3), PAIR)
    buffer = memory + put_seq_no(seq_nos, C) % C.num_buffers * C.buffer_words + begin
    arrived = tl.load(timeout) > 0
    for part in range(tl.program_id(0) % C.take_shares, tl.cdiv(words, C.part_words), C.take_shares):
        at = part * C.part_words + tl.arange(0, C.part_words)
        inside = at < words
        found = tl.load(buffer + at, mask=inside & arrived, other=0)
        tl.store(received + begin + at, found, mask=inside)


def put_words(buffers: tuple[torch.Tensor, ...], constants: AllToAllConstants) -> Launch:
    """Bind the kernel that puts messages into the peers' memory, as `all_to_all`."""
    sent, _, *rest = buffers
    return Launch(put_words_kernel, (sent, *rest), (constants.num_putting, 1, 1), C=constants)


def take_words(buffers: tuple[torch.Tensor, ...], constants: AllToAllConstants) -> Launch:
    """Bind the kernels that wait for messages and copy them, as `all_to_all`. There must be some."""
    _, received, peers, memory, seq_nos, error_flags, timeout = buffers
    shared = peers, memory, seq_nos
    wait = Launch(wait_words_kernel, (*shared, error_flags, timeout), (1, 1, 1), C=constants)
    grid = constants.num_sources * constants.take_shares, 1, 1
    return in_turn(wait, Launch(take_words_kernel, (received, *shared, timeout), grid, C=constants))


def all_to_all(buffers: tuple[torch.Tensor, ...], constants: AllToAllConstants) -> Launch:
    """Bind the kernels to their buffers. In torch it is `all_to_all_single`.

    `error_flags` says whose acknowledgement or message was late first. `received` then gets zeros.

    Args:
        buffers: sent, received, peers, memory, seq_nos, error_flags and timeout, as the kernels take them. A row of
            `peers` for a destination holds the address of its memory, its cp rank, the word of its buffer and that of
            `sent` at which the message begins, and its words; for a source the address of its memory, its cp rank, the
            word of the buffer and of `received` at which the message begins, and its words. Words at which messages
            begin are even.
        constants: of the exchange.

    Returns:
        The launch.
    """
    put = put_words(buffers, constants)
    return in_turn(put, take_words(buffers, constants)) if constants.num_sources else put
