"""prefetch: one exchange for all depths, on the side stream, under the trunk.

Every token that any depth needs is known when the batch arrives: send them all at once, then.
"""

from __future__ import annotations

from overlap_mtp.schedules.packed import WiredRoller


class PrefetchRoller(WiredRoller):
    name = "prefetch"
    overlapped = True

    @property
    def depths_per_exchange(self) -> int:
        return self.num_depths
