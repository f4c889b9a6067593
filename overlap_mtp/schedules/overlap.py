"""overlap: one exchange per depth on the side stream; depth k + 1 travels while MTP layer k computes.

The MR's improvement (b). Depth k + 1 is depth k rolled by one, so each exchange carries one token a chunk. This
is the order that values need which are not known in advance, such as activations.
"""

from __future__ import annotations

from overlap_mtp.schedules.packed import WiredRoller


class OverlapRoller(WiredRoller):
    name = "overlap"
    overlapped = True
