"""A roll that is correct by construction, and wrong ones that each differ from it in one respect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from overlap_mtp import SequenceLayout, roll_reference

Roll = Callable[..., tuple[torch.Tensor, torch.Tensor]]
Tensors = Callable[[torch.Tensor, SequenceLayout, int], torch.Tensor]


def _same(tensor: torch.Tensor, layout: SequenceLayout, rank: int) -> torch.Tensor:
    return tensor


def _all_shards(shards: list[torch.Tensor], rank: int) -> list[torch.Tensor]:
    return shards


def _by_one(full: torch.Tensor, layout: SequenceLayout, rank: int) -> torch.Tensor:
    return roll_reference(full, layout, 1)


def plain_roll(
    before: Tensors = _same,
    layouts: Callable[[SequenceLayout], SequenceLayout] = lambda layout: layout,
    gathered: Callable[[list[torch.Tensor], int], list[torch.Tensor]] = _all_shards,
    roll: Tensors = _by_one,
    after: Tensors = _same,
    total: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = lambda tensor, rolled: rolled.sum(),
) -> Roll:
    """A roll of the gathered full sequence. Each argument is a step that a mutant may replace.

    Args:
        before: from the tensor that is given to the one that is sent.
        layouts: from the true layout to the one whose documents are rolled.
        gathered: from all ranks' shards to those that are put together.
        roll: of the full tensor.
        after: from this rank's part of it to what is returned.
        total: from the given and the rolled tensor to the sum.
    """

    def roll_tensor(
        tensor: torch.Tensor,
        shifts: int = -1,
        dims: int = -1,
        cp_group: dist.ProcessGroup | None = None,
        packed_seq_params: Any = None,
        layout: SequenceLayout | None = None,
        return_sum: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert cp_group is not None
        assert layout is not None
        assert return_sum
        assert shifts == dims == -1
        assert (packed_seq_params is not None) == layout.is_packed
        rank = cp_group.rank()
        sent = before(tensor, layout, rank).contiguous()
        shards = [torch.empty_like(sent) for _ in range(cp_group.size())]
        dist.all_gather(shards, sent, group=cp_group)
        full = layout.unshard(gathered(shards, rank))
        rolled = after(layout.shard(roll(full, layouts(layout), rank), rank), layout, rank)
        return rolled, total(tensor, rolled)

    return roll_tensor


# Steps of mutants


def shifted(by: int) -> Tensors:
    """The whole row shifted, with zeros at its end, and no document respected."""
    return lambda full, layout, rank: torch.nn.functional.pad(full[..., by:], (0, by))


def without_bounds(layout: SequenceLayout) -> SequenceLayout:
    return SequenceLayout.packed([0, layout.seq_len], 1, "contiguous")


def with_lengths(change: Callable[[Any], Any]) -> Callable[[SequenceLayout], SequenceLayout]:
    """The same documents with other valid lengths."""

    def changed(layout: SequenceLayout) -> SequenceLayout:
        lengths = change(layout.valid_lengths.copy()).clip(0, np.diff(layout.cu_seqlens))
        return SequenceLayout.packed(layout.cu_seqlens, 1, "contiguous", lengths)

    return changed


def forgets_empty_documents(layout: SequenceLayout) -> SequenceLayout:
    """Drops the bounds that repeat, but takes the first valid lengths as they are."""
    bounds = sorted({*layout.cu_seqlens.tolist()})
    lengths = layout.valid_lengths[: len(bounds) - 1]
    return SequenceLayout.packed(bounds, 1, "contiguous", lengths.clip(0, np.diff(bounds)))


def at_ends(what: Callable[[torch.Tensor, int, int], Any], of_padded: bool = False) -> Tensors:
    """A correct roll with something else at the last valid (or last) position of each document."""

    def roll(full: torch.Tensor, layout: SequenceLayout, rank: int) -> torch.Tensor:
        rolled = roll_reference(full, layout, 1)
        ends = layout.cu_seqlens[1:] if of_padded else layout.valid_ends
        for start, end in zip(layout.cu_seqlens[:-1].tolist(), ends.tolist(), strict=True):
            if end > start:
                rolled[..., end - 1] = what(full, start, end)
        return rolled

    return roll


def keeps_padding(full: torch.Tensor, layout: SequenceLayout, rank: int) -> torch.Tensor:
    rolled = roll_reference(full, layout, 1)
    for end, stop in zip(layout.valid_ends.tolist(), layout.cu_seqlens[1:].tolist(), strict=True):
        rolled[..., end:stop] = full[..., end:stop]
    return rolled


def only_first_row(full: torch.Tensor, layout: SequenceLayout, rank: int) -> torch.Tensor:
    rolled = roll_reference(full, layout, 1)
    return rolled[:1].expand_as(rolled).contiguous() if rolled.dim() == 2 else rolled


def into_next_row(full: torch.Tensor, layout: SequenceLayout, rank: int) -> torch.Tensor:
    """The end of a row takes the first token of the next."""
    rolled = roll_reference(full, layout, 1)
    if full.dim() == 2 and not layout.is_packed:
        rolled[:-1, -1] = full[1:, 0]
    return rolled


def swap_halves(tensor: torch.Tensor, layout: SequenceLayout, rank: int) -> torch.Tensor:
    if layout.is_packed or layout.kind != "zigzag":
        return tensor
    return torch.cat(tensor.chunk(2, -1)[::-1], -1)


def at_run_ends(value: Callable[[torch.Tensor, int], Any]) -> Tensors:
    """Something else at the last token of each run of a rank."""

    def after(rolled: torch.Tensor, layout: SequenceLayout, rank: int) -> torch.Tensor:
        runs = layout.runs(rank)
        for last in (runs.local_index + runs.end - runs.begin - 1)[runs.end > runs.begin].tolist():
            rolled[..., last] = value(rolled, last)
        return rolled

    return after


def unlinked_middle(rolled: torch.Tensor, layout: SequenceLayout, rank: int) -> torch.Tensor:
    """The last rank's first chunk is not followed by its second."""
    if rank == layout.cp_size - 1 and layout.kind == "zigzag" and not layout.is_packed:
        rolled[..., layout.local_len // 2 - 1] = 0
    return rolled


def on_rank(which: int, value: float) -> Tensors:
    def after(rolled: torch.Tensor, layout: SequenceLayout, rank: int) -> torch.Tensor:
        if rank == which % layout.cp_size:
            rolled[..., 0] = value
        return rolled

    return after


def through(dtype: torch.dtype) -> Tensors:
    return lambda tensor, layout, rank: tensor.to(dtype).to(tensor.dtype)


def returned_as(dtype: torch.dtype, of: torch.dtype) -> Tensors:
    return lambda rolled, layout, rank: rolled.to(dtype) if rolled.dtype == of else rolled


def ignores_strides(tensor: torch.Tensor, layout: SequenceLayout, rank: int) -> torch.Tensor:
    return torch.as_strided(tensor, tensor.shape, torch.empty(tensor.shape).stride())


def refuses(dtype: torch.dtype) -> Tensors:
    def after(rolled: torch.Tensor, layout: SequenceLayout, rank: int) -> torch.Tensor:
        if rolled.dtype == dtype:
            raise NotImplementedError(f"no {dtype}")
        return rolled

    return after


# Mutants with a memory


def one_buffer() -> Roll:
    """All results of one shape and dtype are the same tensor."""
    buffers: dict[Any, torch.Tensor] = {}

    def after(rolled: torch.Tensor, layout: SequenceLayout, rank: int) -> torch.Tensor:
        return buffers.setdefault((rolled.shape, rolled.dtype), torch.empty_like(rolled)).copy_(rolled)

    return plain_roll(after=after)


def two_buffers() -> Roll:
    """Results of one shape and dtype alternate between two tensors."""
    buffers: dict[Any, list[torch.Tensor]] = {}

    def after(rolled: torch.Tensor, layout: SequenceLayout, rank: int) -> torch.Tensor:
        pair = buffers.setdefault((rolled.shape, rolled.dtype), [torch.empty_like(rolled) for _ in range(2)])
        pair.reverse()
        return pair[0].copy_(rolled)

    return plain_roll(after=after)


def remembers(key: Callable[[torch.Tensor], Any]) -> Roll:
    """A result is kept for later inputs of the same key."""
    kept: dict[Any, Any] = {}
    correct = plain_roll()

    def roll_tensor(
        tensor: torch.Tensor, shifts=-1, dims=-1, cp_group=None, packed_seq_params=None, layout=None
    ):
        found = kept.get(key(tensor))
        if found is None:
            # The input is kept, too: its memory goes to no other tensor.
            found = kept[key(tensor)] = (
                tensor,
                correct(tensor, shifts, dims, cp_group, packed_seq_params, layout),
            )
        return found[1][0].clone(), found[1][1]

    return roll_tensor


def first_layout() -> Roll:
    """The first layout of a length serves for all that have this length."""
    known: dict[int, SequenceLayout] = {}
    return plain_roll(layouts=lambda layout: known.setdefault(layout.seq_len, layout))


def every_other_call(step: Callable[[torch.Tensor], torch.Tensor]) -> Roll:
    """Depth 2 (and 4) is not what it should be."""
    calls = [0]

    def after(rolled: torch.Tensor, layout: SequenceLayout, rank: int) -> torch.Tensor:
        calls[0] += 1
        return step(rolled) if calls[0] % 2 == 0 else rolled

    return plain_roll(after=after)


def into_its_input() -> Roll:
    """The input is written to, and returned."""
    correct = plain_roll()

    def roll_tensor(
        tensor: torch.Tensor, shifts=-1, dims=-1, cp_group=None, packed_seq_params=None, layout=None
    ):
        rolled, total = correct(tensor, shifts, dims, cp_group, packed_seq_params, layout)
        return tensor.copy_(rolled), total

    return roll_tensor


def zero(*_: Any) -> int:
    return 0


# Makers, because some have a memory.
MUTANTS: dict[str, Callable[[], Roll]] = {
    "does nothing": lambda: plain_roll(roll=_same),
    "off by one: two further": lambda: plain_roll(roll=shifted(2)),
    "rolls to the right": lambda: plain_roll(roll=lambda full, *_: torch.roll(full, 1, -1)),
    "no document ends": lambda: plain_roll(layouts=without_bounds),
    "wraps around the stream": lambda: plain_roll(roll=lambda full, *_: torch.roll(full, -1, -1)),
    "wraps around each document": lambda: plain_roll(roll=at_ends(lambda full, start, end: full[..., start])),
    "keeps the last token of a document": lambda: plain_roll(
        roll=at_ends(lambda full, start, end: full[..., end - 1])
    ),
    "fills with -100": lambda: plain_roll(roll=at_ends(lambda *_: -100)),
    "fills with the next document": lambda: plain_roll(
        roll=at_ends(lambda full, start, end: full[..., end % full.shape[-1]], of_padded=True)
    ),
    "padded bounds for valid ones": lambda: plain_roll(layouts=with_lengths(lambda lengths: lengths + 10**6)),
    "keeps the padding": lambda: plain_roll(roll=keeps_padding),
    "valid lengths one too short": lambda: plain_roll(layouts=with_lengths(lambda lengths: lengths - 1)),
    "valid lengths one too long": lambda: plain_roll(layouts=with_lengths(lambda lengths: lengths + 1)),
    "valid lengths of the document before": lambda: plain_roll(
        layouts=with_lengths(lambda lengths: lengths[::-1])
    ),
    "forgets the last document": lambda: plain_roll(
        layouts=with_lengths(lambda lengths: lengths * ([1] * (lengths.size - 1) + [lengths.size == 1]))
    ),
    "forgets empty documents": lambda: plain_roll(layouts=forgets_empty_documents),
    "at most sixteen documents": lambda: plain_roll(
        layouts=with_lengths(lambda lengths: lengths * ([1] * 16 + [0] * 99)[: lengths.size])
    ),
    "swaps the chunks it sends": lambda: plain_roll(before=swap_halves),
    "swaps the chunks it returns": lambda: plain_roll(after=swap_halves),
    "takes the shards in reverse": lambda: plain_roll(gathered=lambda shards, rank: shards[::-1]),
    "takes the shard of a wrong neighbour": lambda: plain_roll(
        gathered=lambda shards, rank: [
            shards[one if one == rank else (one + 1) % len(shards)] for one in range(len(shards))
        ]
    ),
    "takes its own shard for its neighbour's": lambda: plain_roll(
        gathered=lambda shards, rank: [
            shards[rank] if one == rank + 1 else shards[one] for one in range(len(shards))
        ]
    ),
    "nothing follows a chunk": lambda: plain_roll(after=at_run_ends(zero)),
    "a chunk's end follows itself": lambda: plain_roll(
        after=at_run_ends(lambda rolled, last: rolled[..., last - 1])
    ),
    "no link in the middle of the last rank": lambda: plain_roll(after=unlinked_middle),
    "wrong on the first rank": lambda: plain_roll(after=on_rank(0, 1)),
    "wrong on the last rank": lambda: plain_roll(after=on_rank(-1, 1)),
    "wrong depth: depth 2 is depth 3": lambda: every_other_call(
        lambda rolled: torch.nn.functional.pad(rolled[..., 1:], (0, 1))
    ),
    "int32 returned as int64": lambda: plain_roll(after=returned_as(torch.int64, torch.int32)),
    "bool returned as uint8": lambda: plain_roll(after=returned_as(torch.uint8, torch.bool)),
    "bfloat16 returned as float32": lambda: plain_roll(after=returned_as(torch.float32, torch.bfloat16)),
    "int64 through int32": lambda: plain_roll(before=through(torch.int32)),
    "int64 through float64": lambda: plain_roll(before=through(torch.float64)),
    "float16 through bfloat16": lambda: plain_roll(
        before=lambda t, *_: t.bfloat16().half() if t.dtype == torch.float16 else t
    ),
    "float64 through float32": lambda: plain_roll(
        before=lambda t, *_: t.float().double() if t.dtype == torch.float64 else t
    ),
    "-0.0 becomes 0.0": lambda: plain_roll(before=lambda t, *_: t + 0 if t.is_floating_point() else t),
    "only the first row": lambda: plain_roll(roll=only_first_row),
    "rows run into each other": lambda: plain_roll(roll=into_next_row),
    "another shape for 1-D tensors": lambda: plain_roll(after=lambda t, *_: t[None] if t.dim() == 1 else t),
    "ignores strides": lambda: plain_roll(before=ignores_strides),
    "stale: one buffer for all results": one_buffer,
    "stale: two buffers for all results": two_buffers,
    "stale: keeps results by shape": lambda: remembers(lambda t: (t.shape, t.dtype)),
    "stale: keeps results by address": lambda: remembers(lambda t: (t.data_ptr(), t.shape, t.dtype)),
    "stale: keeps the first layout": first_layout,
    "writes into its input": into_its_input,
    "the sum of its input": lambda: plain_roll(total=lambda tensor, rolled: tensor.sum()),
    "the sum is of the first row": lambda: plain_roll(total=lambda tensor, rolled: rolled[:1].sum()),
    "refuses bool": lambda: plain_roll(after=refuses(torch.bool)),
}
