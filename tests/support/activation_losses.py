"""What ranks do with rolls of activations when their losses use other tensors and rolls than those of their peers."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from overlap_mtp import Roller
from overlap_mtp.schedules.activations import ACTIVATION_SCHEDULES, make_activation_roller

from activation_faults import NUM_DEPTHS, batch_of
from activations import ends_of, gradients_of, leaves_of, run_backward
from cases import ODD_RANK, error_of
from exact_activations import Activations, Tensors

# A backward pass is a word of these letters: the loss uses the tensor a or b; all rolls of tensor A or B; or those of
# depth 1.

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


class Apart(torch.autograd.Function):
    """The identity. Its results have one node in the graph, which may get a gradient of one of them only."""

    @staticmethod
    def forward(ctx: Any, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return gradients


def lose_one_of_several_results(group: dist.ProcessGroup) -> str:
    """The same for two tensors that one function returned."""
    batch, roller = batch_of(group), make_activation_roller("overlap", group, NUM_DEPTHS)
    tensors = dict(zip("ab", Apart.apply(*leaves_of(batch).values()), strict=True))
    rolls = roller.start(tensors, batch.layout)
    rolled = [roll for depth in (1, 2) for roll in rolls.at(depth).values()]
    ends = [tensors["a"]] if group.rank() == ODD_RANK else [*tensors.values(), *rolled]
    error = error_of(torch.autograd.backward, ends, [torch.ones_like(end) for end in ends])
    roller.close()
    return error


class FailsOnce(torch.autograd.Function):
    """The identity. Its first backward raises."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        ctx.fails = True
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        if ctx.fails:
            ctx.fails = False
            raise InterruptedError
        return gradient


def run_again_after_a_failed_pass(group: dist.ProcessGroup) -> list[str]:
    """What is wrong after a pass that failed when gradients of one tensor had been added, and those of another not."""
    batch, roller = batch_of(group), make_activation_roller("overlap", group, NUM_DEPTHS)
    leaves = leaves_of(batch)
    b = leaves["b"] * 1  # first, so that its node runs after the one that fails
    tensors = {"a": FailsOnce.apply(leaves["a"]), "b": b}
    rolls = roller.start(tensors, batch.layout)
    everything = ends_of(batch, [tensors, rolls.at(1), rolls.at(2)])
    first = ends_of(batch, [tensors]) if group.rank() == ODD_RANK else everything
    assert error_of(torch.autograd.backward, *zip(*first, strict=True), True) == "InterruptedError: "
    for leaf in leaves.values():
        leaf.grad = None
    torch.autograd.backward(*zip(*everything, strict=True))
    roller.close()
    return batch.wrong_gradients(gradients_of(leaves))


def run_backward_beside_collectives(group: dist.ProcessGroup) -> list[str]:
    """What is wrong if layers have collectives in backward, and the loss of the odd rank does not use the rolls."""

    class Layer(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
            return tensor.view_as(tensor)

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            dist.all_reduce(torch.ones(1, device=gradient.device), group=group)
            return gradient

    batch, roller = batch_of(group), make_activation_roller("overlap", group, NUM_DEPTHS)
    leaves, is_odd = leaves_of(batch), group.rank() == ODD_RANK
    tensors = {name: leaf * 1 for name, leaf in leaves.items()}
    trunk = {name: Layer.apply(tensor) for name, tensor in tensors.items()}
    rolls = roller.start(tensors, batch.layout)
    trunk = {name: Layer.apply(tensor) for name, tensor in trunk.items()}
    depths = [trunk] if is_odd else [trunk, rolls.at(1), rolls.at(2)]
    torch.autograd.backward(*zip(*ends_of(batch, depths), strict=True))
    roller.close()
    return batch.wrong_gradients(
        gradients_of(leaves), lambda rank, name, depth: int(depth == 0 or rank != ODD_RANK)
    )


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
