"""What ranks do with rolls of activations when their losses, batches or steps are not those of their peers."""

from __future__ import annotations

import contextlib
import gc
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from overlap_mtp import Roller, Rolls, SequenceLayout, make_roller
from overlap_mtp.schedules.activations import ACTIVATION_SCHEDULES, make_activation_roller
from overlap_mtp.schedules.timed import TimedRoller

from activations import gradients_of, leaves_of, make_grid, rolls_of, run_backward, wrong_rows
from cases import ODD_RANK, Microbatch, error_of
from exact_activations import Activations, Tensors
from rank_pool import fresh_group
from strategies import same_bits

NUM_DEPTHS = 2


def batch_of(group: dist.ProcessGroup, seed: int = 0, documents: int = 3) -> Activations:
    bounds = [*(0, 4, 12, 16)[:documents], 24]
    layout = SequenceLayout.packed([2 * group.size() * one for one in bounds], group.size())
    return Activations.of(group, layout, NUM_DEPTHS, seed=seed)


# Losses. A backward pass is a word of these letters: the loss uses the tensor a or b; all rolls of tensor A or B; or
# those of depth 1.

LETTERS: dict[str, tuple[str, range]] = {
    "a": ("a", range(1)),
    "b": ("b", range(1)),
    "A": ("a", range(1, NUM_DEPTHS + 1)),
    "B": ("b", range(1, NUM_DEPTHS + 1)),
    "1": ("a", range(1, 2)),
}
# The passes of most ranks, and those of the odd rank.
PASSES: dict[str, tuple[list[str], list[str]]] = {
    "all use the rolls": (["abAB"], ["abAB"]),
    "one uses no rolls": (["abAB"], ["ab"]),
    "one uses one depth": (["abAB"], ["ab1"]),
    "one uses the rolls of one tensor": (["abAB"], ["abA"]),
    "one uses rolls alone": (["ab"], ["AB"]),
    "one uses tensors alone": (["AB"], ["ab"]),
    "none uses rolls": (["ab"], ["ab"]),
    "twice": (["abAB", "abAB"], ["abAB", "abAB"]),
    "three times": (["abAB"] * 3, ["abAB"] * 3),
    "twice, one without rolls": (["abAB", "abAB"], ["ab", "ab"]),
    "twice, one first without rolls": (["abAB", "abAB"], ["ab", "abAB"]),
    "twice, one then without rolls": (["abAB", "abAB"], ["abAB", "ab"]),
    "the main loss, then that of MTP": (["ab", "AB"], ["ab", "AB"]),
    "the loss of MTP, then the main one": (["AB", "ab"], ["AB", "ab"]),
    "a main loss of one tensor, then MTP": (["a", "AB"], ["a", "AB"]),
    "main and MTP apart, one without MTP": (["ab", "AB"], ["ab", "ab"]),
    "MTP and main apart, one without MTP": (["AB", "ab"], ["ab", "ab"]),
}
WITHOUT_AT = ["one uses no rolls", "one uses tensors alone", "twice, one without rolls"]
WITH_LATE_AT = ["the main loss, then that of MTP", "a main loss of one tensor, then MTP"]


def run_passes(
    batch: Activations, roller: Roller, passes: list[str], at: str
) -> tuple[list[Tensors], Tensors]:
    """(rolls, gradients) of backward passes over one graph. `at` is called "first", "late" (after the first pass) or
    "never"."""
    leaves = leaves_of(batch)
    tensors = {name: leaf * 1 for name, leaf in leaves.items()}
    rolls = roller.start(tensors, batch.layout)
    rolled = [tensors]
    for number, letters in enumerate(passes):
        if len(rolled) == 1 and (at == "first" or (at == "late" and number == 1)):
            rolled += [rolls.at(depth) for depth in range(1, NUM_DEPTHS + 1)]
        used = [(name, depth) for name, depths in map(LETTERS.__getitem__, letters) for depth in depths]
        ends = [(rolled[depth][name] * 1, batch.weight(name, depth)) for name, depth in used]
        torch.autograd.backward(*zip(*ends, strict=True), retain_graph=number + 1 < len(passes))
    return rolled[1:], gradients_of(leaves)


