"""What all transports share: an exchange is started, and then waited for or dropped."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from overlap_mtp.device_layout import Layout
from overlap_mtp.exchange.group import ExchangeGroup, Traffic
from overlap_mtp.exchange.plan import ExchangePlan
from overlap_mtp.layout import SequenceLayout

WORD_BYTES = 8
IN_STEP = (
    "all ranks of a cp group must start the same batches by the same rollers in the same order, with the same layout "
    "(cu_seqlens, valid_lengths, of_batch), and ask for the same depths in the same order; of activations, all or none "
    "must need gradients, and backward must run in the same order; or it refused its batch"
)
LATE = ("the {carries}", "the acknowledgement")  # what the second and third word of the error flags stand for

Rolled = list[dict[str, torch.Tensor]]  # by depth and name


@dataclass(slots=True, eq=False)
class PendingExchange:
    """One exchange that was started: wait for it, or drop it.

    If it is garbage-collected before either, it is dropped.
    """

    transport: Transport
    number: int
    local_len: int
    depths: Rolled  # the rolls: they are complete when it has been waited for
    buffers: Any  # the transport's
    stream: Any = None  # the CUDA stream that it was started from
    is_done: bool = False  # it was waited for or dropped

    def wait(self) -> Rolled:
        """Wait for the tokens, on the current stream (CUDA) or on the host (CPU). Return the rolls."""
        if self.is_done:
            raise RuntimeError(f"exchange {self.number} was already waited for or dropped")
        rolled = self.transport.finish(self)
        self.is_done = True
        return rolled

    def drop(self) -> None:
        """Give the buffers back without waiting. It launches nothing, so a finaliser may call it."""
        if not self.is_done:
            self.is_done = True
            self.transport.take_back(self)

    def __del__(self) -> None:
        self.drop()


@dataclass(frozen=True)
class TransportConfig:
    """What a transport is made for."""

    group: ExchangeGroup  # that carries the exchanges
    plans: list[ExchangePlan]  # of all ranks, in rank order
    spec: Any  # ExchangeSpec or RowSpec of the batches
    traffic: Traffic  # counts what is sent
    is_overlapped: bool  # send on the side stream
    local_len: int  # tokens a rank of the first batch: launches are captured ahead for this length


class Transport(ABC):
    """Moves tokens between the ranks of a group. It knows plans and kernels, not schedules."""

    name: str
    carries = "tokens"
    has_captures = False  # a CUDA graph holds an exchange of it

    def __init__(self, config: TransportConfig) -> None:
        self.group, self.spec, self.traffic = config.group, config.spec, config.traffic
        self.plan, self.device = config.plans[config.group.cp_rank], config.spec.device
        self._flagged: Sequence[int] = self.plan.sources  # which cp ranks the first error flag counts
        self.num_started = 0
        self.failure: str | None = None  # what `raise_if_failed` has raised
        # [0]: 1 + the index in `_flagged` of a rank with another plan; [1]: 1 + a cp rank whose message is late;
        # [2]: 1 + a cp rank that is late with an acknowledgement (both + cp_size if it is a backward over symmetric
        # memory); [3]: 1 if the bounds of a DeviceLayout are illegal; of activations: 1 + a tp rank with another plan.
        # Pinned: kernels write it, and the host reads it without waiting.
        is_pinned = self.device.type == "cuda"
        self.error_flags = torch.zeros(4, dtype=torch.int32, pin_memory=is_pinned, device="cpu")
        self._flags = self.error_flags.numpy()
        self._two_flags: Any = self._flags.view("int64")  # the same in two words
        self._message_bytes = WORD_BYTES * self.spec.words_per_token * self.plan.num_send_rows

    @property
    def has_peers(self) -> bool:
        return bool(self.plan.sources or self.plan.destinations)

    @abstractmethod
    def start(
        self,
        tensors: list[torch.Tensor],
        layout: Layout,
        mark: int,
        ready: torch.cuda.Event | None = None,
    ) -> PendingExchange:
        """Pack and send. It never blocks the host on CUDA.

        Args:
            tensors: of the batch in the order of the spec's names, contiguous.
            layout: of the batch.
            mark: numbers the exchanges of the cp group. A rank whose peer has another mark or layout fails.
            ready: as in `Roller.start`.

        Returns:
            The exchange.
        """

    @abstractmethod
    def finish(self, exchange: PendingExchange) -> Rolled:
        """Wait for an exchange, and return its rolls (`PendingExchange.wait`)."""

    @abstractmethod
    def take_back(self, exchange: PendingExchange) -> None:
        """Take the buffers of an exchange that nobody waits for. It launches nothing (`PendingExchange.drop`)."""

    def retire(self) -> None:  # noqa: B027 - most keep no buffers for later exchanges
        """Start no more exchanges. Those under way can still be waited for; then the buffers are freed."""

    def close(self) -> None:
        """Free the buffers after everything that uses them has run. Raise what `raise_if_failed` raises."""
        self.raise_if_failed()

    def set_replay_layout(self, exchange: PendingExchange, layout: SequenceLayout) -> None:
        """Give an exchange that was captured in a CUDA graph other documents for the replays to come."""
        raise RuntimeError("only an exchange that was captured in a CUDA graph can be given another layout")

    def raise_if_failed(self) -> None:
        """Raise RuntimeError if a peer was late or had another plan since the last call. It never waits."""
        if not (self._two_flags[0] or self._two_flags[1]):
            return
        source, *late, bounds = (int(word) for word in self._flags)
        self._flags[:] = 0
        self.failure = self.failure or self._describe_failure(
            source, late, bounds
        )  # others follow from the first
        raise RuntimeError(self.failure)

    def _describe_failure(self, source: int, late: list[int], bounds: int) -> str:
        where = f"in one of the exchanges up to number {self.num_started - 1}"
        if bounds:
            return (
                f"overlap_mtp: the bounds of a DeviceLayout are illegal ({where}), and its tokens were not rolled: "
                "DeviceLayout.on_host() reads them and says what is wrong"
            )
        for peer, what in zip(late, LATE, strict=False):
            if peer:
                return (
                    f"overlap_mtp: cp rank {self.plan.cp_rank} of {self.plan.cp_size} gave up waiting for "
                    f"{what.format(carries=self.carries)} of "
                    f"cp rank {peer - 1} ({where}): that rank is missing, late or at another exchange"
                )
        return (
            f"overlap_mtp: cp rank {self._flagged[source - 1]} exchanged {self.carries} by another plan than cp rank "
            f"{self.plan.cp_rank} ({where}): {IN_STEP}"
        )

    def describe(self, number: int) -> str:
        return f"exchange {number} ({self.plan.num_depths} depths, {self._message_bytes} bytes sent)"
