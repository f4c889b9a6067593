"""What is read from a profile of either format: device activities and host ranges, as columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from overlap_mtp.profiling.intervals import Ints
from overlap_mtp.tracing import LABEL

UNKNOWN = -1
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

    def __post_init__(self) -> None:
        if not self.activities.start.size:
            raise ProfileError(
                f"{self.source}: the profile is empty: it holds no kernel, copy or memset (was the GPU traced?)"
            )

    def rank(self, process: int) -> int | None:
        """Return the rank in the labels of a process's ranges, else the one that the file states, else None."""
        ours = self.ranges.text[self.ranges.is_ours & (self.ranges.process == process)]
        label = LABEL.match(self.texts[ours[0]]) if ours.size else None
        return int(label["rank"]) if label else self.ranks.get(process)


class Texts(dict[str, int]):
    """Numbers distinct strings in the order in which they are first asked for."""

    def __missing__(self, text: str) -> int:
        return self.setdefault(text, len(self))
