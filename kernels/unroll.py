"""Writes the rolls of all tensors at all depths from what is held and what was received: one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from overlap_mtp.cargo import Cargo
from overlap_mtp.kernels.geometry import CU_AT, SEQ_LEN_AT, last_at_or_below, typed
from overlap_mtp.kernels.launch import Grid, Launch
from overlap_mtp.kernels.pack import FINGERPRINT_AT, copy_words
from overlap_mtp.plan import PlanShape


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
    """For this program's block of slots, at its depth: (slot or row of the token so far ahead, whether it is held
    here, whether it was received)."""
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    depth = tl.program_id(1) + 1
    inside = slot < tl.load(record + SEQ_LEN_AT) // CP_SIZE
    if BY_DOCUMENT:
        unit = last_at_or_below(record + CU_AT, slot.to(tl.int64) * CP_SIZE, MAX_DOCUMENTS, STEPS)
        start = tl.load(record + CU_AT + unit)
        end = tl.load(record + CU_AT + unit + 1)
    else:
        unit = tl.zeros_like(slot)
        start = unit.to(tl.int64)
        end = start + tl.load(record + SEQ_LEN_AT)
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
    source = tl.where(code < 0, first_slot + (-1 - code) * size, code + unit.to(tl.int64) * stride) + beyond
    return source, is_held, wanted & (code >= 0)


@triton.jit
def store_rolls(
    record,
    wire,
    source,
    is_held,
    is_received,
    FILLS: tl.constexpr,
    WIDTHS: tl.constexpr,
    GROUP_SIZES: tl.constexpr,
    NUM_TENSORS: tl.constexpr,
    BATCH: tl.constexpr,
    CP_SIZE: tl.constexpr,
    RECORD_LEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes this program's block of slots, at its depth and batch row, of every tensor."""
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    depth = tl.program_id(1) + 1
    b = tl.program_id(2)
    length = tl.load(record + SEQ_LEN_AT) // CP_SIZE
    for n in tl.static_range(NUM_TENSORS):
        tensor = typed(tl.load(record + RECORD_LEN + n), WIDTHS[n])
        output = typed(tl.load(record + RECORD_LEN + NUM_TENSORS + n), WIDTHS[n])
        held = tl.load(tensor + b * length + source, mask=is_held, other=FILLS[n])
        word = tl.load(wire + source * (NUM_TENSORS * BATCH) + n * BATCH + b, mask=is_received, other=0)
        to = output + ((depth - 1) * (GROUP_SIZES[n] * BATCH) + b) * length + slot
        tl.store(to, tl.where(is_received, word.to(held.dtype), held), mask=slot < length)


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
    wire,  # [num_recv_rows, NUM_TENSORS * BATCH]
    trouble,
    OVERRIDABLE: tl.constexpr,
    ROUTES_AT: tl.constexpr,
    HEADERS_AT: tl.constexpr,
    NUM_SOURCES: tl.constexpr,
    FILLS: tl.constexpr,
    WIDTHS: tl.constexpr,
    GROUP_SIZES: tl.constexpr,
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
        wire,
        source,
        is_held,
        is_received,
        FILLS,
        WIDTHS,
        GROUP_SIZES,
        NUM_TENSORS,
        BATCH,
        CP_SIZE,
        RECORD_LEN,
        BLOCK,
    )
    if tl.program_id(0) + tl.program_id(1) + tl.program_id(2) == 0:
        check_headers(record, table + HEADERS_AT, wire, trouble, NUM_SOURCES, NUM_TENSORS * BATCH)
        remember(record, override, RECORD_LEN + 2 * NUM_TENSORS, OVERRIDABLE, BLOCK)


def unroll(
    buffers: tuple[torch.Tensor, ...],
    shape: PlanShape,
    cargo: Cargo,
    overridable: bool = False,
    block: int = 256,
) -> Launch:
    """A launch of what `overlap_mtp.kernels.reference.unroll` does.

    `buffers` are the first five arguments of `unroll_kernel`. `record`: the one that `pack` left. `trouble` may be
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
        "FILLS": cargo.fills,
        "WIDTHS": cargo.widths,
        "GROUP_SIZES": cargo.group_sizes,
        "NUM_TENSORS": len(cargo.names),
        "BATCH": cargo.rows,
        "NUM_DEPTHS": shape.num_depths,
        "NUM_CHUNKS": shape.num_chunks,
        "CP_SIZE": shape.cp_size,
        "HELD_CHUNKS": shape.held_chunks,
        "BY_DOCUMENT": shape.by_document,
        "MAX_DOCUMENTS": shape.max_documents,
        "STEPS": (shape.max_documents - 1).bit_length(),
        "RECORD_LEN": shape.record_len,
    }


def unroll_grid(length: int, shape: PlanShape, cargo: Cargo, block: int = 256) -> Grid:
    """The grid for `length` tokens a rank."""
    return (triton.cdiv(length, block), shape.num_depths, cargo.rows)