def wrong_after_passes(group: dist.ProcessGroup) -> list[str]:
    """The gradients that are wrong after the passes of each case, by every schedule."""
    wrong = []
    for schedule in ACTIVATION_SCHEDULES:
        cases = [(case, "first") for case in PASSES]
        if schedule == "overlap":
            cases += [(case, "never") for case in WITHOUT_AT] + [(case, "late") for case in WITH_LATE_AT]
        for number, (case, at) in enumerate(cases):
            batch, roller = batch_of(group, number), make_activation_roller(schedule, group, NUM_DEPTHS)
            usual, odd = PASSES[case]
            is_odd = group.rank() == ODD_RANK

            def times(
                rank: int, name: str, depth: int, usual: list[str] = usual, odd: list[str] = odd
            ) -> int:
                used = [LETTERS[one] for letters in (odd if rank == ODD_RANK else usual) for one in letters]
                return sum(name == one and depth in depths for one, depths in used)

            mine = "first" if at == "never" and not is_odd else at
            rolled, gradients = run_passes(batch, roller, odd if is_odd else usual, mine)
            found = batch.wrong_rolls(rolled) + batch.wrong_gradients(gradients, times)
            if set(gradients) != set(batch.tensors):
                found.append(f"gradients of {sorted(gradients)} alone")
            wrong += [f"{schedule}, {case}, {at}: {one}" for one in found]
            roller.close()
    return wrong


def lose_a_gradient(group: dist.ProcessGroup) -> list[str]:
    """What the backward of a loss raises that, on one rank, uses neither the rolls nor the second tensor."""
    errors = []
    for schedule in ACTIVATION_SCHEDULES:
        batch, roller = batch_of(group), make_activation_roller(schedule, group, NUM_DEPTHS)
        passes = ["a" if group.rank() == ODD_RANK else "abAB"]
        errors.append(error_of(run_passes, batch, roller, passes, "first"))
        roller.close()
    return errors


def look_under_no_grad(group: dist.ProcessGroup) -> list[str]:
    """What is wrong with rolls, and their gradients, that are first looked at under no_grad."""
    wrong = []
    for schedule in ACTIVATION_SCHEDULES:
        batch, roller = batch_of(group), make_activation_roller(schedule, group, NUM_DEPTHS)
        leaves = leaves_of(batch)
        tensors = {name: leaf * 1 for name, leaf in leaves.items()}
        rolls = roller.start(tensors, batch.layout)
        with torch.no_grad():
            rolls.at(1)
        run_backward(batch, tensors, [rolls.at(depth) for depth in (1, 2)])
        wrong += [f"{schedule}: {one}" for one in batch.wrong_gradients(gradients_of(leaves))]
        roller.close()
    return wrong


# Steps that end before their end, on all ranks.


