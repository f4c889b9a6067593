"""Gathers the tokens that peers need into one outgoing wire, for all tensors, documents and depths: one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from overlap_mtp.cargo import Cargo
from overlap_mtp.kernels.geometry import SEQ_LEN_AT, slot_of_row, typed
from overlap_mtp.kernels.launch import Launch
from overlap_mtp.plan import FINGERPRINT, PlanShape

FINGERPRINT_AT = tl.constexpr(FINGERPRINT)


@triton.jit
def source_of(given, override, OVERRIDABLE: tl.constexpr):
    """Where to read a record and its addresses: as given, or what has been put in their place (see `pack`)."""
    source = given
    if OVERRIDABLE:
        source = tl.where(tl.load(override + FINGERPRINT_AT) >= 0, override, given)
    return source


@triton.jit
def copy_words(source, target, LENGTH: tl.constexpr, BLOCK: tl.constexpr):
    for begin in tl.static_range(0, LENGTH, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        tl.store(target + at, tl.load(source + at, mask=at < LENGTH, other=0), mask=at < LENGTH)


@triton.jit
def pack_kernel(
    given,  # int64 [RECORD_LEN + 2 * NUM_TENSORS], may be pinned host memory
    override,  # like `given`, on the device
    record,  # the same
    table,
    wire,  # [NUM_ROWS, NUM_TENSORS * BATCH]
    WIDTHS: tl.constexpr,
    NUM_TENSORS: tl.constexpr,
    BATCH: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    CP_SIZE: tl.constexpr,
    BY_DOCUMENT: tl.constexpr,
    RECORD_LEN: tl.constexpr,
    OVERRIDABLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    source = source_of(given, override, OVERRIDABLE)
    b = tl.program_id(1)
    if tl.program_id(0) + b == 0:
        copy_words(source, record, RECORD_LEN + 2 * NUM_TENSORS, BLOCK)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < NUM_ROWS
    slot, used, header = slot_of_row(source, table, row, inside, NUM_ROWS, NUM_CHUNKS, CP_SIZE, BY_DOCUMENT)
    fingerprint = tl.load(source + FINGERPRINT_AT)
    length = tl.load(source + SEQ_LEN_AT) // CP_SIZE
    for n in tl.static_range(NUM_TENSORS):
        tensor = typed(tl.load(source + RECORD_LEN + n), WIDTHS[n])
        word = tl.load(tensor + b * length + slot, mask=used, other=0).to(tl.int64)
        to = wire + row.to(tl.int64) * (NUM_TENSORS * BATCH) + n * BATCH + b
        tl.store(to, tl.where(header, fingerprint, word), mask=inside)


def pack(
    buffers: tuple[torch.Tensor, ...],
    shape: PlanShape,
    cargo: Cargo,
    overridable: bool = False,
    block: int = 128,
) -> Launch:
    """A launch of what `overlap_mtp.kernels.reference.pack` does.

    `buffers` are the first five arguments of `pack_kernel`:
    - `given`: int64, the record of the batch followed by the addresses of its tensors and of their rolls; it may be
      pinned host memory, and is read when the kernel runs;
    - `override`: with `overridable`, replaces all that where its fingerprint is not negative, which is how a
      captured graph is given another record;
    - `record`: where the kernel leaves all this for the unroll, for which host memory would be too far away;
    - `table`: PlanShape.table on the device; `wire`: the outgoing one.
    `block`: rows a program.
    """
    grid = (max(1, triton.cdiv(shape.num_send_rows, block)), cargo.rows, 1)
    return Launch(
        pack_kernel,
        buffers,
        grid,
        WIDTHS=cargo.widths,
        NUM_TENSORS=len(cargo.names),
        BATCH=cargo.rows,
        NUM_ROWS=shape.num_send_rows,
        NUM_CHUNKS=shape.num_chunks,
        CP_SIZE=shape.cp_size,
        BY_DOCUMENT=shape.by_document,
        RECORD_LEN=shape.record_len,
        OVERRIDABLE=overridable,
        BLOCK=block,
    )
