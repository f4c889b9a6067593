"""Signals that ask a run to end: the launcher passes them on, and the ranks finish their step and save."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType

from torch.multiprocessing.spawn import ProcessContext, ProcessExitedException

STOPPING = (signal.SIGTERM, signal.SIGUSR1)  # of Slurm and Kubernetes before they preempt
INTERRUPTED = 128 + signal.SIGINT  # the exit status, as a shell has it
_received: list[int] = []  # the signals of this process; they have no other owner than it


def stop_signal() -> int:
    """Return the first signal that asked this rank to stop, or 0."""
    return _received[0] if _received else 0


def listen(status: Callable[[], str]) -> None:
    """Say where the ranks are if a signal asks this one to stop, and let `stop_signal` return it.

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
                    print(
                        f"overlap_mtp: {name}: ended by the launcher; {status()}", file=sys.stderr, flush=True
                    )
                _received.append(number)

    threading.Thread(target=wait, name="overlap_mtp signals", daemon=True).start()


def join(context: ProcessContext, grace_s: float | None) -> None:
    """Wait for the ranks that this process has started, and pass signals on to them.

    Args:
        context: the ranks.
        grace_s: seconds for the others after a rank has died. Then those that are still there are killed.

    Raises:
        SystemExit: a signal has ended the run; the status is 128 plus its number, never 0.
        ProcessExitedException, ProcessRaisedException: a rank has failed.
    """
    passed_on: list[int] = []

    def pass_on(number: int, _frame: FrameType | None = None) -> None:
        if number not in passed_on:
            print(f"overlap_mtp: {signal.Signals(number).name} to the launcher", file=sys.stderr, flush=True)
        passed_on.append(number)
        for process in context.processes:
            if process.is_alive():
                os.kill(process.pid, number)

    in_main = threading.current_thread() is threading.main_thread()  # no other thread may set handlers
    before = {number: signal.signal(number, pass_on) for number in STOPPING if in_main}
    try:
        while not context.join(grace_period=grace_s):
            pass
    except KeyboardInterrupt:
        pass_on(signal.SIGINT)
        for process in context.processes:
            process.join(grace_s or 5)
            process.kill()
        raise SystemExit(INTERRUPTED) from None
    except ProcessExitedException as error:
        by_signal = [128 + number for number in (*passed_on, *STOPPING, signal.SIGINT)]
        code = 128 - error.exit_code if error.exit_code < 0 and passed_on else error.exit_code
        if code in by_signal:
            print(f"overlap_mtp: ended by {signal.Signals(code - 128).name}", file=sys.stderr, flush=True)
            raise SystemExit(code) from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
