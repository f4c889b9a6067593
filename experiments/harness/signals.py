"""Signals that ask a rank to stop. They are kept until it can act on them; then it finishes its step and saves."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Collection
from types import FrameType
from typing import Any

STOPPING = (signal.SIGTERM, signal.SIGUSR1)  # of Slurm and Kubernetes before they preempt
INTERRUPTED = 128 + signal.SIGINT  # the exit status, as a shell has it
_received: list[int] = []  # the signals of this process; they have no other owner than it


def hold(numbers: Collection[int] = (*STOPPING, signal.SIGINT)) -> None:
    """Keep signals waiting until `release`. The threads and processes that this thread starts keep them, too."""
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)


def release(numbers: Collection[int] = (*STOPPING, signal.SIGINT)) -> None:
    """Let signals through, first those that have waited."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)


def set_interrupts(before: Any, handler: Any) -> None:
    """Set the handler of SIGINT if it is `before`: a shell lets programs in its background ignore the signal."""
    if signal.getsignal(signal.SIGINT) is before:
        signal.signal(signal.SIGINT, handler)


def interrupt_once(_number: int, _frame: FrameType | None) -> None:
    """Handle SIGINT: raise KeyboardInterrupt the first time. A terminal and the launcher both send one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def stop_signal() -> int:
    """Return the first signal that asked this rank to stop, or 0."""
    return _received[0] if _received else 0


def listen(status: Callable[[], str]) -> None:
    """Let `stop_signal` return a signal that asks this rank to stop, and say where the ranks are. Release the signals.

    The main thread may be in a collective, where Python runs no signal handlers. So another thread waits for the
    signals. If a peer is gone, the run ends by its watchdog and not by a finished step.

    Args:
        status: returns what to say about the ranks.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    for number in STOPPING:
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def wait() -> None:
        while number := os.read(reader, 1)[0]:
            if number in STOPPING:
                if not _received:
                    name = signal.Signals(number).name
                    asks = f"overlap_mtp: {name} asks the run to end after this step"
                    print(f"{asks}; {status()}", file=sys.stderr, flush=True)
                _received.append(number)

    threading.Thread(target=wait, name="overlap_mtp signals", daemon=True).start()
    release(STOPPING)


def ignore() -> None:
    """Ignore signals that ask this process to stop: it is about to end. They cannot change its status any more."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
