"""What is read from a profile of either format: device activities and host ranges, as columns."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from overlap_mtp.labels import LABEL
from overlap_mtp.profiling.intervals import Ints

UNKNOWN = -1
UNNAMED = ""  # the name of a kernel whose name the profile does not hold
MOST_DEVICES = 4096  # in one file
LONGEST_TIME_NS = 1 << 61  # later times cannot be added without overflow; this is the year 2043
LOST = -2  # the capture time of a CUDA graph's node that was captured before the profile began


class ProfileError(ValueError):
    """A file cannot be read as a profile; the message names the file and the reason."""


class Kind(IntEnum):
    """What a device did."""

    KERNEL = 0
    MEMSET = 1
    LOCAL_COPY = 2  # within the device
    PEER_COPY = 3  # between devices
    HOST_COPY = 4  # between host and device
    GRAPH = 5  # a whole CUDA graph whose kernels were not traced


@dataclass(frozen=True)
class Group:
    """The process group of a collective, and which collective it is."""

    name: str
    ranks: tuple[int, ...]  # empty if the profile does not tell them
    collective: str


@dataclass(frozen=True)
class Activities:
    """Device activities, one entry each. Times are in ns on the profile's clock; a value may be UNKNOWN.

    `launched` and `thread` say when and on which thread the host launched it (for a node of a CUDA graph: launched
    the graph). `captured` and `capture_thread` say when and where a node of a CUDA graph was captured, or LOST.
    """

    start: Ints
    end: Ints
    process: Ints  # an index into Profile.pids
    device: Ints
    stream: Ints
    kind: Ints
    name: Ints  # an index into Profile.names
    num_bytes: Ints
    launched: Ints
    thread: Ints
    captured: Ints
    capture_thread: Ints
    group: Ints  # an index into Profile.groups, or UNKNOWN


@dataclass(frozen=True)
class Ranges:
    """Host ranges, one entry each; times in ns."""

    start: Ints
    end: Ints
    process: Ints
    thread: Ints
    text: Ints  # an index into Profile.texts
    payload: Ints
    is_ours: npt.NDArray[np.bool_]  # of the domain `overlap_mtp`, with a text that LABEL matches


@dataclass(frozen=True)
class Profile:
    """One file."""

    source: str  # the file's name
    pids: Sequence[int]
    names: Sequence[str]  # of kernels and copies
    texts: Sequence[str]  # of ranges
    activities: Activities
    ranges: Ranges
    ranks: Mapping[int, int] = field(default_factory=dict)  # process -> rank, if the file itself says so
    groups: Sequence[Group] = ()
    world_size: int | None = None
    path: str = ""  # tells files of one name apart
    clock: str = ""  # profiles with the same clock have comparable times
    notes: Sequence[str] = ()  # what was left out or could not be read

    def __post_init__(self) -> None:
        activities = self.activities
        if not activities.start.size:
            raise ProfileError(
                f"{self.source}: the profile is empty: it holds no kernel, copy or memset (was the GPU traced?)"
            )
        if max(-int(activities.start.min()), int(activities.end.max())) > LONGEST_TIME_NS:
            raise ProfileError(f"{self.source}: a time lies more than {LONGEST_TIME_NS} ns from 0")
        num_devices = len(set(zip(activities.process.tolist(), activities.device.tolist(), strict=True)))
        if num_devices > MOST_DEVICES:
            raise ProfileError(f"{self.source}: {num_devices} devices: at most {MOST_DEVICES} are read")
        object.__setattr__(self, "ranks", {**self.ranks, **self._labelled_ranks()})

    def _labelled_ranks(self) -> dict[int, int]:
        """The rank in the labels of each process's ranges."""
        ranges, found = self.ranges, dict[int, int]()
        labels = [label_of(text) for text in self.texts]
        rank_of = np.array([int(label["rank"]) if label else UNKNOWN for label in labels], np.int64)
        pairs = zip(
            ranges.process[ranges.is_ours].tolist(),
            rank_of[ranges.text[ranges.is_ours]].tolist(),
            strict=True,
        )
        for process, rank in dict.fromkeys(pairs):
            if found.setdefault(process, rank) != rank:
                raise ProfileError(
                    f"{self.source}: one process has ranges of rank {found[process]} and of rank {rank}: "
                    "give a file for each rank"
                )
        return found


def label_of(text: str) -> re.Match[str] | None:
    """Match a label of this project. A rank of more than nine digits is none."""
    label = LABEL.match(text)
    return label if label and len(label["rank"]) < 10 and text.isprintable() else None


def printable(text: object) -> str:
    """Return any name that a file holds as text without control characters; "" if there is none."""
    if text is None:
        return UNNAMED
    word = text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)
    return word if word.isprintable() else "".join(c if c.isprintable() else "\ufffd" for c in word)


class Texts(dict[str, int]):
    """Numbers distinct strings in the order in which they are first asked for."""

    def __missing__(self, text: str) -> int:
        return self.setdefault(text, len(self))
