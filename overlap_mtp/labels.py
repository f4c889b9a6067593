"""What the ranges of `overlap_mtp.tracing` are called. Profiles are read by these names, also without torch.

A label is the name, its detail and the rank: "step prefetch r0", "send-recv r1". LABEL reads a label back.
"""

from __future__ import annotations

import re

NAMES = ("step", "trunk", "depth", "loss", "backward", "pack", "send-recv", "join", "unroll")
LABEL = re.compile(rf"^(?P<name>{'|'.join(NAMES)})(?: (?P<detail>\S+))? r(?P<rank>\d+)$")
DOMAIN = "overlap_mtp"
