"""Which rows of activations a rank sends, receives and adds up: the plan of tokens, for rows and their gradients.

A row is what the tensors of an exchange hold for one token, in all rows of the batch. The plan of tokens
(`overlap_mtp.exchange.plan`) says which tokens cross ranks. This module says in which message each one travels
(`RowPlan`), and for one batch where each rolled row comes from and where its gradient goes (`RowMaps`).

Under tensor parallelism with sequence parallelism a rank holds a slice of its cp rank's rows. Rows that follow a slice
may lie on another tp rank. So every tp rank gives the first `num_depths` rows of its slice (the heads) and those rows
of its slice that leave the cp rank; a sum over the tp ranks gives all of them to each. The exchange over cp ranks comes
after it.

    forward:   out = [rows to send | heads],   summed over tp,   sent;   in = [heads | received rows]
    backward:  in  = gradients of these rows,  summed over tp,   sent back;   out = [received gradients | heads]

Both are parts of one buffer, [rows to send | heads | received rows].

This is index arithmetic in numpy and torch; nothing here knows torch.distributed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from overlap_mtp.exchange.plan import (
    ExchangePlan,
    Segment,
    make_metadata,
    make_plans,
    segments_of,
)
from overlap_mtp.kernels import reference
from overlap_mtp.layout import IntArray, SequenceLayout

NOTHING, HEADER = -1, -2  # in place of a row: none; one that carries the fingerprint


class RowOrder(NamedTuple):
    """Where the rows of a plan lie in a buffer, and the messages that they make."""

    position: IntArray  # [rows of the plan]: the row in the buffer; NOTHING for the plan's own headers
    # [messages][cp_size]: rows to or from each peer, with a header; 0 for none
    splits: tuple[tuple[int, ...], ...]
    headers: tuple[tuple[int, ...], ...]  # [messages]: the rows of the headers, one for each peer

    @property
    def num_rows(self) -> int:
        return sum(map(sum, self.splits))

    @property
    def all_headers(self) -> list[int]:
        return [row for message in self.headers for row in message]

    def begin_of(self, message: int) -> int:
        """The row at which a message begins."""
        return sum(map(sum, self.splits[:message]))


@dataclass(frozen=True)
class RowPlan:
    """The part of a rank's plan that all batches of a kind share."""

    tokens: ExchangePlan
    sent: RowOrder
    received: RowOrder
    tp_rank: int = 0
    tp_size: int = 1

    @cached_property
    def num_heads(self) -> int:
        """Rows that the tp ranks give each other."""
        return self.tp_size * self.tokens.num_depths if self.tp_size > 1 else 0

    @cached_property
    def num_rows(self) -> int:
        """Rows of the buffer."""
        return self.sent.num_rows + self.num_heads + self.received.num_rows

    @cached_property
    def out_rows(self) -> slice:
        """The part of the buffer that leaves in forward and arrives in backward."""
        return slice(0, self.sent.num_rows + self.num_heads)

    @cached_property
    def in_rows(self) -> slice:
        """The part of the buffer that arrives in forward and leaves in backward."""
        return slice(self.sent.num_rows, self.num_rows)


def make_row_plans(
    layout: SequenceLayout, num_depths: int, max_documents: int, by_depth: bool, tp: tuple[int, int] = (0, 1)
) -> list[RowPlan]:
    """Make the plans of all cp ranks for one kind of layout, in rank order.

    Args:
        layout, num_depths, max_documents: as for `overlap_mtp.exchange.plan.make_plan`.
        by_depth: one message for each depth, with the rows that no smaller depth needs; otherwise one for all.
        tp: this rank's tp rank, and how many tp ranks share the rows of a cp rank.

    Returns:
        The plans.
    """
    peers, messages = range(layout.cp_size), num_depths if by_depth else 1

    def order(tokens: ExchangePlan, segments: list[list[Segment]]) -> RowOrder:
        return _order(segments, tokens.max_documents if tokens.by_document else 1, messages)

    plans = []
    for tokens in make_plans(layout, num_depths, max_documents):
        sent = [segments_of(layout, tokens.cp_rank, peer, num_depths) for peer in peers]
        received = [segments_of(layout, peer, tokens.cp_rank, num_depths) for peer in peers]
        plans.append(RowPlan(tokens, order(tokens, sent), order(tokens, received), *tp))
    return plans


