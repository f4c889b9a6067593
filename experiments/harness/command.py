"""Command lines: the options are the fields of a dataclass, and a wrong one ends in one line."""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
import tyro
import tyro.constructors

from harness.launch import check_environment, check_gpus, choose_device
from harness.options_file import read_file, with_values
from overlap_mtp.exchange.select import TRANSPORTS

T = TypeVar("T")


def parse_options(kind: type[T], description: str, on_cpu: T | None = None) -> T:
    """Read the command line, and the file that `--config` names, into a dataclass.

    Args:
        kind: a dataclass. Each field is an option; its docstring or comment is the help text. The fields of nested
            dataclasses become options of the same level, in a group of their own. So do those of its bases, if it
            has fields of bases only.
        description: what `--help` says first.
        on_cpu: defaults in place of those of the dataclass, if ranks run on CPU.

    Returns:
        The dataclass. A usage error ends the process with status 2.
    """
    _refuse_empty(sys.argv)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", nargs="?")
    first.add_argument("--device", nargs="?")
    given, _ = first.parse_known_args()
    with usage_errors():
        values = read_file(Path(given.config), kind) if given.config else {}
    base = None
    device = given.device or values.get("device")
    wants_gpu = device == "cuda" or (device is None and torch.cuda.is_available())
    if on_cpu is not None and not wants_gpu:
        base, description = on_cpu, f"{description} The defaults here are those on CPU ranks."
    default = with_values(kind, base, values) if base is not None or values else None
    flags = (tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            command: Any = tyro.cli(_command_of(kind, default), description=description, config=flags)
    except SystemExit as end:
        if end.code == 2:
            print(f"error: {_what_is_wrong(said.getvalue())} (--help lists the options)", file=sys.stderr)
        raise
    parts = [getattr(command, name) for name in _groups_of(kind)]
    return kind(**{field.name: getattr(part, field.name) for part in parts for field in fields(part)})


def _refuse_empty(arguments: list[str]) -> None:
    """End the process if an option's value is empty: an empty path would be the current folder."""
    for option, value in itertools.pairwise(arguments):
        if not value or (value.startswith("--") and value.endswith("=")):
            option = value.rstrip("=") or option
            print(f"error: {option} must not be empty: give a value, or leave it out", file=sys.stderr)
            raise SystemExit(2)


def _groups_of(kind: type) -> dict[str, type]:
    """Return the dataclasses that hold the fields of `kind` by the name of their group; "main" has no title."""
    bases = [base for base in kind.__bases__ if is_dataclass(base)]
    assert not bases or {*_names(kind)} == {name for base in bases for name in _names(base)}
    return {one.__name__.removesuffix("Options").lower(): one for one in bases} or {"main": kind}


def _names(kind: type) -> list[str]:
    return [one.name for one in fields(kind)]


def _command_of(kind: type, default: Any) -> type:
    """Return a dataclass of what a command line holds: the groups of options, and `--config`."""
    about = tyro.conf.arg(
        metavar="FILE.toml",
        help="Read options from this file, by the same names; the command line wins.",
        help_behavior_hint="(default: no file)",
    )
    groups: list[Any] = []
    for name, group in _groups_of(kind).items():
        hint = Annotated[group, tyro.conf.arg(name="" if name == "main" else name)]  # type: ignore[valid-type]
        if default is None:
            groups.append((name, hint))
        else:
            own = group(**{one.name: getattr(default, one.name) for one in fields(group)})
            groups.append((name, hint, field(default=own)))
    config = [("config", Annotated[Path | None, about], None)] if fields(kind) else []
    return make_dataclass("Command", [*groups, *config], frozen=True, kw_only=True)


def _what_is_wrong(box: str) -> str:
    """Return in one line what tyro says in a box: a title, the error, and under a rule the nearest option."""
    lines = [re.sub(r"\x1b\[[0-9;]*m|[^\w\s!-~]", "", line).strip() for line in box.splitlines()]
    text = " ".join(lines[1:]).strip().partition("  ")[0]
    nearest = re.search(r"Perhaps you meant:\s+(--[\w-]+)", " ".join(lines))
    return f"{text}; perhaps {nearest[1]} is meant" if nearest else text


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Turn an error in the options, or in the files that they name, into one line and exit status 2.

    Nothing but checks belongs into the block: an error of the work itself is no usage error.
    """
    try:
        yield
    except (ValueError, OverflowError, OSError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(2) from None


@dataclass(frozen=True)
class SmallSize:
    """What a command that is meant for GPUs runs by default on CPU ranks."""

    options: Any  # the defaults there; they have an `out`, and their ranks in `where`
    takes: str  # about how long that takes on two free CPU cores, such as "40 s"
    full_size: str  # the options that give the defaults on GPUs
    full_takes: str  # about how long these take on such cores

    def say(self, options: Any) -> None:
        """Print that a command runs this size, if it does; under torchrun on rank 0 only."""
        is_small = replace(options, out=self.options.out, where=self.options.where) == self.options
        if is_small and not options.where.on_gpu and os.environ.get("RANK", "0") == "0":
            print(
                f"no GPUs: the default is a small size, which takes about {self.takes} on two free CPU cores. The full "
                f"size is meant for GPUs and takes about {self.full_takes} here: {self.full_size}",
                flush=True,
            )


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


def _numbers(arguments: list[str], least: int = 1) -> tuple[int, ...]:
    parts = _words(arguments)
    if not all(part.isdecimal() and int(part) >= least for part in parts):
        raise ValueError(
            f"must be whole numbers of at least {least} with a comma between them, got {arguments[0]!r}"
        )
    return tuple(int(part) for part in parts)


def _comma_separated(parse: Callable[[list[str]], Any], metavar: str) -> Any:
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=parse,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [",".join(str(part) for part in value)],
    )


def default_is(text: str, name: str | None = None) -> Any:
    """Return a note for the type of an option: what `--help` says of a default that is None or empty.

    Args:
        text: what it stands for, such as "one per GPU".
        name: of the option, if it is not that of the field.
    """
    return tyro.conf.arg(
        name=name, help_behavior_hint=lambda shown: f"(default: {text if shown in ('None', '') else shown})"
    )


# Types of options: one argument with commas, each part once.
Words = Annotated[tuple[str, ...], _comma_separated(_words, "WORD,...")]
Numbers = Annotated[tuple[int, ...], _comma_separated(_numbers, "INT,...")]
NumbersFrom0 = Annotated[tuple[int, ...], _comma_separated(partial(_numbers, least=0), "INT,...")]


@dataclass(frozen=True)
class RankOptions:
    """The ranks to run on. Under torchrun their number is torchrun's."""

    ranks: Annotated[int | None, default_is("one for each GPU, or two on CPU")] = None
    """Ranks to start."""
    device: Annotated[Literal["cuda", "cpu"] | None, default_is("cuda if there is a GPU")] = None
    """What the ranks run on."""

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


Ranks = Annotated[RankOptions, tyro.conf.arg(name="rank")]  # the title of their group


@dataclass(frozen=True)
class TransportOptions(RankOptions):
    """The ranks to run on, and the transports to run over."""

    transports: Annotated[Words | None, default_is("process_group, and on GPUs symmetric too")] = None
    """Transports of the schedules that have a choice: process_group, symmetric."""

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


RanksAndTransports = Annotated[TransportOptions, tyro.conf.arg(name="rank")]


def write_record(record: dict[str, Any], path: Path) -> Path:
    """Write a record as JSON, make its folder if it is missing, and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def exit_with_1_if(is_wrong: Callable[[dict[str, Any]], object], *paths: Path) -> None:
    """End the process with status 1 if a record is wrong. Other ranks than rank 0, which has the records, return.

    Args:
        is_wrong: tells it from a record.
        paths: of the records.
    """
    is_rank_0 = os.environ.get("RANK", "0") == "0"
    if is_rank_0 and any(is_wrong(json.loads(path.read_text())) for path in paths):
        raise SystemExit(1)
