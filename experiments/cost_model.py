"""What an exchange costs a step: counts from the library, a few costs each, and least squares to find them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import combinations

import numpy as np
import numpy.typing as npt

from overlap_mtp import SequenceLayout
from overlap_mtp.exchange.plan import make_plan

Array = npt.NDArray[np.float64]
TENSORS = 4
WORD_BYTES = 8  # of a token of one tensor on the wire
SCHEDULES = ("sync", "merged", "overlap", "prefetch")


@dataclass(frozen=True)
class Load:
    """What a step has to exchange. `documents` 1 is a dense sequence."""

    schedule: str
    cp_size: int
    depths: int
    documents: int
    max_documents: int = 128


@dataclass(frozen=True)
class Counts:
    """Of one microbatch, on the rank that sends most."""

    exchanges: int  # one after another: what waits for what
    messages: int
    bytes: int


@cache
def count(load: Load) -> Counts:
    """Messages and bytes as the library's plans have them, for zigzag layouts and any cp_size."""
    if load.schedule == "sync":  # a token a message, each tensor, depth and document for itself
        neighbours = max(len(peers) for _, peers in _shapes(load.cp_size, 1, 1, False))
        exchanges = TENSORS * load.depths * load.documents
        return Counts(exchanges, exchanges * neighbours, exchanges * neighbours * WORD_BYTES)
    exchanges, depths = (1, load.depths) if load.schedule == "prefetch" else (load.depths, 1)
    shapes = _shapes(load.cp_size, depths, max(load.max_documents, load.documents), load.documents > 1)
    rows, peers = max(shape[0] for shape in shapes), max(len(shape[1]) for shape in shapes)
    return Counts(exchanges, exchanges * peers, exchanges * rows * TENSORS * WORD_BYTES)


@cache
def _shapes(
    cp_size: int, depths: int, max_documents: int, packed: bool
) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Rows that each rank sends in an exchange, and to whom."""
    seq_len = 2 * cp_size * max(64, depths)
    kind = SequenceLayout.packed([0, seq_len], cp_size) if packed else SequenceLayout.dense(seq_len, cp_size)
    shapes = (make_plan(kind, rank, depths, max_documents) for rank in range(cp_size))
    return tuple((sum(shape.send_rows), tuple(shape.destinations)) for shape in shapes)


@dataclass(frozen=True)
class Step:
    """A step without exchange (`prepared`), and what of it can hide one. Times in µs."""

    floor_us: float
    forward_us: float
    launch_us: float  # host time that launching a forward pass takes
    rolled_share: float  # of the forward pass, what is done when the last depth is rolled
    trunk_share: float  # of the forward pass, from behind its first layer
    layer_share: float  # of the forward pass: one MTP layer and its head


@dataclass(frozen=True)
class Costs:
    """All that is fitted to a link, in µs (per KB: of 1000 bytes). Never negative."""

    host_exchange_us: float  # launching a packed exchange and its join
    host_plan_us: float  # building and uploading the plan of a packing
    host_document_us: float  # ... for each document of it
    host_roll_us: float  # of `sync`: launching the local work of one roll of one tensor
    host_message_us: float  # launching a single send, and its receive
    roll_us: float  # of `sync`: the local work of one roll on the device
    message_us: float  # a single send on the device
    packed_message_us: float  # a packed message on the device, pack and unroll included
    kilobyte_us: float

    def host_us(self, load: Load) -> float:
        """Host time that the schedule adds to a step."""
        costs = (self.host_exchange_us, self.host_plan_us, self.host_roll_us, self.host_message_us)
        return float(np.dot(host_terms(load), costs)) + self.host_document_us * documents_planned(load)

    def device_us(self, load: Load) -> float:
        """Device time of all exchanges, hidden or not."""
        costs = (self.roll_us, self.message_us, self.packed_message_us, self.kilobyte_us)
        return float(np.dot(device_terms(load), costs))

    def step_delta_us(self, load: Load, step: Step) -> float:
        """What a step gets longer by: on the device, or on the host where that is what the device waits for."""
        return max(self._unhidden_us(load, step), self.host_us(load) - slack_us(step))

    def _unhidden_us(self, load: Load, step: Step) -> float:
        exchanges = count(load).exchanges
        each = self.device_us(load) / exchanges
        trunk, layer = step.trunk_share * step.forward_us, step.layer_share * step.forward_us
        if load.schedule == "prefetch":
            return max(0.0, each - trunk)
        if load.schedule == "overlap":
            return max(0.0, each - trunk) + (exchanges - 1) * max(0.0, each - layer)
        return exchanges * each

    def share(self, load: Load, step: Step) -> float:
        """Of the step, what the exchange takes."""
        exposed = self.step_delta_us(load, step)
        return exposed / (step.floor_us + exposed)


def slack_us(step: Step) -> float:
    """How far the device is behind the host at the last roll: none on a step that the host bounds.

    So much host time costs nothing.
    """
    return step.rolled_share * max(0.0, step.forward_us - step.launch_us)


def documents_planned(load: Load) -> int:
    """Documents of the plan that a packing needs."""
    return load.documents if load.schedule != "sync" and load.documents > 1 else 0


def host_terms(load: Load) -> list[float]:
    """How often each host cost is paid: exchange, plan, roll, single message."""
    counted = count(load)
    if load.schedule == "sync":
        return [0, 0, TENSORS * load.depths, counted.messages]
    return [counted.exchanges, load.documents > 1, 0, 0]


def device_terms(load: Load) -> list[float]:
    """How often each device cost is paid: roll, single message, packed message, KB."""
    counted = count(load)
    if load.schedule == "sync":
        return [TENSORS * load.depths, counted.messages, 0, counted.bytes / 1000]
    return [0, 0, counted.messages, counted.bytes / 1000]


@dataclass(frozen=True)
class Measured:
    """A schedule in one recorded comparison."""

    run: str
    load: Load
    step: Step
    step_delta_us: float
    low_us: float
    high_us: float
    host_us: float  # more than `prepared` has
    held_out: bool

    @property
    def stderr_us(self) -> float:
        """What it may be off by: half its interval, or a tenth of itself, which is what the model hopes for."""
        return max((self.high_us - self.low_us) / 2, abs(self.step_delta_us) / 10, 1.0)


@dataclass(frozen=True)
class IsolatedExchange:
    """A microbatch's packed exchanges isolated, from `roll_latency`."""

    load: Load
    messages: int
    bytes: int
    host_us: float
    gpu_us: float | None
    stderr_us: float  # of the GPU time