class Fails(torch.autograd.Function):
    """The identity. Its backward raises."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        raise InterruptedError


def start(batch: Activations, roller: Roller, leaves: Tensors) -> tuple[Tensors, Rolls]:
    tensors = {name: leaf * 1 for name, leaf in leaves.items()}
    return tensors, roller.start(tensors, batch.layout)


def drop_before_at(batch: Activations, roller: Roller, leaves: Tensors) -> None:
    start(batch, roller, leaves)


def raise_before_at(batch: Activations, roller: Roller, leaves: Tensors) -> None:
    _tensors, _rolls = start(batch, roller, leaves)
    raise InterruptedError


def drop_after_at(batch: Activations, roller: Roller, leaves: Tensors) -> None:
    start(batch, roller, leaves)[1].at(NUM_DEPTHS)


def raise_before_gradients_leave(batch: Activations, roller: Roller, leaves: Tensors) -> None:
    _, rolls = start(batch, roller, leaves)
    Fails.apply(rolls.at(1)["a"]).sum().backward()


def raise_before_gradients_arrive(batch: Activations, roller: Roller, leaves: Tensors) -> None:
    """What is computed between `start` and `at` fails in backward."""
    tensors, rolls = start(batch, roller, leaves)
    trunk = Fails.apply(tensors["a"])
    (trunk.sum() + rolls.at(1)["a"].sum()).backward()


def raise_after_gradients_arrive(batch: Activations, roller: Roller, leaves: Tensors) -> None:
    tensors = {name: Fails.apply(leaf) for name, leaf in leaves.items()}
    roller.start(tensors, batch.layout).at(1)["a"].sum().backward()


def roll_under_no_grad(batch: Activations, roller: Roller, leaves: Tensors) -> None:
    with torch.no_grad():
        _, rolls = start(batch, roller, leaves)
        rolled = [rolls.at(depth) for depth in (1, 2)]
    assert batch.wrong_rolls(rolled) == []
    assert not any(roll.requires_grad for by_name in rolled for roll in by_name.values())


def roll_leaves(batch: Activations, roller: Roller, leaves: Tensors) -> None:
    rolls = roller.start(leaves, batch.layout)
    run_backward(batch, leaves, [rolls.at(depth) for depth in (1, 2)])


def drop_rolls_of_leaves(batch: Activations, roller: Roller, leaves: Tensors) -> None:
    roller.start(leaves, batch.layout)


UNFINISHED = [
    *(drop_before_at, raise_before_at, drop_after_at, raise_before_gradients_leave),
    *(raise_before_gradients_arrive, raise_after_gradients_arrive, roll_under_no_grad),
    *(roll_leaves, drop_rolls_of_leaves),
]


@contextlib.contextmanager
def few_objects() -> Iterator[None]:
    """The garbage collector looks at new objects alone: thousands of modules would take it a second each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


def num_tensors() -> int:
    """Tensors that were made inside of `few_objects`."""
    gc.collect()
    return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())


@few_objects()
def leaks(group: dist.ProcessGroup) -> list[str]:
    """What unfinished steps leave behind, and what is wrong with the steps after them."""
    wrong = []
    for schedule in ACTIVATION_SCHEDULES:
        roller = make_activation_roller(schedule, group, NUM_DEPTHS)
        batch, others = batch_of(group, documents=1), [batch_of(group, seed, 1) for seed in range(2)]
        leaves = leaves_of(batch)
        held: list[int] = []
        for step in range(6 if schedule == "overlap" else 3):
            for unfinished in UNFINISHED:
                with contextlib.suppress(InterruptedError):
                    unfinished(batch, roller, leaves)
                found = wrong_rows(others[step % 2], roller)
                wrong += [f"{schedule}, after {unfinished.__name__}: {one}" for one in found]
            for leaf in leaves.values():
                leaf.grad = None
            held.append(num_tensors())
        if len({*held[1:]}) > 1:
            wrong.append(f"{schedule}: the number of tensors became {held}")
        hooks = sum(len(leaf._backward_hooks or {}) for leaf in leaves.values())
        if hooks:
            wrong.append(f"{schedule}: {hooks} hooks")
        roller.close()
    return wrong


@without_collector()
def what_outlives_a_step(group: dist.ProcessGroup) -> list[str]:
    """Objects of a step that live after it, without the help of the garbage collector."""
    alive = []
    for schedule in ACTIVATION_SCHEDULES:
        batch, roller = batch_of(group), make_activation_roller(schedule, group, NUM_DEPTHS)
        leaves = leaves_of(batch)
        for has_backward in (True, False):
            tensors, rolls = start(batch, roller, leaves)
            rolled = [rolls.at(depth) for depth in (1, 2)]
            watched = {"rolls": rolls, "tensor": tensors["a"], "roll": rolled[0]["a"]}
            graph = rolls._backward  # type: ignore[attr-defined]
            watched |= {"graph": graph, "exchange": graph.exchange, "buffer": graph.exchange.buffer}
            references = {name: weakref.ref(one) for name, one in watched.items()}
            if has_backward:
                run_backward(batch, tensors, rolled)
            del tensors, rolls, rolled, watched, graph
            alive += [f"{schedule}: {name}" for name, one in references.items() if one() is not None]
        roller.close()
    return alive


