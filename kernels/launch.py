"""A kernel bound to its buffers: what is left to do for a launch is to launch it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Grid = tuple[int, int, int]
MOST_GRAPHS = 16  # of a launch: batches whose length keeps changing have a grid each
Runner = Callable[[int | None], None]


class Launch:
    """One kernel with all its arguments; calling it launches it on the current stream.

    Triton's own dispatch looks at every argument at every launch, which takes 13 µs of host time; a compiled kernel
    launched with ready addresses takes 8, and a CUDA graph of that launch 4.5 (measured on the host of an H200,
    triton 3.6). So what changes from launch to launch is not an argument but words in memory that the kernel reads,
    and a launch that is made a second time becomes a graph.
    """

    def __init__(self, kernel: Any, tensors: tuple[torch.Tensor, ...], grid: Grid, **constants: Any) -> None:
        self._kernel = kernel
        self._tensors = tensors  # kept alive
        self._constants = constants
        self._device = next((tensor.device for tensor in tensors if tensor.is_cuda), None)
        self._runners: dict[Grid, Callable[..., None]] = {}
        self._graphs: dict[Grid, torch.cuda.CUDAGraph] = {}
        self.grid = grid

    def __call__(self, stream: int | None, grid: Grid | None = None, as_graph: bool = False) -> None:
        """`stream`: the handle of the current CUDA stream; None where kernels are interpreted. `as_graph`: it may
        become one, which it may not while another is being captured."""
        grid = grid or self.grid
        graph = self._graphs.get(grid) if as_graph else None
        if graph is not None:
            graph.replay()
            return
        if grid not in self._runners:
            self._runners[grid] = self._compiled(grid)
        elif as_graph and len(self._graphs) < MOST_GRAPHS:
            self.prepare(grid)
        self._runners[grid](stream)

    def prepare(self, grid: Grid) -> None:
        """Makes a graph of the launch ahead of its use. Nothing runs."""
        if grid not in self._runners:
            self._runners[grid] = self._compiled(grid)
        self._graphs[grid] = self._captured(grid)

    def _compiled(self, grid: Grid) -> Runner:
        if self._device is None:
            return lambda _: self._kernel[grid](*self._tensors, **self._constants)
        runner = self._kernel.warmup(*self._tensors, grid=grid, **self._constants)[grid]
        arguments = (*(tensor.data_ptr() for tensor in self._tensors), *self._constants.values())
        return lambda stream: runner(*arguments, stream=stream)

    def _captured(self, grid: Grid) -> torch.cuda.CUDAGraph:
        # Its kernels have the priority of this stream, whichever the graph is launched on: an exchange should get the
        # first room that a running kernel leaves, not that behind its last wave.
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(self._device, priority=-1)
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")  # other threads may ask their events
            try:
                self._runners[grid](stream.cuda_stream)
            finally:
                graph.capture_end()
        return graph
