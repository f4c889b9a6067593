"""Draw one device: a row for each stream, `sync` above `prefetch`, whole steps and a close view of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from overlap_mtp.profiling.classify import REGIONS, DeviceTimeline, Role
from overlap_mtp.profiling.intervals import Ints, Union, covered, length, merge
from overlap_mtp.profiling.schedule_names import BASELINE, JUDGED, base_name, in_usual_order
from overlap_mtp.profiling.streams import named_streams

PREFERRED = (BASELINE, JUDGED)
LOOKS = {  # drawn in this order, so that short messages lie on top
    Role.NEITHER: ("#dddddd", "host copies and the unknown"),
    Role.OPAQUE: ("#f0e6c8", "CUDA graph"),
    Role.COMPUTE: ("#9db4c0", "compute"),
    Role.MODEL: ("#b79ecb", "other communication"),
    Role.EXPERTS: ("#8a5aa8", "dispatch to experts"),
    Role.LOCAL: ("#5f9e6e", "unroll"),
    Role.EXCHANGE: ("#c8371b", "the exchange"),
}
REGION_COLOURS = {"trunk": "#e4e4e4", "depth": "#f2d59b", "loss": "#d5e3d0", "backward": "#d9d3e8"}
NEAR_NS = 300_000  # messages closer than this share a close view
ZOOM_NS = (200_000, 1_500_000)  # the shortest and longest close view
MOST_STREAMS = 24  # drawn: those with the most time
RESOLUTION = 4000  # bars closer than this part of a view are drawn as one


@dataclass(frozen=True)
class View:
    """The activities of a step (or of a whole profile), and the step's begin and end; ns."""

    timeline: DeviceTimeline
    name: str
    members: Ints
    begin: int
    end: int

    def of(self, role: Role) -> Ints:
        members: Ints = self.members[self.timeline.role[self.members] == role]
        return members

    def merged(self, members: Ints, gap: int = 0) -> Union:
        return merge(self.timeline.start[members], self.timeline.end[members], gap)


def can_write(path: Path) -> bool:
    """Return whether the end of a file's name is one of a kind of picture that can be written."""
    return path.suffix[1:].lower() in {"", *FigureCanvasAgg.get_supported_filetypes()}


def plot(timelines: Sequence[DeviceTimeline], path: Path) -> None:
    """Write what `draw` draws into a file; the end of its name tells the kind (`can_write`)."""
    draw(timelines).savefig(path, dpi=120)


def draw(timelines: Sequence[DeviceTimeline]) -> Figure:
    """Draw the last `sync` and `prefetch` steps of the first device that has both.

    If there are no such steps, draw two other schedules, or else the whole profile.
    """
    timeline = max(
        timelines, key=lambda one: len({base_name(step.schedule) for step in one.steps} & set(PREFERRED))
    )
    views = _views(timeline)
    heights = [1.6 + len(_streams(view)) for view in views]
    figure = Figure(figsize=(13, 1.2 + 0.5 * sum(heights)), layout="constrained")
    grid = figure.subplots(len(views), 2, height_ratios=heights, squeeze=False)
    whole = max(view.end - view.begin for view in views)  # one scale for all steps
    for (left, right), view in zip(grid, views, strict=True):
        begin, width = _close_view(view)
        _draw_view(left, view, (0, whole), 1e6)
        left.axvspan(begin / 1e6, (begin + width) / 1e6, color="black", alpha=0.08)
        left.set_title(f"{view.name[:60]}: {_title(view)}", fontsize=9, loc="left", parse_math=False)
        _draw_view(right, view, (begin, begin + width), 1e3, begin)
        right.set_title(f"the shaded {width / 1e3:,.0f} µs", fontsize=9, loc="left")
        right.set_yticklabels([])
    grid[-1, 0].set_xlabel("ms since the step's first kernel", fontsize=8)
    grid[-1, 1].set_xlabel("µs", fontsize=8)
    used = [look for role, look in LOOKS.items() if any(view.of(role).size for view in views)]
    patches = [Patch(color=colour, label=label) for colour, label in used]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), fontsize=8, frameon=False)
    figure.suptitle(_headline(timeline, views), fontsize=12, parse_math=False)
    return figure


def _headline(timeline: DeviceTimeline, views: Sequence[View]) -> str:
    """What the picture shows, and where it was recorded."""
    has_exchange = any(view.of(Role.EXCHANGE).size for view in views)
    what = "The exchange" if has_exchange else "Communication"
    when = "in one step of each schedule" if timeline.steps else "in the whole profile"
    source, where = timeline.profile.source, timeline.label
    where = where if source in where else f"{where} of {source}"
    return f"{what} beside compute {when} ({where[-80:]})"


