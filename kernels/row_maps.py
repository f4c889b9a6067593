"""Make the maps of a batch of activations on the device, in one launch. `RowMaps.of` is the same in numpy.

Each own row and each row of the buffer looks for what concerns it, so no two programs write the same word. The backward
maps look `depth` positions back, for the rolled row that used a row.

A token that leaves has the same rows of the buffer in every batch. So the plan fixes what comes back to it
(`returned`), and the batch only says which own row it is (`returned_to`). With tensor parallelism its head may come
back, too. Heads that leave in no other row follow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from overlap_mtp.exchange.rows import HEADER, NOTHING, RowMaps, RowPlan
from overlap_mtp.kernels.common import (
    CU_AT,
    bounds_of,
    chunk_of,
    document_of,
    held_chunk,
    local_len_of,
)
from overlap_mtp.kernels.launch import Launch
from overlap_mtp.kernels.pack import token_of_row
from overlap_mtp.kernels.unroll import find_sources, find_users_of_received
from overlap_mtp.layout import IntArray

HEADER_AT = tl.constexpr(HEADER)
NOTHING_AT = tl.constexpr(NOTHING)


class RowMapConstants(NamedTuple):
    """All that is fixed for the maps of a plan. The kernel takes it as one constant, `C`."""

    # As in overlap_mtp.kernels.common.ExchangeConstants:
    by_document: bool
    max_documents: int
    search_steps: int
    cp_size: int
    num_chunks: int
    held_chunks: tuple[int, ...]
    num_depths: int
    num_send_rows: int
    routes_at: int
    # Of the RowPlan:
    tp_rank: int
    tp_size: int
    num_heads: int
    num_sent: int  # rows of the buffer
    num_received: int
    sent_widths: tuple[int, ...]  # of each held chunk, how many tokens leave
    num_slots: int
    num_uses: int  # of a slot, without its head
    # Where the sections of the table begin:
    sent_at: int
    received_at: int
    slots_at: int
    returned_at: int


@triton.jit
def in_slice(local_index, known, length, C: tl.constexpr):
    """Which own rows local tokens [BLOCK] of the cp rank are; NOTHING if another tp rank holds them."""
    row = local_index - C.tp_rank * length
    return tl.where(known & (row >= 0) & (row < length), row, NOTHING_AT)


@triton.jit
def find_users(metadata, local_index, inside, depth, C: tl.constexpr):
    """(the local tokens whose rolls at `depth` are local tokens [BLOCK], whether there are such)."""
    sequence, start, chunk_len, held, offset = chunk_of(metadata, local_index, C)
    chunk = held_chunk(held, C)
    position = start + chunk * chunk_len + offset
    document, valid_end = document_of(metadata, sequence, position, C)
    begin = tl.load(metadata + CU_AT + document)
    is_used = inside & (position < valid_end) & (position - depth >= begin)
    in_tail = inside & (valid_end < 0)  # stays as it is

    before = offset - depth
    chunk_distance = tl.where(before < 0, (chunk_len - 1 - before) // chunk_len, 0)
    LAST: tl.constexpr = C.num_chunks // C.cp_size - 1
    in_first = chunk - chunk_distance == C.held_chunks[0]
    in_last = chunk - chunk_distance == C.held_chunks[LAST]
    first = start // C.cp_size + tl.where(in_first, 0, LAST) * chunk_len
    user = tl.where(in_tail, local_index, first + before + chunk_distance * chunk_len)
    return user, in_tail | is_used & (in_first | in_last)


@triton.jit
def map_own_rows(metadata, plan_table, row_table, source, own_back, row, length, C: tl.constexpr):
    """Write `source` and `own_back` of this program's depth, for own rows [BLOCK]."""
    inside = row < length
    depth = tl.program_id(1) + 1
    local_index = C.tp_rank * length + row
    found, is_held, is_received = find_sources(metadata, plan_table, local_index, depth, C)
    found = found.to(tl.int32)
    came = in_slice(found, is_held, length, C)
    if C.tp_size > 1:
        head = length + found // length * C.num_depths + found % length
        came = tl.where(is_held & (came < 0), head, came)
    position = tl.load(row_table + found, mask=inside & is_received, other=0)
    came = tl.where(is_received, length + C.num_heads + position, came)
    user, is_used = find_users(metadata, local_index, inside, depth, C)
    at = (depth - 1) * length + row
    tl.store(source + at, came, mask=inside)
    tl.store(own_back + at, in_slice(user, is_used, length, C), mask=inside)


