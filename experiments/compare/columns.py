"""The columns of a comparison's tables: what each says of a schedule's row of the record."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from compare.comparison import TIMING_ONLY, TOKENS

BASELINE = TOKENS.baseline
RATIO = "/ no exchange"
Row = dict[str, Any]
Columns = dict[str, Callable[[str, Row], str]]  # by heading: the cell of a schedule and its row


def figure(value: float, like: float | None = None, digits: int = 4) -> str:
    """Return a number with about `digits` digits, and as many decimals as another one would have."""
    size = abs(value if like is None else like)
    decimals = next((n for n in range(digits - 1, 0, -1) if size < 10 ** (digits - n)), 0)
    return f"{value:z,.{decimals}f}"  # z: no -0


def _ratio(mode: str, row: Row) -> str:
    value, low, high = (row["ratio"][part] for part in ("value", "low", "high"))
    if value == low == high == 1:
        return "1"
    return f"{figure(value)} [{figure(low, value)}, {figure(high, value)}]"


def stalls_of(row: Row) -> list[dict[str, float]]:
    """Return the stall of the forward pass and, of activations, that of the backward pass, if they were measured."""
    return [one for one in (row["stall_us"], row.get("backward_stall_us")) if one is not None]


def _same(mode: str, row: Row) -> str:
    if mode in (BASELINE, TIMING_ONLY):
        return "reference" if mode == BASELINE else "-"
    equal = row["rolls_equal"] and row["loss_equal"] and row.get("gradients_equal", True)
    return "yes" if equal else "NO"


NARROW: Columns = {
    "schedule": lambda mode, _: mode,
    "step (ms)": lambda _, row: figure(row["median_ms"]),
    RATIO: _ratio,
    "stall (µs)": lambda _, row: " + ".join(f"{one['value']:,.0f}" for one in stalls_of(row)) or "-",
    "messages": lambda _, row: f"{row['messages_per_step']:,.0f}",
    "same bits": _same,
}
NARROW_CAPTION = (
    f"median over rounds of the slowest rank; {RATIO}: ratio to the step of {BASELINE} (activations: of "
    f"{TIMING_ONLY}) [95 % interval]; stall: how long the rolls held up the compute stream, on GPUs (activations: "
    "forward + backward); messages: of all ranks, in a step; "
    f"{TIMING_ONLY}: rolls wrong values and sends nothing, for timing only"
)


def _interval(one: dict[str, float] | None, digits: int) -> str:
    if one is None:
        return "-"
    value, low, high = (f"{one[part]:.{digits}f}" for part in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _efficiency(mode: str, row: Row) -> str:
    return _interval(None if mode in (BASELINE, TIMING_ONLY) else row["efficiency"], 2)


def _same_of_each(mode: str, row: Row) -> str:
    if mode in (BASELINE, TIMING_ONLY):
        return "the reference" if mode == BASELINE else "timing only"
    cells = ["yes" if row[which] else "NO" for which in ("rolls_equal", "loss_equal")]
    if "gradients_equal" in row:
        cells.append(f"gradients {'yes' if row['gradients_equal'] else 'NO'}")
    return ", ".join(cells)


def _host(row: Row) -> str:
    times = (row["host_us"], row.get("backward_host_us"))
    return " + ".join(f"{one:.0f}" for one in times if one is not None) or "-"


WIDE: Columns = {
    "schedule": lambda mode, _: mode,
    "step ms (p10-p90)": lambda _, row: f"{row['median_ms']:.2f} ({row['p10_ms']:.2f}-{row['p90_ms']:.2f})",
    RATIO: lambda _, row: _interval(row["ratio"], 4),
    "step delta µs": lambda _, row: _interval(row["step_delta_us"], 0),
    "stall µs": lambda _, row: " + ".join(_interval(one, 0) for one in stalls_of(row)) or "-",
    "efficiency": _efficiency,
    "tokens/s": lambda _, row: f"{row['tokens_per_s']:,.0f}",
    "host µs": lambda _, row: _host(row),
    "messages": lambda _, row: f"{row['messages_per_step']:.0f}",
    "KB": lambda _, row: f"{row['bytes_per_step'] / 1000:.1f}",
    "loss": lambda _, row: f"{row['loss']:.5f}",
    "same rolls, loss": _same_of_each,
}
WIDE_CAPTION = (
    "median [95 % interval]; step delta: step minus the step without any exchange; stall: how long the rolls held up "
    "the compute stream of the slowest rank, by CUDA events; host: time in their calls (stall and host of activations: "
    "forward + backward); messages and KB of all ranks together"
)
