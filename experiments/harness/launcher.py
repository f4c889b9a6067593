"""The process that starts the ranks of a run: it passes signals on to them, and waits for them."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from types import FrameType

from torch.multiprocessing.spawn import ProcessContext, ProcessExitedException

from harness.signals import INTERRUPTED, STOPPING, hold, release


def start_and_join(start: Callable[[], ProcessContext], grace_s: float | None) -> None:
    """Start ranks and wait for them. Pass on to them the signals that reach this process from now on.

    Args:
        start: starts the ranks. They begin with all signals held, and release them when they can act on them.
        grace_s: seconds for the others after a rank has died. Then those that are still there are killed.

    Raises:
        SystemExit: a signal has ended a rank; the status is 128 plus its number. Ranks that were told to stop and then
            ended with status 0 raise nothing.
        ProcessExitedException, ProcessRaisedException: a rank has failed.
    """
    passed_on: list[int] = []
    ranks: list[BaseProcess] = []

    def send(number: int) -> None:
        for rank in ranks:
            if rank.is_alive() and rank.pid is not None:
                os.kill(rank.pid, number)

    def pass_on(number: int, _frame: FrameType | None = None) -> None:
        if number not in passed_on:
            print(f"overlap_mtp: {signal.Signals(number).name} to the launcher", file=sys.stderr, flush=True)
        passed_on.append(number)
        send(number)

    in_main = threading.current_thread() is threading.main_thread()  # no other thread may set handlers
    before = {number: signal.signal(number, pass_on) for number in STOPPING if in_main}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        resource_tracker.ensure_running()  # it starts now, because its start releases signals
        hold()
        context = start()
        ranks += context.processes
        for number in tuple(passed_on):
            send(number)
        release()
        while not context.join(grace_period=grace_s):
            pass
    except KeyboardInterrupt:
        if in_main:  # another Ctrl-C does not wait for the ranks
            signal.signal(signal.SIGINT, lambda *_: send(signal.SIGKILL))
        pass_on(signal.SIGINT)
        for rank in ranks:
            rank.join(grace_s or 5)
            rank.kill()
        raise SystemExit(INTERRUPTED) from None
    except ProcessExitedException as error:
        by_signal = [128 + number for number in (*passed_on, signal.SIGINT)]
        code = 128 - error.exit_code if error.exit_code < 0 and passed_on else error.exit_code
        if code in by_signal:
            print(f"overlap_mtp: ended by {signal.Signals(code - 128).name}", file=sys.stderr, flush=True)
            raise SystemExit(code) from None
        raise
    finally:
        hold()
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
