"""Which stream waits for what when activations are exchanged between GPUs: the order of calls, without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any
from unittest import mock

import pytest
import torch

from overlap_mtp.layout import SequenceLayout
from overlap_mtp.schedules import activations
from overlap_mtp.schedules.activations import ActivationRoller, make_activation_roller

from pretended_gpus import pretended_gpus

pytest.importorskip("triton")
LAYOUT = SequenceLayout.packed([0, 6, 16], 1, "contiguous")
FORK = ["forked on compute", "side waits for forked", "upload on side"]
START = [*FORK, *("row_maps on side", "unroll_own_rows on side", "pack_rows on side", "arrived on side")]
JOIN = ["compute waits for arrived", "unroll_received_rows on compute", "joined on compute"]
BACKWARD = [
    *(*FORK, "sum_rows on side", "pack_sums on side", "returned on side"),
    *("compute waits for returned", "add_rows on compute", "joined on compute"),
]


@dataclass
class Calls:
    """What is called, in order."""

    log: list[str] = field(default_factory=list)
    current: Any = None
    is_reached: bool = True  # every event
    recorded: set[tuple[int, str]] = field(default_factory=set)  # addresses, and the streams that use them
    names: Any = field(default_factory=lambda: cycle(("forked", "arrived", "returned", "joined")))

    def stream(self, name: str) -> Any:
        return mock.Mock(
            wait_event=lambda event: self.log.append(f"{name} waits for {event.called}"), called=name
        )

    def event(self, name: str = "") -> Any:
        called = name or next(self.names)
        return mock.Mock(
            record=lambda stream: self.log.append(f"{called} on {stream.called}"),
            query=lambda: self.is_reached,
            synchronize=lambda: self.log.append(f"the host waits for {called}"),
            called=called,
        )

    def replay(self, launch: Any) -> None:
        if launch.first is not None:
            self.replay(launch.first)
        name = launch._kernel.__name__.removesuffix("_kernel")
        self.log.append(f"{name} on {self.current.called}")

    @property
    def record(self) -> Any:
        """In place of Tensor.record_stream."""
        return lambda tensor, stream: self.recorded.add((tensor.data_ptr(), stream.called))

    def take(self) -> list[str]:
        """The calls since the last time."""
        found, self.log = self.log, []
        return found


@pytest.fixture
def calls() -> Iterator[Calls]:
    from overlap_mtp.exchange import row_cuda
    from overlap_mtp.kernels.launch import Launch

    made = Calls()
    made.current = made.stream("compute")
    with (
        pretended_gpus(),
        mock.patch.object(row_cuda, "BUFFERS", 1),
        mock.patch.object(Launch, "replay", lambda launch: made.replay(launch)),
        mock.patch.object(torch.Tensor, "record_stream", made.record),
        mock.patch.multiple(
            torch.cuda,
            Stream=lambda *_, **__: made.stream("side"),
            Event=made.event,
            current_stream=lambda device=None: made.current,
            set_stream=lambda stream: setattr(made, "current", stream),
        ),
    ):
        yield made


@pytest.fixture
def roller(calls: Calls) -> ActivationRoller:
    made = make_activation_roller("overlap", None, num_depths=2)
    assert isinstance(made, ActivationRoller)
    made.start({"a": torch.ones(1, 16, 4)}, LAYOUT)  # the first makes buffers
    calls.log.clear()
    calls.recorded.clear()
    return made


def free(roller: ActivationRoller) -> list[str]:
    """The last use of each of the buffers that are free."""
    assert roller._transport is not None
    return [buffers.last_use.called for buffers in roller._transport._free]  # type: ignore[attr-defined]


def started(roller: ActivationRoller, ready: Any = None, needs_gradient: bool = False) -> Any:
    return roller.start({"a": torch.ones(1, 16, 4, requires_grad=needs_gradient) * 1}, LAYOUT, ready)


def test_own_rows_are_written_and_sent_aside_and_the_join_waits_for_the_rest(
    calls: Calls, roller: ActivationRoller
):
    rolls = started(roller)
    assert calls.take() == START
    assert free(roller) == []
    rolls.at(1)
    assert calls.take() == JOIN
    rolls.at(2)
    assert calls.take() == []
    del rolls
    assert free(roller) == ["joined"]


def test_an_early_event_leaves_the_rolls_to_the_join(calls: Calls, roller: ActivationRoller):
    rolls = started(roller, calls.event("ready"))
    begun = ["upload on side", "row_maps on side", "pack_rows on side"]
    assert calls.take() == [FORK[0], "side waits for ready", *begun, "arrived on side"]
    rolls.at(1)
    assert calls.take() == [JOIN[0], "unroll_own_rows on compute", *JOIN[1:]]


def test_gradients_leave_before_they_are_added(calls: Calls, roller: ActivationRoller):
    rolls = started(roller, needs_gradient=True)
    rolled = rolls.at(1)["a"]
    del rolls
    calls.take()
    rolled.sum().backward()
    assert calls.take() == BACKWARD
    del rolled
    assert free(roller) == ["joined"]


def test_a_second_pass_waits_until_the_device_has_read_what_the_first_one_wrote(
    calls: Calls, roller: ActivationRoller
):
    rolled = started(roller, needs_gradient=True).at(1)["a"].sum()
    rolled.backward(retain_graph=True)
    calls.take()
    rolled.backward()
    assert calls.take() == ["the host waits for joined", *BACKWARD]


def test_buffers_are_used_again_only_after_their_last_use(calls: Calls, roller: ActivationRoller):
    rolls = started(roller)
    del rolls  # it is dropped
    assert free(roller) == ["arrived"]
    calls.is_reached = False
    rolls = started(roller)
    assert free(roller) == ["arrived"]
    calls.is_reached = True
    others = started(roller)
    assert free(roller) == []
    del rolls, others


@pytest.mark.parametrize("event", [None, "ready"])
def test_another_stream_waits_for_memory_and_rows(calls: Calls, roller: ActivationRoller, event: str | None):
    rolls = started(roller, event and calls.event(event))
    calls.take()
    calls.current = calls.stream("other")
    roll = rolls.at(1)["a"]
    assert calls.take()[:2] == ["other waits for forked", "other waits for arrived"]
    assert (roll.data_ptr(), "other") in calls.recorded


def test_a_backward_that_is_given_up_leaves_its_memory_to_the_side_stream(
    calls: Calls, roller: ActivationRoller
):
    used = torch.ones(1, 16, 4)

    def give_up(_: torch.Tensor) -> None:
        raise InterruptedError

    rolls = started(roller, needs_gradient=True)
    inner = rolls._tensors[0]
    inner.register_hook(give_up)  # between backward of the join and that of the start
    rolled = rolls.at(1)["a"]
    del rolls, inner
    assert not calls.recorded
    with pytest.raises(InterruptedError):
        torch.autograd.backward(rolled, used)
    del rolled
    assert (used.data_ptr(), "side") in calls.recorded
    assert free(roller) == ["returned"]


def test_gradients_of_another_stream_are_left_to_the_side_stream(calls: Calls, roller: ActivationRoller):
    transport, used = roller._transport, [torch.ones(1, 16, 4) for _ in range(2)]
    rolls = started(roller, needs_gradient=True)
    rolls.at(1)
    exchange = rolls._backward.exchange
    compute, calls.current = calls.current, calls.stream("other")
    transport.begin_backward(exchange, [[one] for one in used])  # type: ignore[union-attr]
    calls.current = compute
    transport.end_backward(exchange)  # type: ignore[union-attr]
    assert {(one.data_ptr(), "side") for one in used} <= calls.recorded


def test_a_join_after_backward_waits_for_it(calls: Calls, roller: ActivationRoller):
    tensor = torch.ones(1, 16, 4, requires_grad=True) * 1
    rolls = roller.start({"a": tensor}, LAYOUT)
    tensor.sum().backward()
    calls.take()
    rolls.at(1)
    assert calls.take() == ["compute waits for joined", *JOIN[1:]]


@pytest.mark.parametrize("schedule", ["overlap", "merged"])
def test_a_backward_that_a_hook_starts_waits_for_a_join_on_another_stream(calls: Calls, schedule: str):
    roller = make_activation_roller(schedule, None, num_depths=2)
    tensor = torch.ones(1, 16, 4, requires_grad=True) * 1
    rolls = roller.start({"a": tensor}, LAYOUT)
    compute, calls.current = calls.current, calls.stream("other")
    rolls.at(1)
    calls.current = compute
    calls.take()
    tensor.sum().backward()
    assert calls.take()[:2] == ["compute waits for joined", "forked on compute"]


def test_a_tensor_of_another_stream_waits_for_the_backward_that_a_hook_started(
    calls: Calls, roller: ActivationRoller
):
    streams = {"a": calls.stream("of a"), "b": calls.stream("of b")}
    tensors = {name: torch.ones(1, 16, 4, requires_grad=True) * 1 for name in "ab"}
    take_part = activations._take_part

    def take_part_on_own_stream(this: Any, number: int, gradient: Any) -> Any:
        calls.current = streams["ab"[number]]
        return take_part(this, number, gradient)

    with mock.patch.object(activations, "_take_part", take_part_on_own_stream):
        rolls = roller.start(tensors, LAYOUT)
    calls.take()
    sum(tensor.sum() for tensor in tensors.values()).backward()
    log = calls.take()
    [ended_on] = [one[-1] for one in log if one.startswith("joined on")]
    other = "ab".replace(ended_on, "")
    assert log[-1] == f"of {other} waits for joined"
    assert {stream for _, stream in calls.recorded} >= {f"of {other}"}
    del rolls


def test_an_exchange_is_not_captured(calls: Calls, roller: ActivationRoller):
    with (
        mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=True),
        pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"),
    ):
        started(roller)


def test_longer_batches_get_longer_buffers(calls: Calls, roller: ActivationRoller):
    longer = SequenceLayout.packed([0, 6, 32], 1, "contiguous")
    assert free(roller) == ["arrived"]
    rolls = roller.start({"a": torch.ones(1, 32, 4)}, longer)
    assert free(roller) == []
    del rolls
    rolls = started(roller)  # a short one fits into them
    assert free(roller) == []
    del rolls
    assert free(roller) == ["arrived"]
