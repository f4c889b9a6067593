"""Ranges for profilers, and the timed: what they say, and that they change nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import timeit

import pytest
import torch

from overlap_mtp import SequenceLayout, make_roller, tracing
from overlap_mtp.schedules.timed import TimedRoller
from overlap_mtp.tracing import LABEL, BackwardSpan, span

from cases import NUM_DEPTHS, error_of, full_batch, local_to, packed
from rank_pool import RankPool


def test_a_label_says_name_detail_and_rank():
    found = LABEL.match(span("step", "prefetch:process_group").label)
    assert found is not None
    assert found.groupdict() == {"name": "step", "detail": "prefetch:process_group", "rank": "0"}
    found = LABEL.match(span("send-recv", num_bytes=10).label)
    assert found is not None
    assert found.groupdict() == {"name": "send-recv", "detail": None, "rank": "0"}
    assert LABEL.match("somebody else's range") is None
    assert span("depth", 2, depth=2) is span("depth", 2, depth=2)


def test_a_range_is_cheap_when_nobody_listens():
    one = span("pack")

    def enter() -> None:
        with one:
            pass

    assert min(timeit.repeat(enter, number=1000, repeat=5)) / 1000 < 5e-6  # 0.4 µs on an idle machine


def test_torch_profiler_sees_ranges_on_the_thread_that_runs_backward():
    marks = BackwardSpan()
    weight = torch.ones(4, requires_grad=True)
    with torch.profiler.profile() as profile:
        loss = marks.begins((marks.ends(weight * 1) * 3).sum())
        loss.backward()
    assert torch.equal(weight.grad, torch.full((4,), 3.0))
    names = [event.name for event in profile.events()]
    assert span("backward").label in names


def test_ranges_can_be_switched_off():
    code = (
        "from overlap_mtp import tracing; import torch\n"
        "x = torch.ones(1, requires_grad=True)\n"
        "print(tracing.ENABLED, tracing.BackwardSpan().begins(x) is x)\n"
        "with tracing.span('pack'): pass"
    )
    environment = {**os.environ, "OVERLAP_MTP_TRACING": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "False True", done.stderr
    assert tracing.ENABLED


@pytest.mark.parametrize("schedule", ["sync", "prefetch"])
def test_a_metered_roller_rolls_the_same_and_knows_its_cost(schedule):
    layout = SequenceLayout.dense(8, 1)
    batch = full_batch(layout)
    plain = make_roller(schedule, None, NUM_DEPTHS).start(batch, layout)
    timed = TimedRoller(make_roller(schedule, None, NUM_DEPTHS))
    rolls = timed.start(batch, layout)
    for depth in range(1, NUM_DEPTHS + 1):
        stall_estimate = rolls.at(depth)
        assert all(torch.equal(stall_estimate[name], tensor) for name, tensor in plain.at(depth).items())
    cost = timed.read()
    assert 0 < cost.host_us < 1e6
    assert cost.stall_us is None  # no device to hold up
    assert timed.read().host_us == 0


def ask_for_symmetric(group) -> str:
    layout = packed(group.size())
    roller = make_roller("prefetch", group, NUM_DEPTHS, "symmetric")
    return error_of(lambda: roller.start(local_to(group, "prefetch", layout), layout))


def test_symmetric_memory_is_refused_on_cpu(pool: RankPool):
    for error in pool.run(ask_for_symmetric, 2):
        assert error.startswith("ValueError: transport symmetric needs GPUs"), error


def test_nothing_but_a_captured_exchange_takes_another_layout():
    layout = SequenceLayout.dense(8, 1)
    rolls = make_roller("prefetch", None, NUM_DEPTHS).start(full_batch(layout), layout)
    assert error_of(lambda: rolls.set_replay_layout(layout)).startswith("RuntimeError: only")
