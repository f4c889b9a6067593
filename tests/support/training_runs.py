"""Runs of experiments/train.py in processes of their own, for tests."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
STEPS = 8
COMMON = f"--device cpu --seq-len 256 --documents 3 --steps {STEPS} --save-every 2".split()


def start(
    out: Path,
    *arguments: str,
    before: Sequence[str] = (),
    program: str = "experiments/train.py",
    where: str = "",
    ignoring_sigint: bool = False,
) -> subprocess.Popen[str]:
    command = [sys.executable, *before, str(ROOT / program), "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "400", "HANGS_IN": where}
    return subprocess.Popen(
        [*command, *COMMON, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
        preexec_fn=(lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)) if ignoring_sigint else None,
    )


def train(out: Path, *arguments: str, limit_s: float = 120) -> str:
    run = start(out, *arguments)
    said, _ = run.communicate(timeout=limit_s)
    assert run.returncode == 0, said
    return said


def records(out: Path) -> list[dict]:
    """What a run says of its steps that does not depend on the machine."""
    timed = {"tokens_per_s", "stall_us", "memory_gib"}
    lines = (out / "steps.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in timed} for line in lines]


def after_steps(run: subprocess.Popen[str], out: Path, steps: int) -> list[int]:
    """Its two ranks' processes, once they run and the log holds so many steps."""
    log, deadline = out / "steps.jsonl", time.monotonic() + 90
    while True:
        assert run.poll() is None, run.communicate()[0]
        assert time.monotonic() < deadline
        ranks = ranks_of(run.pid)
        if len(ranks) == 2 and log.exists() and len(log.read_text().splitlines()) >= steps:
            return ranks
        time.sleep(0.005)


def is_alive(pid: int) -> bool:
    """And not a zombie, which whoever adopted it is yet to bury."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def ranks_of(launcher: int) -> list[int]:
    """The processes that it started, in the order of their ranks; not those that are yet to become something else."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    commands = {int(pid): command_of(int(pid)) for pid in children}
    none = (b"", command_of(launcher))
    return sorted(pid for pid, one in commands.items() if one not in none and b"resource_tracker" not in one)


def command_of(pid: int) -> bytes:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""
