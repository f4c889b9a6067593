"""What processes listen on, by Linux's own tables."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

LISTEN = "0A"  # the state, as /proc/net/tcp has it
LOOPBACK = {"0100007F", "00000000000000000000000001000000"}  # 127.0.0.1 and ::1


def addresses() -> list[str]:
    """The addresses that this process listens on, in hexadecimal digits."""
    held = {os.readlink(one) for one in Path("/proc/self/fd").iterdir() if one.exists() or one.is_symlink()}
    rows = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in Path("/proc/net", table).read_text().splitlines()[1:]
    ]
    return [row[1].split(":")[0] for row in rows if row[3] == LISTEN and f"socket:[{row[9]}]" in held]


def report(device: torch.device, folder: Path, *_: Any) -> None:
    """Write the addresses that a rank listens on, after all ranks have talked to one another."""
    dist.all_reduce(torch.ones(1, device=device))
    Path(folder, f"rank{dist.get_rank()}").write_text(" ".join(addresses()))
    dist.barrier()
