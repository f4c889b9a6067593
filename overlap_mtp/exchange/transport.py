"""What all transports share: their two verbs, what they count, and what keeps an exchange alive."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch

from overlap_mtp.exchange.group import ExchangeGroup
from overlap_mtp.exchange.plan import PlanShape, write_record
from overlap_mtp.exchange.spec import Cargo, Outputs
from overlap_mtp.layout import IntArray, SequenceLayout

WORD_BYTES = 8
LATE = ("the tokens", "the acknowledgement")  # what the words of `trouble` behind the first stand for


@dataclass
class Traffic:
    """What a rank has sent: messages (one per peer and exchange) and their bytes."""

    messages: int = 0
    bytes: int = 0

    def add(self, messages: int, num_bytes: int) -> None:
        self.messages += messages
        self.bytes += num_bytes


class Slot:
    """The buffers of one exchange, which the next one uses when this has landed.

    `given` holds the batch's record and the addresses of its tensors and their rolls. It is pinned: a GPU reads it
    where it is, so that nothing is copied before the exchange can begin.
    """

    def __init__(self, shape: PlanShape, cargo: Cargo) -> None:
        length, on_gpu = shape.record_len + 2 * len(cargo.names), cargo.device.type == "cuda"
        self.shape = shape
        self.given = torch.zeros(length, dtype=torch.int64, pin_memory=on_gpu)
        self._words: IntArray = self.given.numpy()
        self._record = self._words[: shape.record_len]
        self._addresses = self._words[shape.record_len :]
        self._is_written = False
        self.tensors: list[torch.Tensor] = []
        self.outputs: Outputs | None = None

    def write(self, tensors: list[torch.Tensor], layout: SequenceLayout, outputs: Outputs) -> None:
        """Says what the next exchange carries, and keeps it alive."""
        if layout.is_packed or not self._is_written:  # all dense layouts of one shape are alike
            write_record(layout, self.shape, self._record)
            self._is_written = True
        self._addresses[:] = [*(tensor.data_ptr() for tensor in tensors), *outputs.bases]
        self.tensors, self.outputs = tensors, outputs

    def forget(self) -> None:
        """Lets go of what it carried."""
        self.tensors, self.outputs = [], None

    def words_for(self, layout: SequenceLayout) -> IntArray:
        """`given` with another batch's record."""
        words = self._words.copy()
        write_record(layout, self.shape, words[: self.shape.record_len])
        return words


@dataclass(slots=True, eq=False)
class Flight:
    """One exchange under way. Dropped before it has landed, it gives its slot back all the same.

    `landed` is set when nothing more is to be done about its slot, whether its tokens came or not.
    """

    transport: Transport
    number: int
    slot: Any
    length: int  # tokens a rank
    depths: list[dict[str, torch.Tensor]]  # the rolls, to be written
    stream: Any = None  # the CUDA stream that it was launched from
    work: Any = None
    landed: bool = False

    def __del__(self) -> None:
        if not self.landed:
            self.transport.abandon(self)


class Transport(ABC):
    """Moves packed tokens between the ranks of a group. Knows plans and kernels, not schedules."""

    name: str

    def __init__(self, group: ExchangeGroup, shape: PlanShape, cargo: Cargo, traffic: Traffic) -> None:
        self.group, self.shape, self.cargo, self.traffic = group, shape, cargo, traffic
        self.device = cargo.device
        self.launched = 0
        # In pinned memory kernels write it where the host reads it without waiting: 1 + the source whose plan
        # differs, then 1 + the cp rank that is late with tokens and with an acknowledgement.
        self.trouble = torch.zeros(4, dtype=torch.int32, pin_memory=self.device.type == "cuda")
        self._trouble = self.trouble.numpy()
        self._troubles: Any = self._trouble.view("int64")  # the same in two words, looked at in 0.1 µs
        self.table = torch.from_numpy(shape.table).to(self.device)
        self.cargo_table = torch.from_numpy(cargo.table).to(self.device)
        self._message_bytes = WORD_BYTES * cargo.words * shape.num_send_rows

    @property
    def has_peers(self) -> bool:
        return bool(self.shape.sources or self.shape.destinations)

    @abstractmethod
    def launch(
        self, tensors: list[torch.Tensor], layout: SequenceLayout, ready: torch.cuda.Event | None = None
    ) -> Flight:
        """Packs `tensors` (Cargo.tensors) and sends them. Never blocks the host on CUDA. `ready` as in Roller.start."""

    @abstractmethod
    def land(self, flight: Flight) -> list[dict[str, torch.Tensor]]:
        """Waits for the flight, on the current stream on CUDA; the rolls by depth and name."""

    @abstractmethod
    def abandon(self, flight: Flight) -> None:
        """Takes back the slot of a flight that will not land. Called by a finaliser: launches nothing."""

    @abstractmethod
    def close(self) -> None:
        """Lets the buffers go, when all that uses them has run. Raises what `check` does."""

    def set_replay_layout(self, flight: Flight, layout: SequenceLayout) -> None:
        """Gives a flight that was captured in a CUDA graph other documents for the replays to come."""
        raise RuntimeError("only an exchange that was captured in a CUDA graph can be given another layout")

    def check(self) -> None:
        """Raises RuntimeError if a peer was found late, or to have another plan. Never waits."""
        if not (self._troubles[0] or self._troubles[1]):
            return
        source, *late = (int(word) for word in self._trouble)
        self._trouble[:] = 0
        where = f"in one of the exchanges up to number {self.launched - 1}"
        for peer, what in zip(late, LATE, strict=False):
            if peer:
                raise RuntimeError(
                    f"overlap_mtp: cp rank {self.shape.cp_rank} of {self.shape.cp_size} gave up waiting for "
                    f"{what} of cp rank {peer - 1} ({where}): that rank is missing, late or at another exchange"
                )
        peer = self.shape.sources[source - 1]
        raise RuntimeError(
            f"overlap_mtp: cp rank {peer} exchanged tokens by another plan than cp rank {self.shape.cp_rank} "
            f"({where}): all ranks of a cp group must pass the same layout (cu_seqlens, valid_lengths) for the "
            "same microbatch"
        )

    def describe(self, flight: Flight) -> str:
        return f"exchange {flight.number} ({self.shape.num_depths} depths, {self._message_bytes} bytes sent)"


def num_units(shape: PlanShape, layout: SequenceLayout) -> int:
    """The units that a batch has: its documents, or its one stream."""
    return layout.num_documents if shape.by_document else 1
