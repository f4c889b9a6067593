"""What a rank sends to whom, and where each rolled token comes from.

A plan is data: first rank, last rank, short chunk, padding and document end are entries of its table, never
branches of the code that carries it out. Index arithmetic in numpy only.

**Sources.** A rank's slots fall into runs of consecutive positions (`SequenceLayout.runs`). The token `depth`
ahead of a slot is at slot + depth while that is inside the run's valid part; past it, the run's `halo` row
says where the first, second, ... token after the run is: a local slot, a row of the received wire, or
nowhere (the document has ended).

**Wire.** One message a peer: a header row whose first word is the plan's fingerprint, then one row a token,
each row holding that token's word of every tensor and batch row. A token travels once however many depths want
it (twice only where a chunk is shorter than num_depths and two runs of the receiver need it). How many rows a
message has is fixed by `PlanShape` (layout kind, num_depths, max_documents), never by the batch: unused rows
travel empty.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from overlap_mtp.layout import IntArray, SequenceLayout

NOWHERE = -1  # as a source: the fill value; as a slot to send: an unused row
HEADER = -2  # as a slot to send: the row that carries the fingerprint
NO_RUN = np.iinfo(np.int32).max  # `run_begin` of an unused run


@dataclass(frozen=True)
class PlanShape:
    """The sizes of a plan: alike for every batch that may follow, so that they can be agreed on once.

    `send_rows[p]` and `recv_rows[p]` are the rows of the message to and from cp rank p, header included;
    0 where no message is ever needed.
    """

    cp_rank: int
    num_depths: int
    max_runs: int
    send_rows: tuple[int, ...]
    recv_rows: tuple[int, ...]

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

    # Where each section of the table (RollPlan.table) begins.
    @cached_property
    def run_begin_at(self) -> int:
        return self.num_send_rows

    @cached_property
    def run_end_at(self) -> int:
        return self.run_begin_at + self.max_runs

    @cached_property
    def halo_at(self) -> int:
        return self.run_end_at + self.max_runs

    @cached_property
    def headers_at(self) -> int:
        return self.halo_at + self.max_runs * self.num_depths

    @cached_property
    def fingerprint_at(self) -> int:
        return self.headers_at + len(self.sources)

    @cached_property
    def table_len(self) -> int:
        return self.fingerprint_at + 1


@dataclass(frozen=True)
class RollPlan:
    """One rank's part in the rolls of one layout, as one int32 `table` that a single copy takes to a device.

    Its sections, in this order:
    - `send_slots` [num_send_rows]: the local slot that each row of the outgoing wire carries, or HEADER, or
      NOWHERE for an unused row;
    - `run_begin`, `run_end` [max_runs]: the slots of each run, padding excluded; unused runs begin at NO_RUN;
    - `halo` [max_runs, num_depths]: where the j-th token after each run is: a local slot; local_len + a row
      of the incoming wire; or NOWHERE;
    - `headers` [number of sources]: the rows of the incoming wire that must hold the fingerprint;
    - `fingerprint` [1]: 31 bits of the layout's hash.
    """

    shape: PlanShape
    local_len: int
    table: npt.NDArray[np.int32]

    @property
    def send_slots(self) -> npt.NDArray[np.int32]:
        return self.table[: self.shape.run_begin_at]

    @property
    def run_begin(self) -> npt.NDArray[np.int32]:
        return self.table[self.shape.run_begin_at : self.shape.run_end_at]

    @property
    def run_end(self) -> npt.NDArray[np.int32]:
        return self.table[self.shape.run_end_at : self.shape.halo_at]

    @property
    def halo(self) -> npt.NDArray[np.int32]:
        section = self.table[self.shape.halo_at : self.shape.headers_at]
        return section.reshape(self.shape.max_runs, self.shape.num_depths)

    @property
    def headers(self) -> npt.NDArray[np.int32]:
        return self.table[self.shape.headers_at : self.shape.fingerprint_at]

    @property
    def fingerprint(self) -> int:
        return int(self.table[self.shape.fingerprint_at])


def plan_shape(layout: SequenceLayout, cp_rank: int, num_depths: int, max_documents: int) -> PlanShape:
    """The sizes of `cp_rank`'s plans for layouts like this one.

    Packed layouts differ from batch to batch: their shape depends on `max_documents` alone, and covers the
    worst case, documents shorter than 2 * cp_size * num_depths tokens included. A dense layout's chunks have
    one length, so its shape is exact.
    """
    layout.check_rank(cp_rank)
    chunks = 2 if layout.kind == "zigzag" else 1
    documents = max_documents if layout.is_packed else 1
    crossing = documents if layout.kind == "zigzag" else 1  # documents that one bound of a piece can cut
    size = None if layout.is_packed else layout.local_len // chunks

    def rows(holder: int, asker: int) -> int:
        wanted = crossing * _most_wanted(layout, holder, asker, num_depths, size)
        return 1 + wanted if wanted and holder != asker else 0

    return PlanShape(
        cp_rank,
        num_depths,
        max_runs=chunks * documents,
        send_rows=tuple(rows(cp_rank, peer) for peer in range(layout.cp_size)),
        recv_rows=tuple(rows(peer, cp_rank) for peer in range(layout.cp_size)),
    )


def _most_wanted(layout: SequenceLayout, holder: int, asker: int, num_depths: int, size: int | None) -> int:
    """The most tokens of one document that `asker`'s halos can need from `holder`.

    The num_depths tokens after chunk a lie in chunks a + 1, a + 2, ... The one `gap` chunks on holds
    min(size, num_depths - (gap - 1) * size) of them; over all sizes that is at most num_depths // gap.
    """

    def chunks(rank: int) -> tuple[int, ...]:
        return (rank, 2 * layout.cp_size - 1 - rank) if layout.kind == "zigzag" else (rank,)

    gaps = [b - a for a in chunks(asker) for b in chunks(holder) if b > a]
    if size is None:
        return sum(num_depths // gap for gap in gaps)
    return sum(max(0, min(size, num_depths - (gap - 1) * size)) for gap in gaps)


def build_plan(layout: SequenceLayout, shape: PlanShape) -> RollPlan:
    """The plan of rank `shape.cp_rank` for `layout`: depends on the layout alone, not on any token.

    Raises ValueError where the layout has more runs than `shape` was made for (too many documents).
    """
    runs = layout.runs(shape.cp_rank)
    if runs.begin.size > shape.max_runs:
        raise ValueError(
            f"the layout has {runs.begin.size} runs, more than the plan's max_runs {shape.max_runs}: "
            "raise max_documents"
        )
    table = np.full(shape.table_len, NOWHERE, np.int32)
    plan = RollPlan(shape, layout.local_len, table)

    plan.run_begin[:] = NO_RUN
    plan.run_begin[: runs.begin.size] = runs.slot
    valid_end = np.clip(layout.valid_ends[runs.document], runs.begin, runs.end)
    plan.run_end[: runs.begin.size] = runs.slot + valid_end - runs.begin

    holder, slot = halo_of(layout, shape.cp_rank, shape.num_depths)
    code = np.where(holder == shape.cp_rank, slot, NOWHERE).ravel()
    row = 0
    for index, peer in enumerate(shape.sources):
        plan.headers[index] = row
        wanted = np.flatnonzero(holder == peer)
        assert wanted.size < shape.recv_rows[peer], "plan_shape promised fewer rows than a layout needs"
        code[wanted] = layout.local_len + row + 1 + np.arange(wanted.size)
        row += shape.recv_rows[peer]
    plan.halo[: runs.begin.size] = code.reshape(holder.shape)

    row = 0
    for peer in shape.destinations:
        plan.send_slots[row] = HEADER
        holder, slot = halo_of(layout, peer, shape.num_depths)
        mine = slot[holder == shape.cp_rank]  # in the order in which the peer numbers its rows
        plan.send_slots[row + 1 : row + 1 + mine.size] = mine
        row += shape.send_rows[peer]

    table[shape.fingerprint_at] = int.from_bytes(layout.key[:4], "little") & 0x7FFFFFFF
    return plan


def halo_of(layout: SequenceLayout, cp_rank: int, num_depths: int) -> tuple[IntArray, IntArray]:
    """(holder, slot there) of the num_depths tokens after each run of a rank, [num_runs, num_depths].

    The holder is NOWHERE for what lies past the document's last valid token.
    """
    runs = layout.runs(cp_rank)
    position = runs.end[:, None] + np.arange(num_depths)
    holder, slot = layout.locate(position, runs.document[:, None])
    return np.where(position < layout.valid_ends[runs.document][:, None], holder, NOWHERE), slot
