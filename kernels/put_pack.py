"""Pack the tokens that a peer needs straight into its memory, and signal it: programs of `put_unroll`."""

from __future__ import annotations

import triton
import triton.language as tl

from overlap_mtp.kernels.common import FINGERPRINT_AT, as_pointer, rows_in_use
from overlap_mtp.kernels.pack import gather_rows, store_rows
from overlap_mtp.kernels.signals import flag_of, give_up, signal, wait_signal

# A row of the table: address of the peer's memory, its cp rank, first row there, first row here, rows of a sequence.
PEER_WORDS = tl.constexpr(5)
# A row of the table: address of the source's memory, its cp rank, its first row here, its rows of a sequence.
SOURCE_WORDS = tl.constexpr(4)
LATE_ACKNOWLEDGEMENT = tl.constexpr(2)  # the word of `error_flags`


@triton.jit
def put_pack(
    metadata,
    plan_table,
    tensor_table,
    peer,
    part,
    seq_no,
    memory,
    error_flags,
    timeout,
    C: tl.constexpr,
):
    """Put a part of exchange `seq_no` into the memory of a peer, if it has acknowledged the one before in that buffer.

    Parts that the batch does not use are signalled, too: a peer with other documents may wait for them.
    """
    rank = tl.load(peer + 1)
    first = tl.load(peer + 3) + 1  # after the header
    row = part * C.part_rows + tl.arange(0, C.part_rows)
    inside = row < rows_in_use(metadata, tl.load(peer + 4), C)
    words = gather_rows(metadata, plan_table, tensor_table, first + row, inside, 0, C)
    free = flag_of(memory + C.acknowledgements_at, seq_no, rank, 0, 1, C)
    if wait_signal(free, seq_no - C.num_buffers, tl.load(timeout), C.on_gpu):
        theirs = as_pointer(tl.load(peer), 8)
        buffer = theirs + seq_no % C.num_buffers * C.buffer_words
        buffer += tl.load(peer + 2) * (C.num_tensors * C.batch_rows)
        if part == 0:
            tl.store(buffer, tl.load(metadata + FINGERPRINT_AT))
        store_rows(words, buffer, 1 + row, inside, 0, C)
        for b in range(1, C.batch_rows):
            words = gather_rows(metadata, plan_table, tensor_table, first + row, inside, b, C)
            store_rows(words, buffer, 1 + row, inside, b, C)
        signal(flag_of(theirs + C.signals_at, seq_no, C.cp_rank, part, C.num_parts, C), seq_no)
    else:
        give_up(error_flags + LATE_ACKNOWLEDGEMENT, 1 + rank, timeout)


@triton.jit
def acknowledge(sources, seq_no, C: tl.constexpr):
    """Tell all sources that what they put for exchange `seq_no` has been read; 0: for none."""
    s = tl.arange(0, C.padded_sources)
    known = (s < C.num_sources) & (seq_no > 0)
    theirs = as_pointer(tl.load(sources + s * SOURCE_WORDS, mask=known, other=0), 8)
    signal(flag_of(theirs + C.acknowledgements_at, seq_no, C.cp_rank, 0, 1, C), seq_no, known)
