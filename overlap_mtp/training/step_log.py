"""What a run says of its steps, one JSON object a line, whole after any number of restarts."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any


class RunInProgressError(RuntimeError):
    """Another process is writing this log."""


class StepLog:
    """A JSONL file with one record a step, in order. One rank has it.

    A run that goes on from a checkpoint takes its steps again: what the file says of steps behind the checkpoint is
    taken out, as is a last line that was cut short. `sync` before a checkpoint is saved makes sure that none is
    missing. `missing` says how many of those steps the file lacks all the same: it was deleted, say.
    """

    def __init__(self, path: Path, steps_done: int = 0) -> None:
        """`steps_done`: how many steps the checkpoint holds; records of later ones, numbered from 1, go.

        Raises RunInProgressError where the folder's log is another process's, on file systems that have locks.
        """
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._folder = os.open(path.parent, os.O_RDONLY)
        self._lock()
        kept = (
            [record for record in read_records(path) if record["step"] <= steps_done] if path.exists() else []
        )
        self.missing = steps_done - len({record["step"] for record in kept})
        temporary = path.with_suffix(".tmp")
        with temporary.open("w") as file:
            file.writelines(json.dumps(record) + "\n" for record in kept)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        os.fsync(self._folder)
        self._file = path.open("a")

    def _lock(self) -> None:
        """Of the folder: the file is another one after each restart."""
        try:
            fcntl.flock(self._folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._folder)
            raise RunInProgressError(
                f"{self.path} is being written by another process: end that run, or take another folder"
            ) from None
        except OSError:  # a file system without locks
            pass

    def write(self, record: dict[str, Any]) -> None:
        """`record` has a `step`. It survives the process from now on, and the machine after `sync`."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        os.close(self._folder)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a log. A last line that was cut short is left out; any other that is not JSON is a ValueError."""
    records = []
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
    return records
