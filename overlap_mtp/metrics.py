"""What a run says of its steps, one JSON object a line, whole after any number of restarts."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class StepLog:
    """A JSONL file with one record a step, in order. One rank has it.

    A run that goes on from a checkpoint takes its steps again: what the file says of steps behind the checkpoint is
    taken out, as is a last line that was cut short. `sync` before a checkpoint is saved makes sure that none is
    missing.
    """

    def __init__(self, path: Path, steps_done: int = 0) -> None:
        """`steps_done`: how many steps the checkpoint holds; records of later ones, numbered from 1, go."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = (
            [record for record in read_records(path) if record["step"] <= steps_done] if path.exists() else []
        )
        temporary = path.with_suffix(".tmp")
        with temporary.open("w") as file:
            file.writelines(json.dumps(record) + "\n" for record in kept)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
        self._file = path.open("a")

    def write(self, record: dict[str, Any]) -> None:
        """`record` has a `step`. It survives the process from now on, and the machine after `sync`."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


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
