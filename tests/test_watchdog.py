"""Ranks that die, fail or never arrive, in real processes: who the others say it was, and that none is left over."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from overlap_mtp.watchdog import EXIT_CODE, Watchdog, connect

DEADLINE_S = 8.0
ROUNDS = 400  # of 20 ms: as long as the deadline
PROGRAM = str(Path(__file__).resolve())


def program(scenario: str, odd: int) -> None:
    """A run of all-reduces in which rank `odd` does what the scenario is named after."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    deadline = timedelta(seconds=DEADLINE_S)
    store = connect(deadline)
    with Watchdog(store, rank, world_size, deadline) as watchdog:
        watchdog.phase("joining")
        on_gpu = os.environ["BACKEND"] == "nccl"
        device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
        timeout = deadline * (0.4 if scenario == "sleeps" and not on_gpu else 10)
        groups = dist.PrefixStore("groups", store)
        if on_gpu:
            torch.cuda.set_device(rank)
        backend = os.environ["BACKEND"]
        dist.init_process_group(backend, store=groups, rank=rank, world_size=world_size, timeout=timeout)
        for step in range(10):
            watchdog.phase(f"step {step}")
            if rank == odd and step == 3:
                if scenario == "raises":
                    raise ValueError("a batch of nonsense")
                if scenario in ("sleeps", "is late"):
                    time.sleep(1000)
                if scenario == "ends early":
                    return
                time.sleep(1 if scenario == "is killed" else 0)  # so that it has said where it is
                print("here", flush=True)
                time.sleep(1000 if scenario == "is killed" else 0)
            if scenario == "is late" and step == 4:
                time.sleep(1000)  # as in a kernel that spins: no exception ever comes
            if scenario != "is late":
                dist.all_reduce(torch.ones(1, device=device))
            if on_gpu:
                watchdog.phase(f"step {step}: waiting")
                torch.cuda.synchronize()
        watchdog.phase("leaving")
        if scenario == "is slow to end" and rank == odd:
            time.sleep(3)
        dist.destroy_process_group()


def run(
    scenario: str, odd: int, world_size: int = 3, absent: int | None = None, backend: str = "gloo"
) -> dict[int, tuple[int, str]]:
    """(exit status, stderr) by rank; raises where one of them outlives twice the deadline."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    base = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world_size)}
    base["BACKEND"] = backend
    processes = {
        rank: subprocess.Popen(
            [sys.executable, PROGRAM, scenario, str(odd)],
            env=base | {"RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
        if rank != absent
    }
    found = {}
    try:
        if scenario == "is killed":
            assert processes[odd].stdout.readline() == "here\n"
            processes[odd].send_signal(signal.SIGKILL)
        begin = time.monotonic()
        for rank, process in processes.items():
            if scenario in ("sleeps", "is late") and rank == odd:
                continue  # a launcher ends it when the others have ended; its own watchdog may as well
            _, said = process.communicate(timeout=2 * DEADLINE_S + 20 - (time.monotonic() - begin))
            found[rank] = (process.returncode, said)
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("odd", [0, 2])
def test_a_rank_that_is_killed_is_named(odd):
    found = run("is killed", odd)
    for rank in {0, 1, 2} - {odd}:
        status, said = found[rank]
        assert status != 0
        # Rank 0 holds the store here: without it nobody can say where it was.
        assert (
            f"rank {odd}, which holds the store, is gone" in said
            or f"rank {odd} is gone: no sign of it" in said
        )
        assert f'rank {rank} of 3 was in "step 3" and ends' in said
        if odd:
            assert 'the last was in "step 3"' in said
        for innocent in {0, 1, 2} - {odd}:
            assert f"rank {innocent} is gone" not in said
            assert f"rank {innocent} failed" not in said


@pytest.mark.slow
@pytest.mark.parametrize("odd", [0, 1])
def test_a_rank_that_raises_is_named_with_its_error(odd):
    found = run("raises", odd)
    assert "ValueError: a batch of nonsense" in found[odd][1]
    for rank in {0, 1, 2} - {odd}:
        status, said = found[rank]
        assert status != 0
        assert (
            f'rank {odd} failed in "step 3": ValueError: a batch of nonsense; rank {rank} of 3 was in' in said
        )


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["sleeps", "is late"])
def test_a_rank_that_never_arrives_is_named(scenario):
    """In the phase that the others wait in (their collective is given up), or in an earlier one (nothing is)."""
    found = run(scenario, 1)
    for rank in (0, 2):
        status, said = found[rank]
        assert status != 0
        assert "rank 1 has not arrived after" in said
        assert 'it is still in "step 3"' in said
    if scenario == "is late":
        assert {status for status, _ in found.values()} == {EXIT_CODE}


@pytest.mark.slow
@pytest.mark.parametrize("absent", [0, 1])
def test_a_rank_that_is_never_started_is_named(absent):
    found = run("nothing", -1, absent=absent)
    for status, said in found.values():
        assert status != 0
        assert "PeerError" in said
        assert "rank 1, which never arrived" in said if absent else "no store, which rank 0 holds" in said


@pytest.mark.slow
def test_ranks_that_end_apart_are_left_in_peace():
    for status, said in run("is slow to end", 2).values():
        assert status == 0, said


@pytest.mark.multi_gpu
@pytest.mark.parametrize("scenario", ["is killed", "sleeps", "raises"])
def test_on_nccl_too_the_rank_is_named(scenario):
    """Whose kernels spin for ever: no exception comes of a peer that is gone."""
    status, said = run(scenario, 1, world_size=2, backend="nccl")[0]
    assert status != 0
    expected = {
        "is killed": 'rank 1 is gone: no sign of it for 4 s, the last was in "step 3"',
        "sleeps": "rank 1 has not arrived after",
        "raises": 'rank 1 failed in "step 3": ValueError: a batch of nonsense',
    }
    assert expected[scenario] in said


def test_a_phase_costs_next_to_nothing():
    watchdog = Watchdog(dist.HashStore(), 0, 1)
    with watchdog:
        begin = time.perf_counter()
        for _ in range(10_000):
            watchdog.phase("a step")
        assert time.perf_counter() - begin < 10_000 * 10e-6


if __name__ == "__main__":
    program(sys.argv[1], int(sys.argv[2]))
