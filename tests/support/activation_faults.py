"""What ranks do with rolls of activations when their losses, batches or steps are not those of their peers."""

from __future__ import annotations

import torch
import torch.distributed as dist

from overlap_mtp import Roller, SequenceLayout
from overlap_mtp.schedules.activations import ACTIVATION_SCHEDULES, make_activation_roller

from activations import gradients_of, leaves_of
from cases import ODD_RANK
from exact_activations import Activations, Tensors

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
