"""What a rank sends to whom, and where each rolled token comes from.

**Geometry.** A layout cuts sequences into equal chunks. A sequence is a document (zigzag) or the whole stream
(others). A rank holds the same chunks of every sequence, one sequence after the other. So the token `depth` after
a local token lies a known number of chunks further on (its `chunk_distance`, at most num_depths), at a known offset.
Who holds it, and where, depends only on the bounds of its sequence.

A plan therefore has two parts. `ExchangePlan` is made once for a kind of layout: for each chunk and chunk distance it
says where such tokens are found. The `metadata` of a batch adds the bounds of its documents. First rank, last rank,
short chunk, padding and document end are entries of these two; the code that carries them out has no branch for them.

**Message.** There is one message for each peer. Its first row is a header; the first word of the header is the
fingerprint of the exchange and of the bounds. Then follow the same rows for each sequence. A row holds one token: a
word for each tensor and batch row. A token travels once, however many depths want it (twice only if a chunk is shorter
than num_depths and two chunks of the receiver need the token). The plan fixes how many rows a message has; the batch
never changes it.

This is index arithmetic in numpy. `overlap_mtp.kernels.reference` carries plans out in plain torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from overlap_mtp.device_layout import DeviceLayout, Layout
from overlap_mtp.layout import IntArray, SequenceLayout

HEADER = -1  # in place of a row's sequence: the row carries the fingerprint
NO_DOCUMENT = np.iinfo(np.int32).max  # the bound of an unused document

# The words of the metadata: these, then `cu_seqlens` [max_documents + 1] and `valid_ends` [max_documents].
FINGERPRINT, NUM_DOCUMENTS, SEQ_LEN, CU_SEQLENS = range(4)


@dataclass(frozen=True)
class ExchangePlan:
    """The part of a rank's plan that all batches of a kind share.

    `send_rows[p]` and `recv_rows[p]` count the rows of the message to and from cp rank p, with the header. They are 0
    if no message is ever needed. `send_stride[p]` and `recv_stride[p]` count the rows of one sequence.

    `table` (int32) has three sections:
    - `rows` [3, num_send_rows]: for each outgoing row its sequence (or HEADER), which of this rank's chunks it comes
      from, and the offset of its token in that chunk;
    - `routes` [num_held, num_depths + 1, 2]: for this rank's i-th chunk of a sequence and each chunk distance, where
      the tokens at that distance are. (-1 - j, 0) means this rank's j-th chunk. (row, stride) means row
      `row + sequence * stride + offset` of the received rows;
    - `headers` [number of sources]: the received rows that must hold the fingerprint.
    """

    cp_rank: int
    num_depths: int
    max_documents: int
    num_chunks: int
    held_chunks: tuple[int, ...]
    by_document: bool  # a sequence is a document; otherwise it is the whole stream
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
        """The cp ranks that send to this one."""
        return tuple(peer for peer, rows in enumerate(self.recv_rows) if rows)

    @cached_property
    def destinations(self) -> tuple[int, ...]:
        """The cp ranks that this one sends to."""
        return tuple(peer for peer, rows in enumerate(self.send_rows) if rows)

    def first_send_row(self, peer: int) -> int:
        return sum(self.send_rows[:peer])

    def first_recv_row(self, peer: int) -> int:
        return sum(self.recv_rows[:peer])

    def num_sequences(self, layout: Layout) -> int:
        """How many sequences a batch has: its documents in use, or the one stream. A DeviceLayout may have fewer."""
        return layout.num_used_documents if self.by_document else 1

    @cached_property
    def asked(self) -> npt.NDArray[np.int32]:
        """What each received row is asked for, [4, num_recv_rows].

        Its sequence, the held chunk that it follows, how many chunks further on it is, and its offset there. Headers
        have zeros, which no token has.
        """
        codes = self.table[self.routes_at : self.headers_at].reshape(self.num_held, -1, 2)[..., 0]
        held, distance = np.nonzero(codes > 0)  # a received row: row 0 is a header
        first = codes[held, distance]
        order = first.argsort()
        asked = np.zeros((4, self.num_recv_rows), np.int32)
        for peer in self.sources:
            begin = self.first_recv_row(peer) + 1
            sequence, at = np.divmod(np.arange(self.recv_rows[peer] - 1), self.recv_stride[peer])
            route = order[np.searchsorted(first[order], begin + at, side="right") - 1]
            body = sequence, held[route], distance[route], begin + at - first[route]
            asked[:, begin : begin + at.size] = body
        return asked

    # Where the sections of the table begin.
    @cached_property
    def routes_at(self) -> int:
        return 3 * self.num_send_rows

    @cached_property
    def headers_at(self) -> int:
        return self.routes_at + 2 * self.num_held * (self.num_depths + 1)

    # Where the last section of the metadata begins, and how many words the metadata has.
    @cached_property
    def valid_ends_at(self) -> int:
        return CU_SEQLENS + self.max_documents + 1

    @cached_property
    def metadata_len(self) -> int:
        return self.valid_ends_at + self.max_documents


def make_plan(layout: SequenceLayout, cp_rank: int, num_depths: int, max_documents: int) -> ExchangePlan:
    """Make the plan of one rank for all layouts of the same kind as this one.

    Packed layouts differ from batch to batch. Their plan covers the worst case for `max_documents` documents, which
    includes documents shorter than num_chunks * num_depths tokens. The chunks of a dense layout have one length, so
    its plan is exact.

    Args:
        layout: gives the kind, and the length if it is dense.
        cp_rank: the rank.
        num_depths: how many depths one exchange carries.
        max_documents: the most documents that a packed batch has.

    Returns:
        The plan.
    """
    layout.check_rank(cp_rank)
    ranks = range(layout.cp_size)
    by_document = layout.by_document
    documents = max_documents if layout.is_packed else 1
    sequences = documents if by_document else 1

    def wanted(holder: int, asker: int) -> list[Segment]:
        return segments_of(layout, holder, asker, num_depths)

    def stride(holder: int, asker: int) -> int:
        return sum(one.width for one in wanted(holder, asker))

    send_stride = tuple(stride(cp_rank, peer) for peer in ranks)
    recv_stride = tuple(stride(peer, cp_rank) for peer in ranks)
    send_rows, recv_rows = (
        tuple(1 + sequences * one if one else 0 for one in strides) for strides in (send_stride, recv_stride)
    )
    held = layout.held_chunks(cp_rank)
    table_len = 3 * sum(send_rows) + 2 * len(held) * (num_depths + 1) + sum(map(bool, recv_rows))
    sizes = (cp_rank, num_depths, documents, layout.num_chunks, held, by_document)
    messages = (send_rows, recv_rows, send_stride, recv_stride)
    plan = ExchangePlan(*sizes, *messages, np.zeros(table_len, np.int32))
    _fill_rows(plan, [wanted(cp_rank, peer) for peer in ranks], sequences)
    _fill_routes(plan, [wanted(peer, cp_rank) for peer in ranks])
    return plan


def make_plans(layout: SequenceLayout, num_depths: int, max_documents: int) -> list[ExchangePlan]:
    """Make the plans of all ranks, in rank order (`make_plan`)."""
    return [make_plan(layout, rank, num_depths, max_documents) for rank in range(layout.cp_size)]


@dataclass(frozen=True)
class Segment:
    """Tokens of every sequence that one rank needs from another: the first `width` tokens of a chunk."""

    asker_chunk: int  # which of the asker's chunks they follow
    chunk_distance: int  # how many chunks further on they are
    holder_chunk: int  # which of the holder's chunks they are in
    width: int


def segments_of(layout: SequenceLayout, holder: int, asker: int, num_depths: int) -> list[Segment]:
    """What `asker` may need from `holder`, in the order of its rows of one sequence.

    The num_depths tokens after chunk a lie in chunks a + 1, a + 2, ... The chunk at distance d holds
    min(chunk_len, num_depths - (d - 1) * chunk_len) of them. Over all chunk lengths, which differ if the layout is
    packed, that is at most num_depths // d.
    """
    chunk_len = None if layout.is_packed else layout.seq_len // layout.num_chunks
    segments = []
    for i, a in enumerate(layout.held_chunks(asker)):
        for j, b in enumerate(layout.held_chunks(holder)):
            distance = b - a
            if 1 <= distance <= num_depths and holder != asker:
                if chunk_len is None:
                    width = num_depths // distance
                else:
                    width = min(chunk_len, num_depths - (distance - 1) * chunk_len)
                if width > 0:
                    segments.append(Segment(i, distance, j, width))
    return segments


def _fill_rows(plan: ExchangePlan, segments: list[list[Segment]], sequences: int) -> None:
    rows = plan.table[: plan.routes_at].reshape(3, -1)
    for peer in plan.destinations:
        row = plan.first_send_row(peer)
        rows[0, row] = HEADER
        body = rows[:, row + 1 : row + plan.send_rows[peer]].reshape(3, sequences, -1)
        body[0] = np.arange(sequences)[:, None]
        body[1] = np.concatenate([np.full(one.width, one.holder_chunk) for one in segments[peer]])
        body[2] = np.concatenate([np.arange(one.width) for one in segments[peer]])


def _fill_routes(plan: ExchangePlan, segments: list[list[Segment]]) -> None:
    routes = plan.table[plan.routes_at : plan.headers_at].reshape(plan.num_held, -1, 2)
    for i, a in enumerate(plan.held_chunks):
        for j, b in enumerate(plan.held_chunks):
            if 0 <= b - a <= plan.num_depths:
                routes[i, b - a, 0] = -1 - j
    for index, peer in enumerate(plan.sources):
        header = plan.first_recv_row(peer)
        plan.table[plan.headers_at + index] = header
        row = header + 1
        for one in segments[peer]:
            routes[one.asker_chunk, one.chunk_distance] = row, plan.recv_stride[peer]
            row += one.width


def write_metadata(layout: SequenceLayout, plan: ExchangePlan, metadata: IntArray, mark: int = 0) -> None:
    """Write a batch's part of the plan. It takes a few microseconds and allocates nothing.

    Empty documents at the end are left out. They hold no token, and take no part of `max_documents`.

    Args:
        layout: the layout of the batch.
        plan: the plan of this kind of layout.
        metadata: int64, at least `plan.metadata_len` words. They are overwritten.
        mark: of the exchange (`overlap_mtp.exchange.transport.Transport.start`).

    Raises:
        ValueError: if the layout has more documents than the plan.
    """
    documents = layout.num_used_documents
    if documents > plan.max_documents:
        raise ValueError(
            f"the layout has {documents} documents, more than the plan's {plan.max_documents}: raise max_documents"
        )
    ends_at = plan.valid_ends_at
    metadata[NUM_DOCUMENTS] = documents
    metadata[SEQ_LEN] = layout.cu_seqlens[-1]
    metadata[CU_SEQLENS : CU_SEQLENS + documents + 1] = layout.cu_seqlens[: documents + 1]
    metadata[CU_SEQLENS + documents + 1 : ends_at] = NO_DOCUMENT
    metadata[ends_at : ends_at + documents] = layout.valid_ends[:documents]
    metadata[FINGERPRINT] = fingerprint_of(layout.checksum, layout.batch, mark)


def write_references(layout: DeviceLayout, metadata: IntArray, mark: int) -> None:
    """Write where the bounds of a batch are, in place of them.

    `overlap_mtp.kernels.bounds` makes the metadata from it on the device.

    Args:
        layout: of the batch.
        metadata: as for `write_metadata`. From the word CU_SEQLENS on it gets the addresses of `cu_seqlens` and
            `cu_valid` (0 if there is none), and the bytes of an entry.
        mark: of the exchange.
    """
    metadata[FINGERPRINT] = fingerprint_of(0, layout.batch, mark)
    metadata[NUM_DOCUMENTS] = layout.num_documents - 1
    metadata[SEQ_LEN] = layout.seq_len
    metadata[CU_SEQLENS] = layout.cu_seqlens.data_ptr()
    metadata[CU_SEQLENS + 1] = 0 if layout.cu_valid is None else layout.cu_valid.data_ptr()
    metadata[CU_SEQLENS + 2] = layout.cu_seqlens.itemsize


def fingerprint_of(checksum: int, batch: int, mark: int) -> int:
    """What the header of a message says: it is equal on two ranks that mean the same exchange of the same batch.

    Args:
        checksum: of the bounds, 32 bits.
        batch: the checksum of the batch's name, 32 bits (`SequenceLayout.of_batch`).
        mark: of the exchange; its lowest 31 bits count.

    Returns:
        A number in [0, 2**63).
    """
    return (mark & 0x7FFFFFFF) << 32 | checksum ^ batch


def make_metadata(layout: SequenceLayout, plan: ExchangePlan, mark: int = 0) -> IntArray:
    """Make the metadata of a batch, int64 [plan.metadata_len]."""
    metadata = np.zeros(plan.metadata_len, np.int64)
    write_metadata(layout, plan, metadata, mark)
    return metadata
