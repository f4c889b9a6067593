"""Activations on ranks: their rolls and gradients against the definition on one process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

from overlap_mtp import Roller, SequenceLayout, make_roller
from overlap_mtp.device_layout import Layout
from overlap_mtp.schedules.activations import ACTIVATION_SCHEDULES, make_activation_roller

from cases import EXCHANGING, NUM_DEPTHS, Microbatch
from exact_activations import SEQ_DIM, Activations, Tensors
from rank_bodies import device_layout_of
from rank_pool import device_of
from strategies import KINDS, same_bits


def rolls_of(roller: Roller, tensors: Tensors, layout: Layout) -> list[Tensors]:
    """The rolls of all depths."""
    rolls = roller.start(tensors, layout)
    return [rolls.at(depth) for depth in range(1, roller.num_depths + 1)]


def ends_of(batch: Activations, depths: list[Tensors]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What backward begins with, and the gradients there: those of the tensors, then of the rolls at each depth."""
    return [
        (tensor * 1, batch.weight(name, depth))
        for depth, by_name in enumerate(depths)
        for name, tensor in by_name.items()
    ]


def run_backward(batch: Activations, tensors: Tensors, rolled: list[Tensors]) -> None:
    """Run backward from the rolls and from the tensors themselves, which have another consumer."""
    torch.autograd.backward(*zip(*ends_of(batch, [tensors, *rolled]), strict=True))


def leaves_of(batch: Activations) -> Tensors:
    return {name: tensor.requires_grad_() for name, tensor in batch.shards().items()}


def wrong_rows(batch: Activations, roller: Roller, on_device: bool = False) -> list[str]:
    """What is wrong with one microbatch, forward and backward."""
    leaves = leaves_of(batch)
    tensors = {name: leaf * 1 for name, leaf in leaves.items()}
    layout = device_layout_of(batch.layout, batch.device) if on_device else batch.layout
    rolled = rolls_of(roller, tensors, layout)
    run_backward(batch, tensors, rolled)
    return batch.wrong_rolls(rolled) + batch.wrong_gradients(gradients_of(leaves))


def wrong_under_a_default_device(group: dist.ProcessGroup) -> list[str]:
    """What is rolled wrongly if `torch.set_default_device` names another device than that of the batch."""
    batch = Microbatch.of(group)
    rows, wrong = Activations.of(group, batch.layout, NUM_DEPTHS), []
    for schedule in EXCHANGING:
        roller, shards = make_roller(schedule, group, NUM_DEPTHS), batch.shards()
        with torch.device("meta"):
            rolls = roller.start(shards, batch.layout)
            rolls.at(NUM_DEPTHS)
        wrong += batch.wrong(rolls)
    for schedule in ACTIVATION_SCHEDULES:
        roller, leaves = make_activation_roller(schedule, group, NUM_DEPTHS), leaves_of(rows)
        tensors = {name: leaf * 1 for name, leaf in leaves.items()}
        with torch.device("meta"):
            rolled = rolls_of(roller, tensors, rows.layout)
        run_backward(rows, tensors, rolled)
        wrong += rows.wrong_rolls(rolled) + rows.wrong_gradients(gradients_of(leaves))
    return wrong


