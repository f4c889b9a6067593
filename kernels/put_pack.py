"""Pack the tokens that peers need straight into the peers' memory, signal it, and wait for theirs: one launch.

There is one program for each peer, and one more that copies the metadata for the unroll and waits. It waits here, on
the side stream if the exchange is overlapped, so that the join is a copy.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from overlap_mtp.exchange.plan import SEQ_NO
from overlap_mtp.kernels.common import (
    NUM_DOCUMENTS_AT,
    ExchangeConstants,
    as_pointer,
    copy_metadata,
    metadata_of,
)
from overlap_mtp.kernels.launch import Launch
from overlap_mtp.kernels.pack import gather_rows, store_rows
from overlap_mtp.kernels.signals import MAX_WAITING, flag_of, signal, wait_signal

SEQ_NO_AT = tl.constexpr(SEQ_NO)
# Of `peers`: address of its memory, its cp rank, first row there, first row here, rows of a sequence.
PEER_WORDS = tl.constexpr(5)
SOURCE_WORDS = tl.constexpr(2)  # of `sources`: address of its memory, its cp rank
# A program gathers 4 words a thread at a time: larger tiles need too many registers. Twice the warps for plans of long
# messages saves 1.0 µs with 128 documents; four times saved 1.5, but with 32 documents it cost 0.5 (2 x H200).
WARP_WORDS, MIN_WARPS, MAX_WARPS = 128, 4, MAX_WAITING.value // 32
LATE_TOKENS, LATE_ACKNOWLEDGEMENT = tl.constexpr(1), tl.constexpr(2)  # the words of `error_flags` for them


@triton.jit
def wait_for_tokens(seq_no, sources, memory, error_flags, timeout, C: tl.constexpr):
    """Wait until all sources have signalled exchange `seq_no`. Returns it, or -seq_no if one is late."""
    arrived = seq_no
    NUM_SOURCES: tl.constexpr = C.num_sources
    for s in tl.static_range(NUM_SOURCES):
        rank = tl.load(sources + s * SOURCE_WORDS + 1)
        flag = flag_of(memory + C.signals_at, seq_no, rank, C)
        if not wait_signal(flag, seq_no, tl.load(timeout), C.on_gpu):
            arrived = -seq_no
            tl.store(error_flags + LATE_TOKENS, (1 + rank).to(tl.int32))
            tl.store(timeout, tl.zeros_like(seq_no))
    return arrived


@triton.jit
def put_pack_kernel(
    host_metadata,  # int64 [addresses_end], may be pinned host memory
    replay_metadata,  # the same, on the device
    metadata,  # the same, written here
    plan_table,
    tensor_table,
    peers,  # int64 [num_destinations, PEER_WORDS]; the sources follow, [num_sources, SOURCE_WORDS]
    memory,  # this rank's symmetric memory
    seq_nos,  # int64 [num_destinations + 1], one for each program
    error_flags,
    timeout,  # int64 [1], 0 after something has failed
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    source = metadata_of(host_metadata, replay_metadata, C)
    seq_no = tl.load(seq_nos + program) + 1
    if program == C.num_destinations:
        copy_metadata(source, metadata, C)
        arrived = seq_no
        if C.on_gpu:
            sources = peers + C.num_destinations * PEER_WORDS
            arrived = wait_for_tokens(seq_no, sources, memory, error_flags, timeout, C)
        tl.debug_barrier()
        tl.store(metadata + SEQ_NO_AT, arrived)
    else:
        peer = peers + program * PEER_WORDS
        rank = tl.load(peer + 1)
        first = tl.load(peer + 3)
        sequences = 1
        if C.by_document:
            sequences = tl.load(source + NUM_DOCUMENTS_AT).to(tl.int32)
        # Rows in use: the header and the sequences of this batch.
        rows = 1 + sequences * tl.load(peer + 4).to(tl.int32)
        row = tl.arange(0, BLOCK)
        words = gather_rows(source, plan_table, tensor_table, first + row, row < rows, 0, C)
        # The peer must have read the exchange before in this buffer.
        free = flag_of(memory + C.acknowledgements_at, seq_no, rank, C)
        if wait_signal(free, seq_no - C.num_buffers, tl.load(timeout), C.on_gpu):
            theirs = as_pointer(tl.load(peer), 8)
            buffer = theirs + seq_no % C.num_buffers * C.buffer_words
            buffer += tl.load(peer + 2) * (C.num_tensors * C.batch_rows)
            store_rows(words, buffer, row, row < rows, 0, C)
            for turn in range(1, C.batch_rows * tl.cdiv(rows, BLOCK)):
                b = turn % C.batch_rows
                row = turn // C.batch_rows * BLOCK + tl.arange(0, BLOCK)
                words = gather_rows(source, plan_table, tensor_table, first + row, row < rows, b, C)
                store_rows(words, buffer, row, row < rows, b, C)
            signal(flag_of(theirs + C.signals_at, seq_no, C.cp_rank, C), seq_no)
        else:
            tl.store(error_flags + LATE_ACKNOWLEDGEMENT, (1 + rank).to(tl.int32))
            tl.store(timeout, tl.zeros_like(seq_no))
    tl.store(seq_nos + program, seq_no)


def put_pack(buffers: tuple[torch.Tensor, ...], constants: ExchangeConstants, block: int = 0) -> Launch:
    """Bind the put_pack kernel to its buffers. `overlap_mtp.kernels.reference.put_pack` is the same in plain torch.

    If a peer is late, `error_flags` says who. If its tokens are late, the sequence number in `metadata` is negative.

    Args:
        buffers: the first ten arguments of `put_pack_kernel`. `overlap_mtp.kernels.pack.pack` describes the first
            five; overlap_mtp.exchange.symmetric describes the others.
        constants: of the exchange.
        block: rows that a program gathers at a time. Default: the whole message, as far as registers go.

    Returns:
        The launch.
    """
    longest = triton.next_power_of_2(max(1, constants.max_send_rows))
    words = longest * constants.padded_tensors
    warps = max(MIN_WARPS, min(words // WARP_WORDS, MAX_WARPS))
    if not block:
        block = max(16, min(longest, warps * WARP_WORDS // constants.padded_tensors))
    grid = (constants.num_destinations + 1, 1, 1)
    return Launch(put_pack_kernel, buffers, grid, C=constants, BLOCK=block, num_warps=warps)