@few_objects()
def close_with_exchanges_under_way(group: dist.ProcessGroup) -> list[str]:
    """What rollers leave behind that are closed with exchanges under way, and what is wrong with the next rollers."""
    wrong, held = [], []
    for number in range(6):
        batch = batch_of(group, number)
        abandoned = make_activation_roller("overlap", group, NUM_DEPTHS)
        for _ in range(3):
            rolls = abandoned.start(batch.shards(), batch.layout)
        abandoned.close()
        wrong += [error_of(rolls.at, 1), error_of(abandoned.start, batch.shards(), batch.layout)]
        del rolls
        roller = make_activation_roller("overlap", group, NUM_DEPTHS)
        wrong += wrong_rows(batch, roller)
        roller.close()
        held.append(num_tensors())
    wrong = [one for one in wrong if one != "RuntimeError: this roller is closed"]
    return [*wrong, f"the number of tensors became {held}"] if len({*held[1:]}) > 1 else wrong


# Steps of several microbatches and rollers


def recompute(group: dist.ProcessGroup) -> list[str]:
    """What is wrong with layers that are computed again in backward, and take the rolls as inputs."""
    wrong = []
    for schedule in ACTIVATION_SCHEDULES:
        batch, roller = batch_of(group), make_activation_roller(schedule, group, NUM_DEPTHS)
        found: dict[str, tuple[list[torch.Tensor], tuple[int, int]]] = {}
        for how in ("kept", "recomputed", "recomputed, reentrant"):
            messages, leaves = roller.traffic.messages, leaves_of(batch)
            computed = []

            def layer(
                hidden: torch.Tensor, ahead: torch.Tensor, computed: list[int] = computed
            ) -> torch.Tensor:
                computed.append(1)
                return torch.tanh(hidden + ahead * ahead)

            tensors, rolls = start(batch, roller, leaves)
            hidden = tensors["a"]
            for depth in (1, 2):
                inputs = hidden, rolls.at(depth)["a"]
                reentrant = how.endswith("reentrant")
                hidden = (
                    layer(*inputs) if how == "kept" else checkpoint(layer, *inputs, use_reentrant=reentrant)
                )
            (hidden * batch.weight("a", 0)).sum().backward()
            messages = roller.traffic.messages - messages
            found[how] = [leaves["a"].grad, hidden.detach()], (messages, len(computed))
        bits, (messages, times) = found["kept"]
        for how, (others, counts) in found.items():
            if not all(map(same_bits, bits, others)):
                wrong.append(f"{schedule}, {how}: other bits")
            if counts != (messages, times * (1 if how == "kept" else 2)) or messages == 0:
                wrong.append(f"{schedule}, {how}: (messages, layers) {counts} after {messages, times}")
        roller.close()
    return wrong


def roll_among_others(group: dist.ProcessGroup) -> list[str]:
    """What is wrong with microbatches under way of several rollers, of tokens and activations, on one group.

    The number of documents changes. Rolls are taken in another order than they were started in.
    """
    wrong = []
    of_tokens = [make_roller(schedule, group, NUM_DEPTHS) for schedule in ("prefetch", "sync")]
    rollers = [make_activation_roller(one, group, NUM_DEPTHS) for one in (*ACTIVATION_SCHEDULES, "overlap")]
    timed = [TimedRoller(roller) for roller in rollers]
    for step in range(4):
        under_way = []
        for number, roller in enumerate(timed):
            batch = batch_of(group, step + number, documents=1 + (step + number) % 4)
            tokens = Microbatch.of(group, variant=step + number)
            leaves = leaves_of(batch)
            under_way.append(
                (batch, leaves, *start(batch, roller, leaves), tokens, tokens.start(of_tokens[number % 2]))
            )
        order = under_way if step % 2 else under_way[::-1]
        rolled = {}
        for depth in (1, 2) if step < 2 else (2, 1):
            for number, (_, _, _, rolls, _, token_rolls) in enumerate(order):
                rolled[number, depth] = rolls.at(depth)
                token_rolls.at(depth)
        ends = []
        for number, (batch, _, tensors, _, tokens, token_rolls) in enumerate(order):
            mine = [rolled[number, depth] for depth in (1, 2)]
            wrong += batch.wrong_rolls(mine) + tokens.wrong(token_rolls)
            ends.append((batch, tensors, mine))
        if step == 0:  # one backward for all
            losses = [
                (roll * batch.weight(name, depth)).sum()
                for batch, tensors, mine in ends
                for depth, by_name in enumerate([tensors, *mine])
                for name, roll in by_name.items()
            ]
            torch.stack(losses).sum().backward()
        else:
            for end in ends[::-1] if step == 1 else ends:
                run_backward(*end)
        for batch, leaves, *_ in order:
            wrong += batch.wrong_gradients(gradients_of(leaves))
    if any(one.read().host_us <= 0 or one.begun != 4 * 3 for one in timed):
        wrong.append("a TimedRoller counts otherwise")
    for roller in (*rollers, *of_tokens):
        roller.close()
    return wrong


