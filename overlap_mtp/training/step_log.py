"""The log of a training run: one JSON object per step, complete after any number of restarts."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any


class RunInProgressError(RuntimeError):
    """Another process is writing this log."""


class StepLog:
    """A JSONL file with one record per step, in order. One rank writes it.

    A run that resumes from a checkpoint repeats steps. So the records of steps after the checkpoint are removed first,
    and so is an incomplete last line. Call `sync` before each checkpoint, so that no record before it is lost.

    Args:
        path: the file. Its folder is made if there is none.
        steps_done: the number of steps that the checkpoint holds. Records of later steps (counted from 1) are removed.

    Attributes:
        missing: how many of the `steps_done` records the file lacks, for example because it was deleted.

    Raises:
        RunInProgressError: another process writes a log in this folder. File systems without locks do not show it.
    """

    def __init__(self, path: Path, steps_done: int = 0) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._folder = os.open(path.parent, os.O_RDONLY)
        self._lock()
        kept = [one for one in read_records(path) if one["step"] <= steps_done] if path.exists() else []
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
        """Lock the folder, because each restart replaces the file."""
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
        """Append a record, which has a `step`. It survives the end of this process, but not yet of the machine.

        If the file was deleted, it is made again, and its records are `missing`.
        """
        if os.fstat(self._file.fileno()).st_nlink == 0:
            self._file.close()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a")
            self.missing = record["step"] - 1
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Make sure that all records are on disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        os.close(self._folder)


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a log. Leave out an incomplete last line.

    Raises:
        ValueError: another line is not JSON; the message names its number.
    """
    records = []
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
    return records
