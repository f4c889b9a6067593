"""Waits for what the peers have put, unrolls it, and tells them that their slots are free: one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from overlap_mtp.exchange.plan import DONE, PlanShape
from overlap_mtp.exchange.spec import Cargo
from overlap_mtp.kernels.common import typed
from overlap_mtp.kernels.launch import Launch
from overlap_mtp.kernels.put_pack import EPOCH_AT
from overlap_mtp.kernels.signals import flag_at, raise_flag, wait_for
from overlap_mtp.kernels.unroll import check_headers, find_sources, remember, roll_constants, store_rolls

DONE_AT = tl.constexpr(DONE)
LATE_TOKENS = tl.constexpr(1)  # the word of `trouble` for them
SOURCE_WORDS = 2  # of `sources`: address of its memory, its cp rank
SOURCE_WORDS_ = tl.constexpr(SOURCE_WORDS)


@triton.jit
def acknowledge(
    sources,
    epoch,
    NUM_SOURCES: tl.constexpr,
    CP_SIZE: tl.constexpr,
    CP_RANK: tl.constexpr,
    RING: tl.constexpr,
    AT: tl.constexpr,
):
    """Tells all sources that what they put at `epoch` has been read."""
    for s in tl.static_range(NUM_SOURCES):
        theirs = typed(tl.load(sources + s * SOURCE_WORDS_), 8)
        raise_flag(flag_at(theirs + AT, epoch % RING, CP_RANK, CP_SIZE), epoch)


@triton.jit
def take_kernel(
    record,  # int64 [RECORD_LEN + 2 * NUM_TENSORS], as `put` left it
    override,
    table,
    cargo,
    sources,  # int64 [NUM_SOURCES, SOURCE_WORDS]
    memory,  # this rank's symmetric memory
    trouble,
    patience,  # int64 [1], 0 once something has failed
    OVERRIDABLE: tl.constexpr,
    CP_RANK: tl.constexpr,
    RING: tl.constexpr,
    SLOT_WORDS: tl.constexpr,
    SIGNALS_AT: tl.constexpr,
    ACKNOWLEDGEMENTS_AT: tl.constexpr,
    TIMED: tl.constexpr,
    ROUTES_AT: tl.constexpr,
    HEADERS_AT: tl.constexpr,
    NUM_SOURCES: tl.constexpr,
    WIDTHS: tl.constexpr,
    NUM_WIDTHS: tl.constexpr,
    NUM_TENSORS: tl.constexpr,
    BATCH: tl.constexpr,
    NUM_DEPTHS: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    CP_SIZE: tl.constexpr,
    HELD_CHUNKS: tl.constexpr,
    BY_DOCUMENT: tl.constexpr,
    MAX_DOCUMENTS: tl.constexpr,
    STEPS: tl.constexpr,
    RECORD_LEN: tl.constexpr,
    COPY_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    source, is_held, is_received = find_sources(
        record,
        table + ROUTES_AT,
        NUM_DEPTHS,
        NUM_CHUNKS,
        CP_SIZE,
        HELD_CHUNKS,
        BY_DOCUMENT,
        MAX_DOCUMENTS,
        STEPS,
        BLOCK,
    )
    epoch = tl.load(record + EPOCH_AT)
    slot = epoch % RING
    wire = memory + slot * SLOT_WORDS
    arrived = epoch > 0
    for s in tl.static_range(NUM_SOURCES):
        rank = tl.load(sources + s * SOURCE_WORDS_ + 1)
        signal = flag_at(memory + SIGNALS_AT, slot, rank, CP_SIZE)
        if not wait_for(signal, epoch, tl.load(patience), TIMED):
            arrived = epoch < 0
            tl.store(trouble + LATE_TOKENS, (1 + rank).to(tl.int32))
            tl.store(patience, tl.zeros_like(epoch))
    store_rolls(
        record,
        cargo,
        wire,
        source,
        is_held,
        is_received & arrived,
        WIDTHS,
        NUM_WIDTHS,
        NUM_TENSORS,
        BATCH,
        CP_SIZE,
        RECORD_LEN,
        BLOCK,
    )
    if tl.program_id(0) + tl.program_id(1) + tl.program_id(2) == 0:
        remember(record, override, RECORD_LEN + 2 * NUM_TENSORS, OVERRIDABLE, COPY_BLOCK)
        if arrived:
            check_headers(record, table + HEADERS_AT, wire, trouble, NUM_SOURCES, NUM_TENSORS * BATCH)
    tl.debug_barrier()
    programs = tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)
    if tl.atomic_add(record + DONE_AT, 1, sem="acq_rel", scope="gpu") == programs - 1:
        acknowledge(sources, epoch, NUM_SOURCES, CP_SIZE, CP_RANK, RING, ACKNOWLEDGEMENTS_AT)


@triton.jit
def discard_kernel(
    record,
    sources,
    NUM_SOURCES: tl.constexpr,
    CP_SIZE: tl.constexpr,
    CP_RANK: tl.constexpr,
    RING: tl.constexpr,
    AT: tl.constexpr,
):
    acknowledge(sources, tl.load(record + EPOCH_AT), NUM_SOURCES, CP_SIZE, CP_RANK, RING, AT)


def take(
    buffers: tuple[torch.Tensor, ...],
    shape: PlanShape,
    cargo: Cargo,
    constants: dict[str, object],
    overridable: bool = False,
    block: int = 256,
) -> Launch:
    """A launch that unrolls what peers put into this rank's memory, as `overlap_mtp.kernels.reference.unroll` does.

    `buffers` are the first eight arguments of `take_kernel`, `constants` are those of SymmetricLayout; the grid is
    that of `unroll_grid`. Where tokens do not come in time, `trouble` says who is late and the rolls hold the fill.
    """
    return Launch(
        take_kernel,
        buffers,
        (1, 1, 1),
        OVERRIDABLE=overridable,
        CP_RANK=shape.cp_rank,
        **constants,
        ROUTES_AT=shape.routes_at,
        HEADERS_AT=shape.headers_at,
        NUM_SOURCES=len(shape.sources),
        **roll_constants(shape, cargo),
        BLOCK=block,
    )


def discard(record: torch.Tensor, sources: torch.Tensor, shape: PlanShape, ring: int, at: int) -> Launch:
    """A launch that acknowledges an exchange which nobody will unroll. `at`: where acknowledgements begin."""
    return Launch(
        discard_kernel,
        (record, sources),
        (1, 1, 1),
        NUM_SOURCES=len(shape.sources),
        CP_SIZE=shape.cp_size,
        CP_RANK=shape.cp_rank,
        RING=ring,
        AT=at,
    )
