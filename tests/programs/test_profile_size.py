"""A large export is read in bounded time and memory."""

import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from handmade import MACHINE

PROCESSES, KERNELS, PER_STEP = 2, 500_000, 2000  # kernels of each process
MOST_SECONDS, MOST_GB = 20, 4
# Each kernel is launched in a range of its own, and one in ten is NCCL's.
EXPORT = f"""
    CREATE TABLE process AS SELECT 0 rank, {MACHINE | 100 << 24} pid UNION SELECT 1, {MACHINE | 101 << 24};
    CREATE TABLE kernel AS WITH RECURSIVE each(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM each LIMIT {KERNELS})
        SELECT i, rank, pid FROM process, each;
    CREATE TABLE StringIds (id INTEGER PRIMARY KEY, value);
    INSERT INTO StringIds VALUES
        (1, 'gemm'), (2, 'ncclDevKernel_AllGather'), (4, 'layer'), (10, 'step prefetch r0'), (11, 'step prefetch r1');
    CREATE TABLE CUPTI_ACTIVITY_KIND_RUNTIME AS
        SELECT 1000 * i start, pid | 1 globalTid, i + 1 correlationId FROM kernel;
    CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL AS SELECT 1000 * i + 5000 start, 1000 * i + 6500 end, 0 deviceId,
        7 + i % 2 streamId, i + 1 correlationId, pid globalPid, 1 + (i % 10 = 0) shortName FROM kernel;
    CREATE TABLE NVTX_EVENTS AS
        SELECT 1000 * i - 100 start, 1000 * i + 500 end, 59 eventType, 4 textId, pid | 1 globalTid FROM kernel;
    INSERT INTO NVTX_EVENTS SELECT 1000 * i - 200, 1000 * (i + {PER_STEP}) - 300, 59, 10 + rank, pid | 1 FROM kernel
        WHERE i % {PER_STEP} = 0;
    DROP TABLE kernel;
"""


@pytest.mark.slow
def test_a_million_kernels(tmp_path):
    with closing(sqlite3.connect(tmp_path / "large.sqlite")) as db:
        db.executescript(EXPORT)
    report = Path(__file__).parents[2] / "profiles" / "report.py"
    command = [sys.executable, report, tmp_path / "large.sqlite", "--json", tmp_path / "out.json"]
    process = subprocess.Popen(command, cwd=report.parents[1], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    assert used.ru_utime + used.ru_stime < MOST_SECONDS
    assert used.ru_maxrss / 1e6 < MOST_GB  # Linux counts KB
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["launches"] for row in rows] == [KERNELS // 10] * PROCESSES
    assert rows[0]["steps"] == KERNELS // PER_STEP
