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

from overlap_mtp.channel import Channel, channel_of
from overlap_mtp.layout import Kind, SequenceLayout
from overlap_mtp.plan import NOWHERE, halo_of
from overlap_mtp.recent import Recent
from overlap_mtp.schedules.base import Roller, Rolls, fill_of
from overlap_mtp.transport import Traffic
from overlap_mtp.upload import upload


@dataclass(frozen=True)
class Boundary:
    """What one document's roll by one needs across ranks.

    `lower` and `upper` are (slot to send, slot to receive) with the ranks below and above; a slot is None
    where nothing moves. Slots are local: a received token lands there, in the rolled tensor.
    """

    lower: tuple[int | None, int | None]
    upper: tuple[int | None, int | None]


@dataclass(frozen=True)
class RollByOne:
    """A rank's roll by one of one layout."""

    boundaries: list[Boundary]  # one a document that crosses ranks here
    moved: list[tuple[int, int]]  # (from, to) slots of tokens that a run takes from another run of this rank
    empty: torch.Tensor  # slots that no token moves into: document ends and padding

    @classmethod
    def of(cls, layout: SequenceLayout, cp_rank: int, device: torch.device) -> RollByOne:
        runs = layout.runs(cp_rank)
        holder, slot = (side[:, 0] for side in halo_of(layout, cp_rank, num_depths=1))
        last = runs.slot + (runs.end - runs.begin) - 1  # of each run
        neighbours = {cp_rank - 1, cp_rank + 1} & set(range(layout.cp_size))
        wants, gives = {}, {}  # (document, neighbour) -> slot
        for at in np.flatnonzero((holder != cp_rank) & (holder != NOWHERE)):
            wants[int(runs.document[at]), int(holder[at])] = int(last[at])
        for peer in neighbours:
            theirs = layout.runs(peer)
            their_holder, my_slot = (side[:, 0] for side in halo_of(layout, peer, num_depths=1))
            for at in np.flatnonzero(their_holder == cp_rank):
                gives[int(theirs.document[at]), peer] = int(my_slot[at])
        boundaries = []
        for document in sorted({document for document, _ in [*wants, *gives]}):
            pairs = [
                (gives.get((document, peer)), wants.get((document, peer)))
                for peer in (cp_rank - 1, cp_rank + 1)
            ]
            boundaries.append(Boundary(*pairs))
        own = np.flatnonzero(holder == cp_rank)
        return cls(
            boundaries,
            list(zip(slot[own].tolist(), last[own].tolist(), strict=True)),
            upload(np.flatnonzero(~layout.valid(cp_rank, depth=1)), device),
        )


def roll_by_one(
    tensor: torch.Tensor, steps: RollByOne, fill: int, channel: Channel, traffic: Traffic
) -> torch.Tensor:
    """[..., L] -> [..., L], one blocking exchange with each neighbour per document."""
    rolled = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    rolled[..., :-1] = tensor[..., 1:]
    for source, target in steps.moved:
        rolled[..., target] = tensor[..., source]
    for document, boundary in enumerate(steps.boundaries):
        with channel.named_errors(f"the roll of document {document}, shape {list(tensor.shape)},"):
            _exchange(tensor, rolled, boundary, channel, traffic)
    return rolled.index_fill_(-1, steps.empty, fill)


def _exchange(
    tensor: torch.Tensor, rolled: torch.Tensor, boundary: Boundary, channel: Channel, traffic: Traffic
) -> None:
    work: list[dist.Work | None] = []
    received = []

    def send(slot: int | None, peer: int) -> None:
        if slot is not None:
            token = tensor[..., slot].contiguous()
            work.append(dist.isend(token, channel.global_rank(peer), group=channel.group))
            traffic.add(1, token.nbytes)

    def receive(slot: int | None, peer: int) -> None:
        if slot is not None:
            token = torch.empty_like(tensor[..., slot], memory_format=torch.contiguous_format)
            work.append(dist.irecv(token, channel.global_rank(peer), group=channel.group))
            received.append((slot, token))

    # In this order no two ranks wait for one another: below sends first, above receives first.
    send(boundary.lower[0], channel.cp_rank - 1)
    receive(boundary.lower[1], channel.cp_rank - 1)
    receive(boundary.upper[1], channel.cp_rank + 1)
    send(boundary.upper[0], channel.cp_rank + 1)
    for one in work:
        assert one is not None
        one.wait()
    for slot, token in received:
        rolled[..., slot] = token


class SyncRoller(Roller):
    name = "sync"

    def __init__(self, channel: Channel, num_depths: int, max_documents: int) -> None:
        super().__init__(channel, num_depths, max_documents)
        self._steps: Recent[RollByOne] = Recent()

    def _start(self, batch: dict[str, torch.Tensor], layout: SequenceLayout) -> Rolls:
        device = next(iter(batch.values())).device
        steps = self._steps.get(layout.key, lambda: RollByOne.of(layout, self._channel.cp_rank, device))
        return SyncRolls(self, batch, steps)

    def roll(self, batch: dict[str, torch.Tensor], steps: RollByOne) -> dict[str, torch.Tensor]:
        return {
            name: roll_by_one(tensor, steps, fill_of(name), self._channel, self.traffic)
            for name, tensor in batch.items()
        }


class SyncRolls(Rolls):
    def __init__(self, roller: SyncRoller, batch: dict[str, torch.Tensor], steps: RollByOne) -> None:
        self._roller = roller
        self._steps = steps
        self._rolled = [batch]  # by depth, the batch itself at 0

    def at(self, depth: int) -> dict[str, torch.Tensor]:
        self._roller.check_depth(depth)
        while len(self._rolled) <= depth:
            self._rolled.append(self._roller.roll(self._rolled[-1], self._steps))
        return dict(self._rolled[depth])


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
    channel = channel_of(cp_group)
    local_len = tensor.shape[dims]
    if channel.cp_size > 1 and local_len % 2:
        raise ValueError(
            f"a zigzag shard holds two chunks of one length, got odd length {local_len} along {dims}"
        )
    kind: Kind = "zigzag" if channel.cp_size > 1 else "contiguous"
    layout = SequenceLayout.dense(local_len * channel.cp_size, channel.cp_size, kind)
    steps = RollByOne.of(layout, channel.cp_rank, tensor.device)
    rolled = tensor.movedim(dims, -1)
    for _ in range(-shifts):
        rolled = roll_by_one(rolled, steps, 0, channel, Traffic())
    rolled = rolled.movedim(-1, dims)
    return rolled, rolled.sum(dtype=sum_dtype(tensor.dtype))


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """What tokens are counted in: int64 for integers and bool, float32 for half precision."""
    if not dtype.is_floating_point:
        return torch.int64
    return torch.float32 if dtype.itemsize < 4 else dtype
