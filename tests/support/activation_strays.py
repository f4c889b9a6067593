"""What ranks do whose rolls of activations are out of step, or that cannot agree on a batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from overlap_mtp import Roller, SequenceLayout
from overlap_mtp.schedules.activations import ACTIVATION_SCHEDULES, make_activation_roller

from activation_faults import NUM_DEPTHS, batch_of, start
from activations import leaves_of, make_grid, rolls_of, run_backward, wrong_rows
from cases import ODD_RANK, error_of
from exact_activations import Activations
from rank_pool import device_of, fresh_group


def other_documents(batch: Activations) -> Activations:
    bounds = batch.layout.cu_seqlens.copy()
    bounds[1] += batch.layout.num_chunks
    return replace(batch, layout=SequenceLayout.packed(bounds, batch.layout.cp_size))


def other_lengths(batch: Activations) -> Activations:
    lengths = batch.layout.valid_lengths - [0, 1, 0]
    return replace(
        batch,
        layout=SequenceLayout.packed(batch.layout.cu_seqlens, batch.layout.cp_size, valid_lengths=lengths),
    )


def converted(batch: Activations, change: Callable[[torch.Tensor], torch.Tensor]) -> Activations:
    tensors, weights = (
        {key: change(one) for key, one in some.items()} for some in (batch.tensors, batch.weights)
    )
    return replace(batch, tensors=tensors, weights=weights)


# What the odd rank starts in place of its second microbatch.
CHANGES: dict[str, Callable[[Activations], Activations]] = {
    "cu_seqlens": other_documents,
    "valid_lengths": other_lengths,
    "of_batch": lambda batch: replace(batch, layout=batch.layout.of_batch("another")),
    "dtype": lambda batch: converted(batch, torch.Tensor.float),
    "shape": lambda batch: converted(batch, lambda one: one[:, :1]),
    "illegal": lambda batch: converted(batch, torch.Tensor.long),
    "no_grad": lambda batch: batch,
    "no backward": lambda batch: batch,
    "away": lambda batch: batch,
}


def outcomes_of(
    group: dist.ProcessGroup, schedule: str, case: str, check_layouts: bool = False
) -> list[tuple[str, float]]:
    """The outcomes and seconds of three microbatches; the second is another one on the odd rank.

    A rank that stays away does so from then on: a rank cannot tell that its peer left one batch out, unless they have
    names (`of_batch`).
    """
    roller = make_activation_roller(schedule, group, NUM_DEPTHS, check_layouts=check_layouts)
    outcomes = []
    for number in range(3):
        batch = batch_of(group, number)
        is_odd = number == 1 and group.rank() == ODD_RANK
        if is_odd:
            batch = CHANGES[case](batch)
        begin = time.monotonic()
        try:
            if case == "away" and number > 0 and group.rank() == ODD_RANK:
                outcome = "RuntimeError: away"
            elif is_odd and case == "no backward":
                start(batch, roller, leaves_of(batch))[1].at(1)
                outcome = "RuntimeError: no backward"
            elif is_odd and case == "no_grad":
                with torch.no_grad():
                    rolls_of(roller, batch.shards(), batch.layout)
                outcome = "right"
            elif is_odd and case == "illegal":
                outcome = str(rolls_of(roller, batch.shards(), batch.layout))
            else:
                outcome = str(wrong_rows(batch, roller) or "right")
        except (ValueError, RuntimeError) as error:
            outcome = f"{type(error).__name__}: {error}"
        outcomes.append((outcome, time.monotonic() - begin))
    return outcomes


OUT_OF_STEP = [
    *(("overlap", case) for case in CHANGES),
    *(("merged", case) for case in CHANGES if case not in ("valid_lengths", "of_batch")),
    *(("sync", case) for case in ("cu_seqlens", "no_grad", "illegal", "no backward")),
]


def go_out_of_step(world: dist.ProcessGroup) -> dict[tuple[str, str], list[tuple[str, float]]]:
    """The outcomes of all cases. Each has a thread and a group, so that they wait side by side."""
    groups = {case: fresh_group(world) for case in OUT_OF_STEP}
    with ThreadPoolExecutor(len(groups)) as threads:
        return dict(zip(groups, threads.map(lambda one: outcomes_of(groups[one], *one), groups), strict=True))


def go_out_of_step_far_away(world: dist.ProcessGroup) -> dict[tuple[str, str], list[tuple[str, float]]]:
    """The outcomes of cases that headers give away, on more ranks than a rank has neighbours."""
    cases = list(product(("overlap", "merged"), ("cu_seqlens", "dtype", "no_grad", "illegal")))
    return {case: outcomes_of(fresh_group(world, timeout_s=20), *case) for case in cases}


COMPARED = ("cu_seqlens", "valid_lengths", "of_batch", "no_grad", "illegal", "dtype", "shape")


def compare_by_sync(world: dist.ProcessGroup) -> dict[str, list[tuple[str, float]]]:
    """The outcomes of cases that `sync` finds only if it compares layouts."""
    return {case: outcomes_of(fresh_group(world), "sync", case, check_layouts=True) for case in COMPARED}


def wrong_if_sync_goes_in_another_order(world: dist.ProcessGroup) -> list[str]:
    """What is not found where `sync` compares: the odd rank takes or returns two microbatches in another order."""
    wrong = []
    for where in ("at", "backward"):
        group = fresh_group(world)
        roller = make_activation_roller("sync", group, NUM_DEPTHS, check_layouts=True)
        batches = [batch_of(group, seed) for seed in range(2)]
        started = [start(batch, roller, leaves_of(batch)) for batch in batches]
        order = (1, 0) if group.rank() == ODD_RANK else (0, 1)
        errors = []
        if where == "at":
            errors = [error_of(started[one][1].at, 1) for one in order]
        else:
            rolled = [[rolls.at(depth) for depth in range(1, NUM_DEPTHS + 1)] for _, rolls in started]
            errors = [error_of(run_backward, batches[one], started[one][0], rolled[one]) for one in order]
        if not all("started another microbatch" in error for error in errors):
            wrong += [f"{where}: {errors}"]
        wrong += wrong_rows(batches[0], roller)
    return wrong


# What the odd rank's roller and first batch have in place of the others', and what the errors say.
DIFFERENT: dict[str, tuple[dict[str, Any], Callable[[Activations], Activations], list[str]]] = {
    "num_depths": ({"num_depths": 1}, lambda batch: batch, ["num_depths", "1", "2"]),
    "max_documents": ({"max_documents": 7}, lambda batch: batch, ["max_documents", "7", "128"]),
    "schedule": ({"schedule": "merged"}, lambda batch: batch, ["schedule", "merged", "overlap"]),
    "seq_dim": (
        {"seq_dim": 0},
        lambda batch: replace(batch, seq_dim=0),
        ["seq_dim", "0", "1"],
    ),
    "dtype": ({}, CHANGES["dtype"], ["a float64 [2, 3]", "a float32 [2, 3]"]),
    "shape": ({}, CHANGES["shape"], ["a float64 [2, 3]", "a float64 [1, 3]"]),
    "illegal": ({}, CHANGES["illegal"], ["a must be one of float64", "int64"]),
    "names": (
        {},
        lambda batch: replace(batch, tensors={"a": batch.tensors["a"]}),
        ["a float64 [2, 3]", "b float64 [2, 5]"],
    ),
    "kind": (
        {},
        lambda batch: replace(
            batch, layout=SequenceLayout.packed(batch.layout.cu_seqlens, batch.layout.cp_size, "contiguous")
        ),
        ["packed zigzag", "packed contiguous"],
    ),
    "cp_size": (
        {},
        lambda batch: replace(batch, layout=SequenceLayout.dense(48, 6)),
        ["cp_size 6", "3 ranks"],
    ),
}


def start_other_kinds(group: dist.ProcessGroup) -> dict[str, tuple[str, list[str]]]:
    """For each difference, what the first start raises, and what is wrong with a second one, of a good batch."""
    found = {}
    for case, (options, change, _) in DIFFERENT.items():
        batch, settings = batch_of(group), {"schedule": "overlap", "num_depths": NUM_DEPTHS}
        is_odd = group.rank() == ODD_RANK
        roller = make_activation_roller(cp_group=group, **settings | (options if is_odd else {}))
        mine = change(batch) if is_odd else batch
        shards = (mine if mine.layout.cp_size == group.size() else batch).shards()
        error = error_of(roller.start, shards, mine.layout)
        found[case] = error, [] if options else wrong_rows(batch, roller)
        roller.close()
    return found


# What tp rank 1 starts second in place of its batch, as (batch, layout, hidden size).
SHARED: dict[str, Callable[[int], tuple[SequenceLayout, int]]] = {
    "layout": lambda cp_size: (SequenceLayout.packed([0, 6 * cp_size, 12 * cp_size], cp_size), 3),
    "length": lambda cp_size: (SequenceLayout.packed([0, 4 * cp_size, 24 * cp_size], cp_size), 3),
    "shape": lambda cp_size: (SequenceLayout.packed([0, 4 * cp_size, 12 * cp_size], cp_size), 5),
    "illegal": lambda cp_size: (SequenceLayout.dense(12 * (cp_size + 1), cp_size + 1), 3),
    "nothing": lambda cp_size: (SequenceLayout.packed([0, 4 * cp_size, 12 * cp_size], cp_size), 3),
}


OF_ONE_SIZE = "layout", "illegal", "nothing"  # sums of other sizes hang on GPUs


def differ_among_tp_ranks(
    world: dist.ProcessGroup, cases: Sequence[str] = tuple(SHARED)
) -> dict[tuple[str, str], list[str]]:
    """By schedule and case, the outcomes of two microbatches on cp ranks of 2 tp ranks each."""
    found, cp_size = {}, world.size() // 2
    for schedule, case in product(ACTIVATION_SCHEDULES, cases):
        grid = make_grid(2, cp_size)
        assert grid is not None
        tp_group, cp_group = grid
        assert tp_group is not None
        roller = make_activation_roller(schedule, cp_group, NUM_DEPTHS, tp_group=tp_group)

        def step(layout: SequenceLayout, hidden: int, roller: Roller = roller) -> None:
            device = device_of(world)
            leaf = torch.ones(1, layout.local_len // 2, hidden, device=device, requires_grad=True)
            rolled = roller.start({"a": leaf * 1}, layout).at(1)["a"]
            if leaf.is_cuda:  # the device finds out later
                torch.cuda.synchronize()
            roller.raise_if_failed()
            rolled.sum().backward()

        is_odd = tp_group.rank() == ODD_RANK
        good, odd = SHARED["nothing"](cp_size), SHARED[case](cp_size)
        found[schedule, case] = [error_of(step, *one) for one in (good, odd if is_odd else good)]
    return found


def assert_tp_ranks_heard(by_rank: list[dict[tuple[str, str], list[str]]]) -> None:
    """Check what `differ_among_tp_ranks` found on all ranks."""
    for rank, found in enumerate(by_rank):
        for (schedule, case), (first, second) in found.items():
            assert first == "nothing", first
            if case == "nothing":
                assert second == "nothing", second
            elif case == "illegal" and rank % 2 == ODD_RANK:
                assert second.startswith("ValueError: the layout is for cp_size"), second
            else:
                heard = f"RuntimeError: overlap_mtp: tp rank {1 - rank % 2} exchanged"
                assert second.startswith(heard), (schedule, case, second)


def count_collectives_of_none(world: dist.ProcessGroup) -> list[int]:
    """How many sums over tp ranks each schedule takes for one microbatch, forward and backward; the last is `none`."""
    grid = make_grid(2, 2)
    assert grid is not None
    layout, counts = SequenceLayout.dense(24, 2), []
    for schedule in (*ACTIVATION_SCHEDULES, "none"):
        batch = Activations.of(grid[1], layout, NUM_DEPTHS, tp_group=grid[0])
        roller = make_activation_roller(schedule, grid[1], NUM_DEPTHS, tp_group=grid[0])
        roller.start(batch.shards(), layout).at(1)
        tensors, rolls = start(batch, roller, leaves_of(batch))
        with mock.patch.object(dist, "all_gather", wraps=dist.all_gather) as sums:
            run_backward(batch, tensors, [rolls.at(depth) for depth in (1, 2)])
        counts.append(sums.call_count)
        roller.close()
    return counts
