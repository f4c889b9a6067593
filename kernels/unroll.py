"""Writes the rolls of all tensors at all depths from what is held and what was received: one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from overlap_mtp.exchange.plan import PlanShape
from overlap_mtp.exchange.spec import Cargo
from overlap_mtp.kernels.common import (
    CU_AT,
    FINGERPRINT_AT,
    SEQ_LEN_AT,
    last_at_or_below,
    typed,
)
from overlap_mtp.kernels.launch import Grid, Launch
from overlap_mtp.kernels.pack import copy_words, width_constants


@triton.jit
def find_sources(
    record,
    routes,
    NUM_DEPTHS: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    CP_SIZE: tl.constexpr,
    HELD_CHUNKS: tl.constexpr,
    BY_DOCUMENT: tl.constexpr,
    MAX_DOCUMENTS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """For this program's block of slots and depth: (slot or row of the token so far ahead, whether it is held
    here, whether it was received)."""
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    depth = tl.program_id(1) + 1
    seq_len = tl.load(record + SEQ_LEN_AT).to(tl.int32)  # 64-bit divisions are slow
    inside = slot < seq_len // CP_SIZE
    if BY_DOCUMENT:
        unit = last_at_or_below(record + CU_AT, slot * CP_SIZE, MAX_DOCUMENTS, STEPS)
        start = tl.load(record + CU_AT + unit).to(tl.int32)
        end = tl.load(record + CU_AT + unit + 1).to(tl.int32)
    else:
        unit = tl.zeros_like(slot)
        start = unit
        end = start + seq_len
    size = tl.maximum((end - start) // NUM_CHUNKS, 1)
    first_slot = start // CP_SIZE
    within = slot - first_slot
    held = tl.minimum(within // size, NUM_CHUNKS // CP_SIZE - 1)
    chunk = tl.where(held == 0, HELD_CHUNKS[0], HELD_CHUNKS[NUM_CHUNKS // CP_SIZE - 1])
    offset = within - held * size
    position = start + chunk * size + offset
    document = unit
    if not BY_DOCUMENT:
        document = last_at_or_below(record + CU_AT, position, MAX_DOCUMENTS, STEPS)
    valid_end = tl.load(record + CU_AT + (MAX_DOCUMENTS + 1) + document)
    wanted = inside & (position + depth < valid_end)

    gap = (offset + depth) // size
    beyond = offset + depth - gap * size
    route = routes + 2 * (held * (NUM_DEPTHS + 1) + gap)
    code = tl.load(route, mask=wanted, other=0)
    stride = tl.load(route + 1, mask=wanted, other=0)
    is_held = wanted & (code < 0)
    source = tl.where(code < 0, first_slot + (-1 - code) * size, code + unit * stride) + beyond
    return source.to(tl.int64), is_held, wanted & (code >= 0)


@triton.jit
def store_rolls(
    record,
    cargo,
    wire,
    source,
    is_held,
    is_received,
    WIDTHS: tl.constexpr,
    NUM_WIDTHS: tl.constexpr,
    NUM_TENSORS: tl.constexpr,
    BATCH: tl.constexpr,
    CP_SIZE: tl.constexpr,
    RECORD_LEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes this program's block of slots of its tensor, at its depth and batch row."""
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    depth = tl.program_id(1)
    n = tl.program_id(2) % NUM_TENSORS
    b = tl.program_id(2) // NUM_TENSORS
    width = tl.load(cargo + n)
    fill = tl.load(cargo + NUM_TENSORS + n)
    group = tl.load(cargo + 2 * NUM_TENSORS + n)
    tensor = tl.load(record + RECORD_LEN + n)
    output = tl.load(record + RECORD_LEN + NUM_TENSORS + n)
    length = (tl.load(record + SEQ_LEN_AT).to(tl.int32) // CP_SIZE).to(tl.int64)
    word = tl.load(wire + source * (NUM_TENSORS * BATCH) + n * BATCH + b, mask=is_received, other=0)
    to = (depth * group * BATCH + b) * length + slot
    for w in tl.static_range(NUM_WIDTHS):
        if width == WIDTHS[w]:
            held = tl.load(typed(tensor, WIDTHS[w]) + b * length + source, mask=is_held, other=0)
            known = tl.where(is_received, word, tl.where(is_held, held.to(tl.int64), fill))
            tl.store(typed(output, WIDTHS[w]) + to, known.to(held.dtype), mask=slot < length)


@triton.jit
def check_headers(record, headers, wire, trouble, NUM_SOURCES: tl.constexpr, ROW_WORDS: tl.constexpr):
    """Sets trouble[0] to 1 + i where the message of the i-th source was made by another plan."""
    expected = tl.load(record + FINGERPRINT_AT)
    for h in tl.static_range(NUM_SOURCES):
        header = tl.load(headers + h).to(tl.int64)
        tl.store(trouble, h + 1, mask=tl.load(wire + header * ROW_WORDS) != expected)


@triton.jit
def remember(record, override, LENGTH: tl.constexpr, OVERRIDABLE: tl.constexpr, BLOCK: tl.constexpr):
    """Lets the replays of a captured graph find on the device what the first has found on the host."""
    if OVERRIDABLE:
        if tl.load(override + FINGERPRINT_AT) < 0:
            copy_words(record, override, LENGTH, BLOCK)


@triton.jit
def unroll_kernel(
    record,  # int64 [RECORD_LEN + 2 * NUM_TENSORS], on the device
    override,
    table,
    cargo,
    wire,  # [num_recv_rows, NUM_TENSORS * BATCH]
    trouble,
    OVERRIDABLE: tl.constexpr,
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
    store_rolls(
        record,
        cargo,
        wire,
        source,
        is_held,
        is_received,
        WIDTHS,
        NUM_WIDTHS,
        NUM_TENSORS,
        BATCH,
        CP_SIZE,
        RECORD_LEN,
        BLOCK,
    )
    if tl.program_id(0) + tl.program_id(1) + tl.program_id(2) == 0:
        check_headers(record, table + HEADERS_AT, wire, trouble, NUM_SOURCES, NUM_TENSORS * BATCH)
        remember(record, override, RECORD_LEN + 2 * NUM_TENSORS, OVERRIDABLE, COPY_BLOCK)


def unroll(
    buffers: tuple[torch.Tensor, ...],
    shape: PlanShape,
    cargo: Cargo,
    overridable: bool = False,
    block: int = 256,
) -> Launch:
    """A launch of what `overlap_mtp.kernels.reference.unroll` does.

    `buffers` are the first six arguments of `unroll_kernel`. `record`: the one that `pack` left. `trouble` may be
    pinned host memory, so that the host can look at it without waiting for the device. `block`: slots a program.
    The grid depends on the batch: see `unroll_grid`.
    """
    return Launch(
        unroll_kernel,
        buffers,
        (1, 1, 1),
        OVERRIDABLE=overridable,
        ROUTES_AT=shape.routes_at,
        HEADERS_AT=shape.headers_at,
        NUM_SOURCES=len(shape.sources),
        **roll_constants(shape, cargo),
        BLOCK=block,
    )


def roll_constants(shape: PlanShape, cargo: Cargo) -> dict[str, object]:
    """The constants that `unroll_kernel` and `take_kernel` share, in their order."""
    return {
        **width_constants(cargo),
        "BATCH": cargo.rows,
        "NUM_DEPTHS": shape.num_depths,
        "NUM_CHUNKS": shape.num_chunks,
        "CP_SIZE": shape.cp_size,
        "HELD_CHUNKS": shape.held_chunks,
        "BY_DOCUMENT": shape.by_document,
        "MAX_DOCUMENTS": shape.max_documents,
        "STEPS": (shape.max_documents - 1).bit_length(),
        "RECORD_LEN": shape.record_len,
        "COPY_BLOCK": triton.next_power_of_2(shape.record_len + 2 * len(cargo.names)),
    }


def unroll_grid(length: int, shape: PlanShape, cargo: Cargo, block: int = 256) -> Grid:
    """The grid for `length` tokens a rank: blocks of slots, depths, tensors of all batch rows."""
    return (triton.cdiv(length, block), shape.num_depths, cargo.words)
