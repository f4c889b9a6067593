"""What limits a report: what a profile lacks, and what in it cannot be told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from overlap_mtp.profiling.classify import DeviceTimeline, Role
from overlap_mtp.profiling.intervals import NONE
from overlap_mtp.profiling.names import NameKind, kind_of_name
from overlap_mtp.profiling.trace import Kind, Profile

MOST_NAMES = 5  # listed in a note
LONGEST_NAME = 100  # characters


def notes_on(
    profiles: Sequence[Profile], timelines: Sequence[DeviceTimeline], has_communication: bool
) -> Iterator[str]:
    """Yield a sentence for each thing that limits the report on these profiles."""
    untold = _untold(timelines)
    suspects = [name for name in untold if name]
    if not has_communication and not untold:
        yield "No communication: no kernel of NCCL, no copy between devices, nothing in a range of the exchange."
    elif not has_communication:
        yield "No kernel is known to be communication, but some cannot be told:"
    if suspects:
        shown = ", ".join(
            f"{untold[name]:,} x {name[:LONGEST_NAME]}" for name in sorted(suspects)[:MOST_NAMES]
        )
        more = f", and {len(suspects) - MOST_NAMES} more names" if len(suspects) > MOST_NAMES else ""
        yield f"Kernels that look like communication, of no known library, count as nothing: {shown}{more}."
    if unnamed := untold[""]:
        yield f"{unnamed:,} kernels have no names in the profile: they may be communication, and count as nothing."
    if not any(timeline.has_ours for timeline in timelines):
        yield "No ranges of overlap_mtp: communication is told by name alone."
    if any(timeline.steps for timeline in timelines) and all(
        (timeline.step == NONE).all() for timeline in timelines
    ):
        yield (
            "No activity could be tied to a step: the profile lacks the CUDA runtime calls. All of it counts as "
            "outside of the steps (--outside-steps)."
        )
    if cut := max((sum(step.is_cut for step in timeline.steps) for timeline in timelines), default=0):
        yield f"{cut} {'steps were' if cut > 1 else 'step was'} cut off by the end of the capture, and left out."
    if any((timeline.role == Role.OPAQUE).any() for timeline in timelines):
        yield "CUDA graphs were traced as a whole and count as nothing: profile with --cuda-graph-trace=node."
    if lost := sum(timeline.num_lost for timeline in timelines):
        yield (
            f"{lost:,} kernels are of CUDA graphs that were captured before the profile began, or of a trace without "
            "captures: they are told by name alone."
        )
    for profile in profiles:
        yield from profile.notes
    yield from _ranks(timelines)
    yield from _repeated(profiles)
    yield from _strangers(timelines)


def _untold(timelines: Sequence[DeviceTimeline]) -> Counter[str]:
    """How often each kernel runs that may be communication; "" for those without a name."""
    found: Counter[str] = Counter()
    for timeline in timelines:
        activities = timeline.profile.activities
        mine = timeline.activity[timeline.role == Role.NEITHER]
        mine = mine[activities.kind[mine] == Kind.KERNEL]
        names, counts = np.unique(activities.name[mine], return_counts=True)
        for name, count in zip(names.tolist(), counts.tolist(), strict=True):
            text = timeline.profile.names[name]
            found["" if kind_of_name(text) == NameKind.UNNAMED else text] += count
    return found


def _ranks(timelines: Sequence[DeviceTimeline]) -> Iterator[str]:
    ranks = {timeline.rank for timeline in timelines}
    known = sorted(rank for rank in ranks if rank is not None)
    if not known or None in ranks:
        return
    sizes = {timeline.profile.world_size for timeline in timelines} - {None}
    if len(sizes) > 1:
        yield f"The files are of different jobs: of {' and '.join(map(str, sorted(filter(None, sizes))))} ranks."
    size = max([known[-1] + 1, *filter(None, sizes)])
    if len(known) < size and (sizes or len(known) > 1):
        shown = ", ".join(map(str, known[:16])) + (", ..." if len(known) > 16 else "")
        yield f"{len(known)} of {size} ranks are there ({shown}): waits for the others are not known."


def _repeated(profiles: Sequence[Profile]) -> Iterator[str]:
    seen: dict[tuple[bytes, ...], Profile] = {}
    for profile in profiles if len(profiles) > 1 else ():
        activities = profile.activities
        key = (activities.start.tobytes(), activities.end.tobytes(), repr(list(profile.pids)).encode())
        if (other := seen.setdefault(key, profile)) is not profile:
            yield f"{profile.source} holds the same as {other.source}: one recording was given twice."


def _strangers(timelines: Sequence[DeviceTimeline]) -> Iterator[str]:
    """Say which devices other processes use, too. What they compute there does not hide anything."""
    users: dict[tuple[str, str, int], list[DeviceTimeline]] = {}
    for one in timelines:
        users.setdefault((one.profile.path, one.profile.source, one.device), []).append(one)
    for (_, source, device), each in users.items():
        if len(each) > 1 and any(one.rank is None for one in each):
            labels = ", ".join(one.label for one in each[:MOST_NAMES])
            yield (
                f"{source}: {len(each)} processes use device {device} ({labels}). Only compute of its own process "
                "hides communication."
            )