def _order(segments: list[list[Segment]], sequences: int, messages: int) -> RowOrder:
    """Order the rows to or from each peer by message. A plan has them by peer, each after a header."""
    message_of = [  # of the rows of one sequence, for each peer
        np.array(
            [min(one.chunk_distance + at, messages) - 1 for one in peer for at in range(one.width)], np.int64
        )
        for peer in segments
    ]
    positions = [np.full(1 + sequences * one.size if one.size else 0, NOTHING) for one in message_of]
    end, splits, headers = 0, [], []
    for message in range(messages):
        rows = [0] * len(segments)
        of_message = []
        for peer, messages_of_rows in enumerate(message_of):
            here = 1 + np.flatnonzero(np.tile(messages_of_rows == message, sequences))
            if here.size:
                of_message.append(end)
                positions[peer][here] = end + 1 + np.arange(here.size)
                rows[peer] = 1 + here.size
                end += rows[peer]
        splits.append(tuple(rows))
        headers.append(tuple(of_message))
    return RowOrder(np.concatenate(positions), tuple(splits), tuple(headers))


class Message(NamedTuple):
    """Rows of the buffer that go to a peer or come from it."""

    peer: int
    begin: int
    rows: int
    columns: slice = slice(None)  # of one tensor, or all

    def of(self, buffer: torch.Tensor) -> torch.Tensor:
        """The part of a buffer that travels."""
        return buffer[self.begin : self.begin + self.rows, self.columns]


class Round(NamedTuple):
    """Messages that travel together. In backward, what was received is sent."""

    sent: list[Message]
    received: list[Message]

    def reversed(self) -> Round:
        return Round(self.received, self.sent)


def reversed_rounds(rounds: list[Round]) -> list[Round]:
    """The rounds of backward: the last depth comes first."""
    return [one.reversed() for one in reversed(rounds)]


def message_rounds(plan: RowPlan) -> list[Round]:
    """The rounds of a plan: one message for each peer in each; none without peers. All batches have the same."""
    first = plan.in_rows.start + plan.num_heads
    rounds = []
    for number in range(len(plan.sent.splits)):
        both = []
        for order, base in ((plan.sent, 0), (plan.received, first)):
            begin, messages = base + order.begin_of(number), []
            for peer, rows in enumerate(order.splits[number]):
                if rows:
                    messages.append(Message(peer, begin, rows))
                begin += rows
            both.append(messages)
        if any(both):
            rounds.append(Round(*both))
    return rounds


def document_rounds(
    layout: SequenceLayout, plans: list[RowPlan], cp_rank: int, sizes: list[int]
) -> list[Round]:
    """A round for each depth, tensor and document, in this order, without headers, of the rows that the batch needs.

    That is what rolls by one send that are repeated for each depth: a row travels at the first depth that needs it.

    Args:
        layout: of the batch.
        plans: of all ranks; each has one message for a peer.
        cp_rank: of this rank.
        sizes: elements of each tensor in a row.

    Returns:
        The rounds of this rank. Rounds without messages are left out.
    """
    mine = plans[cp_rank]
    ends = np.cumsum(sizes).tolist()
    tensors = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    rounds: dict[tuple[int, int, int], Round] = {}
    first_use = {rank: _first_use(layout, plans[rank]) for rank in (cp_rank, *mine.tokens.destinations)}

    def add(asker: int, holder: int) -> None:
        tokens = plans[asker].tokens
        begin, end = tokens.first_recv_row(holder), tokens.first_recv_row(holder) + tokens.recv_rows[holder]
        is_mine = asker == cp_rank
        at = mine.in_rows.start + mine.num_heads + begin if is_mine else mine.tokens.first_send_row(asker)
        depths = first_use[asker][begin:end]
        rows = np.flatnonzero(depths)
        for row, depth in zip(rows.tolist(), depths[rows].tolist(), strict=True):
            for n, columns in enumerate(tensors):  # row 0 is the header
                key = depth, n, (row - 1) // tokens.recv_stride[holder]
                one = rounds.setdefault(key, Round([], []))
                if is_mine:
                    one.received.append(Message(holder, at + row, 1, columns))
                else:
                    one.sent.append(Message(asker, at + row, 1, columns))

    for peer in range(layout.cp_size):
        if mine.tokens.recv_rows[peer]:
            add(cp_rank, peer)
        if mine.tokens.send_rows[peer]:
            add(peer, cp_rank)
    return [rounds[key] for key in sorted(rounds)]


