"""What a record says about how and where it was made: command, hardware and versions, never hosts or whole paths."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from datetime import date
from pathlib import Path
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


def command() -> str:
    """Return the command of this run as one would type it in the repository's root.

    Of an absolute path only the part below the working directory stays, or else its last part.
    """
    start = "python"
    if "TORCHELASTIC_RUN_ID" in os.environ:  # set by torchrun
        local, ranks = os.environ["LOCAL_WORLD_SIZE"], os.environ["WORLD_SIZE"]
        hosts = [] if local == ranks else ["--nnodes", str(int(ranks) // int(local))]
        start = shlex.join(["torchrun", *hosts, "--nproc-per-node", local])
    program, *arguments = sys.argv
    return f"{start} {shlex.join([f'experiments/{Path(program).name}', *map(_without_folders, arguments)])}"


def _without_folders(argument: str) -> str:
    """Shorten the absolute path in an argument, which may be `--option=path` or have several with commas between."""
    name, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    parts = [Path(part) if part.startswith(("/", "~")) else part for part in value.split(",")]
    here = Path.cwd()
    short = [
        part
        if isinstance(part, str)
        else str(part.relative_to(here) if part.is_relative_to(here) else part.name)
        for part in parts
    ]
    return name + equals + ",".join(short)
