"""What a rank sends to whom, and where each rolled token comes from.

**Geometry.** A layout cuts units (each document: zigzag; the whole stream: contiguous) into equal chunks, and a
rank holds the same chunks of every unit, one behind the other. The token `depth` ahead of a slot therefore lies a
known number of chunks on (its `gap`, at most num_depths), at a known offset: who holds it, and where, depends on
the bounds of its unit alone. So a plan has two parts: `PlanShape`, made once for a kind of layout, says for each
chunk and gap where such tokens are found; the `record` of a microbatch adds the bounds of its documents. First
rank, last rank, short chunk, padding and document end are entries of these, never branches of the code that carries
them out.

**Wire.** One message a peer: a header row whose first word is the fingerprint of the bounds, then the same rows for
each unit, each row holding one token's word of every tensor and batch row. A token travels once however many depths
want it (twice only where a chunk is shorter than num_depths and two chunks of the receiver need it). How many rows
a message has is fixed by the shape, never by the batch.

Index arithmetic in numpy only. `overlap_mtp.kernels.reference` carries plans out in plain torch.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from overlap_mtp.layout import IntArray, SequenceLayout

HEADER = -1  # as the unit of a row: the row that carries the fingerprint
NO_DOCUMENT = np.iinfo(np.int32).max  # where a document that is not there begins

# The words of a record: these, then `cu_seqlens` [max_documents + 1] and `valid_ends` [max_documents].
FINGERPRINT, NUM_DOCUMENTS, SEQ_LEN, EPOCH, DONE, CU_SEQLENS = range(6)


@dataclass(frozen=True)
class PlanShape:
    """The part of a rank's plans that all batches of a kind share, so that it can be agreed on once.

    `send_rows[p]` and `recv_rows[p]` are the rows of the message to and from cp rank p, header included; 0 where no
    message is ever needed. `send_stride[p]` and `recv_stride[p]` are those of one unit.

    `table` (int32) has these sections:
    - `rows` [3, num_send_rows]: the unit of each outgoing row (or HEADER), which of my chunks of it, and the
      offset in that chunk of the token that it carries;
    - `routes` [num_held, num_depths + 1, 2]: for my i-th chunk of a unit and each gap, where tokens so many chunks
      on are: (-1 - j, 0) in my j-th chunk; (row, stride) in row + unit * stride + offset of the incoming wire;
    - `headers` [number of sources]: the rows of the incoming wire that must hold the fingerprint.
    """

    cp_rank: int
    num_depths: int
    max_documents: int
    num_chunks: int
    held_chunks: tuple[int, ...]
    by_document: bool  # a unit is a document; else the whole stream
    send_rows: tuple[int, ...]
    recv_rows: tuple[int, ...]
    send_stride: tuple[int, ...]
    recv_stride: tuple[int, ...]
    table: npt.NDArray[np.int32] = field(repr=False, compare=False)

    @property
    def cp_size(self) -> int:
        return len(self.send_rows)

    @property
    def num_held(self) -> int:
        return len(self.held_chunks)

    @cached_property
    def num_send_rows(self) -> int:
        return sum(self.send_rows)

    @cached_property
    def num_recv_rows(self) -> int:
        return sum(self.recv_rows)

    @cached_property
    def sources(self) -> tuple[int, ...]:
        """The cp ranks that a message comes from."""
        return tuple(peer for peer, rows in enumerate(self.recv_rows) if rows)

    @cached_property
    def destinations(self) -> tuple[int, ...]:
        """The cp ranks that a message goes to."""
        return tuple(peer for peer, rows in enumerate(self.send_rows) if rows)

    def first_send_row(self, peer: int) -> int:
        return sum(self.send_rows[:peer])

    def first_recv_row(self, peer: int) -> int:
        return sum(self.recv_rows[:peer])

    # Where the sections of the table begin.
    @cached_property
    def routes_at(self) -> int:
        return 3 * self.num_send_rows

    @cached_property
    def headers_at(self) -> int:
        return self.routes_at + 2 * self.num_held * (self.num_depths + 1)

    # Where the sections of a record begin, and its length.
    @cached_property
    def valid_ends_at(self) -> int:
        return CU_SEQLENS + self.max_documents + 1

    @cached_property
    def record_len(self) -> int:
        return self.valid_ends_at + self.max_documents


def plan_shape(layout: SequenceLayout, cp_rank: int, num_depths: int, max_documents: int) -> PlanShape:
    """The shape of `cp_rank`'s plans for layouts like this one.

    Packed layouts differ from batch to batch: their shape depends on `max_documents` alone, and covers the worst
    case, documents shorter than num_chunks * num_depths tokens included. A dense layout's chunks have one length,
    so its shape is exact.
    """
    layout.check_rank(cp_rank)
    ranks = range(layout.cp_size)
    by_document = layout.kind == "zigzag"
    documents = max_documents if layout.is_packed else 1
    units = documents if by_document else 1
    size = None if layout.is_packed else layout.seq_len // layout.num_chunks

    def wanted(holder: int, asker: int) -> list[Stretch]:
        return _stretches(layout, holder, asker, num_depths, size)

    def stride(holder: int, asker: int) -> int:
        return sum(one.width for one in wanted(holder, asker))

    send_stride = tuple(stride(cp_rank, peer) for peer in ranks)
    recv_stride = tuple(stride(peer, cp_rank) for peer in ranks)
    send_rows, recv_rows = (
        tuple(1 + units * one if one else 0 for one in strides) for strides in (send_stride, recv_stride)
    )
    held = layout.held_chunks(cp_rank)
    shape = PlanShape(
        cp_rank,
        num_depths,
        documents,
        layout.num_chunks,
        held,
        by_document,
        send_rows,
        recv_rows,
        send_stride,
        recv_stride,
        np.zeros(3 * sum(send_rows) + 2 * len(held) * (num_depths + 1) + sum(map(bool, recv_rows)), np.int32),
    )
    _fill_rows(shape, [wanted(cp_rank, peer) for peer in ranks], units)
    _fill_routes(shape, [wanted(peer, cp_rank) for peer in ranks])
    return shape


@dataclass(frozen=True)
class Stretch:
    """Tokens of every unit that one rank needs from another (or itself): the first `width` of a chunk."""

    asker_chunk: int  # which of the asker's chunks they follow
    gap: int  # how many chunks on
    holder_chunk: int  # which of the holder's chunks they are in
    width: int


def _stretches(
    layout: SequenceLayout, holder: int, asker: int, num_depths: int, size: int | None
) -> list[Stretch]:
    """What `asker` may need from `holder`, in the order of its rows of a unit.

    The num_depths tokens after chunk a lie in chunks a + 1, a + 2, ... The one `gap` chunks on holds
    min(size, num_depths - (gap - 1) * size) of them; over all sizes that is at most num_depths // gap.
    """
    stretches = []
    for i, a in enumerate(layout.held_chunks(asker)):
        for j, b in enumerate(layout.held_chunks(holder)):
            gap = b - a
            if 1 <= gap <= num_depths and holder != asker:
                width = num_depths // gap if size is None else min(size, num_depths - (gap - 1) * size)
                if width > 0:
                    stretches.append(Stretch(i, gap, j, width))
    return stretches


def _fill_rows(shape: PlanShape, stretches: list[list[Stretch]], units: int) -> None:
    rows = shape.table[: shape.routes_at].reshape(3, -1)
    for peer in shape.destinations:
        row = shape.first_send_row(peer)
        rows[0, row] = HEADER
        body = rows[:, row + 1 : row + shape.send_rows[peer]].reshape(3, units, -1)
        body[0] = np.arange(units)[:, None]
        body[1] = np.concatenate([np.full(one.width, one.holder_chunk) for one in stretches[peer]])
        body[2] = np.concatenate([np.arange(one.width) for one in stretches[peer]])


def _fill_routes(shape: PlanShape, stretches: list[list[Stretch]]) -> None:
    routes = shape.table[shape.routes_at : shape.headers_at].reshape(shape.num_held, -1, 2)
    for i, a in enumerate(shape.held_chunks):
        for j, b in enumerate(shape.held_chunks):
            if 0 <= b - a <= shape.num_depths:
                routes[i, b - a, 0] = -1 - j
    for index, peer in enumerate(shape.sources):
        header = shape.first_recv_row(peer)
        shape.table[shape.headers_at + index] = header
        row = header + 1
        for one in stretches[peer]:
            routes[one.asker_chunk, one.gap] = row, shape.recv_stride[peer]
            row += one.width


def write_record(layout: SequenceLayout, shape: PlanShape, record: IntArray) -> None:
    """Writes a batch's part of the plan into int64 `record` [>= record_len]; a few microseconds, no allocation.

    Raises ValueError where the layout has more documents than `shape` was made for.
    """
    documents = layout.num_documents
    if documents > shape.max_documents:
        raise ValueError(
            f"the layout has {documents} documents, more than the plan's {shape.max_documents}: raise max_documents"
        )
    ends_at = shape.valid_ends_at
    record[NUM_DOCUMENTS] = documents
    record[SEQ_LEN] = layout.cu_seqlens[-1]
    record[CU_SEQLENS : CU_SEQLENS + documents + 1] = layout.cu_seqlens
    record[CU_SEQLENS + documents + 1 : ends_at] = NO_DOCUMENT
    record[ends_at : ends_at + documents] = layout.valid_ends
    record[FINGERPRINT] = zlib.crc32(record[NUM_DOCUMENTS : ends_at + documents].data)


def new_record(layout: SequenceLayout, shape: PlanShape) -> IntArray:
    """The record of a batch, int64 [record_len]."""
    record = np.zeros(shape.record_len, np.int64)
    write_record(layout, shape, record)
    return record
