"""Command lines: the options are the fields of a dataclass, and a wrong one ends in one line."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import tyro

from harness.launch import choose_device

T = TypeVar("T")


def parse_options(kind: type[T], description: str) -> T:
    """Read the command line into a dataclass.

    Args:
        kind: a dataclass. Each field is an option; its docstring or comment is the help text. The fields of nested
            dataclasses become options of the same level.
        description: what `--help` says first.

    Returns:
        The dataclass. A usage error ends the process with status 2.
    """
    flags = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
    return tyro.cli(kind, description=description, config=flags)


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Turn a ValueError or OverflowError of the block into one line and exit status 2."""
    try:
        yield
    except (ValueError, OverflowError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def check_least(options: object, **least: float) -> None:
    """Check options against their smallest legal values; None is legal.

    Args:
        options: a dataclass of options.
        least: the smallest legal value of each field to check.

    Raises:
        ValueError: an option is smaller.
    """
    for name, smallest in least.items():
        value = getattr(options, name)
        if value is not None and value < smallest:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {smallest}, got {value}")


def split(text: str) -> tuple[str, ...]:
    """Return the parts of a comma-separated option, each once."""
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


@dataclass(frozen=True)
class RankOptions:
    """The ranks to run on. Under torchrun their number is torchrun's."""

    ranks: int | None = None
    """Number of ranks; by default one per GPU, or two on CPU."""
    device: Literal["cuda", "cpu"] | None = None
    """By default cuda if there is a GPU."""

    @property
    def on_gpu(self) -> bool:
        """Whether the ranks run on GPUs. Raises ValueError if there are none although `device` asks for them."""
        return choose_device(self.device) == "cuda"

    @property
    def count(self) -> int:
        """The number of ranks that will run. Raises ValueError as `on_gpu` does, and if the number is below 1."""
        check_least(self, ranks=1)
        default = torch.cuda.device_count() if self.on_gpu else 2
        return int(os.environ.get("WORLD_SIZE", 0)) or self.ranks or default


def write_record(record: dict[str, Any], path: Path) -> Path:
    """Write a record as JSON, make its folder if it is missing, and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path
