"""Command lines: the options are the fields of a dataclass, and a wrong one ends in one line."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
import tyro
import tyro.constructors

from harness.launch import check_environment, check_gpus, choose_device
from overlap_mtp.exchange.select import TRANSPORTS

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
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, description=description, config=flags)
    except SystemExit as end:
        if end.code == 2:
            print(f"error: {_what_is_wrong(said.getvalue())} (--help lists the options)", file=sys.stderr)
        raise


def _what_is_wrong(box: str) -> str:
    """Return in one line what tyro says in a box: a title, the error, and under a rule the nearest option."""
    lines = [re.sub(r"\x1b\[[0-9;]*m|[^\w\s!-~]", "", line).strip() for line in box.splitlines()]
    text = " ".join(lines[1:]).strip().partition("  ")[0]
    nearest = re.search(r"Perhaps you meant:\s+(--[\w-]+)", " ".join(lines))
    return f"{text}; perhaps {nearest[1]} is meant" if nearest else text


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Turn what options or the files that they name are wrong in into one line and exit status 2.

    Nothing but checks belongs into the block: an error of the work itself is no usage error.
    """
    try:
        yield
    except (ValueError, OverflowError, OSError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(2) from None


def check_out(folder: Path, *names: str) -> None:
    """Make a folder for results, before any work is done.

    Args:
        folder: given by `--out`.
        names: files that will be written into it.

    Raises:
        ValueError: it cannot be a folder, or files cannot be written into it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(
            f"out must be a folder, or a path for one, that can be written to: {error}"
        ) from None
    for path in (folder / name for name in names):
        if path.exists() and not (path.is_file() and os.access(path, os.W_OK)):
            raise ValueError(
                f"{path} must be a file that can be written to: take it away, or give another --out"
            )


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


def check_among(options: object, **legal: Collection[str]) -> None:
    """Check options that hold several words against the legal words; None is legal.

    Args:
        options: a dataclass of options.
        legal: the legal words of each field to check.

    Raises:
        ValueError: an option holds another word.
    """
    for name, words in legal.items():
        unknown = [word for word in getattr(options, name) or () if word not in words]
        if unknown:
            raise ValueError(f"{name} must be among {', '.join(words)}, got {unknown[0]!r}")


def _words(arguments: list[str]) -> tuple[str, ...]:
    parts = tuple(dict.fromkeys(part.strip() for part in arguments[0].split(",")))
    if not all(parts):
        raise ValueError(f"must be words with a comma between them, got {arguments[0]!r}")
    return parts


def _numbers(arguments: list[str]) -> tuple[int, ...]:
    parts = _words(arguments)
    if not all(part.isdecimal() and int(part) for part in parts):
        raise ValueError(f"must be whole numbers above 0 with a comma between them, got {arguments[0]!r}")
    return tuple(int(part) for part in parts)


def _comma_separated(parse: Callable[[list[str]], Any], metavar: str) -> Any:
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=parse,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [",".join(str(part) for part in value)],
    )


# Types of options: one argument with commas, each part once.
Words = Annotated[tuple[str, ...], _comma_separated(_words, "WORD,...")]
Numbers = Annotated[tuple[int, ...], _comma_separated(_numbers, "INT,...")]


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
        check_environment()
        default = torch.cuda.device_count() if self.on_gpu else 2
        ranks = int(os.environ.get("WORLD_SIZE", 0)) or self.ranks or default
        check_gpus(ranks, choose_device(self.device))
        return ranks


@dataclass(frozen=True)
class TransportOptions(RankOptions):
    """The ranks to run on, and the transports to run over."""

    transports: Words | None = None
    """process_group, symmetric; by default process_group, and on GPUs symmetric too."""

    @property
    def chosen(self) -> tuple[str, ...]:
        """The transports to run over."""
        return self.transports or (("process_group", "symmetric") if self.on_gpu else ("process_group",))

    def check(self) -> None:
        """Raise ValueError for a transport that does not exist, or not on this device, and as `count` does."""
        check_among(self, transports=TRANSPORTS)
        if "symmetric" in self.chosen and not self.on_gpu:
            raise ValueError("--transports symmetric needs GPUs")
        _ = self.count


def write_record(record: dict[str, Any], path: Path) -> Path:
    """Write a record as JSON, make its folder if it is missing, and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path
