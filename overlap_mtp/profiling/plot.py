"""A timeline of one device: a lane for each stream, `sync` above `prefetch`, whole steps and a close look."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from overlap_mtp.profiling.classify import REGIONS, Lane, Role, base_name
from overlap_mtp.profiling.intervals import Ints, Union, covered, length, merge

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import Patch

PREFERRED = ("sync", "prefetch")  # from top to bottom
LOOKS = {  # drawn in this order, so that short messages lie on top
    Role.NEITHER: ("#dddddd", "host copies"),
    Role.OPAQUE: ("#f0e6c8", "CUDA graph"),
    Role.COMPUTE: ("#9db4c0", "compute"),
    Role.MODEL: ("#b79ecb", "other communication"),
    Role.LOCAL: ("#5f9e6e", "unroll"),
    Role.EXCHANGE: ("#c8371b", "the exchange"),
}
REGION_COLOURS = {"trunk": "#e4e4e4", "depth": "#f2d59b", "loss": "#d5e3d0", "backward": "#d9d3e8"}
NEAR_NS = 300_000  # messages closer than this are looked at together
ZOOM_NS = (200_000, 1_500_000)  # the shortest and longest close view
RESOLUTION = 4000  # what is closer than this part of a view is drawn as one


@dataclass(frozen=True)
class View:
    """One panel: the activities of a step (or of a whole profile), and from when to when to look; ns."""

    lane: Lane
    name: str
    members: Ints
    begin: int
    end: int

    def of(self, role: Role) -> Ints:
        members: Ints = self.members[self.lane.role[self.members] == role]
        return members


def draw(lanes: Sequence[Lane], path: Path) -> None:
    """Draws the first device that has the most of `sync` and `prefetch`, the last step of each, into a PNG."""
    lane = max(lanes, key=lambda one: len({base_name(step.schedule) for step in one.steps} & set(PREFERRED)))
    views = [_whole(lane, name, members) for name, members in _chosen(lane)]
    heights = [1.6 + np.unique(lane.stream[view.members]).size for view in views]
    figure, grid = plt.subplots(
        len(views),
        2,
        figsize=(13, 1.2 + 0.5 * sum(heights)),
        height_ratios=heights,
        layout="constrained",
        squeeze=False,
    )
    whole = max(view.end - view.begin for view in views)  # one scale for all steps
    for row, view in enumerate(views):
        begin, close = _close_look(view)
        _draw_view(grid[row, 0], view, (0, whole), 1e6)
        grid[row, 0].axvspan(begin / 1e6, (begin + close) / 1e6, color="black", alpha=0.08)
        grid[row, 0].set_title(f"{view.name}: {_said(view)}", fontsize=9, loc="left")
        _draw_view(grid[row, 1], view, (begin, begin + close), 1e3, begin)
        grid[row, 1].set_title(f"the shaded {close / 1e3:,.0f} µs", fontsize=9, loc="left")
        grid[row, 1].set_yticklabels([])
    grid[-1, 0].set_xlabel("ms since the step's first kernel", fontsize=8)
    grid[-1, 1].set_xlabel("µs", fontsize=8)
    used = {role for role in LOOKS if any(view.of(role).size for view in views)}
    patches = [Patch(color=colour, label=label) for role, (colour, label) in LOOKS.items() if role in used]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), fontsize=8, frameon=False)
    figure.suptitle(lane.label, fontsize=10)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def _chosen(lane: Lane) -> list[tuple[str, Ints]]:
    """The last step of each preferred schedule, else of two others, else everything."""
    steps = {step.schedule: index for index, step in enumerate(lane.steps) if (lane.step == index).any()}
    names = [name for wanted in PREFERRED for name in steps if base_name(name) == wanted] or list(steps)[:2]
    return [(name, np.flatnonzero(lane.step == steps[name])) for name in names] or [
        ("whole profile", np.arange(lane.start.size))
    ]


def _whole(lane: Lane, name: str, members: Ints) -> View:
    return View(lane, name, members, int(lane.start[members].min()), int(lane.end[members].max()) + 1)


def _close_look(view: View) -> tuple[int, int]:
    """Where a close look begins and how long it is: at the step's first exchange, or else communication; ns."""
    lane, members = view.lane, view.of(Role.EXCHANGE)
    if not members.size:
        members = view.of(Role.MODEL) if view.of(Role.MODEL).size else view.members
    starts, ends = merge(lane.start[members], np.maximum(lane.end[members], lane.start[members] + 1), NEAR_NS)
    begin, length_ns = int(starts[0]) - view.begin, int(ends[0] - starts[0])
    width = min(max(2 * length_ns, ZOOM_NS[0]), ZOOM_NS[1])
    return max(0, begin - max(width - length_ns, width // 4) // 2), width


def _said(view: View) -> str:
    lane, exchange = view.lane, view.of(Role.EXCHANGE)
    if not exchange.size:
        return f"{(view.end - view.begin) / 1e6:.2f} ms"
    compute = view.of(Role.COMPUTE)
    union = merge(lane.start[exchange], lane.end[exchange])
    hidden = int(covered(merge(lane.start[compute], lane.end[compute]), *union).sum())
    time = length(union)
    return (
        f"{(view.end - view.begin) / 1e6:.2f} ms, exchange {time / 1e3:,.0f} µs, "
        f"{100 * hidden / time if time else 0:.0f} % of it under compute"
    )


def _draw_view(axes: Any, view: View, window: tuple[int, int], unit: float, origin: int = 0) -> None:
    """Streams from top to bottom, above them the parts of the step.

    `window` is from when to when to look and `origin` the axis's 0, both in ns since the step began; `unit` is the
    axis's, in ns.
    """
    lane, gap = view.lane, (window[1] - window[0]) // RESOLUTION
    streams = np.unique(lane.stream[view.members]).tolist()
    place = _Place(axes, view.begin + origin, unit)
    for number, stream in enumerate(streams):
        for role, (colour, _) in LOOKS.items():
            members = view.of(role)
            members = members[lane.stream[members] == stream]
            place.bars(merge(lane.start[members], lane.end[members], gap), (-number - 0.4, 0.8), colour)
    for part in np.unique(lane.region[view.members]).tolist():
        name = lane.parts[part].split()[0]
        if name in REGIONS:
            members = view.members[lane.region[view.members] == part]
            union = merge(lane.start[members], lane.end[members], (view.end - view.begin) // 50)
            place.bars(union, (0.65, 0.6), REGION_COLOURS[name])
            place.name(lane.parts[part], union, (view.begin + window[0], view.begin + window[1]))
    axes.set_xlim((window[0] - origin) / unit, (window[1] - origin) / unit)
    axes.set_ylim(-len(streams) + 0.4, 1.35)
    axes.set_yticks([0.95, *(-number for number in range(len(streams)))])
    axes.set_yticklabels(["part of step", *(f"stream {stream}" for stream in streams)], fontsize=8)
    axes.tick_params(axis="x", labelsize=8, labelbottom=True)
    axes.spines[["top", "right"]].set_visible(False)


@dataclass(frozen=True)
class _Place:
    """Puts times on an axis."""

    axes: Any
    origin: int
    unit: float

    def at(self, time: float) -> float:
        return (time - self.origin) / self.unit

    def bars(self, union: Union, place: tuple[float, float], colour: str) -> None:
        bars = [(self.at(a), (b - a) / self.unit) for a, b in zip(*union, strict=True)]
        if bars:  # the edge keeps visible what is shorter than a pixel
            self.axes.broken_barh(bars, place, facecolors=colour, edgecolors=colour, linewidth=0.4)

    def name(self, part: str, union: Union, window: tuple[int, int]) -> None:
        """Writes the part's name where there is room, and a line where an MTP depth begins."""
        for start, end in zip(union[0].tolist(), union[1].tolist(), strict=True):
            if part.startswith("depth") and window[0] <= start <= window[1]:
                self.axes.axvline(self.at(start), color="#a8741a", linewidth=0.8, linestyle=":")
            start, end = max(start, window[0]), min(end, window[1])
            share = (end - start) / (window[1] - window[0])
            if share > 0.02:
                text = part if share > 0.07 else part.split()[-1] if part.startswith("depth") else ""
                self.axes.text(self.at((start + end) / 2), 0.95, text, ha="center", va="center", fontsize=7)
