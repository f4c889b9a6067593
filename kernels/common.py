"""What the kernels share: the geometry of a plan (overlap_mtp.exchange.plan), and tensors of several widths."""

from __future__ import annotations

import triton
import triton.language as tl

from overlap_mtp.exchange.plan import CU_SEQLENS, FINGERPRINT, NO_DOCUMENT, NUM_DOCUMENTS, SEQ_LEN

FINGERPRINT_AT = tl.constexpr(FINGERPRINT)
NUM_DOCUMENTS_AT = tl.constexpr(NUM_DOCUMENTS)
SEQ_LEN_AT = tl.constexpr(SEQ_LEN)
CU_AT = tl.constexpr(CU_SEQLENS)
NOWHERE = tl.constexpr(int(NO_DOCUMENT))


@triton.jit
def typed(address, WIDTH: tl.constexpr):
    """Addresses as pointers to integers of WIDTH bytes."""
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
def load_words(addresses, offset, widths, mask, other, WIDTHS: tl.constexpr, NUM_WIDTHS: tl.constexpr):
    """int64 [N, BLOCK]: element `offset` [BLOCK] of the N tensors at `addresses`, where `mask` [N, BLOCK]."""
    words = other
    for w in tl.static_range(NUM_WIDTHS):
        here = mask & (widths == WIDTHS[w])[:, None]
        pointer = typed(addresses[:, None] + offset[None, :] * WIDTHS[w], WIDTHS[w])
        words = tl.where(here, tl.load(pointer, mask=here, other=0).to(tl.int64), words)
    return words


@triton.jit
def last_at_or_below(bounds, value, COUNT: tl.constexpr, STEPS: tl.constexpr):
    """The last of COUNT rising bounds that is <= value [BLOCK], by bisection in STEPS steps; the first one is."""
    found = tl.zeros_like(value).to(tl.int32)
    for step in tl.static_range(STEPS):
        candidate = found + (1 << (STEPS - 1 - step))
        known = candidate < COUNT
        bound = tl.load(bounds + candidate, mask=known, other=0)
        found = tl.where(known & (bound <= value), candidate, found)
    return found


@triton.jit
def slot_of_row(record, table, row, inside, NUM_ROWS, NUM_CHUNKS, CP_SIZE, BY_DOCUMENT: tl.constexpr):
    """(local slot that an outgoing row carries, whether it carries one, whether it is a header), [BLOCK] each."""
    unit = tl.load(table + row, mask=inside, other=0)
    held = tl.load(table + NUM_ROWS + row, mask=inside, other=0)
    offset = tl.load(table + 2 * NUM_ROWS + row, mask=inside, other=0)
    used = inside & (unit >= 0)
    if BY_DOCUMENT:
        start = tl.load(record + CU_AT + unit, mask=used, other=0).to(tl.int32)  # 64-bit divisions are slow
        end = tl.load(record + CU_AT + unit + 1, mask=used, other=0).to(tl.int32)
    else:
        start = tl.zeros_like(unit)
        end = start + tl.load(record + SEQ_LEN_AT).to(tl.int32)
    size = (end - start) // NUM_CHUNKS
    slot = start // CP_SIZE + held * size + offset
    return slot, used & (end < NOWHERE) & (offset < size), inside & (unit < 0)
