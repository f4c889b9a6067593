"""Packs the tokens that peers need straight into the peers' memory, and says so: one launch.

One program a peer, and one that keeps the record for the unroll.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from overlap_mtp.exchange.plan import DONE, EPOCH, PlanShape
from overlap_mtp.exchange.spec import Cargo
from overlap_mtp.kernels.common import NUM_DOCUMENTS_AT, typed
from overlap_mtp.kernels.launch import Launch
from overlap_mtp.kernels.pack import copy_words, gather_constants, gather_rows, put_rows, source_of
from overlap_mtp.kernels.signals import flag_at, raise_flag, wait_for

EPOCH_AT = tl.constexpr(EPOCH)
DONE_AT = tl.constexpr(DONE)
PEER_WORDS = (
    5  # of `peers`: address of its memory, its cp rank, first row there, first row here, rows of a unit
)
PEER_WORDS_ = tl.constexpr(PEER_WORDS)
MOST_WORDS = (
    512  # that a program of 4 warps gathers at a time: with more it needs registers that are seldom free
)
LATE_ACKNOWLEDGEMENT = tl.constexpr(2)  # the word of `trouble` for it


@triton.jit
def put_kernel(
    given,  # int64 [RECORD_LEN + 2 * NUM_TENSORS], may be pinned host memory
    override,  # like `given`, on the device
    record,  # the same
    table,
    cargo,
    peers,  # int64 [destinations, PEER_WORDS]
    memory,  # this rank's symmetric memory
    epochs,  # int64 [NUM_DESTINATIONS + 1], a program's own each
    trouble,
    patience,  # int64 [1], 0 once something has failed
    WIDTHS: tl.constexpr,
    NUM_WIDTHS: tl.constexpr,
    NUM_TENSORS: tl.constexpr,
    PADDED: tl.constexpr,
    BATCH: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    CP_SIZE: tl.constexpr,
    BY_DOCUMENT: tl.constexpr,
    RECORD_LEN: tl.constexpr,
    OVERRIDABLE: tl.constexpr,
    COPY_BLOCK: tl.constexpr,
    CP_RANK: tl.constexpr,
    NUM_DESTINATIONS: tl.constexpr,
    RING: tl.constexpr,
    SLOT_WORDS: tl.constexpr,
    SIGNALS_AT: tl.constexpr,
    ACKNOWLEDGEMENTS_AT: tl.constexpr,
    TIMED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    source = source_of(given, override, OVERRIDABLE)
    epoch = tl.load(epochs + program) + 1
    if program == NUM_DESTINATIONS:
        copy_words(source, record, RECORD_LEN + 2 * NUM_TENSORS, COPY_BLOCK)
        tl.debug_barrier()
        tl.store(record + EPOCH_AT, epoch)
        tl.store(record + DONE_AT, tl.zeros_like(epoch))
    else:
        peer = peers + program * PEER_WORDS_
        rank = tl.load(peer + 1)
        first = tl.load(peer + 3)
        units = 1
        if BY_DOCUMENT:
            units = tl.load(source + NUM_DOCUMENTS_AT).to(tl.int32)
        rows = 1 + units * tl.load(peer + 4).to(
            tl.int32
        )  # those in use: the header and the units that there are
        row = tl.arange(0, BLOCK)
        words = gather_rows(
            source,
            table,
            cargo,
            first + row,
            row < rows,
            0,
            WIDTHS,
            NUM_WIDTHS,
            NUM_TENSORS,
            PADDED,
            NUM_ROWS,
            NUM_CHUNKS,
            CP_SIZE,
            BY_DOCUMENT,
            RECORD_LEN,
        )
        slot = epoch % RING
        # The peer has read what was last put into this slot of its memory.
        free = flag_at(memory + ACKNOWLEDGEMENTS_AT, slot, rank, CP_SIZE)
        if wait_for(free, epoch - RING, tl.load(patience), TIMED):
            theirs = typed(tl.load(peer), 8)
            wire = theirs + slot * SLOT_WORDS + tl.load(peer + 2) * (NUM_TENSORS * BATCH)
            put_rows(words, wire, row, row < rows, 0, NUM_TENSORS, PADDED, BATCH)
            for turn in range(1, BATCH * tl.cdiv(rows, BLOCK)):
                row = turn // BATCH * BLOCK + tl.arange(0, BLOCK)
                words = gather_rows(
                    source,
                    table,
                    cargo,
                    first + row,
                    row < rows,
                    turn % BATCH,
                    WIDTHS,
                    NUM_WIDTHS,
                    NUM_TENSORS,
                    PADDED,
                    NUM_ROWS,
                    NUM_CHUNKS,
                    CP_SIZE,
                    BY_DOCUMENT,
                    RECORD_LEN,
                )
                put_rows(words, wire, row, row < rows, turn % BATCH, NUM_TENSORS, PADDED, BATCH)
            raise_flag(flag_at(theirs + SIGNALS_AT, slot, CP_RANK, CP_SIZE), epoch)
        else:
            tl.store(trouble + LATE_ACKNOWLEDGEMENT, (1 + rank).to(tl.int32))
            tl.store(patience, tl.zeros_like(epoch))
    tl.store(epochs + program, epoch)


def put(
    buffers: tuple[torch.Tensor, ...],
    shape: PlanShape,
    cargo: Cargo,
    constants: dict[str, object],
    overridable: bool = False,
    block: int | None = None,
) -> Launch:
    """A launch that packs as `overlap_mtp.kernels.reference.pack` does, into the memory of the peers.

    `buffers` are the first ten arguments of `put_kernel`, of which `overlap_mtp.kernels.pack.pack` describes the
    first five; `constants` are those of SymmetricLayout. `block`: rows that a program gathers at a time, by default a
    whole message, as far as registers go.
    """
    if block is None:
        words = triton.next_power_of_2(len(cargo.names))
        block = max(16, min(triton.next_power_of_2(max(shape.send_rows)), MOST_WORDS // words))
    return Launch(
        put_kernel,
        buffers,
        (len(shape.destinations) + 1, 1, 1),
        **gather_constants(shape, cargo),
        OVERRIDABLE=overridable,
        COPY_BLOCK=triton.next_power_of_2(shape.record_len + 2 * len(cargo.names)),
        CP_RANK=shape.cp_rank,
        NUM_DESTINATIONS=len(shape.destinations),
        **constants,
        BLOCK=block,
    )
