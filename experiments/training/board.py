"""The records of a run for TensorBoard."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def check_tensorboard() -> None:
    """Raise ValueError if the package is missing."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ValueError(
            "--tensorboard needs the package tensorboard: pip install 'overlap-mtp[tensorboard]', or leave it out"
        )


class Board:
    """Writes the numbers of each step as TensorBoard's event files. One rank writes them.

    Args:
        folder: of the event files. A run that resumes adds a file.
        steps_done: the steps that the checkpoint holds. TensorBoard drops what was written of later ones.
    """

    def __init__(self, folder: Path, steps_done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # here: the package is optional

        self._writer: Any = SummaryWriter(str(folder), purge_step=steps_done + 1)

    def write(self, record: dict[str, Any]) -> None:
        """Write all numbers of a step's record."""
        for name, value in _numbers(record):
            self._writer.add_scalar(name, value, record["step"])

    def sync(self) -> None:
        """Write what is still in memory."""
        self._writer.flush()

    def close(self) -> None:
        """Write what is still in memory, and close the file."""
        self._writer.close()


def _numbers(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield each number with its name; those of depths and of parts of the model have a name in two parts."""
    for name, value in record.items():
        if isinstance(value, list):
            value = {f"depth {depth}": one for depth, one in enumerate(value, start=1)}
        for part, one in (value if isinstance(value, dict) else {"": value}).items():
            if one is not None and name != "step":
                yield f"{name}/{part}" if part else name, one