def run_backward_of_several_microbatches(group: dist.ProcessGroup) -> list[str]:
    """Run backward once for three microbatches. The odd rank uses the rolls of only one of them."""
    roller = make_activation_roller("overlap", group, NUM_DEPTHS)
    batches = [batch_of(group, seed) for seed in range(3)]
    leaves = [leaves_of(batch) for batch in batches]
    started = [start(batch, roller, mine) for batch, mine in zip(batches, leaves, strict=True)]
    ends, wrong = [], []
    for number, (batch, (tensors, rolls)) in enumerate(zip(batches, started, strict=True)):
        rolled = [rolls.at(depth) for depth in (1, 2)]
        depths = [tensors] if group.rank() == ODD_RANK and number != 1 else [tensors, *rolled]
        ends += [
            (roll * 1, batch.weight(name, depth))
            for depth, by_name in enumerate(depths)
            for name, roll in by_name.items()
        ]
    torch.autograd.backward(*zip(*ends, strict=True))
    for number, (batch, mine) in enumerate(zip(batches, leaves, strict=True)):

        def times(rank: int, name: str, depth: int, number: int = number) -> int:
            return int(depth == 0 or number == 1 or rank != ODD_RANK)

        wrong += [f"microbatch {number}: {one}" for one in batch.wrong_gradients(gradients_of(mine), times)]
    roller.close()
    return wrong


# Ranks that are out of step


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


def outcomes_of(group: dist.ProcessGroup, schedule: str, case: str) -> list[tuple[str, float]]:
    """The outcomes and seconds of three microbatches; the second is another one on the odd rank.

    A rank that stays away does so from then on: a rank cannot tell that its peer left one batch out, unless they have
    names (`of_batch`).
    """
    roller, outcomes = make_activation_roller(schedule, group, NUM_DEPTHS), []
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
    "layout": lambda cp_size: (SequenceLayout.packed([0, 12, 24], cp_size), 3),
    "length": lambda cp_size: (SequenceLayout.packed([0, 8, 48], cp_size), 3),
    "shape": lambda cp_size: (SequenceLayout.packed([0, 8, 24], cp_size), 5),
    "illegal": lambda cp_size: (SequenceLayout.dense(24, 3), 3),
    "nothing": lambda cp_size: (SequenceLayout.packed([0, 8, 24], cp_size), 3),
}


def differ_among_tp_ranks(world: dist.ProcessGroup) -> dict[tuple[str, str], list[str]]:
    """By schedule and case, the outcomes of two microbatches on 2 cp ranks of 2 tp ranks."""
    found = {}
    for schedule, case in product(ACTIVATION_SCHEDULES, SHARED):
        grid = make_grid(2, 2)
        assert grid is not None
        tp_group, cp_group = grid
        assert tp_group is not None
        roller = make_activation_roller(schedule, cp_group, NUM_DEPTHS, tp_group=tp_group)

        def step(layout: SequenceLayout, hidden: int, roller: Roller = roller) -> None:
            leaf = torch.ones(1, layout.local_len // 2, hidden, requires_grad=True)
            roller.start({"a": leaf * 1}, layout).at(1)["a"].sum().backward()

        is_odd = tp_group.rank() == ODD_RANK
        good = SHARED["nothing"](2)
        found[schedule, case] = [error_of(step, *one) for one in (good, SHARED[case](2) if is_odd else good)]
    return found


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
        with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as sums:
            run_backward(batch, tensors, [rolls.at(depth) for depth in (1, 2)])
        counts.append(sums.call_count)
        roller.close()
    return counts
