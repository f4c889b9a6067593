"""sync: one blocking message for each tensor, depth and document. The baseline, and the public `roll_tensor`.

It sends what Megatron-LM's `roll_tensor` sends since MR !3330 (commit 08abeedbfe), message for message: isend and
irecv, the lower neighbour first, waited for before the next tensor or document. The local work is as lean as that
allows. As there, messages carry no fingerprint: only `check_layouts` detects that ranks are out of step.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from overlap_mtp.device_layout import DeviceLayout, Layout, layout_from
from overlap_mtp.exchange.group import ExchangeGroup, Traffic, exchange_group_of
from overlap_mtp.exchange.spec import Batch
from overlap_mtp.layout import IntArray, Kind, SequenceLayout
from overlap_mtp.schedules.roller import CHANGED, ChainedRolls, Roller, RollerConfig, Rolls, Tokens, detached
from overlap_mtp.tensors import sum_dtype, upload
from overlap_mtp.tracing import span

NO_RANK = -1  # the holder of a token past its document's end


def next_tokens(layout: SequenceLayout, cp_rank: int) -> tuple[IntArray, IntArray]:
    """(holder or NO_RANK, local_index there) of the token that follows each of a rank's runs, [num_runs]."""
    runs = layout.runs(cp_rank)
    holder, local_index = layout.locate(runs.end, runs.document)
    return np.where(runs.end < layout.valid_ends[runs.document], holder, NO_RANK), local_index


class Message(NamedTuple):
    """One token, to or from the rank below or above."""

    is_sent: bool
    peer: int
    row: int  # of `RollByOne.sent` or `RollByOne.received`


@dataclass(frozen=True)
class RollByOne:
    """How a rank rolls tensors of one layout by one. All tensors are int64 local indices, on the tensors' device."""

    boundaries: list[list[Message]]  # of each document that crosses ranks here
    sent: torch.Tensor  # tokens that leave
    received: torch.Tensor  # where tokens arrive, in the rolled tensor
    moved: torch.Tensor  # [2, n]: from and to, if a run takes the first token of another run of this rank
    empty: torch.Tensor  # document ends and padding, where no token comes
    kept: torch.Tensor  # the tail, which stays as it is

    @classmethod
    def of(cls, layout: SequenceLayout, cp_rank: int, device: torch.device) -> RollByOne:
        runs = layout.runs(cp_rank)
        holder, next_index = next_tokens(layout, cp_rank)
        last = runs.local_index + (runs.end - runs.begin) - 1  # of each run
        wanted = [at for at in range(last.size) if holder[at] not in (cp_rank, NO_RANK)]
        wants = {(int(runs.document[at]), int(holder[at])): i for i, at in enumerate(wanted)}
        gives: dict[tuple[int, int], int] = {}  # (document, neighbour) -> which of the sent tokens
        sent: list[int] = []
        for peer in {cp_rank - 1, cp_rank + 1} & set(range(layout.cp_size)):
            documents = layout.runs(peer).document
            their_holder, my_index = next_tokens(layout, peer)
            for at in np.flatnonzero(their_holder == cp_rank):
                gives[int(documents[at]), peer] = len(sent)
                sent.append(int(my_index[at]))
        lower, upper = cp_rank - 1, cp_rank + 1
        # In this order no two ranks wait for each other: of two, the upper sends first and the lower receives first.
        order = (gives, lower), (wants, lower), (wants, upper), (gives, upper)
        boundaries = [
            [Message(rows is gives, peer, rows[d, peer]) for rows, peer in order if (d, peer) in rows]
            for d in sorted({document for document, _ in [*wants, *gives]})
        ]
        own = holder == cp_rank
        indices = (np.array(sent, np.int64), last[wanted], np.stack([next_index[own], last[own]]))
        in_tail = layout.in_tail(cp_rank)
        ends = (np.flatnonzero(~layout.valid(cp_rank, depth=1) & ~in_tail), np.flatnonzero(in_tail))
        return cls(boundaries, *(upload(one, device) for one in (*indices, *ends)))


def roll_by_one(
    tensor: torch.Tensor, steps: RollByOne, fill: float, group: ExchangeGroup, traffic: Traffic
) -> torch.Tensor:
    """Roll [..., L] by one: for each document, a blocking exchange with each neighbour."""
    rolled = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    rolled[..., :-1] = tensor[..., 1:]
    if steps.moved.numel():
        rolled[..., steps.moved[1]] = tensor[..., steps.moved[0]]
    if steps.boundaries:
        sent = tensor[..., steps.sent].movedim(-1, 0).contiguous()  # a row a token
        received = tensor.new_empty((steps.received.numel(), *tensor.shape[:-1]))
        with span("send-recv"):
            for document, messages in enumerate(steps.boundaries):
                with group.named_errors(f"the roll of document {document}, shape {list(tensor.shape)},"):
                    _exchange(sent, received, messages, group, traffic)
        rolled[..., steps.received] = received.movedim(0, -1)
    if steps.kept.numel():
        rolled[..., steps.kept] = tensor[..., steps.kept]
    return rolled.index_fill_(-1, steps.empty, fill)


