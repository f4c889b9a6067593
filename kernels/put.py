"""Packs the tokens that peers need straight into the peers' memory, and says so: one launch.

One program a peer, and one that keeps the record for the unroll.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from overlap_mtp.cargo import Cargo
from overlap_mtp.kernels.geometry import NUM_DOCUMENTS_AT, SEQ_LEN_AT, slot_of_row, typed
from overlap_mtp.kernels.launch import Launch
from overlap_mtp.kernels.pack import FINGERPRINT_AT, copy_words, source_of
from overlap_mtp.kernels.signals import flag_at, raise_flag, wait_for
from overlap_mtp.plan import EPOCH, PlanShape

EPOCH_AT = tl.constexpr(EPOCH)
PEER_WORDS = (
    5  # of `peers`: address of its memory, its cp rank, first row there, first row here, rows of a unit
)
PEER_WORDS_ = tl.constexpr(PEER_WORDS)
LATE_ACKNOWLEDGEMENT = tl.constexpr(2)  # the word of `trouble` for it


@triton.jit
def put_rows(
    source,
    table,
    peer,
    wire,  # where the message's first row goes, in the peer's memory
    WIDTHS: tl.constexpr,
    NUM_TENSORS: tl.constexpr,
    BATCH: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    CP_SIZE: tl.constexpr,
    BY_DOCUMENT: tl.constexpr,
    RECORD_LEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The rows that are in use: the header and those of the units that there are."""
    first = tl.load(peer + 3)
    units = 1
    if BY_DOCUMENT:
        units = tl.load(source + NUM_DOCUMENTS_AT).to(tl.int32)
    rows = 1 + units * tl.load(peer + 4).to(tl.int32)
    fingerprint = tl.load(source + FINGERPRINT_AT)
    length = tl.load(source + SEQ_LEN_AT) // CP_SIZE
    for begin in range(0, rows, BLOCK):
        row = begin + tl.arange(0, BLOCK)
        inside = row < rows
        slot, used, header = slot_of_row(
            source, table, first + row, inside, NUM_ROWS, NUM_CHUNKS, CP_SIZE, BY_DOCUMENT
        )
        for n in tl.static_range(NUM_TENSORS):
            tensor = typed(tl.load(source + RECORD_LEN + n), WIDTHS[n])
            for b in range(BATCH):
                word = tl.load(tensor + b * length + slot, mask=used, other=0).to(tl.int64)
                to = wire + row.to(tl.int64) * (NUM_TENSORS * BATCH) + n * BATCH + b
                tl.store(to, tl.where(header, fingerprint, word), mask=inside)


@triton.jit
def put_kernel(
    given,  # int64 [RECORD_LEN + 2 * NUM_TENSORS], may be pinned host memory
    override,  # like `given`, on the device
    record,  # the same
    table,
    peers,  # int64 [destinations, PEER_WORDS]
    memory,  # this rank's symmetric memory
    epochs,  # int64 [NUM_DESTINATIONS + 1], a program's own each
    trouble,
    patience,  # int64 [1], 0 once something has failed
    WIDTHS: tl.constexpr,
    NUM_TENSORS: tl.constexpr,
    BATCH: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    CP_SIZE: tl.constexpr,
    CP_RANK: tl.constexpr,
    BY_DOCUMENT: tl.constexpr,
    RECORD_LEN: tl.constexpr,
    OVERRIDABLE: tl.constexpr,
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
        copy_words(source, record, RECORD_LEN + 2 * NUM_TENSORS, BLOCK)
        tl.debug_barrier()
        tl.store(record + EPOCH_AT, epoch)
    if program < NUM_DESTINATIONS:
        peer = peers + program * PEER_WORDS_
        rank = tl.load(peer + 1)
        slot = epoch % RING
        # The peer has read what was last put into this slot of its memory.
        free = flag_at(memory + ACKNOWLEDGEMENTS_AT, slot, rank, CP_SIZE)
        if wait_for(free, epoch - RING, tl.load(patience), TIMED):
            theirs = typed(tl.load(peer), 8)
            wire = theirs + slot * SLOT_WORDS + tl.load(peer + 2) * (NUM_TENSORS * BATCH)
            put_rows(
                source,
                table,
                peer,
                wire,
                WIDTHS,
                NUM_TENSORS,
                BATCH,
                NUM_ROWS,
                NUM_CHUNKS,
                CP_SIZE,
                BY_DOCUMENT,
                RECORD_LEN,
                BLOCK,
            )
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
    block: int = 256,
) -> Launch:
    """A launch that packs as `overlap_mtp.kernels.reference.pack` does, into the memory of the peers.

    `buffers` are the first nine arguments of `put_kernel`, of which `overlap_mtp.kernels.pack.pack` describes the
    first four; `constants` are those of SymmetricLayout.
    """
    return Launch(
        put_kernel,
        buffers,
        (len(shape.destinations) + 1, 1, 1),
        WIDTHS=cargo.widths,
        NUM_TENSORS=len(cargo.names),
        BATCH=cargo.rows,
        NUM_ROWS=shape.num_send_rows,
        NUM_CHUNKS=shape.num_chunks,
        CP_SIZE=shape.cp_size,
        CP_RANK=shape.cp_rank,
        BY_DOCUMENT=shape.by_document,
        RECORD_LEN=shape.record_len,
        OVERRIDABLE=overridable,
        NUM_DESTINATIONS=len(shape.destinations),
        **constants,
        BLOCK=block,
    )