@triton.jit
def map_in_rows(metadata, row_table, in_back, row, length, C: tl.constexpr):
    """Write `in_back` of this program's depth, for `in` rows [BLOCK]."""
    depth = tl.program_id(1) + 1
    inside = row < C.num_heads + C.num_received
    received = row - C.num_heads
    is_received = inside & (received >= 0)
    asked = row_table + C.received_at
    is_header = is_received & (tl.load(asked + received, mask=is_received, other=0) == HEADER_AT)
    user, known = find_users_of_received(metadata, asked, C.num_received, received, is_received, depth, C)
    back = in_slice(user, known, length, C)
    if C.tp_size > 1:
        tp_rank, offset = row // C.num_depths, row % C.num_depths
        is_theirs = (row < C.num_heads) & (tp_rank != C.tp_rank) & (offset < length)
        user, known = find_users(metadata, tp_rank * length + offset, is_theirs, depth, C)
        back = tl.where(is_theirs, in_slice(user, known, length, C), back)
    back = tl.where(is_header & (depth == 1), HEADER_AT, back)
    tl.store(in_back + (depth - 1) * (C.num_heads + C.num_received) + row, back, mask=inside)


@triton.jit
def own_row_of(metadata, plan_table, sent, length, C: tl.constexpr):
    """The own rows that rows [BLOCK] of the plan's messages carry; NOTHING for rows that carry none."""
    known = sent >= 0
    local_index, used, _ = token_of_row(metadata, plan_table, tl.where(known, sent, 0), known, C)
    return in_slice(local_index, used, length, C)


@triton.jit
def map_out_rows(metadata, plan_table, row_table, packed, row, length, C: tl.constexpr):
    """Write `packed` for `out` rows [BLOCK]."""
    sent = tl.load(row_table + C.sent_at + row, mask=row < C.num_sent, other=NOTHING_AT)
    own = own_row_of(metadata, plan_table, sent, length, C)
    own = tl.where(sent == HEADER_AT, HEADER_AT, own)
    if C.tp_size > 1:
        head = row - C.num_sent - C.tp_rank * C.num_depths
        own = tl.where((head >= 0) & (head < C.num_depths) & (head < length), head, own)
    tl.store(packed + row, own, mask=row < C.num_sent + C.num_heads)


