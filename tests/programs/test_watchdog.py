"""Ranks that die, fail or never arrive, in real processes: who the others say it was, and that none is left over."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from overlap_mtp.training.rendezvous import connect
from overlap_mtp.training.watchdog import EXIT_CODE, Watchdog, collectives_begun

PROGRAM = str(Path(__file__).resolve())
DEADLINE_S = {"gloo": 8.0, "nccl": 16.0}  # a GPU's first calls hold Python's lock for seconds
START_S = 90.0  # three interpreters that import torch on a busy machine
SLACK_S = 4.0  # for a process to end
EVER_S = 1000.0


def misdeed(scenario: str) -> None:
    if scenario in ("is killed", "is frozen"):
        os.kill(os.getpid(), signal.SIGKILL if scenario == "is killed" else signal.SIGSTOP)
    if scenario == "raises":
        raise ValueError("a batch of nonsense")
    if scenario == "seems lost":
        raise RuntimeError("Connection closed by peer")
    time.sleep(EVER_S)


def program(scenario: str, odd: int, others: str) -> None:
    """Ten steps of all-reduces; in step 3 rank `odd` does what the scenario is named after.

    The `others` are then in their all-reduce ("reduce"), or, as in a kernel that spins, where no exception ever comes:
    in that step ("spin") or in the next one ("spin ahead"). "one works": rank 0 is in a receive, rank 1 is busy.
    "wait": they wait in that step, and their collectives are followed, of which nobody gives one up in time.
    "join": before the steps, when the others are in init_process_group, which waits for the store.
    """
    rank, world_size, backend = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), os.environ["BACKEND"]
    deadline = timedelta(seconds=DEADLINE_S[backend])
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    ones = torch.ones(1, device=device)
    store = connect(timedelta(seconds=float(os.environ["START_S"])))
    with Watchdog(store, rank, world_size, deadline) as watchdog:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        watchdog.phase("joining")
        if others == "join":
            time.sleep(0.5)
            if rank == odd:
                print("here", flush=True)
                misdeed(scenario)
        groups = dist.PrefixStore("groups", store)
        gives_up = scenario == "sleeps" and backend == "gloo" and others != "wait"
        timeout = deadline * (0.4 if gives_up else 10)
        dist.init_process_group(backend, store=groups, rank=rank, world_size=world_size, timeout=timeout)
        if others == "wait":
            watchdog.follow(collectives_begun(dist.group.WORLD))
        for step in range(10):
            watchdog.phase(f"step {step}")
            if step == 3:
                time.sleep(0.5)  # so that all have heard where the others are
                if rank == odd:
                    print("here", flush=True)
                    misdeed(scenario)
                elif others == "one works":
                    dist.recv(ones, src=odd) if rank == 0 else time.sleep(EVER_S)
                elif others.startswith("spin"):
                    watchdog.phase("step 4") if others == "spin ahead" else None
                    time.sleep(EVER_S)
            dist.all_reduce(ones)
            if device.type == "cuda":
                if others != "wait":
                    watchdog.phase(f"step {step}: waiting")
                torch.cuda.synchronize()
        dist.destroy_process_group()


def program_of_leaving() -> None:
    """Ranks end apart: 2 is there for longer than the deadline after 0, which holds the store, is done."""
    rank = int(os.environ["RANK"])
    with Watchdog(connect(timedelta(seconds=START_S)), rank, 3, timedelta(seconds=2)) as watchdog:
        print("here", flush=True)
        for tenth in range((5, 17, 33)[rank]):
            watchdog.phase(f"tenth {tenth}")
            time.sleep(0.1)


def start(
    *arguments: str, ranks: list[int], world_size: int = 3, **environment: str
) -> dict[int, subprocess.Popen]:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world_size)}
    common |= {"OMP_NUM_THREADS": "1", "START_S": str(START_S), "BACKEND": "gloo"} | environment
    return {
        rank: subprocess.Popen(
            [sys.executable, PROGRAM, *arguments],
            env=os.environ | common | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ranks
    }


def ends(processes: dict[int, subprocess.Popen], limit_s: float) -> dict[int, tuple[int, str]]:
    """(exit status, stderr) by rank, of processes that all end by themselves. TimeoutExpired where one does not."""
    end, found = time.monotonic() + limit_s, {}
    for rank, process in processes.items():
        said = process.communicate(timeout=max(0.1, end - time.monotonic()))[1]
        found[rank] = (process.returncode, said)
    return found


def run(
    scenario: str, odd: int, others: str, world_size: int = 3, backend: str = "gloo"
) -> dict[int, tuple[int, str]]:
    """How the ranks end: all of them, the odd one too, by themselves and within the deadline after its misdeed."""
    arguments = (scenario, str(odd), others)
    processes = start(*arguments, ranks=list(range(world_size)), world_size=world_size, BACKEND=backend)
    try:
        assert processes[odd].stdout.readline() == "here\n", processes[odd].communicate()[1]
        frozen = {odd: processes[odd]} if scenario == "is frozen" else {}
        awake = {rank: process for rank, process in processes.items() if rank not in frozen}
        found = ends(awake, DEADLINE_S[backend] + SLACK_S)
        if frozen:
            frozen[odd].send_signal(signal.SIGCONT)
            found |= ends(frozen, DEADLINE_S[backend] + SLACK_S)
        return found
    finally:
        for process in processes.values():
            process.kill()
            process.wait()


def assert_all_name(found: dict[int, tuple[int, str]], odd: int, what: str, phase: str = "step 3") -> None:
    """Every rank but the odd one ends in a line that says `what`, and blames nobody else."""
    for rank in set(found) - {odd}:
        status, said = found[rank]
        line = next((line for line in said.splitlines() if "overlap_mtp: " in line), said)
        assert what in line
        assert f'; rank {rank} of {len(found)} was in "{phase}" and ends' in line
        assert status == (1 if "PeerError" in line else EXIT_CODE), said
        for other in set(found) - {odd}:
            assert not any(f"rank {other} {word}" in said for word in ("is gone", "failed", "has not"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scenario", "others"),
    [
        ("is killed", "join"),
        ("is killed", "reduce"),
        ("is killed", "spin"),
        ("is killed", "one works"),
        ("is frozen", "spin"),
    ],
)
def test_a_rank_that_dies_is_named(scenario, others):
    found, phase = run(scenario, 2, others), "joining" if others == "join" else "step 3"
    assert_all_name(found, 2, "rank 2 is gone: no sign of it for ", phase)
    assert_all_name(found, 2, f'the last was in "{phase}"', phase)
    assert found[2][0] == (-signal.SIGKILL if scenario == "is killed" else EXIT_CODE)


@pytest.mark.slow
@pytest.mark.parametrize(("scenario", "others"), [("is killed", "reduce"), ("is frozen", "spin")])
def test_the_rank_that_holds_the_store_is_named(scenario, others):
    found = run(scenario, 0, others)
    assert_all_name(found, 0, "rank 0, which holds the store, is gone: no answer for ")
    assert_all_name(found, 0, 'the last sign was in "step 3"')


@pytest.mark.slow
@pytest.mark.parametrize(("odd", "others"), [(0, "spin"), (1, "reduce")])
def test_a_rank_that_raises_is_named_with_its_error(odd, others):
    found = run("raises", odd, others)
    assert_all_name(found, odd, f'rank {odd} failed in "step 3": ValueError: a batch of nonsense')
    status, said = found[odd]
    assert status == 1
    assert said.strip().endswith("ValueError: a batch of nonsense")


@pytest.mark.slow
@pytest.mark.parametrize("odd", [0, 1])
def test_a_rank_that_lost_nobody_is_to_blame_itself(odd):
    found = run("seems lost", odd, "spin")
    assert_all_name(found, odd, f'rank {odd} failed in "step 3": RuntimeError: Connection closed by peer')
    assert "PeerError" not in found[odd][1]


@pytest.mark.slow
@pytest.mark.parametrize("others", ["reduce", "wait", "spin ahead"])
def test_a_rank_that_never_arrives_is_named(others):
    """In the phase that the others wait in (a collective is given up, or followed), or in an earlier one."""
    found = run("sleeps", 1, others)
    phase = "step 4" if others == "spin ahead" else "step 3"
    assert_all_name(found, 1, "rank 1 has not arrived after ", phase)
    assert_all_name(found, 1, 'it is still in "step 3"', phase)
    status, said = found[1]
    assert status == EXIT_CODE
    assert "rank 1 has not arrived after " in said


@pytest.mark.slow
@pytest.mark.parametrize("absent", [0, 1])
def test_a_rank_that_is_never_started_is_named(absent):
    """The two that come start apart by as much as a busy machine makes of it, which the deadline must outlast."""
    present = [rank for rank in range(3) if rank != absent]
    processes = start("nothing", "-1", "reduce", ranks=present, START_S="10")
    try:
        for status, said in ends(processes, 10 + START_S).values():
            assert status == 1
            assert f"rank {absent}, which never arrived" in said
            assert "PeerError" in said
            assert "may be missing" not in said
    finally:
        for process in processes.values():
            process.kill()
            process.wait()


@pytest.mark.slow
def test_ranks_that_end_apart_are_left_in_peace():
    processes = start("leaving", ranks=[0, 1, 2])
    for status, said in ends(processes, START_S).values():
        assert status == 0, said
        assert "overlap_mtp: " not in said


@pytest.mark.slow
def test_a_run_that_is_stopped_as_a_whole_goes_on():
    """As by Ctrl-Z, for longer than a single rank may be silent."""
    processes = start("leaving", ranks=[0, 1, 2])
    for process in processes.values():
        assert process.stdout.readline() == "here\n"
    for number, pause_s in ((signal.SIGSTOP, 2.5), (signal.SIGCONT, 0)):
        for process in processes.values():
            process.send_signal(number)
        time.sleep(pause_s)
    for status, said in ends(processes, START_S).values():
        assert status == 0, said


@pytest.mark.multi_gpu
@pytest.mark.parametrize(
    ("scenario", "others"),
    [("is killed", "reduce"), ("sleeps", "reduce"), ("sleeps", "wait"), ("raises", "reduce")],
)
def test_on_nccl_too_the_rank_is_named(scenario, others):
    """Whose kernels spin for ever: no exception comes of a peer that is gone."""
    status, said = run(scenario, 1, others, world_size=2, backend="nccl")[0]
    assert status == EXIT_CODE, said
    expected = {
        "is killed": 'rank 1 is gone: no sign of it for 4 s, the last was in "step 3"',
        "sleeps": "rank 1 has not arrived after",
        "raises": 'rank 1 failed in "step 3": ValueError: a batch of nonsense',
    }
    assert expected[scenario] in said


if __name__ == "__main__":
    if sys.argv[1] == "leaving":
        program_of_leaving()
    else:
        try:
            program(sys.argv[1], int(sys.argv[2]), sys.argv[3])
        except ValueError:  # gone at once: the others must have learned of it before it left the watchdog
            traceback.print_exc()
            os._exit(1)
