"""What is read from a profile, whatever its format: device activities and host ranges, as columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from overlap_mtp.profiling.intervals import Ints
from overlap_mtp.tracing import LABEL

UNKNOWN = -1
LOST = -2  # when a node of a CUDA graph was captured, where that was before the profile began
FOREVER = np.iinfo(np.int64).max // 2  # the end of a range that was open when the capture stopped
PAYLOAD_BYTES = (1 << 40) - 1  # the bits of a payload that count bytes (overlap_mtp.tracing)


class ProfileError(ValueError):
    """A file cannot be read as a profile; the message names the file and says why."""


class Kind(IntEnum):
    """What a device did."""

    KERNEL = 0
    MEMSET = 1
    LOCAL_COPY = 2  # within the device
    PEER_COPY = 3  # between devices
    HOST_COPY = 4  # between host and device
    GRAPH = 5  # a whole CUDA graph, of which the kernels were not traced


@dataclass(frozen=True)
class Activities:
    """Device activities, one entry each; times in ns on the profile's clock, UNKNOWN where nothing is known.

    `launched` and `thread` are when and where the host launched it (a graph's node: when it launched the graph);
    `captured` and `capture_thread` when and where a node of a CUDA graph was captured, or LOST.
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
    is_ours: npt.NDArray[np.bool_]  # of the domain `overlap_mtp`, and LABEL reads its text


@dataclass(frozen=True)
class Profile:
    """One file."""

    source: str  # the file's name
    pids: Sequence[int]
    names: Sequence[str]  # of kernels and copies
    texts: Sequence[str]  # of ranges
    activities: Activities
    ranges: Ranges
    ranks: Mapping[int, int] = field(default_factory=dict)  # process -> rank, where the file itself says so

    def rank(self, process: int) -> int | None:
        """The rank in the labels of a process's ranges, else what the file says, else None."""
        ours = np.flatnonzero(self.ranges.is_ours & (self.ranges.process == process))
        if ours.size:
            label = LABEL.match(self.texts[self.ranges.text[ours[0]]])
            assert label is not None
            return int(label["rank"])
        return self.ranks.get(process)


class Texts:
    """Distinct strings, numbered as they come."""

    def __init__(self) -> None:
        self._index: dict[str, int] = {}

    def index(self, text: str) -> int:
        return self._index.setdefault(text, len(self._index))

    def all(self) -> tuple[str, ...]:
        return tuple(self._index)
