"""merged: one exchange per depth, all tensors and documents in it, waited for where it is launched.

The MR's improvement (a) without (b): what merging alone brings. Each depth is the one before rolled by one.
"""

from __future__ import annotations

from overlap_mtp.schedules.packed import WiredRoller


class MergedRoller(WiredRoller):
    name = "merged"
    overlapped = False
