"""What the kernels share: typed addresses, and the geometry of a plan (see overlap_mtp.plan)."""

from __future__ import annotations

import triton
import triton.language as tl

from overlap_mtp.plan import CU_SEQLENS, NUM_DOCUMENTS, SEQ_LEN

NUM_DOCUMENTS_AT = tl.constexpr(NUM_DOCUMENTS)
SEQ_LEN_AT = tl.constexpr(SEQ_LEN)
CU_AT = tl.constexpr(CU_SEQLENS)


@triton.jit
def typed(address, WIDTH: tl.constexpr):
    """An address as a pointer to integers of WIDTH bytes."""
    if WIDTH == 8:
        pointer = address.to(tl.pointer_type(tl.int64))
    elif WIDTH == 4:
        pointer = address.to(tl.pointer_type(tl.int32))
    elif WIDTH == 2:
        pointer = address.to(tl.pointer_type(tl.int16))
    else:
        pointer = address.to(tl.pointer_type(tl.uint8))
    return pointer


@triton.jit
def last_at_or_below(bounds, value, COUNT: tl.constexpr, STEPS: tl.constexpr):
    """The last of COUNT rising bounds that is <= value, by bisection in STEPS steps; the first is."""
    found = tl.zeros_like(value).to(tl.int32)
    for step in tl.static_range(STEPS):
        candidate = found + (1 << (STEPS - 1 - step))
        known = candidate < COUNT
        bound = tl.load(bounds + candidate, mask=known, other=0)
        found = tl.where(known & (bound <= value), candidate, found)
    return found


@triton.jit
def slot_of_row(record, table, row, inside, NUM_ROWS, NUM_CHUNKS, CP_SIZE, BY_DOCUMENT: tl.constexpr):
    """(local slot that an outgoing row carries, whether it carries one, whether it is a header)."""
    unit = tl.load(table + row, mask=inside, other=0)
    held = tl.load(table + NUM_ROWS + row, mask=inside, other=0)
    offset = tl.load(table + 2 * NUM_ROWS + row, mask=inside, other=0)
    used = inside & (unit >= 0)
    if BY_DOCUMENT:
        used = used & (unit < tl.load(record + NUM_DOCUMENTS_AT))
        start = tl.load(record + CU_AT + unit, mask=used, other=0)
        end = tl.load(record + CU_AT + unit + 1, mask=used, other=0)
    else:
        start = tl.zeros_like(unit).to(tl.int64)
        end = start + tl.load(record + SEQ_LEN_AT)
    size = (end - start) // NUM_CHUNKS
    return start // CP_SIZE + held * size + offset, used & (offset < size), inside & (unit < 0)
