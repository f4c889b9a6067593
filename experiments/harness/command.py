"""Command lines: the options are the fields of a dataclass, and a wrong one ends in one line."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TypeVar

import tyro

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
