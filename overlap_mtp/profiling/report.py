"""What a report says: rows for ranges, totals for devices, and a summary for each schedule."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from overlap_mtp.profiling.classify import IN_BACKWARD, DeviceTimeline
from overlap_mtp.profiling.schedule_names import EVERYTHING, JUDGED, base_name

JOINS = ("join", "unroll")  # where the compute waits for the exchange
JSON_VERSION = 5  # 4 did not say how much single steps hide in the mean


@dataclass(frozen=True)
class Row:
    """The communication of one range on one device; for kind "local" the exchange's own work on the device.

    The numbers are sums over `steps` steps; None means that a number does not apply or is not known. `exposed_us` is
    communication that no compute covers on the device. `peer_wait_us` is how much longer the kernels took than on
    the rank where each took least.
    """

    device: str
    schedule: str
    range: str
    kind: str  # exchange, experts (DeepEP and others), model (any other communication) or local
    steps: int
    time_us: float
    hidden_us: float | None
    exposed_us: float | None
    hidden_fraction: float | None
    peer_wait_us: float | None
    launches: int
    bytes: int | None


@dataclass(frozen=True)
class Schedule:
    """One schedule over all devices. Fractions are of the time of all devices together, `worst` of one device."""

    name: str
    steps: int
    step_ms: float | None  # median; a step lasts from its first to its last activity, on its slowest device
    exchange_hidden: float | None  # fraction of the ranges `pack` and `send-recv`
    exchange_worst: float | None
    exchange_mean: float | None  # of single steps, each device's for itself, however long their exchange is
    exchange_p10: float | None  # a tenth of these steps hide less
    exchange_least: float | None  # in the worst of them
    all_hidden: float | None  # fraction of all communication
    all_worst: float | None
    efficiency: float | None  # E; None without `sync` and `prepared` steps


@dataclass(frozen=True)
class DeviceTotal:
    """All communication of one schedule on one device. The numbers are sums over `steps` steps.

    `peer_wait_us` is of all kernels that have a peer; None if the wait of one of them is not known.
    """

    device: str
    schedule: str
    steps: int
    communication_us: float
    hidden_us: float
    exposed_us: float
    hidden_fraction: float | None  # None without communication
    peer_wait_us: float | None
    compute_us: float


@dataclass(frozen=True)
class Report:
    """What was found in one recording; `notes` says what limits it."""

    sources: tuple[str, ...]
    rows: tuple[Row, ...]
    schedules: tuple[Schedule, ...]
    notes: tuple[str, ...]
    timelines: tuple[DeviceTimeline, ...]
    totals: tuple[DeviceTotal, ...]

    def judged(self) -> tuple[str, float | None]:
        """Return what `--min-hidden` judges, and its hidden fraction on the worst device (None: there is none).

        That is the exchange of the `prefetch` steps; without step ranges the exchange of the whole profile; without
        any range of this project all communication.
        """
        by_name = {schedule.name: schedule for schedule in self.schedules}
        if not any(timeline.has_ours for timeline in self.timelines):
            return "all communication", by_name[EVERYTHING].all_worst
        if any(timeline.steps for timeline in self.timelines):
            shares = [one.exchange_worst for one in self.schedules if base_name(one.name) == JUDGED]
            found = [share for share in shares if share is not None]
            return f"the exchange in {JUDGED} steps", min(found, default=None)
        return "the exchange", by_name[EVERYTHING].exchange_worst

    def join_us(self) -> float:
        """Return how long the ranges `join` and `unroll` take beside what `judged` looks at, on the slowest device.

        In µs of a mean step, or of the whole profile if it has no steps. A kernel there may wait for the peers: an
        exchange can be hidden while the step stands still at its join.
        """
        has_steps = any(timeline.steps for timeline in self.timelines)
        times: dict[tuple[str, str], float] = {}
        for row in self.rows:
            judged = base_name(row.schedule) == JUDGED if has_steps else row.schedule == EVERYTHING
            if judged and row.range.removesuffix(IN_BACKWARD) in JOINS:
                key = row.device, row.schedule
                times[key] = times.get(key, 0) + row.time_us / max(1, row.steps)
        return max(times.values(), default=0)

    def as_json(self) -> dict[str, Any]:
        """Return everything but the activities themselves."""
        what, fraction = self.judged()
        return {
            "version": JSON_VERSION,
            "units": {"_us": "microseconds", "_ms": "milliseconds", "bytes": "bytes", "hidden": "fraction"},
            "sources": list(self.sources),
            "devices": [timeline.label for timeline in self.timelines],
            "judged": {"what": what, "hidden_fraction": fraction},
            "totals": [asdict(total) for total in self.totals],
            "schedules": [asdict(schedule) for schedule in self.schedules],
            "rows": [asdict(row) for row in self.rows],
            "notes": list(self.notes),
        }
