"""The names of schedules in a profile, and the order in which they are shown."""

from __future__ import annotations

from collections.abc import Iterable

EVERYTHING, OUTSIDE = "all", "outside steps"  # stand for a schedule if there is no step
FLOOR, BASELINE, JUDGED = "prepared", "sync", "prefetch"
USUAL_ORDER = (BASELINE, "merged", "batched", "overlap", JUDGED, FLOOR, "none")


def base_name(schedule: str) -> str:
    """Return `prefetch` for `prefetch:process_group`, which names a transport too."""
    return schedule.split(":")[0]


def in_usual_order(schedules: Iterable[str]) -> list[str]:
    """Return each name once: those of USUAL_ORDER, then others as they come, and what is outside of steps last.

    A name with a transport comes after the same name without one.
    """

    def place(name: str) -> tuple[int, str]:
        if name == OUTSIDE:
            return len(USUAL_ORDER) + 1, ""
        base = base_name(name)
        return (USUAL_ORDER.index(base), name) if base in USUAL_ORDER else (len(USUAL_ORDER), "")

    return sorted(dict.fromkeys(schedules), key=place)
