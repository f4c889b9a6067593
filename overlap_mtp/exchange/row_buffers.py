"""What exchanges of activations between GPUs use again and again, so that CUDA graphs can hold it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from overlap_mtp.exchange.cuda import HostMetadata
from overlap_mtp.exchange.plan import FINGERPRINT
from overlap_mtp.exchange.row_spec import RowSpec
from overlap_mtp.exchange.rows import RowPlan
from overlap_mtp.kernels.launch import Launch, in_turn
from overlap_mtp.kernels.row_maps import RowMapper
from overlap_mtp.kernels.rows import BoundRows, RowConstants
from overlap_mtp.kernels.upload import upload


class Fixed(NamedTuple):
    """What all buffers of a transport are bound to."""

    plan: RowPlan
    spec: RowSpec
    mapper: RowMapper
    constants: list[RowConstants]
    # The headers that arrive in forward and in backward, as kernels take them.
    headers: tuple[torch.Tensor, torch.Tensor]
    error_flags: torch.Tensor


class RowBuffers:
    """The buffers of one exchange, forward and backward, and the kernels that are bound to them.

    The launches run in this order: `maps_own`, `pack`, `unroll`, then `sums`, `pack_sums`, `add`. `maps_own` makes the
    maps and writes the own rows of the rolls. If the rolls must not be written before the join, `maps_only` makes the
    maps alone, and `unroll_all` writes all rows.
    """

    def __init__(self, fixed: Fixed, length: int) -> None:
        """Make the buffers. They fit every batch of at most `length` rows on this rank."""
        plan, mapper, constants = fixed.plan, fixed.mapper, fixed.constants
        first = constants[0]
        self.length = length
        self.host = HostMetadata(plan.tokens, first.num_words)
        self.metadata = metadata = torch.zeros_like(self.host.tensor, device=fixed.spec.device)
        self.maps = mapper.allocate(length)
        shape = plan.num_rows, fixed.spec.elements
        self.rows, self.gradient_rows = (
            torch.zeros(shape, dtype=fixed.spec.dtype, device=fixed.spec.device) for _ in range(2)
        )
        self.sends: Any = None  # what NCCL needs to send; otherwise `pack` and `pack_sums` send, too
        self.shared: object = None  # keeps the memory of peers mapped, if it is shared
        self.forked, self.arrived, self.returned, self.joined = (torch.cuda.Event() for _ in range(4))  # type: ignore[no-untyped-call]
        self.last_use = self.joined
        self._backward_at = first.gradients_at
        backward_at = plan.tokens.metadata_len + first.gradients_at

        words = metadata[plan.tokens.metadata_len :]
        bound = BoundRows(constants, words, metadata[FINGERPRINT : FINGERPRINT + 1], length)
        out_rows, in_rows = plan.out_rows, plan.in_rows
        forward, backward = ((one, fixed.error_flags) for one in fixed.headers)
        maps = self.maps

        def make_maps() -> tuple[Launch, Launch]:
            return upload(self.host.tensor, metadata, 0, backward_at), mapper.bind(metadata, maps)

        def unroll() -> Launch:
            return bound.unroll_received_rows(maps.in_back, self.rows[in_rows], *forward)

        self.maps_only = in_turn(*make_maps())
        self.maps_own = in_turn(*make_maps(), bound.unroll_own_rows(maps.source))
        self.pack = bound.pack_rows(maps.packed, self.rows[out_rows])
        self.unroll = unroll()
        self.unroll_all = in_turn(bound.unroll_own_rows(maps.source), unroll())
        self.sums = in_turn(upload(self.host.tensor, metadata, backward_at), bound.sum_rows(maps.own_back))
        self.pack_sums = bound.pack_sums(maps.in_back, self.gradient_rows[in_rows])
        self.add = bound.add_rows(maps.returned_to, maps.returned, self.gradient_rows[out_rows], *backward)

    def capture(self, writes_ahead: bool) -> None:
        """Capture the graphs that are needed if rolls are written ahead, or if not. The others follow when they are."""
        forward = (self.maps_own, self.unroll) if writes_ahead else (self.maps_only, self.unroll_all)
        for launch in (*forward, self.pack, self.sums, self.pack_sums, self.add):
            launch.capture()

    def write_backward(self, addresses: list[int], fingerprint: int) -> None:
        """Say what the backward of the exchange carries."""
        self.host.addresses[self._backward_at :] = [*addresses, fingerprint]

    def free(self) -> None:
        """Free the graphs. It must not run during a capture."""
        del self.maps_only, self.maps_own, self.pack, self.unroll, self.unroll_all
        del self.sums, self.pack_sums, self.add, self.sends, self.shared


class Lease:
    """Buffers that an exchange uses. They go back with it, in any thread: it launches nothing."""

    def __init__(
        self, buffers: RowBuffers, free: deque[RowBuffers], writes_ahead: bool, stream: torch.cuda.Stream
    ) -> None:
        self.buffers, self._free = buffers, free
        self.writes_ahead = writes_ahead  # own rows of rolls, before the join
        self.stream = stream  # that the exchange was started from
        self.backward_stream: torch.cuda.Stream | None = None  # the same of the last backward
        self.used_on: torch.cuda.Stream | None = None  # where `joined` was recorded last
        self.has_written = False  # what its backward carries
        self._in_use: tuple[Sequence[torch.Tensor], torch.cuda.Stream] | None = None

    def keep(self, tensors: Sequence[torch.Tensor], side: torch.cuda.Stream) -> None:
        """Keep tensors that the side stream uses, until `joined`: only the words refer to them."""
        self.let_go()  # rolls that nobody has joined before backward
        self._in_use = tensors, side

    def joined(self) -> None:
        """Say that the stream which they belong to has waited for the side stream."""
        self._in_use = None

    def let_go(self) -> None:
        """Free them when the side stream has used them: nobody will wait for it."""
        if self._in_use is not None:
            (tensors, side), self._in_use = self._in_use, None
            for tensor in tensors:
                tensor.record_stream(side)

    def __del__(self) -> None:
        self.let_go()
        self._free.append(self.buffers)