def fit(steps: list[Measured], isolated: list[IsolatedExchange]) -> Costs:
    """Costs that explain the steps that are not held out. Raises ValueError where there are none.

    What a document costs the host comes from exchanges isolated, all else of the host from host times in steps: in a
    loop of nothing else they are shorter. Device costs come from GPU times of exchanges isolated, and from what
    blocking schedules expose where the device hides their host time.
    """
    used = [one for one in steps if not one.held_out]
    if not used:
        raise ValueError("no comparison to fit to: see --fit-documents")
    document_us = _document_us(isolated)
    values = np.array([one.host_us - document_us * documents_planned(one.load) for one in used])
    doubts = np.array([max(one.host_us, 1.0) for one in used])  # relative errors
    host = nnls(np.array([host_terms(one.load) for one in used], np.float64), values, doubts)
    at_slack = [
        one
        for one in used
        if one.load.schedule in ("sync", "merged")
        and np.dot(host_terms(one.load), host) + document_us * documents_planned(one.load)
        <= slack_us(one.step)
    ]
    device = _fit_device(at_slack, [one for one in isolated if one.gpu_us is not None])
    exchange, plan, roll, message = (float(cost) for cost in host)
    return Costs(exchange, plan, document_us, roll, message, *(float(cost) for cost in device))


def _document_us(isolated: list[IsolatedExchange]) -> float:
    if not isolated:
        return 0.0
    terms = [[*host_terms(one.load)[:2], documents_planned(one.load)] for one in isolated]
    values = np.array([one.host_us for one in isolated])
    return float(nnls(np.array(terms, np.float64), values, values)[2])


def _fit_device(blocking: list[Measured], isolated: list[IsolatedExchange]) -> Array:
    terms = [device_terms(one.load) for one in blocking]
    terms += [[0.0, 0.0, one.messages, one.bytes / 1000] for one in isolated]
    if not terms:
        return np.zeros(4)
    values = [one.step_delta_us for one in blocking] + [one.gpu_us or 0.0 for one in isolated]
    doubts = [one.stderr_us for one in blocking] + [one.stderr_us for one in isolated]
    return nnls(np.array(terms, np.float64), np.array(values), np.array(doubts))


def nnls(terms: Array, values: Array, doubts: Array) -> Array:
    """Least squares without negative solutions: `terms` [n, p] @ solution = `values` [n], each to its doubt.

    Exact for the few columns that there are: the best of all choices of columns whose solution has no negative.
    """
    a, b = terms / doubts[:, None], values / doubts
    best, least = np.zeros(a.shape[1]), float(b @ b)
    for size in range(1, a.shape[1] + 1):
        for columns in map(list, combinations(range(a.shape[1]), size)):
            solution, _, rank, _ = np.linalg.lstsq(a[:, columns], b, rcond=None)
            left = b - a[:, columns] @ solution
            if rank == size and (solution >= 0).all() and left @ left < least * (1 - 1e-9):
                best, least = np.zeros(a.shape[1]), float(left @ left)
                best[columns] = solution
    return best
