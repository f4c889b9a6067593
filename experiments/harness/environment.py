"""What a record says about where it was made: hardware and versions, never hosts or paths."""

from __future__ import annotations

import os
import platform
from datetime import date
from typing import Any

import torch
import triton

import overlap_mtp

# Variables that change how ranks reach one another, or in which order a device runs work.
LINK_VARIABLES = ("NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE", "NCCL_NET", "CUDA_DEVICE_MAX_CONNECTIONS")


def describe(device: torch.device, ranks: int) -> dict[str, Any]:
    """Return the hardware, the versions and the date of a run, for its record.

    Args:
        device: of this rank.
        ranks: how many ranks the run has.
    """
    where: dict[str, Any] = {
        "date": date.today().isoformat(),
        "ranks": ranks,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "backend": "nccl" if device.type == "cuda" else "gloo",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "overlap_mtp": overlap_mtp.__version__,
    }
    if device.type == "cuda":
        where["gpus_of_host"] = torch.cuda.device_count()
        where["nccl"] = ".".join(str(part) for part in torch.cuda.nccl.version())  # type: ignore[no-untyped-call]
        where["cuda"] = torch.version.cuda
        where["environment"] = {name: os.environ[name] for name in LINK_VARIABLES if name in os.environ}
    return where
