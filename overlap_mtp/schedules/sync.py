"""sync: one blocking message per tensor, per depth, per document. The baseline, and the public `roll_tensor`.

What Megatron-LM's `roll_tensor` does since MR !3330 (commit 08abeedbfe), message for message: isend/irecv, the
lower neighbour first, waited for before the next tensor or document. The local work is as lean as that allows.
Like there, messages are bare tokens without a fingerprint: ranks with different layouts are not found out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from overlap_mtp.exchange.group import ExchangeGroup, exchange_group_of
from overlap_mtp.exchange.spec import fill_of
from overlap_mtp.exchange.transport import Traffic
from overlap_mtp.layout import IntArray, Kind, SequenceLayout
from overlap_mtp.recent import Recent
from overlap_mtp.schedules.roller import Batch, ChainedRolls, Roller, Rolls, detached
from overlap_mtp.tensors import sum_dtype, upload
from overlap_mtp.tracing import span

NOWHERE = -1  # the holder of a token past its document's end


def next_tokens(layout: SequenceLayout, cp_rank: int) -> tuple[IntArray, IntArray]:
    """(holder or NOWHERE, slot there) of the token that follows each of a rank's runs, [num_runs]."""
    runs = layout.runs(cp_rank)
    holder, slot = layout.locate(runs.end, runs.document)
    return np.where(runs.end < layout.valid_ends[runs.document], holder, NOWHERE), slot


@dataclass(frozen=True)
class Boundary:
    """One document's messages: which of the sent and received tokens go to and come from the rank below and above.

    Indices into `RollByOne.sent` and `RollByOne.received`; None where nothing moves.
    """

    to_lower: int | None
    from_lower: int | None
    from_upper: int | None
    to_upper: int | None


@dataclass(frozen=True)
class RollByOne:
    """A rank's roll by one of one layout. All tensors are int64 slots on the tensors' device."""

    boundaries: list[Boundary]  # one a document that crosses ranks here
    sent: torch.Tensor  # tokens that leave
    received: torch.Tensor  # where tokens arrive, in the rolled tensor
    moved: torch.Tensor  # [2, n]: from where to where a run takes a token of another run of this rank
    empty: torch.Tensor  # where no token moves: document ends and padding

    @classmethod
    def of(cls, layout: SequenceLayout, cp_rank: int, device: torch.device) -> RollByOne:
        runs = layout.runs(cp_rank)
        holder, slot = next_tokens(layout, cp_rank)
        last = runs.local_index + (runs.end - runs.begin) - 1  # of each run
        wanted = [at for at in range(last.size) if holder[at] not in (cp_rank, NOWHERE)]
        wants = {(int(runs.document[at]), int(holder[at])): i for i, at in enumerate(wanted)}
        gives: dict[tuple[int, int], int] = {}  # (document, neighbour) -> which of the sent tokens
        sent: list[int] = []
        for peer in {cp_rank - 1, cp_rank + 1} & set(range(layout.cp_size)):
            documents = layout.runs(peer).document
            their_holder, my_slot = next_tokens(layout, peer)
            for at in np.flatnonzero(their_holder == cp_rank):
                gives[int(documents[at]), peer] = len(sent)
                sent.append(int(my_slot[at]))
        lower, upper = cp_rank - 1, cp_rank + 1
        boundaries = [
            Boundary(
                gives.get((d, lower)), wants.get((d, lower)), wants.get((d, upper)), gives.get((d, upper))
            )
            for d in sorted({document for document, _ in [*wants, *gives]})
        ]
        own = holder == cp_rank
        slots = (np.array(sent, np.int64), last[wanted], np.stack([slot[own], last[own]]))
        empty = np.flatnonzero(~layout.valid(cp_rank, depth=1))
        return cls(boundaries, *(upload(one, device) for one in (*slots, empty)))


