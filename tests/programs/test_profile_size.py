"""A large export is read in bounded time and memory."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from handmade import MACHINE, TABLES

ROOT = Path(__file__).parents[2]
KERNELS = 1_000_000
PROCESSES = 2
PER_STEP = 2000
MOST_SECONDS, MOST_GB = 20, 4


def write_large(path: Path) -> None:
    """Two processes, steps of 2,000 kernels, each launched in a range of its own; one in ten is NCCL's."""
    tables = ("StringIds", "NVTX_EVENTS", "CUPTI_ACTIVITY_KIND_RUNTIME", "CUPTI_ACTIVITY_KIND_KERNEL")
    with closing(sqlite3.connect(path)) as db:
        db.executescript("".join(f"CREATE TABLE {table} ({TABLES[table]});" for table in tables))
        names = [(1, "gemm"), (2, "ncclDevKernel_AllGather"), (3, "cudaLaunchKernel"), (4, "layer")]
        names += [(10 + rank, f"step prefetch r{rank}") for rank in range(PROCESSES)]
        db.executemany("INSERT INTO StringIds VALUES (?, ?)", names)
        for rank in range(PROCESSES):
            pid = MACHINE | (100 + rank) << 24
            each = range(KERNELS // PROCESSES)
            db.executemany(
                "INSERT INTO CUPTI_ACTIVITY_KIND_RUNTIME VALUES (?, ?, 0, ?, ?, 3, 0, NULL)",
                ((1000 * i, 1000 * i + 400, pid | 1, i + 1) for i in each),
            )
            db.executemany(
                "INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL VALUES (?, ?, 0, 1, ?, ?, ?, 1, ?, NULL, 1)",
                ((1000 * i + 5000, 1000 * i + 6500, 7 + i % 2, i + 1, pid, 1 + (i % 10 == 0)) for i in each),
            )
            db.executemany(
                "INSERT INTO NVTX_EVENTS (start, end, eventType, textId, globalTid) VALUES (?, ?, 59, ?, ?)",
                ((1000 * i - 100, 1000 * i + 500, 4, pid | 1) for i in each),
            )
            db.executemany(
                "INSERT INTO NVTX_EVENTS (start, end, eventType, textId, globalTid) VALUES (?, ?, 59, ?, ?)",
                ((1000 * i - 200, 1000 * (i + PER_STEP) - 300, 10 + rank, pid | 1) for i in each[::PER_STEP]),
            )
        db.commit()


@pytest.mark.slow
def test_a_million_kernels(tmp_path):
    write_large(tmp_path / "large.sqlite")
    command = [sys.executable, "profiles/report.py", str(tmp_path / "large.sqlite")]
    process = subprocess.Popen(
        [*command, "--json", str(tmp_path / "out.json")], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    assert used.ru_utime + used.ru_stime < MOST_SECONDS
    assert used.ru_maxrss / 1e6 < MOST_GB  # Linux counts KB
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["launches"] for row in rows] == [KERNELS // PROCESSES // 10] * PROCESSES
    assert rows[0]["steps"] == KERNELS // PROCESSES // PER_STEP
