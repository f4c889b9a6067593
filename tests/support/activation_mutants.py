"""Exchanges of activations that are each wrong in one row: of the values, or of the gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from overlap_mtp import SequenceLayout
from overlap_mtp.exchange import row_transport
from overlap_mtp.exchange.rows import Round, RowMaps
from overlap_mtp.kernels import row_reference

from activations import rows_differ

Patch = Callable[[pytest.MonkeyPatch], None]


def with_map(name: str, change: Callable[[torch.Tensor], None]) -> Patch:
    """One of the indices of a batch is another."""

    def patch(patched: pytest.MonkeyPatch) -> None:
        correct = RowMaps.of

        def of(*args: Any, **options: Any) -> RowMaps:
            maps = correct(*args, **options)
            index = getattr(maps, name).clone()
            change(index)
            return maps._replace(**{name: index})

        patched.setattr(RowMaps, "of", of)

    return patch


def with_rounds(change: Callable[[list[Round]], list[Round]]) -> Patch:
    """The messages are others, in the same way on all ranks."""

    def patch(patched: pytest.MonkeyPatch) -> None:
        for name in ("message_rounds", "document_rounds"):
            correct = getattr(row_transport, name)

            def rounds(*args: Any, correct: Any = correct, **options: Any) -> list[Round]:
                return change(correct(*args, **options))

            patched.setattr(row_transport, name, rounds)

    return patch


def with_kernel(name: str, after: Callable[..., None]) -> Patch:
    """Something happens after a kernel. It gets the kernel and its arguments."""

    def patch(patched: pytest.MonkeyPatch) -> None:
        correct = getattr(row_reference, name)

        def kernel(*args: Any, **options: Any) -> None:
            correct(*args, **options)
            after(correct, *args[:4])

        patched.setattr(row_reference, name, kernel)

    return patch


def with_index(name: str, change: Callable[[torch.Tensor], None]) -> Patch:
    """One kernel gets another index. It is the second argument of all kernels."""

    def patch(patched: pytest.MonkeyPatch) -> None:
        correct = getattr(row_reference, name)

        def kernel(first: Any, index: torch.Tensor, *args: Any) -> None:
            index = index.clone()
            change(index)
            correct(first, index, *args)

        patched.setattr(row_reference, name, kernel)

    return patch


# Changes of an index. A batch may have no such row on a rank: then its rows are all right.


def drop_one(index: torch.Tensor) -> None:
    """The last row goes nowhere, or comes from nowhere."""
    used = (index.flatten() >= 0).nonzero()[:, 0]
    if used.numel():
        index.view(-1)[used[-1]] = -1


def move_one(index: torch.Tensor) -> None:
    """The first row is its neighbour in place of itself."""
    used = (index.flatten() >= 0).nonzero()[:, 0]
    if used.numel():
        index.view(-1)[used[0]] ^= 1


def swap_two(index: torch.Tensor) -> None:
    """Two rows that follow each other at one depth stand for each other."""
    for row in index if index.dim() == 2 else [index]:
        used = (row >= 0).nonzero()[:, 0]
        if used.numel() > 1:
            row[used[:2]] = row[used[:2].flip(0)]
            return


def fill_one(index: torch.Tensor) -> None:
    """What should be 0 is a row."""
    unused = (index.flatten() == -1).nonzero()[:, 0]
    if unused.numel():
        index.view(-1)[unused[0]] = 0


# What happens after a kernel.


def add_one_again(
    add_rows: Any, rows: torch.Tensor, to: torch.Tensor, returned: torch.Tensor, sums: Any
) -> None:
    if to.numel():
        add_rows(rows, to[:1], returned[:1, :1], sums)


def double_one(kernel: Any, gradients: Any, back: torch.Tensor, sums: Any) -> None:
    used = (back >= 0).any(0).nonzero()[:, 0]
    for tensor in sums:
        tensor[used[:1]] *= 2


def add_last(kernel: Any, gradients: Any, back: torch.Tensor, sums: Any) -> None:
    for total, gradient in zip(sums, gradients[-1], strict=True):
        total[0] += gradient[-1]


def round_all(kernel: Any, tensors: Any, source: Any, rolls: Any) -> None:
    for roll in (one for depth in rolls for one in depth):
        roll.copy_(roll.float())


# Changes of messages, for all ranks.


def without_last_row(rounds: list[Round]) -> list[Round]:
    return [Round(*([one._replace(rows=one.rows - 1) for one in half] for half in both)) for both in rounds]


def without_last_round(rounds: list[Round]) -> list[Round]:
    return rounds[:-1]


def without_second_tensor(rounds: list[Round]) -> list[Round]:
    return [Round(*([one for one in half if not one.columns.start] for half in both)) for both in rounds]


# What is wrong with a mutant: rolled rows that arrive or stay, gradients that return or stay.
MUTANTS: dict[str, tuple[Patch, str]] = {
    "a received row is dropped": (with_index("unroll_received_rows", drop_one), "arrives"),
    "a received row goes to a neighbour": (with_index("unroll_received_rows", move_one), "arrives"),
    "two received rows are swapped": (with_index("unroll_received_rows", swap_two), "arrives"),
    "two rows of a roll are swapped": (with_map("source", swap_two), "stays"),
    "past a document's end is a row": (with_map("source", fill_one), "stays"),
    "a row is not sent": (with_map("packed", drop_one), "arrives"),
    "another row is sent": (with_map("packed", move_one), "arrives"),
    "two sent rows are swapped": (with_map("packed", swap_two), "arrives"),
    "rolls are rounded": (with_kernel("unroll_own_rows", round_all), "stays"),
    "the gradient of a received row is not sent": (with_index("pack_sums", drop_one), "returns"),
    "the gradient of another row is sent": (with_index("pack_sums", move_one), "returns"),
    "two gradients are sent for each other": (with_index("pack_sums", swap_two), "returns"),
    "a gradient that returns is not added": (with_map("returned", drop_one), "returns"),
    "two gradients that return are swapped": (with_map("returned", swap_two), "returns"),
    "a gradient that returns goes to a neighbour": (with_map("returned_to", move_one), "returns"),
    "a gradient that returns is added twice": (with_kernel("add_rows", add_one_again), "returns"),
    "the gradient of an own row is dropped": (with_map("own_back", drop_one), "stays"),
    "two gradients of own rows are swapped": (with_map("own_back", swap_two), "stays"),
    "the gradient of an own row counts twice": (with_kernel("sum_rows", double_one), "stays"),
    "the gradient of a fill is added": (with_kernel("sum_rows", add_last), "gradient of row"),
}
# These lose messages, each of one schedule.
LOSING: dict[str, Patch] = {
    "sync": with_rounds(without_second_tensor),
    "merged": with_rounds(without_last_round),
    "overlap": with_rounds(without_last_row),
}


def wrong_with(group: dist.ProcessGroup, layout: SequenceLayout) -> dict[str, list[str]]:
    """The rows that are wrong with each mutant; "nothing" is none."""
    found = {"nothing": rows_differ(group, layout, 3)}
    for name, (patch, _) in MUTANTS.items():
        with pytest.MonkeyPatch.context() as patched:
            patch(patched)
            found[name] = rows_differ(group, layout, 3)
    for schedule, patch in LOSING.items():
        with pytest.MonkeyPatch.context() as patched:
            patch(patched)
            found[schedule] = rows_differ(group, layout, 3, schedules=(schedule,))
    return found
