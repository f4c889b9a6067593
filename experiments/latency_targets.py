"""The targets of the rolls' latency, and which of them a record meets."""

from __future__ import annotations

from typing import Any

from latency.cases import MEGATRON, Point
from latency.report import Row, find

HOST_US = {"process_group": 80, "symmetric": 40}  # start and joins of a microbatch, D = 2
GPU_US = {"process_group": 15, "symmetric": 7}  # one exchange, pack to unroll
GROWTH = 1.2  # from the fewest documents or depths to the most
SPEEDUP = {1: 20, 32: 500}  # of wall time against Megatron-LM, by documents
SYNC = 1.15  # of Megatron-LM's wall time


def targets_of(rows: list[Row]) -> list[dict[str, Any]]:
    """Every target that the rows can decide, for `prefetch` on all ranks and the first number of tokens."""
    ran = [row for row in rows if row["failed"] is None]
    if not ran:
        return []
    cp_size, tokens = max(row["cp_size"] for row in ran), rows[0]["tokens"]
    here = [row for row in ran if row["cp_size"] == cp_size and row["tokens"] == tokens]
    found = []
    for transport in HOST_US:
        mine = [row for row in here if (row["schedule"], row["transport"]) == ("prefetch", transport)]
        found += _of_transport(mine, transport) + _speedups(rows, mine, transport)
    return found + _of_sync(rows)


def _of_transport(rows: list[Row], transport: str) -> list[dict[str, Any]]:
    two_deep = [row for row in rows if row["depths"] == 2]
    found = []
    for quantity, limits in (("host_us", HOST_US), ("gpu_us", GPU_US)):
        measured = [row for row in two_deep if row[quantity]]
        if measured:
            worst = max(measured, key=lambda row: float(row[quantity]["median"]))
            what = f"{transport}: {quantity[:-3]} µs of one exchange, D = 2, worst: {worst['documents']} documents"
            one = worst[quantity]
            found.append(_target(what, limits[transport], one["median"], one["low"], one["high"]))
    found += _growth(f"{transport}: host time by documents", two_deep, "documents")
    for documents in sorted({row["documents"] for row in rows}):
        line = [row for row in rows if row["documents"] == documents]
        found += _growth(f"{transport}: host time by depths, {documents} documents", line, "depths")
    return found


def _growth(what: str, line: list[Row], axis: str) -> list[dict[str, Any]]:
    """Of host time, from the smallest of the line to the largest."""
    ordered = sorted(line, key=lambda row: int(row[axis]))
    if len(ordered) < 2:
        return []
    first, last = ordered[0], ordered[-1]
    what = f"{what}, {last[axis]} over {first[axis]}"
    return [_target(what, GROWTH, *_ratio(last["host_us"], first["host_us"]))]


def _speedups(rows: list[Row], mine: list[Row], transport: str) -> list[dict[str, Any]]:
    found = []
    for row in mine:
        point, baseline = point_of(row), megatron_at(rows, point_of(row))
        if baseline and row["depths"] == 2 and row["documents"] in SPEEDUP:
            kind = "dense" if point.documents == 1 else f"{point.documents} documents"
            ratio = _ratio(baseline["wall_us"], row["wall_us"])
            what = f"{transport}: wall time of Megatron-LM over ours, D = 2, {kind}"
            found.append(_target(what, SPEEDUP[point.documents], *ratio, at_most=False))
    return found


def _of_sync(rows: list[Row]) -> list[dict[str, Any]]:
    """`sync` against Megatron-LM, where it does worst."""
    ratios = []
    for row in rows:
        baseline = megatron_at(rows, point_of(row))
        if row["schedule"] == "sync" and row["failed"] is None and baseline:
            ratios.append((_ratio(row["wall_us"], baseline["wall_us"]), point_of(row)))
    if not ratios:
        return []
    ratio, point = max(ratios, key=lambda one: one[0][0])
    where = f"cp {point.cp_size}, D = {point.depths}, {point.documents} documents"
    return [_target(f"wall time of sync over Megatron-LM, worst: {where}", SYNC, *ratio)]


def megatron_at(rows: list[Row], point: Point) -> Row | None:
    """Megatron-LM in its fastest form at a point, where it ran."""
    both = [find(rows, point, MEGATRON, where) for where in ("host", "device")]
    ran = [row for row in both if row is not None]
    return min(ran, key=lambda row: float(row["wall_us"]["median"]), default=None)


def point_of(row: Row) -> Point:
    return Point(row["cp_size"], row["depths"], row["documents"], row["tokens"])


def _ratio(over: dict[str, float], under: dict[str, float]) -> tuple[float, float, float]:
    """Value, low, high: the interval from the far ends of the two intervals, wider than it need be."""
    return over["median"] / under["median"], over["low"] / under["high"], over["high"] / under["low"]


def _target(
    what: str, limit: float, value: float, low: float, high: float, at_most: bool = True
) -> dict[str, Any]:
    met = high <= limit if at_most else low >= limit  # beyond doubt
    return {
        "what": what,
        "limit": limit,
        "at_most": at_most,
        "value": round(value, 4),
        "low": round(low, 4),
        "high": round(high, 4),
        "met": met,
    }