def _first_use(layout: SequenceLayout, plan: RowPlan) -> IntArray:
    """[num_recv_rows]: the first depth at which the batch uses each received row; 0 for none."""
    tokens = plan.tokens
    sequence, held, distance, offset = plan.tokens.asked
    documents = layout.num_used_documents
    bounds = layout.cu_seqlens[: documents + 1]
    begins = bounds[:-1] if tokens.by_document else np.zeros(1, np.int64)
    ends = bounds[1:] if tokens.by_document else np.array([layout.seq_len])
    is_used = (distance > 0) & (sequence < begins.size)
    sequence = np.where(is_used, sequence, 0)
    start, chunk_len = begins[sequence], (ends - begins)[sequence] // tokens.num_chunks
    # The last token of the chunk before uses it first.
    depth = offset + (distance - 1) * chunk_len + 1
    user = start + (np.array(tokens.held_chunks)[held] + 1) * chunk_len - 1
    valid_end = layout.valid_ends[np.searchsorted(bounds, user, side="right") - 1]  # TAIL in a tail
    is_used &= (offset < chunk_len) & (depth <= tokens.num_depths) & (user + depth < valid_end)
    return np.where(is_used, depth, 0)


class RowMaps(NamedTuple):
    """Where the rows of one batch go on one rank, as indices: int64, NOTHING for none, HEADER for headers.

    S is the number of rows that this rank holds: L, or L / tp_size. `out` and `in` rows are those of
    `RowPlan.out_rows` and `RowPlan.in_rows`.
    """

    packed: torch.Tensor  # [out rows]: the own row that goes there
    source: torch.Tensor  # [num_depths, S]: where each rolled row comes from: an own row, or S + an `in` row
    own_back: torch.Tensor  # [num_depths, S]: the rolled row that each own row went to
    in_back: torch.Tensor  # [num_depths, in rows]: the rolled row that each `in` row went to; headers in [0]
    returned_to: torch.Tensor  # [n]: the own rows that other ranks may have used
    returned: torch.Tensor  # [most uses, n]: the `out` rows with their gradients, in the order they are added

    @classmethod
    def of(cls, layout: SequenceLayout, plan: RowPlan) -> RowMaps:
        """Make the maps of a batch.

        Args:
            layout: of the batch.
            plan: of this rank, for this kind of layout.

        Returns:
            The maps, on the CPU.
        """
        tokens, num_depths = plan.tokens, plan.tokens.num_depths
        metadata = torch.from_numpy(make_metadata(layout, tokens))
        local_len = layout.local_len
        held = local_len // plan.tp_size  # S
        first = plan.tp_rank * held
        source = reference.sources(metadata, tokens, local_len)[:, first : first + held].numpy()
        sent_tokens = reference.sent_tokens(metadata, tokens).numpy()

        packed = np.full(plan.sent.num_rows + plan.num_heads, NOTHING)
        is_body = plan.sent.position != NOTHING
        own = sent_tokens[is_body] - first
        own[(sent_tokens[is_body] < first) | (own >= held)] = NOTHING
        packed[plan.sent.position[is_body]] = own
        packed[plan.sent.all_headers] = HEADER
        if plan.num_heads:
            heads = np.arange(min(num_depths, held))
            packed[plan.sent.num_rows + plan.tp_rank * num_depths + heads] = heads

        is_received = source >= local_len
        is_elsewhere = (source != NOTHING) & ~is_received & ((source < first) | (source >= first + held))
        tp_rank, offset = np.divmod(source, held)
        came = np.where(source == NOTHING, NOTHING, source - first)
        came[is_elsewhere] = held + (tp_rank * num_depths + offset)[is_elsewhere]
        came[is_received] = held + plan.num_heads + plan.received.position[source[is_received] - local_len]

        back = np.full((num_depths, held + plan.num_heads + plan.received.num_rows), NOTHING)
        depth, rolled = np.nonzero(came != NOTHING)
        back[depth, came[depth, rolled]] = rolled
        back[0, held + plan.num_heads + np.array(plan.received.all_headers, np.int64)] = HEADER
        maps = (packed, came, back[:, :held], back[:, held:], *_uses(packed, plan))
        tensors = [torch.from_numpy(np.ascontiguousarray(one)) for one in maps]
        return cls(*tensors)


def _uses(packed: IntArray, plan: RowPlan) -> tuple[IntArray, IntArray]:
    """(own rows that leave, the `out` rows of each, in the order of the plan of tokens, heads last)."""
    in_order = plan.sent.position[plan.sent.position != NOTHING]  # whatever messages they are in
    others = np.arange(plan.sent.num_rows, packed.size)
    rows = np.concatenate([in_order, others])
    rows = rows[packed[rows] != NOTHING]
    own = packed[rows]
    by_own = own.argsort(kind="stable")
    returned_to, first, count = np.unique(own[by_own], return_index=True, return_counts=True)
    returned = np.full((int(count.max(initial=0)), returned_to.size), NOTHING)
    place = np.arange(own.size) - np.repeat(first, count)
    returned[place, np.repeat(np.arange(returned_to.size), count)] = rows[by_own]
    return returned_to, returned
