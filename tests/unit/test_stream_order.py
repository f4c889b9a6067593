"""Which stream waits for what when tokens are exchanged between GPUs: the order of calls, without a GPU."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch

from overlap_mtp.exchange import cuda
from overlap_mtp.exchange.outputs import OutputPool
from overlap_mtp.exchange.plan import make_plans
from overlap_mtp.layout import SequenceLayout

from simulated import spec_of
from strategies import random_batch

pytest.importorskip("triton")
LAYOUT = SequenceLayout.dense(24, 2)
TENSORS = {"input_ids": torch.int32}


@dataclass
class Calls:
    """What is called, in order, and what the calls see."""

    log: list[str] = field(default_factory=list)
    current: Any = None
    is_capturing: bool = False

    def stream(self, name: str) -> Any:
        return mock.Mock(
            wait_event=lambda event: self.log.append(f"{name} waits for {event.called}"), called=name
        )

    def event(self, name: str) -> Any:
        return mock.Mock(record=lambda stream: self.log.append(f"{name} on {stream.called}"), called=name)


class Faked(cuda.CudaTransport):
    """A transport whose streams and events only say that they were called."""

    def __init__(self, calls: Calls, is_overlapped: bool, writes_early: bool) -> None:
        full = random_batch(LAYOUT, 1, dtypes=TENSORS)
        self.spec, self.plan = spec_of(full, LAYOUT, 2, 1), make_plans(LAYOUT, 2, 1)[0]
        self.tensors = [LAYOUT.shard(full[name], 0) for name in self.spec.names]
        self.calls, self.fails, self.num_started, self.failure = calls, False, 0, None
        self.device, self._parts = torch.device("cpu"), self.spec.parts
        self._outputs = OutputPool(self.spec, self.plan.num_depths)
        self._side, self._is_overlapped, self.writes_early = calls.stream("side"), is_overlapped, writes_early
        self._join_span = self._unroll_span = nullcontext()
        self._free, self._dropped, self._wants_more = deque([self._make()]), deque(), False

    def _make(self) -> cuda.ExchangeBuffers:
        made = cuda.ExchangeBuffers.__new__(cuda.ExchangeBuffers)
        made.forked, made.sent, made.unrolled = map(self.calls.event, ("forked", "sent", "unrolled"))
        made.host_metadata, made.last_use, made.tensors, made.outputs = mock.Mock(), made.unrolled, [], None
        made.unroll = None if self.writes_early else mock.Mock()
        made.constants = mock.Mock(num_tensors=1, batch_rows=1, num_depths=2)
        return made

    def _bind(self, buffers: cuda.ExchangeBuffers, first: Any) -> None: ...

    def _count(self, layout: Any) -> None: ...

    def _launch(self, launch: Any, buffers: Any, grid: Any = None) -> None:
        self.calls.log.append(f"unroll on {self.calls.current.called}")

    def _send(self, buffers: cuda.ExchangeBuffers, number: int) -> None:
        self.calls.log.append(f"send on {self.calls.current.called}")
        if self.fails:
            raise RuntimeError("it fails")

    def begin(self, ready: Any = None) -> Any:
        return self.start(self.tensors, LAYOUT, 0, ready)


@pytest.fixture
def calls() -> Iterator[Calls]:
    made = Calls()
    made.current = made.stream("compute")
    faked = mock.patch.multiple(
        torch.cuda,
        current_stream=lambda device=None: made.current,
        is_current_stream_capturing=lambda: made.is_capturing,
        set_stream=lambda stream: setattr(made, "current", stream),
    )
    recorded = mock.patch.object(torch.Tensor, "record_stream")
    with faked, recorded:
        yield made


def test_rolls_that_are_written_early_are_joined_by_an_event_alone(calls: Calls):
    transport = Faked(calls, is_overlapped=True, writes_early=True)
    transport.begin().wait()
    assert calls.log == [
        *("forked on compute", "side waits for forked", "send on side", "sent on side"),
        "compute waits for sent",
    ]
    assert transport._free[0].last_use is transport._free[0].sent


def test_rolls_that_are_written_at_the_join_use_the_buffers_until_then(calls: Calls):
    transport = Faked(calls, is_overlapped=True, writes_early=False)
    transport.begin(calls.event("ready")).wait()
    assert calls.log == [
        *("forked on compute", "side waits for ready", "send on side", "sent on side"),
        *("compute waits for sent", "unroll on compute", "unrolled on compute"),
    ]
    assert transport._free[0].last_use is transport._free[0].unrolled


def test_new_memory_of_rolls_waits_for_what_used_it_before(calls: Calls):
    transport = Faked(calls, is_overlapped=True, writes_early=True)
    for is_new in (True, False):
        calls.log.clear()
        transport.begin(calls.event("ready")).wait()
        waits = [one for one in calls.log if one.startswith("side")]
        assert waits == ["side waits for ready", "side waits for forked"][: 1 + is_new]


def test_after_a_capture_an_exchange_waits_for_replays_and_for_its_event(calls: Calls):
    transport = Faked(calls, is_overlapped=True, writes_early=False)
    transport.has_captures = True
    transport.begin(calls.event("ready"))
    waits = [one for one in calls.log if "waits" in one]
    assert waits == ["side waits for ready", "side waits for forked", "compute waits for sent"]


@pytest.mark.parametrize("is_overlapped", [True, False])
@pytest.mark.parametrize("writes_early", [True, False])
def test_another_stream_waits_for_memory_and_tokens(calls: Calls, is_overlapped: bool, writes_early: bool):
    transport = Faked(calls, is_overlapped, writes_early)
    exchange = transport.begin()
    calls.log.clear()
    calls.current = calls.stream("other")
    exchange.wait()
    assert calls.log[:2] == ["other waits for forked", "other waits for sent"]
    assert "unroll on compute" not in calls.log


@pytest.mark.parametrize("is_overlapped", [True, False])
def test_an_exchange_that_cannot_be_sent_gives_all_back(calls: Calls, is_overlapped: bool):
    transport = Faked(calls, is_overlapped, writes_early=True)
    transport.fails = True
    with pytest.raises(RuntimeError, match="it fails"):
        transport.begin(calls.event("ready"))
    assert calls.current.called == "compute"
    assert calls.log[-1] == f"unrolled on {'side' if is_overlapped else 'compute'}"
    assert transport._free[0].last_use is transport._free[0].unrolled
    transport.fails = False
    calls.log.clear()
    transport.begin(calls.event("ready"))
    # The side stream may not have waited for the memory that was new before.
    assert "side waits for forked" in calls.log or not is_overlapped
