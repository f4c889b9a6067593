"""Runs of experiments/train.py for tests: as a command, or on ranks that are there already."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import tyro

from overlap_mtp.training.step_log import read_records
from training.run import train_on_rank
from training.settings import RunSettings

ROOT = Path(__file__).parents[2]
STEPS = 8
COMMON = f"--device cpu --seq-len 256 --documents 3 --steps {STEPS} --save-every 2".split()


def start(
    out: Path,
    *arguments: str,
    before: Sequence[str] = (),
    program: str = "experiments/train.py",
    hangs_in: str = "",
    ignoring_sigint: bool = False,
) -> subprocess.Popen[str]:
    command = [sys.executable, *before, str(ROOT / program), "--out", str(out)]
    paths = os.pathsep.join(filter(None, [f"{ROOT}/experiments", str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "400", "HANGS_IN": hangs_in}
    return subprocess.Popen(
        [*command, *COMMON, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment | {"PYTHONPATH": paths},
        start_new_session=True,
        preexec_fn=(lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)) if ignoring_sigint else None,
    )


def train(out: Path, *arguments: str, limit_s: float = 300) -> str:
    run = start(out, *arguments)
    output, _ = run.communicate(timeout=limit_s)
    assert run.returncode == 0, output
    return output


class NoWatchdog:
    """For ranks whose pool notices what happens to them."""

    def phase(self, text: str, allowed: timedelta = timedelta(0)) -> None: ...

    def follow(self, *counts: Callable[[], int]) -> None: ...


def settings_of(out: Path, *arguments: str) -> RunSettings:
    options = ["--out", str(out), *COMMON, *arguments]
    return tyro.cli(RunSettings, args=options, config=(tyro.conf.FlagCreatePairsOff,)).resolved()


def train_in_pool(_group: dist.ProcessGroup, settings: RunSettings) -> str:
    """Train on the ranks of a pool, which spares 3 s of a core for each start. Return what is printed."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        train_on_rank(torch.device("cpu"), settings, NoWatchdog())
    return output.getvalue()


def records(out: Path) -> list[dict]:
    """The part of a run's records that does not depend on the machine."""
    timed = {"tokens_per_s", "tflops_per_gpu", "mfu", "stall_us", "memory_gib"}
    return [
        {key: value for key, value in one.items() if key not in timed}
        for one in read_records(out / "steps.jsonl")
    ]


def after_steps(run: subprocess.Popen[str], out: Path, steps: int, num_ranks: int = 2) -> list[int]:
    """Wait until all ranks run and the log holds `steps` records. Return the ranks' processes."""
    log, deadline = out / "steps.jsonl", time.monotonic() + 90
    while True:
        assert run.poll() is None, run.communicate()[0]
        assert time.monotonic() < deadline
        ranks = ranks_of(run.pid)
        if len(ranks) == num_ranks and log.exists() and len(log.read_text().splitlines()) >= steps:
            return ranks
        time.sleep(0.005)


def is_alive(pid: int) -> bool:
    """A zombie, whose parent has not waited for it yet, is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def ranks_of(launcher: int) -> list[int]:
    """The processes that a launcher has started, in the order of their ranks, once they run their own command."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    commands = {int(pid): command_of(int(pid)) for pid in children}
    none = (b"", command_of(launcher))
    return sorted(pid for pid, one in commands.items() if one not in none and b"resource_tracker" not in one)


def command_of(pid: int) -> bytes:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def assert_a_hanging_rank_is_named(out: Path, arguments: str, hangs_in: str, step: int) -> None:
    """Rank 1 stops for ever in the step, but lives. The other ranks are in the same phase."""
    run = start(
        out, *arguments.split(), "--deadline", "8", program="tests/support/hung_run.py", hangs_in=hangs_in
    )
    while (line := run.stdout.readline()) != "here\n":
        assert line, run.communicate()[0]
    begin, ranks = time.monotonic(), ranks_of(run.pid)
    output, _ = run.communicate(timeout=240)
    assert time.monotonic() - begin < 8 + 4
    assert run.returncode != 0
    assert not any(is_alive(pid) for pid in ranks)
    found = re.findall(r"overlap_mtp: (.*); rank \d+ of", output)
    assert len(found) == len(ranks)
    expected = rf'rank 1 has not arrived after \d+ s: it is still in "step {step}, .*: microbatch 0"'
    assert all(re.match(expected, one) for one in found), output