@triton.jit
def map_slots(metadata, plan_table, row_table, returned_to, returned, slot, length, C: tl.constexpr):
    """Write `returned_to` and `returned` for slots [BLOCK]."""
    inside = slot < C.num_slots
    sent = tl.load(row_table + C.slots_at + slot, mask=inside, other=NOTHING_AT)
    own = own_row_of(metadata, plan_table, sent, length, C)
    NUM_USES: tl.constexpr = C.num_uses
    for use in tl.static_range(NUM_USES):
        at = use * C.num_slots + slot
        tl.store(returned + at, tl.load(row_table + C.returned_at + at, mask=inside, other=0), mask=inside)
    if C.tp_size > 1:
        head = slot - (C.num_slots - C.num_depths)
        has_head = inside & (head >= 0) & (head < length)
        sequence, _, _, held, offset = chunk_of(metadata, C.tp_rank * length + head, C)
        start, end = bounds_of(metadata, sequence, has_head, C)
        LAST: tl.constexpr = C.num_chunks // C.cp_size - 1
        width = tl.where(held == 0, C.sent_widths[0], C.sent_widths[LAST])
        has_slot = (offset < width) & (offset < (end - start) // C.num_chunks)  # with its other rows
        own = tl.where(has_head & ~has_slot, head, own)
        is_head = (own >= 0) & (own < C.num_depths)
        at = tl.where(is_head, C.num_sent + C.tp_rank * C.num_depths + own, NOTHING_AT)
        tl.store(returned + NUM_USES * C.num_slots + slot, at, mask=inside)
    tl.store(returned_to + slot, own, mask=inside)


@triton.jit
def row_maps_kernel(
    metadata,  # int64 [metadata_len]
    plan_table,
    row_table,
    packed,
    source,
    own_back,
    in_back,
    returned_to,
    returned,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    length = local_len_of(metadata, C) // C.tp_size
    blocks = tl.cdiv(length, BLOCK)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(0) < blocks:
        map_own_rows(metadata, plan_table, row_table, source, own_back, row, length, C)
    else:
        row -= blocks * BLOCK
        map_in_rows(metadata, row_table, in_back, row, length, C)
        if tl.program_id(1) == 0:
            map_out_rows(metadata, plan_table, row_table, packed, row, length, C)
            map_slots(metadata, plan_table, row_table, returned_to, returned, row, length, C)


@dataclass(frozen=True)
class RowMapper:
    """Makes the maps of the batches of a plan, on a device."""

    constants: RowMapConstants
    plan_table: torch.Tensor  # ExchangePlan.table
    row_table: torch.Tensor

    @classmethod
    def of(cls, plan: RowPlan, device: torch.device) -> RowMapper:
        """Upload the tables of a plan.

        Args:
            plan: of this rank.
            device: of the activations.

        Returns:
            The mapper.
        """
        constants, row_table = _make_table(plan)
        tables = (torch.from_numpy(table).to(device) for table in (plan.tokens.table, row_table))
        return cls(constants, *tables)

    def allocate(self, length: int) -> RowMaps:
        """Allocate maps that fit every batch of at most `length` rows on this rank. They differ from `RowMaps.of`:

        - they are int32;
        - `source` and `own_back` are flat, and have room behind their [num_depths, S];
        - `returned_to` has a slot for each token that may leave. It holds NOTHING if the batch does not use the slot.
        """
        c = self.constants
        num_in, uses = c.num_heads + c.num_received, c.num_uses + (c.tp_size > 1)
        mapped = (c.num_depths * length,)
        shapes = [(c.num_sent + c.num_heads,), mapped, mapped, (c.num_depths, num_in)]
        shapes += [(c.num_slots,), (uses, c.num_slots)]
        device = self.row_table.device
        return RowMaps(*(torch.empty(shape, dtype=torch.int32, device=device) for shape in shapes))

    def bind(self, metadata: torch.Tensor, maps: RowMaps, block: int = 128) -> Launch:
        """Bind the kernel that makes the maps of a batch.

        Args:
            metadata: of the batch, int64 (overlap_mtp.exchange.plan), on the device.
            maps: from `allocate`.
            block: rows of one program.

        Returns:
            The launch.
        """
        c = self.constants
        blocks = triton.cdiv(maps.source.numel() // c.num_depths, block)
        blocks += triton.cdiv(max(len(maps.packed), maps.in_back.shape[1], c.num_slots), block)
        tensors = (metadata, self.plan_table, self.row_table, *maps)
        return Launch(row_maps_kernel, tensors, (blocks, c.num_depths, 1), C=c, BLOCK=block)


def _make_table(plan: RowPlan) -> tuple[RowMapConstants, IntArray]:
    """(the constants, the row table), int32. The table has five sections:

    - `received.position` [num_recv_rows];
    - `sent` [num_sent]: the plan's row that each row of the buffer holds, or HEADER;
    - `received` [4, num_received]: of each received row of the buffer, its sequence (or HEADER), the held chunk that it
      follows, how many chunks further on it is, and its offset there;
    - `slots` [num_slots]: a row of the plan with the slot's token, or NOTHING for a head;
    - `returned` [num_uses, num_slots]: the rows of the buffer with this token.
    """
    tokens = plan.tokens
    sent = np.full(plan.sent.num_rows, HEADER)
    is_body = plan.sent.position != NOTHING
    sent[plan.sent.position[is_body]] = np.flatnonzero(is_body)
    received = np.full((4, plan.received.num_rows), HEADER)
    is_body = plan.received.position != NOTHING
    received[:, plan.received.position[is_body]] = plan.tokens.asked[:, is_body]

    rows_of: dict[tuple[int, ...], list[int]] = {}  # by sequence, held chunk and offset
    for row, key in enumerate(zip(*tokens.table[: tokens.routes_at].reshape(3, -1).tolist(), strict=True)):
        if plan.sent.position[row] != NOTHING:
            rows_of.setdefault(key, []).append(row)
    heads = tokens.num_depths if plan.tp_size > 1 else 0
    slots = np.array([rows[0] for rows in rows_of.values()] + [NOTHING] * heads, np.int64)
    num_uses = max(map(len, rows_of.values()), default=0)
    returned = np.full((num_uses, slots.size), NOTHING)
    for slot, rows in enumerate(rows_of.values()):
        returned[: len(rows), slot] = plan.sent.position[rows]
    widths = [
        1 + max((offset for _, one, offset in rows_of if one == held), default=-1)
        for held in range(tokens.num_held)
    ]

    sections = [plan.received.position, sent, received.reshape(-1), slots, returned.reshape(-1)]
    begins = np.cumsum([section.size for section in sections]).tolist()
    constants = RowMapConstants(
        tokens.by_document,
        tokens.max_documents,
        (tokens.max_documents - 1).bit_length(),
        tokens.cp_size,
        tokens.num_chunks,
        tokens.held_chunks,
        tokens.num_depths,
        tokens.num_send_rows,
        tokens.routes_at,
        plan.tp_rank,
        plan.tp_size,
        plan.num_heads,
        plan.sent.num_rows,
        plan.received.num_rows,
        tuple(widths),
        slots.size,
        num_uses,
        *begins[:-1],
    )
    return constants, np.concatenate(sections).astype(np.int32)
