"""What a bound kernel launches, without a GPU."""

from __future__ import annotations

from typing import Any

import torch

from overlap_mtp.kernels.launch import Dispatch, Grid, Launch


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


class CompilingKernel:
    """In place of a Triton kernel whose launch returns what it compiled. It notes who launched with which arguments."""

    def __init__(self, is_interpreted: bool = False) -> None:
        self.is_interpreted = is_interpreted
        self.calls: list[Any] = []

    def __getitem__(self, grid: Grid) -> Any:
        def launch(*arguments: Any, **constants: Any) -> Compiled | None:
            self.calls.append(("triton", grid, arguments, constants))
            return None if self.is_interpreted else Compiled(self.calls)

        return launch


class Compiled:
    def __init__(self, calls: list[Any]) -> None:
        self.calls = calls

    def __getitem__(self, grid: Grid) -> Any:
        return lambda *arguments: self.calls.append(("compiled", grid, arguments))


ONE, TWO = (1, 1, 1), (2, 1, 1)


def test_triton_looks_at_the_arguments_once_for_constants_and_dtype():
    kernel, numbers = CompilingKernel(), torch.zeros(8)
    launch = Dispatch(kernel)
    launch(ONE, (numbers,), numbers, 3, C=5, BLOCK=7)
    launch(TWO, (numbers,), numbers, 4, C=5, BLOCK=7)
    assert kernel.calls == [
        ("triton", ONE, (numbers, 3), {"C": 5, "BLOCK": 7}),
        ("compiled", TWO, (numbers, 4, 5, 7)),
    ]
    launch(ONE, (numbers,), numbers, 3, C=6, BLOCK=7)
    launch(ONE, (numbers.half(),), numbers, 3, C=5, BLOCK=7)
    assert [call[0] for call in kernel.calls[2:]] == ["triton", "triton"]


def test_triton_launches_what_is_not_aligned_and_it_is_not_kept():
    kernel, numbers = CompilingKernel(), torch.zeros(8)
    launch = Dispatch(kernel)
    for tensors in (
        (numbers, numbers[1:]),
        (numbers, numbers),
        (numbers, numbers[1:]),
        (numbers, numbers[4:]),
    ):
        launch(ONE, tensors, *tensors, C=5)
    assert [call[0] for call in kernel.calls] == ["triton", "triton", "triton", "compiled"]


def test_the_interpreter_launches_each_time():
    kernel, numbers = CompilingKernel(is_interpreted=True), torch.zeros(8)
    launch = Dispatch(kernel)
    for _ in range(3):
        launch(ONE, (numbers,), numbers, C=5)
    assert [call[0] for call in kernel.calls] == ["triton"] * 3
