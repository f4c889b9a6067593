"""NVTX ranges and TimedRoller: what they report, and that they change nothing."""

from __future__ import annotations

import importlib.util
import timeit
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from overlap_mtp import Roller, SequenceLayout, make_activation_roller, make_roller, tracing
from overlap_mtp.labels import LABEL
from overlap_mtp.schedules.timed import Stopwatch, TimedRoller
from overlap_mtp.tracing import BackwardSpan, span

from cases import NUM_DEPTHS, Microbatch


def test_a_label_says_name_detail_and_rank():
    for one, name, detail in (
        (span("step", "prefetch:process_group"), "step", "prefetch:process_group"),
        (span("send-recv", num_bytes=10), "send-recv", None),
    ):
        assert LABEL.match(one.label).groupdict() == {"name": name, "detail": detail, "rank": "0"}
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
    assert span("backward").label in [event.name for event in profile.events()]


def test_ranges_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("OVERLAP_MTP_TRACING", "0")
    spec = importlib.util.find_spec("overlap_mtp.tracing")
    switched_off = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(switched_off)
    loss = torch.ones(1, requires_grad=True)
    assert not switched_off.ENABLED
    assert switched_off.BackwardSpan().begins(loss) is loss
    with switched_off.span("pack"):
        pass
    assert tracing.ENABLED


@pytest.mark.parametrize("schedule", ["sync", "prefetch"])
def test_a_timed_roller_rolls_the_same_and_knows_its_cost(schedule):
    batch, timed = Microbatch.of(None), TimedRoller(make_roller(schedule, None, NUM_DEPTHS))
    assert batch.wrong(timed.start(batch.shards(), batch.layout)) == []
    cost = timed.read()
    assert 0 < cost.host_us < 1e6
    assert cost.stall_us is None  # no device to hold up
    assert timed.read().host_us == 0


def test_a_timed_roller_knows_what_the_backward_pass_of_activations_costs():
    layout, timed = (
        SequenceLayout.dense(8, 1),
        TimedRoller(make_activation_roller("overlap", None, NUM_DEPTHS)),
    )
    rows = torch.randn(1, 8, 4, requires_grad=True)
    ahead = timed.start({"rows": rows}, layout).at(1)["rows"]
    assert timed.backward.read().host_us == 0 < timed.read().host_us
    ahead.sum().backward()
    assert rows.grad is not None
    assert rows.grad[0, :, 0].tolist() == [0] + 7 * [1]
    assert timed.read().host_us == 0 < timed.backward.read().host_us < 1e6


def test_a_stopwatch_subtracts_what_two_events_with_nothing_between_them_take():
    class Event:
        def __init__(self, ms: float) -> None:
            self.ms = ms

        def elapsed_time(self, later: Event) -> float:
            return later.ms - self.ms

    times = map(Event, [0, 0.002, 0.012, 1, 1.003, 1.033])
    stopwatch = Stopwatch()
    stopwatch.on_gpu = True
    with mock.patch.object(stopwatch, "_now", side_effect=times):
        for _ in range(2):
            with stopwatch:
                pass
    assert stopwatch.read().stall_us == pytest.approx(8 + 28)
    assert stopwatch.read().stall_us is None


def test_a_timed_roller_finds_the_gpu_in_a_batch_that_begins_with_none(monkeypatch):
    roller = mock.create_autospec(Roller, instance=True)
    timed = TimedRoller(roller)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(timed.forward, "_now", mock.Mock(return_value="an event"))
    timed.start({"attention_mask": None, "tokens": SimpleNamespace(is_cuda=True)}, Microbatch.of(None).layout)
    assert timed.forward._spans == [3 * ["an event"]]
    roller.start.assert_called_once()
