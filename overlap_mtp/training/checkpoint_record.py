"""What a checkpoint's folder says about itself: `run.json`, the size and CRC-32 of each file, and what is wrong."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp

FORMAT = 1
HINT = "; delete its folder to resume from the checkpoint before it"
Json = Mapping[str, Any]  # of JSON values


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or loaded. All ranks raise the same error."""


class NoCheckpointError(CheckpointError):
    """The folder holds no checkpoint: the run starts from the beginning."""


def write_run(folder: Path, run: Json) -> None:
    """Write `run.json`. It is on disk afterwards."""
    record = {"format": FORMAT, "crc32": zlib.crc32(json.dumps(run).encode()), "run": run}
    (folder / "run.json").write_text(json.dumps(record, indent=1))
    sync_to_disk(folder / "run.json")


def read_run(path: Path) -> dict[str, Any]:
    """Read `run.json`. Raise CheckpointError if it is not as it was written, or names what no checkpoint needs."""
    try:
        record = json.loads((path / "run.json").read_text())
        if record["format"] != FORMAT:
            raise CheckpointError(f"format {record['format']!r} is unknown: this library reads {FORMAT}")
        run: dict[str, Any] = record["run"]
        if record["crc32"] != zlib.crc32(json.dumps(run).encode()):
            raise ValueError("its CRC-32 is wrong")
        if not all(isinstance(run[part], dict) for part in ("files", "progress", "identity", "layout")):
            raise ValueError("it does not describe a checkpoint")
        if strange := [name for name in run["files"] if (path / name).resolve().parent != path.resolve()]:
            raise ValueError(f"it names {strange[0]!r}, which is not a file of its folder")
        if missing := {".metadata", "state.pt"} - {*run["files"]}:
            raise ValueError(f"it does not list {missing.pop()}")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"run.json is half-written or damaged ({message(error)}){HINT}") from error
    return run


def compare(of_what: str, there: Json, here: Json) -> None:
    """Raise CheckpointError if the checkpoint and this run differ, with the names and values that do."""
    pairs = [(name, there.get(name, "absent"), here.get(name, "absent")) for name in {**there, **here}]
    if differ := [f"{name} is {that} there, {this} here" for name, that, this in pairs if that != this]:
        advice = "use the same, or begin a new run in another folder"
        raise CheckpointError(f"the checkpoint was made with other {of_what}: {first_few(differ)}: {advice}")


def file_marks(path: Path) -> list[int] | None:
    """Return [bytes, CRC-32] of a file, which is then on disk, or None if there is no such file."""
    size = crc = 0
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        while block := file.read(1 << 22):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]


def sync_to_disk(path: Path) -> None:
    """Make sure that a file, or the names in a folder, are on disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def message(error: BaseException) -> str:
    """Return what an error says, with its type if it is not ours."""
    if isinstance(error, dcp.CheckpointException):
        return "; ".join(f"rank {rank}: {message(cause)}" for rank, (cause, _) in error.failures.items())
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"


def first_few(texts: list[str]) -> str:
    """Join up to five texts, and say how many more there are."""
    return "; ".join([*texts[:5], f"and {len(texts) - 5} more"] if len(texts) > 5 else texts)