def _exchange(
    sent: torch.Tensor,
    received: torch.Tensor,
    messages: list[Message],
    group: ExchangeGroup,
    traffic: Traffic,
) -> None:
    work: list[dist.Work | None] = []
    for is_sent, peer, row in messages:
        call, token = (dist.isend, sent[row]) if is_sent else (dist.irecv, received[row])
        work.append(call(token, group.global_rank(peer), group=group.process_group))
        if is_sent:
            traffic.add(1, token.nbytes)
    for one in work:
        assert one is not None
        one.wait()


_in_graphs: list[RollByOne] = []  # kept for good: replays read their indices


class SyncRoller(Roller):
    def __init__(self, config: RollerConfig) -> None:
        super().__init__(config)
        self._steps_of = lru_cache(maxsize=64)(RollByOne.of)
        self._failure = ""

    def _refuse(self) -> None:
        super()._refuse()
        if self._group.cp_size > 1 and not self.check_layouts:
            self._failure = (
                f"overlap_mtp: cp rank {self._group.cp_rank} refused a batch that its peers may have started, and with "
                "`sync` they do not hear of it: make a new cp group and new rollers, with check_layouts=True if "
                "all ranks should skip such a batch"
            )

    def _start(self, batch: Batch, layout: Layout, ready: torch.cuda.Event | None) -> Rolls:
        assert isinstance(layout, SequenceLayout)
        if self._failure:
            raise RuntimeError(self._failure)
        self.compare(layout, self.mark)
        device = next(iter(batch.values())).device
        steps = self._steps_of(layout, self._group.cp_rank, device)
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            _in_graphs.append(steps)

        marks = cycle(range(self.mark + 1, self.mark + CHANGED))

        def roll(tensors: Tokens) -> Tokens:
            # Ranks may take their rolls in another order than they started them.
            self.compare(layout, next(marks))
            return {
                name: roll_by_one(tensor, steps, self.options.fills.get(name, 0), self._group, self.traffic)
                for name, tensor in tensors.items()
            }

        return ChainedRolls(self, detached(batch), roll)


def roll_tensor(
    tensor: torch.Tensor | None,
    shifts: int = -1,
    dims: int = -1,
    cp_group: dist.ProcessGroup | None = None,
    packed_seq_params: Any = None,
    return_sum: bool = True,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Roll one zigzag-sharded tensor to the left. Zeros enter at the end of the sequence, or of each document.

    This is the contract of Megatron-LM's `roll_tensor` (MR !3330) for any `shifts` < 0. It sends one blocking message
    for each neighbour, document and token shifted. Padded documents are rolled within their valid tokens.

    Args:
        tensor: this rank's shard, or None.
        shifts: by how many tokens, negative.
        dims: the sequence dimension.
        cp_group: the ranks that share the sequence; None for one rank that holds everything.
        packed_seq_params: the documents, as in `overlap_mtp.device_layout.layout_from`. If they are on a GPU, this
            waits for it.
        return_sum: whether to sum.

    Returns:
        The rolled tensor, of the same shape and dtype, and the sum of this rank's part of it (int64 for integers and
        bool, float32 for half precision, otherwise the tensor's dtype) or None. Both are None if `tensor` is.

    Raises:
        ValueError: if `shifts` >= 0, the length is odd and there is more than one rank, or the documents do not fit.
    """
    if tensor is None:
        return None, None
    if shifts >= 0:
        raise ValueError(f"shifts must be negative (a roll to the left), got {shifts}")
    group = exchange_group_of(cp_group)
    local_len = tensor.shape[dims]
    if group.cp_size > 1 and local_len % 2 and packed_seq_params is None:
        raise ValueError(
            f"a zigzag shard holds two chunks of one length, got odd length {local_len} along {dims}"
        )
    kind: Kind = "zigzag" if group.cp_size > 1 else "contiguous"
    layout: Layout
    if packed_seq_params is None:
        layout = SequenceLayout.dense(local_len * group.cp_size, group.cp_size, kind)
    else:
        layout = layout_from(packed_seq_params, local_len, group.cp_size, kind)
    if isinstance(layout, DeviceLayout):
        layout = layout.on_host()
    if group.cp_size > 1:
        _ = group.process_group  # collective at first use: here, because not every rank has messages
    steps = RollByOne.of(layout, group.cp_rank, tensor.device)
    rolled = tensor.detach().movedim(dims, -1)
    for _ in range(-shifts):
        rolled = roll_by_one(rolled, steps, 0, group, Traffic())
    rolled = rolled.movedim(-1, dims)
    return rolled, rolled.sum(dtype=sum_dtype(tensor.dtype)) if return_sum else None
