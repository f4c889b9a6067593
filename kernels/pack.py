"""Gathers the tokens that peers need into one outgoing wire, for all tensors, documents and depths: one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from overlap_mtp.exchange.plan import PlanShape
from overlap_mtp.exchange.spec import Cargo
from overlap_mtp.kernels.common import FINGERPRINT_AT, SEQ_LEN_AT, load_words, slot_of_row
from overlap_mtp.kernels.launch import Launch


@triton.jit
def source_of(given, override, OVERRIDABLE: tl.constexpr):
    """Where to read a record and its addresses: as given, or what has been put in their place (see `pack`)."""
    source = given
    if OVERRIDABLE:
        source = tl.where(tl.load(override + FINGERPRINT_AT) >= 0, override, given)
    return source


@triton.jit
def copy_words(source, target, LENGTH: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at, mask=at < LENGTH, other=0), mask=at < LENGTH)


@triton.jit
def gather_rows(
    record,
    table,
    cargo,
    row,
    inside,
    b,
    WIDTHS: tl.constexpr,
    NUM_WIDTHS: tl.constexpr,
    NUM_TENSORS: tl.constexpr,
    PADDED: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    CP_SIZE: tl.constexpr,
    BY_DOCUMENT: tl.constexpr,
    RECORD_LEN: tl.constexpr,
):
    """What outgoing rows [BLOCK] carry of batch row `b`: int64 [PADDED, BLOCK]."""
    n = tl.arange(0, PADDED)
    widths = tl.load(cargo + n, mask=n < NUM_TENSORS, other=0)
    addresses = tl.load(record + RECORD_LEN + n, mask=n < NUM_TENSORS, other=0)
    fingerprint = tl.load(record + FINGERPRINT_AT)
    length = (tl.load(record + SEQ_LEN_AT).to(tl.int32) // CP_SIZE).to(tl.int64)
    slot, used, header = slot_of_row(record, table, row, inside, NUM_ROWS, NUM_CHUNKS, CP_SIZE, BY_DOCUMENT)
    nothing = tl.where(header, fingerprint, 0)[None, :] + tl.zeros_like(addresses)[:, None]
    wanted = used[None, :] & (n < NUM_TENSORS)[:, None]
    return load_words(addresses, b * length + slot, widths, wanted, nothing, WIDTHS, NUM_WIDTHS)


@triton.jit
def put_rows(
    words,
    wire,
    row,
    inside,
    b,
    NUM_TENSORS: tl.constexpr,
    PADDED: tl.constexpr,
    BATCH: tl.constexpr,
):
    """Writes `words` [PADDED, BLOCK] of batch row `b` to rows of a wire."""
    n = tl.arange(0, PADDED)
    to = row.to(tl.int64)[None, :] * (NUM_TENSORS * BATCH) + n[:, None] * BATCH + b
    tl.store(wire + to, words, mask=inside[None, :] & (n < NUM_TENSORS)[:, None])


@triton.jit
def pack_kernel(
    given,  # int64 [RECORD_LEN + 2 * NUM_TENSORS], may be pinned host memory
    override,  # like `given`, on the device
    record,  # the same
    table,
    cargo,
    wire,  # [NUM_ROWS, NUM_TENSORS * BATCH]
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
    BLOCK: tl.constexpr,
):
    source = source_of(given, override, OVERRIDABLE)
    b = tl.program_id(1)
    if tl.program_id(0) == tl.num_programs(0) - 1:
        if b == 0:
            copy_words(source, record, RECORD_LEN + 2 * NUM_TENSORS, COPY_BLOCK)
    else:
        row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = row < NUM_ROWS
        words = gather_rows(
            source,
            table,
            cargo,
            row,
            inside,
            b,
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
        put_rows(words, wire, row, inside, b, NUM_TENSORS, PADDED, BATCH)


def pack(
    buffers: tuple[torch.Tensor, ...],
    shape: PlanShape,
    cargo: Cargo,
    overridable: bool = False,
    block: int = 64,
) -> Launch:
    """A launch of what `overlap_mtp.kernels.reference.pack` does.

    `buffers` are the first six arguments of `pack_kernel`:
    - `given`: int64, the record of the batch followed by the addresses of its tensors and of their rolls; it may be
      pinned host memory, and is read when the kernel runs;
    - `override`: with `overridable`, replaces all that where its fingerprint is not negative, which is how a captured
      graph is given another record;
    - `record`: where the kernel leaves all this for the unroll, for which host memory would be too far away;
    - `table`: PlanShape.table and `cargo`: Cargo.table on the device; `wire`: the outgoing one.
    `block`: rows a program. One program more keeps the record.
    """
    return Launch(
        pack_kernel,
        buffers,
        (triton.cdiv(shape.num_send_rows, block) + 1, cargo.rows, 1),
        **gather_constants(shape, cargo),
        OVERRIDABLE=overridable,
        COPY_BLOCK=triton.next_power_of_2(shape.record_len + 2 * len(cargo.names)),
        BLOCK=block,
    )


def gather_constants(shape: PlanShape, cargo: Cargo) -> dict[str, object]:
    """The constants that `pack_kernel` and `put_kernel` share, in their order."""
    return {
        **width_constants(cargo),
        "PADDED": triton.next_power_of_2(len(cargo.names)),
        "BATCH": cargo.rows,
        "NUM_ROWS": shape.num_send_rows,
        "NUM_CHUNKS": shape.num_chunks,
        "CP_SIZE": shape.cp_size,
        "BY_DOCUMENT": shape.by_document,
        "RECORD_LEN": shape.record_len,
    }


def width_constants(cargo: Cargo) -> dict[str, object]:
    """The first constants of all kernels of an exchange."""
    widths = tuple(sorted(set(cargo.widths)))
    return {
        "WIDTHS": widths,
        "NUM_WIDTHS": len(widths),
        "NUM_TENSORS": len(cargo.names),
    }