def _views(timeline: DeviceTimeline) -> list[View]:
    """The last step of each preferred schedule, else of two others, over each transport; else everything."""
    steps = {
        step.schedule: at
        for at, step in enumerate(timeline.steps)
        if (timeline.step == at).any() and not step.is_cut
    }
    ordered = in_usual_order(steps)
    bases = list(dict.fromkeys(map(base_name, ordered)))
    chosen_bases = [base for base in bases if base in PREFERRED] or bases[:2]
    names = [name for name in ordered if base_name(name) in chosen_bases]
    chosen = [(name, np.flatnonzero(timeline.step == steps[name])) for name in names]
    return [
        View(
            timeline, name, members, int(timeline.start[members].min()), int(timeline.end[members].max()) + 1
        )
        for name, members in chosen or [("whole profile", np.arange(timeline.start.size))]
    ]


def _streams(view: View) -> dict[int, str]:
    """The streams to draw, from top to bottom, and what each does."""
    return named_streams(view.timeline, view.members, MOST_STREAMS)


def _close_view(view: View) -> tuple[int, int]:
    """Begin and width of the close view, which shows the step's first exchange, or else communication; ns."""
    members = next(m for m in (view.of(Role.EXCHANGE), view.of(Role.MODEL), view.members) if m.size)
    first = view.timeline.start[members]
    starts, ends = merge(first, np.maximum(view.timeline.end[members], first + 1), NEAR_NS)
    begin, length_ns = int(starts[0]) - view.begin, int(ends[0] - starts[0])
    width = min(max(2 * length_ns, ZOOM_NS[0]), ZOOM_NS[1])
    return max(0, begin - max(width - length_ns, width // 4) // 2), width


def _title(view: View) -> str:
    step = f"{(view.end - view.begin) / 1e6:.2f} ms"
    exchange = view.merged(view.of(Role.EXCHANGE))
    if not (time := length(exchange)):
        return step
    hidden = int(covered(view.merged(view.of(Role.COMPUTE)), *exchange).sum())
    return f"{step}, exchange {time / 1e3:,.0f} µs, {100 * hidden / time:.0f} % of it under compute"


def _draw_view(axes: Any, view: View, window: tuple[int, int], unit: float, origin: int = 0) -> None:
    """Draw the streams from top to bottom, and above them the parts of the step.

    Args:
        window: begin and end of what is shown, in ns since the step began.
        unit: the axis's unit, in ns.
        origin: the axis's 0, in ns since the step began.
    """
    timeline, resolution = view.timeline, (window[1] - window[0]) // RESOLUTION
    low, high = ((edge - origin) / unit for edge in window)

    def bars(union: Union, place: tuple[float, float], colour: str) -> list[list[float]]:
        """Draw a bar for each interval, and return the intervals in the axis's unit."""
        intervals: list[list[float]] = ((np.stack(union, 1) - view.begin - origin) / unit).tolist()
        spans = [(start, end - start) for start, end in intervals]
        if spans:  # the edge keeps visible what is shorter than a pixel
            axes.broken_barh(spans, place, facecolors=colour, edgecolors=colour, linewidth=0.4)
        return intervals

    streams = _streams(view)
    for number, stream in enumerate(streams):
        for role, (colour, _) in LOOKS.items():
            members = view.of(role)
            members = members[timeline.stream[members] == stream]
            bars(view.merged(members, resolution), (-number - 0.4, 0.8), colour)
    for part in np.unique(timeline.region[view.members]).tolist():
        name, _, depth = timeline.parts[part].partition(" ")
        if name not in REGIONS:
            continue
        members = view.members[timeline.region[view.members] == part]
        union = view.merged(members, (view.end - view.begin) // 50)
        for start, end in bars(union, (0.65, 0.6), REGION_COLOURS[name]):
            if depth and low <= start <= high:
                axes.axvline(start, color="#a8741a", linewidth=0.8, linestyle=":")
            start, end = max(start, low), min(end, high)
            share = (end - start) / (high - low)
            if share > 0.02:  # there is room for a name
                text = timeline.parts[part] if share > 0.07 else depth
                axes.text((start + end) / 2, 0.95, text, ha="center", va="center", fontsize=7)
    axes.set_xlim(low, high)
    axes.set_ylim(-len(streams) + 0.4, 1.35)
    axes.set_yticks([0.95, *(-number for number in range(len(streams)))])
    names = [f"{name}\n(stream {stream})" for stream, name in streams.items()]
    axes.set_yticklabels(["part of step", *names], fontsize=8)
    axes.tick_params(axis="x", labelsize=8, labelbottom=True)
    axes.spines[["top", "right"]].set_visible(False)