class Between(torch.nn.Module):
    """Rolls between layers. Only the layers can be compiled."""

    def __init__(self, roller: Roller, layout: SequenceLayout) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first = torch.nn.Linear(4, 4, dtype=torch.float64)
        self._roller, self._layout = roller, layout

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        hidden = self.first(values)
        return torch.tanh(self._rolled(hidden)) * hidden

    @torch.compiler.disable
    def _rolled(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._roller.start({"hidden": hidden}, self._layout).at(1)["hidden"]


def wrong_if_compiled(group: dist.ProcessGroup) -> list[str]:
    """Schedules whose losses or gradients are others between compiled layers than between eager ones."""
    layout, wrong = SequenceLayout.dense(8 * group.size(), group.size()), []
    values = torch.randn(1, layout.local_len, 4, dtype=torch.float64)
    for schedule in ACTIVATION_SCHEDULES:
        found = []
        for is_compiled in (False, True):
            model = Between(make_activation_roller(schedule, group, 1), layout)
            loss = (torch.compile(model, backend="eager") if is_compiled else model)(values).sum()
            loss.backward()
            found.append([loss, model.first.weight.grad, model.first.bias.grad])
        if not all(map(torch.equal, *found)):
            wrong.append(schedule)
    return wrong


def gradients_of(leaves: Tensors) -> Tensors:
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def rows_differ(
    group: dist.ProcessGroup | None,
    layout: SequenceLayout,
    num_depths: int,
    form: str = "BLH",
    names: str = "ab",
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    on_device: bool = False,
    schedules: tuple[str, ...] = ACTIVATION_SCHEDULES,
    tp_group: dist.ProcessGroup | None = None,
) -> list[str]:
    """The rows of rolls and gradients that are not those of the definition, bit for bit."""
    batch = Activations.of(group, layout, num_depths, form, names, dtype, seed, tp_group)
    documents = layout.num_documents + on_device  # those of a DeviceLayout count one more for a tail
    wrong = []
    for schedule in schedules:
        roller = make_activation_roller(schedule, group, num_depths, documents, batch.seq_dim, tp_group)
        wrong += [f"{schedule}: {one}" for one in wrong_rows(batch, roller, on_device)]
        roller.close()
    return wrong


def make_grid(tp_size: int, cp_size: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup | None] | None:
    """This rank's (tp group, cp group) in a grid of the first ranks, the tp rank first; None if it is outside."""
    ranks = torch.arange(tp_size * cp_size).view(cp_size, tp_size)
    made = [
        [dist.new_group(members) for members in grid.tolist()] if grid.shape[1] > 1 else [None] * len(grid)
        for grid in (ranks, ranks.T)
    ]
    if dist.get_rank() >= tp_size * cp_size:
        return None
    cp_rank, tp_rank = divmod(dist.get_rank(), tp_size)
    return made[0][cp_rank], made[1][tp_rank]


def shared_layouts(tp_size: int, cp_size: int) -> list[SequenceLayout]:
    """Slices of one row and of several, with documents that end on slices and one row beside them."""
    found = []
    for kind, slice_len in product(KINDS, (1, 3, 4)):
        seq_len = slice_len * tp_size * cp_size
        if kind == "zigzag":  # documents of 2 tokens a rank
            bounds = [*range(0, seq_len + 1, 2 * cp_size)]
        else:
            ends = range(slice_len, seq_len, slice_len)
            bounds = [0, *sorted(end + n % 3 - 1 for n, end in enumerate(ends)), seq_len]
        lengths = np.diff(bounds)
        found.append(SequenceLayout.dense(seq_len, cp_size, kind))
        found.append(SequenceLayout.packed(bounds, cp_size, kind))
        padded = [0, *(lengths - 1).clip(0)]
        found.append(SequenceLayout.packed([0, *bounds], cp_size, kind, padded))
        if len(bounds) > 2:
            found.append(SequenceLayout.packed(bounds[:2], cp_size, kind, seq_len=seq_len))  # with a tail
    return found


def shared_rows_differ(world: dist.ProcessGroup, grids: list[tuple[int, int]]) -> list[str]:
    """What is wrong with rows that tp ranks share, in grids of (tp, cp) ranks."""
    wrong, dtypes, forms = [], (torch.float64, torch.float32, torch.bfloat16), list(SEQ_DIM)
    for tp_size, cp_size in grids:
        grid = make_grid(tp_size, cp_size)
        if grid is None:
            continue
        tp_group, cp_group = grid
        for n, layout in enumerate(shared_layouts(tp_size, cp_size)):
            schedule, num_depths = ACTIVATION_SCHEDULES[n % 5 % 3], (1, 2, 3, 5)[n % 7 % 4]
            how = num_depths, forms[n % 4], ("a", "ab")[n % 2], dtypes[n % 3], n
            found = rows_differ(cp_group, layout, *how, False, (schedule,), tp_group)
            wrong += [f"tp {tp_size}, cp {cp_size}, layout {n}: {one}" for one in found]
    return wrong


def bits_differ(
    group: dist.ProcessGroup | None,
    layout: SequenceLayout,
    dtype: torch.dtype,
    tp_group: dist.ProcessGroup | None = None,
) -> list[str]:
    """Two runs of every schedule whose values or gradients have not the bits of the first one.

    Gradients are sums that are rounded, of rolls and of other consumers before and after the rolls.
    """
    batch = Activations.of(group, layout, 5, dtype=dtype, tp_group=tp_group)
    found: dict[str, list[torch.Tensor]] = {}
    for schedule in ACTIVATION_SCHEDULES:
        documents = layout.num_documents
        roller = make_activation_roller(schedule, group, 5, documents, tp_group=tp_group)
        for run in range(2):
            leaves = leaves_of(batch)
            tensors = {name: leaf * 1 for name, leaf in leaves.items()}
            before = sum(tensor.square().sum() for tensor in tensors.values())
            rolled = rolls_of(roller, tensors, layout)
            after = sum(tensor.sin().sum() for tensor in tensors.values())
            losses = (roll * roll.cos() / 3 for by_name in rolled for roll in by_name.values())
            sum((loss.sum() for loss in losses), before + after).backward()
            values = [roll.detach() for by_name in rolled for roll in by_name.values()]
            found[f"{schedule}, run {run}"] = values + list(gradients_of(leaves).values())
        roller.close()
    first = next(iter(found.values()))
    return [name for name, bits in found.items() if not all(map(same_bits, bits, first))]


def shared_bits_differ(world: dist.ProcessGroup, dtype: torch.dtype) -> list[str]:
    """As `bits_differ`, if 2 tp ranks share the rows of each of 4 cp ranks."""
    grid = make_grid(2, 4)
    assert grid is not None
    return bits_differ(grid[1], SequenceLayout.packed([0, 16, 48, 64], 4), dtype, grid[0])


def sums_over_tp_differ(world: dist.ProcessGroup, dtype: torch.dtype, tp_size: int) -> list[str]:
    """The schedules whose gradients have other bits than those of the first one.

    Each tp rank holds one row, so that many of them share the gradient of one.
    """
    grid = make_grid(tp_size, world.size() // tp_size)
    assert grid is not None
    tp_group, cp_group = grid
    layout = SequenceLayout.dense(world.size(), world.size() // tp_size, "contiguous")
    generator = torch.Generator().manual_seed(world.rank())
    gradients = torch.randn(4, 1, 1, 64, generator=generator).to(device_of(world), dtype)
    found = []
    for schedule in ACTIVATION_SCHEDULES:
        roller = make_activation_roller(schedule, cp_group, len(gradients), tp_group=tp_group)
        leaf = torch.ones_like(gradients[0]).requires_grad_()
        rolls = roller.start({"a": leaf * 1}, layout)
        rolled = [rolls.at(depth)["a"] for depth in range(1, 1 + len(gradients))]
        torch.autograd.backward(rolled, list(gradients))
        assert leaf.grad is not None
        found.append(leaf.grad)
        roller.close()
    names = zip(ACTIVATION_SCHEDULES, found, strict=True)
    return [name for name, gradient in names if not same_bits(gradient, found[0])]


def count_traffic(
    group: dist.ProcessGroup, schedule: str, layout: SequenceLayout, num_depths: int, names: str
) -> list[tuple[int, int]]:
    """(messages, bytes) of forward and of backward, as the roller counts them; they are those that leave."""
    batch = Activations.of(group, layout, num_depths, names=names, dtype=torch.float32)
    roller = make_activation_roller(schedule, group, num_depths, layout.num_documents)
    roller.start(batch.shards(), layout).at(1)  # the first time the ranks agree on it
    tensors = {name: leaf * 1 for name, leaf in leaves_of(batch).items()}
    counts, sent = [], []
    isend = dist.isend

    def counted(tensor: torch.Tensor, *args: Any) -> Any:
        sent.append(tensor.nbytes)
        return isend(tensor, *args)

    def step(call: Callable[[], Any]) -> Any:
        before = replace(roller.traffic)
        result = call()
        counts.append((roller.traffic.messages - before.messages, roller.traffic.bytes - before.bytes))
        assert counts[-1] == (len(sent), sum(sent))
        sent.clear()
        return result

    with mock.patch.object(dist, "isend", counted):
        rolled = step(lambda: rolls_of(roller, tensors, layout))
        step(lambda: run_backward(batch, tensors, rolled))
    roller.close()
    return counts


def roll_over(group: dist.ProcessGroup, transport: str, body: Callable[..., Any], *args: Any) -> Any:
    """What a body returns whose exchanges of schedule `overlap` go over a transport, if no tp ranks share rows."""
    used, make_roller = [], make_activation_roller

    def make(schedule: str, *args: Any, **options: Any) -> Roller:
        tp_group = options.get("tp_group", args[4] if len(args) > 4 else None)
        is_free = schedule == "overlap" and tp_group is None
        used.append(is_free)
        return make_roller(schedule, *args, **options, transport=transport if is_free else "auto")

    module = sys.modules[body.__module__]
    with mock.patch.object(module, "make_activation_roller", make):
        found = body(group, *args)
    assert any(used)
    return found


def gradients_under_a_hook(group: dist.ProcessGroup) -> list[list[float]]:
    """The gradient of each row, halved by a hook that is older than the rolls; if this rank uses them, and if not.

    Rank 0 always uses them.
    """
    layout, found = SequenceLayout.dense(8, 2, "contiguous"), []
    for factor in (0, None):
        roller = make_activation_roller("overlap", group, 1)
        leaf = torch.ones(1, 4, 2, requires_grad=True)
        born = leaf * 1
        born.register_hook(lambda gradient: gradient / 2)
        rolled = roller.start({"a": born}, layout).at(1)["a"]
        loss = born.sum()
        if group.rank() == 0:
            loss = loss + rolled.sum()
        elif factor is not None:
            loss = loss + factor * rolled.sum()
        loss.backward()
        assert leaf.grad is not None
        found.append(leaf.grad[0, :, 0].tolist())
        roller.close()
    return found
