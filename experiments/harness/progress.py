"""How far a long command is: a bar on a terminal, and without one a line every ten seconds."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

T = TypeVar("T")
LINE_EVERY_S = 10.0


class Progress:
    """Shows how many of a number of things are done, while the block runs.

    A bar is drawn when something is done, and only then: drawing it would disturb what is timed. Without a terminal a
    thread sleeps and writes a line every ten seconds.

    Args:
        total: how many things there are.
        what: what they are, in the plural.
        console: to write to. A quiet one shows nothing.
        done: how many an earlier block has done.
    """

    def __init__(self, total: int, what: str, console: Console, done: int = 0) -> None:
        self.total, self.what, self.console, self.done = total, what, console, done
        self._earlier, self._begin = done, time.perf_counter()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Bar(*columns, console=console, auto_refresh=False, disable=console.quiet)
        self._has_bar = console.is_terminal
        self._ended = threading.Event()
        self._writer = threading.Thread(target=self._write_lines, daemon=True)

    def __enter__(self) -> Self:
        self._begin = time.perf_counter()
        if self._has_bar:
            self._bar.add_task(self.what, total=self.total, completed=self.done)
            self._bar.start()
        elif not self.console.quiet:
            self._writer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._has_bar:
            self._bar.stop()
        elif not self.console.quiet:
            self._ended.set()
            self._writer.join()

    def advance(self, count: int = 1) -> None:
        """Count things that are done now."""
        self.done += count
        if self._has_bar:
            for task in self._bar.task_ids:
                self._bar.update(task, completed=self.done, refresh=True)

    def line(self) -> str:
        """Return what is done and the time that is left, at the pace since the block began."""
        passed_s, mine = time.perf_counter() - self._begin, self.done - self._earlier
        rest = f"{duration(passed_s)} so far"
        if mine:
            rest = f"{duration(passed_s / mine * max(0, self.total - self.done))} left"
        return f"{self.done} of {self.total} {self.what}, {rest}"

    def _write_lines(self) -> None:
        while not self._ended.wait(LINE_EVERY_S):
            self.console.print(self.line(), soft_wrap=True, highlight=False)


def with_progress(
    items: Sequence[T], what: str, console: Console, done: int = 0, total: int | None = None
) -> Iterator[T]:
    """Yield the items and show how many are done.

    Args:
        items: what to yield.
        what: what they are, in the plural.
        console: to show it on.
        done: how many others were done before.
        total: how many there are with the others, if these items are not all.
    """
    with Progress(len(items) if total is None else total, what, console, done) as progress:
        for item in items:
            yield item
            progress.advance()


def duration(seconds: float) -> str:
    """Return a time span in words, such as "40 s", "12 min" or "2.5 h"."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5970 else f"{seconds / 3600:.1f} h"