def roll_by_one(
    tensor: torch.Tensor, steps: RollByOne, fill: int, group: ExchangeGroup, traffic: Traffic
) -> torch.Tensor:
    """[..., L] -> [..., L], one blocking exchange with each neighbour per document."""
    rolled = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    rolled[..., :-1] = tensor[..., 1:]
    if steps.moved.numel():
        rolled[..., steps.moved[1]] = tensor[..., steps.moved[0]]
    if steps.boundaries:
        sent = tensor[..., steps.sent].movedim(-1, 0).contiguous()  # a row a token
        received = tensor.new_empty((steps.received.numel(), *tensor.shape[:-1]))
        with span("send-recv"):
            for document, boundary in enumerate(steps.boundaries):
                with group.named_errors(f"the roll of document {document}, shape {list(tensor.shape)},"):
                    _exchange(sent, received, boundary, group, traffic)
        rolled[..., steps.received] = received.movedim(0, -1)
    return rolled.index_fill_(-1, steps.empty, fill)


def _exchange(
    sent: torch.Tensor, received: torch.Tensor, boundary: Boundary, group: ExchangeGroup, traffic: Traffic
) -> None:
    work: list[dist.Work | None] = []

    def send(row: int | None, peer: int) -> None:
        if row is not None:
            work.append(dist.isend(sent[row], group.global_rank(peer), group=group.group))
            traffic.add(1, sent[row].nbytes)

    def receive(row: int | None, peer: int) -> None:
        if row is not None:
            work.append(dist.irecv(received[row], group.global_rank(peer), group=group.group))

    # In this order no two ranks wait for one another: the upper of two sends first, the lower receives first.
    send(boundary.to_lower, group.cp_rank - 1)
    receive(boundary.from_lower, group.cp_rank - 1)
    receive(boundary.from_upper, group.cp_rank + 1)
    send(boundary.to_upper, group.cp_rank + 1)
    for one in work:
        assert one is not None
        one.wait()


class SyncRoller(Roller):
    name = "sync"

    def __init__(self, group: ExchangeGroup, num_depths: int, max_documents: int) -> None:
        super().__init__(group, num_depths, max_documents)
        self._steps: Recent[RollByOne] = Recent()

    def _start(self, batch: Batch, layout: SequenceLayout, ready: torch.cuda.Event | None) -> Rolls:
        device = next(iter(batch.values())).device
        steps = self._steps.get(
            (layout.key, device), lambda: RollByOne.of(layout, self._group.cp_rank, device)
        )

        def roll(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {
                name: roll_by_one(tensor, steps, fill_of(name), self._group, self.traffic)
                for name, tensor in tensors.items()
            }

        return ChainedRolls(self, detached(batch), roll)


def roll_tensor(
    tensor: torch.Tensor, shifts: int = -1, dims: int = -1, cp_group: dist.ProcessGroup | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rolls one zigzag-sharded dense tensor left by -`shifts` along `dims`; zeros enter at the sequence's end.

    The contract of Megatron-LM's `roll_tensor` (MR !3330), for any `shifts` < 0: returns the rolled tensor, of
    the shape and dtype of `tensor`, and the sum of this rank's part of it (int64 for integers and bool, float32
    for half precision, else the tensor's dtype). Sends one blocking message per neighbour and token shifted.
    Raises ValueError where `shifts` >= 0 or the length along `dims` is odd with more than one rank.
    """
    if shifts >= 0:
        raise ValueError(f"shifts must be negative (a roll to the left), got {shifts}")
    group = exchange_group_of(cp_group)
    local_len = tensor.shape[dims]
    if group.cp_size > 1 and local_len % 2:
        raise ValueError(
            f"a zigzag shard holds two chunks of one length, got odd length {local_len} along {dims}"
        )
    kind: Kind = "zigzag" if group.cp_size > 1 else "contiguous"
    layout = SequenceLayout.dense(local_len * group.cp_size, group.cp_size, kind)
    steps = RollByOne.of(layout, group.cp_rank, tensor.device)
    rolled = tensor.detach().movedim(dims, -1)
    for _ in range(-shifts):
        rolled = roll_by_one(rolled, steps, 0, group, Traffic())
    rolled = rolled.movedim(-1, dims)
    return rolled, rolled.sum(dtype=sum_dtype(tensor.dtype))
