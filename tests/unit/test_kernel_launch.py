"""What a bound kernel launches, without a GPU."""

from __future__ import annotations

from typing import Any

from overlap_mtp.kernels.launch import Grid, Launch, in_turn


class Kernel:
    """In place of a Triton kernel: it notes what it is asked for."""

    def __init__(self, name: str, calls: list[tuple[str, str, Grid]]) -> None:
        self.name, self.calls = name, calls

    def __getitem__(self, grid: Grid) -> Any:
        return lambda *_: self.calls.append(("launch", self.name, grid))

    def warmup(self, *_: Any, grid: Grid) -> dict[Grid, None]:
        self.calls.append(("load", self.name, grid))
        return {grid: None}


def test_another_kernel_runs_first_with_its_own_grid():
    calls: list[tuple[str, str, Grid]] = []
    bounds, send = (
        Launch(Kernel(name, calls), (), (n, 1, 1)) for n, name in enumerate(["bounds", "send"], 1)
    )
    send.first = bounds
    send()
    send((7, 1, 1))
    assert calls == [
        ("launch", "bounds", (1, 1, 1)),
        ("launch", "send", (2, 1, 1)),
        ("launch", "bounds", (1, 1, 1)),
        ("launch", "send", (7, 1, 1)),
    ]
    calls.clear()
    send._load((7, 1, 1))  # before both are captured in one graph
    assert calls == [("load", "bounds", (1, 1, 1)), ("load", "send", (7, 1, 1))]


def test_launches_in_turn_run_in_their_order_whatever_runs_before_each():
    calls: list[tuple[str, str, Grid]] = []
    bounds, maps, own, send = (Launch(Kernel(name, calls), (), (1, 1, 1)) for name in "abcd")
    own.first = maps
    in_turn(in_turn(bounds), own, send)()
    assert [name for _, name, _ in calls] == ["a", "b", "c", "d"]
