"""The drop-in in models of Megatron-LM on four CPU ranks: every result equals that of Megatron-LM alone, to the bit.

The environment variable MEGATRON_CHECKOUT, a folder of Megatron-LM, tests that in place of the installed megatron-core.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron_ranks import DEPTHS, Case, Model, Outcome, is_main, needs_megatron, on_megatron
from rank_pool import RankPool

pytestmark = needs_megatron
MAIN = is_main()
needs_main = pytest.mark.skipif(not MAIN, reason="needs Megatron-LM's main branch (MEGATRON_CHECKOUT)")

PER_BATCH = 4 * DEPTHS  # rolls: ids, positions, labels and loss mask
FULL_RECOMPUTE = (
    ("recompute_granularity", "full"),
    ("recompute_method", "uniform"),
    ("recompute_num_layers", 1),
)


@pytest.fixture(scope="module")
def four() -> Iterator[RankPool]:
    """Four ranks that import Megatron-LM once: that takes 8 s."""
    with RankPool(4, sizes=()) as ranks:
        yield ranks


def compare(four: RankPool, case: Case, program: str = "", *arguments: Any) -> list[Outcome]:
    """Return what the ranks found, if all results are equal."""
    outcomes = four.run(on_megatron, 4, "megatron_models", "compare", case, program, *arguments)
    assert [one.wrong for one in outcomes] == [[]] * 4
    return outcomes


def assert_answered(outcomes: list[Outcome], *, exchanges: int, rolls: int) -> None:
    """An exchange answered for every roll on these ranks, and Megatron-LM did none."""
    for outcome in outcomes:
        assert outcome.fallbacks == {}
        assert outcome.own_rolls == 0
        assert (outcome.exchanges, outcome.answered) == (exchanges, rolls)


ONE_STAGE = {
    "dense": Case(),
    "two rows, arguments by position": Case(rows=2, positional=True),
    "packed": Case(documents=4),
    "packed, documents of one token per chunk": Case(documents=16 * 4 // 8),
    "no loss mask": Case(has_loss_mask=False),
    "no loss mask, packed": Case(has_loss_mask=False, documents=3),
    "boolean loss mask": Case(mask_dtype=torch.bool),
    "bfloat16 loss mask, whose sum stays bfloat16": Case(mask_dtype=torch.bfloat16),
    "tensors that are not contiguous": Case(is_views=True, rows=2),
    "evaluation": Case(is_eval=True),
    "schedule sync": Case(settings={"schedule": "sync"}, documents=3),
    "schedule merged": Case(settings={"schedule": "merged"}, documents=3),
    "schedule overlap": Case(settings={"schedule": "overlap"}, documents=3),
    "more documents than max_documents": Case(settings={"max_documents": 2}, documents=7),
    "padding='megatron' without padding": Case(settings={"padding": "megatron"}, documents=3),
    "DistributedDataParallel": Case(Model(wrapper="ddp")),
    "Float16Module": Case(Model(wrapper="float16"), documents=3),
    "loss per token": Case(Model(options=(("calculate_per_token_loss", True),))),
    "full recompute": Case(Model(options=FULL_RECOMPUTE), microbatches=3),
    "tp 2": Case(Model(cp=2, tp=2)),
    "tp 2, sequence parallel": Case(Model(cp=2, tp=2, sequence_parallel=True)),
    "tp 2, sequence parallel, packed": Case(Model(cp=2, tp=2, sequence_parallel=True), documents=3),
    "dp 2": Case(Model(cp=2)),
    "cp 1, packed": Case(Model(cp=1), documents=3),
}


@pytest.mark.parametrize("name", ONE_STAGE)
def test_an_exchange_answers_every_roll(four, name):
    case = ONE_STAGE[name]
    outcomes = compare(four, case)
    assert_answered(outcomes, exchanges=case.microbatches, rolls=PER_BATCH * case.microbatches)
    assert all((outcome.gradients > 30) != case.is_eval for outcome in outcomes)
    assert all(outcome.forwards == case.microbatches for outcome in outcomes)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_padding_mask_is_rolled_like_megatron_does(four, sequence_parallel):
    """Main rolls it. Under sequence parallelism it is cut over tp ranks before, so that is left to Megatron-LM."""
    model = Model(cp=2, tp=2, sequence_parallel=sequence_parallel)
    outcomes = compare(four, Case(model, has_padding_mask=True))
    masks = DEPTHS * 2 if MAIN else 0
    for outcome in outcomes:
        left = masks if sequence_parallel else 0
        assert outcome.answered == PER_BATCH * 2 + masks - left
        assert sum(outcome.fallbacks.values()) == left
        assert all("does not know" in reason for reason in outcome.fallbacks)


# (exchanges, answered rolls) of a microbatch on each stage
PIPELINES = {
    "MTP and loss on the last stage, 1F1B": (Model(cp=2, pp=2), ((0, 0), (1, PER_BATCH))),
    "MTP on the stage before the loss": (
        Model(cp=2, pp=2, options=(("pipeline_model_parallel_layout", "Ettmm|L"),)),
        ((1, 2 * DEPTHS), (1, 2 * DEPTHS)),
    ),
    "no layer before MTP on its stage": (
        Model(cp=2, pp=2, options=(("pipeline_model_parallel_layout", "Ett|mmL"),)),
        ((0, 0), (1, PER_BATCH)),
    ),
    "interleaved": (Model(cp=2, pp=2, vp=2, num_layers=4), ((0, 0), (1, PER_BATCH))),
}


@pytest.mark.parametrize("documents", [0, 3])
@pytest.mark.parametrize("name", PIPELINES)
def test_pipeline_stages_exchange_what_they_roll(four, name, documents):
    model, stages = PIPELINES[name]
    outcomes = compare(four, Case(model, documents=documents, microbatches=4))
    for stage, (exchanges, rolls) in enumerate(stages):
        assert_answered(outcomes[2 * stage : 2 * stage + 2], exchanges=4 * exchanges, rolls=4 * rolls)


def test_full_recompute_resends_nothing(four):
    once = compare(four, Case())
    twice = compare(four, Case(Model(options=FULL_RECOMPUTE)))
    assert [(one.exchanges, one.answered) for one in once] == [(one.exchanges, one.answered) for one in twice]


# What a program may do in between


@pytest.mark.parametrize("name", ["input_ids", "position_ids", "labels", "loss_mask"])
@pytest.mark.parametrize("documents", [0, 3])
def test_a_tensor_that_is_written_to_after_it_was_sent_is_left_to_megatron(four, name, documents):
    outcomes = compare(four, Case(documents=documents, is_eval=True), "write_in_place", name, -1)
    for outcome in outcomes:
        assert outcome.answered == PER_BATCH - DEPTHS  # the other tensors'
        assert sum(outcome.fallbacks.values()) == DEPTHS


@pytest.mark.parametrize("name", ["input_ids", "labels"])
def test_a_tensor_that_is_written_to_before_it_was_sent_is_rolled_as_it_is_then(four, name):
    outcomes = compare(four, Case(is_eval=True), "write_in_place", name, 0)
    assert_answered(outcomes, exchanges=1, rolls=PER_BATCH)


def test_labels_that_are_written_to_between_mtp_layers_are_left_to_megatron(four):
    for outcome in compare(four, Case(), "write_after_the_first_mtp_layer"):
        assert outcome.answered == 3 * DEPTHS
        assert sum(outcome.fallbacks.values()) == DEPTHS


@pytest.mark.parametrize("schedule", ["prefetch", "overlap", "merged", "sync"])
def test_copies_of_a_tensor_that_is_written_to_are_left_to_megatron(four, schedule):
    four.check(on_megatron, 4, "megatron_programs", "rolls_of_written_tensors", schedule)


def test_two_models_take_turns(four):
    outcomes = compare(four, Case(), "two_models")
    assert_answered(outcomes, exchanges=4, rolls=2 * (4 * DEPTHS + 4 * 1))


def test_a_model_can_call_another_one(four):
    outcomes = compare(four, Case(documents=3), "a_model_within_a_model")
    assert_answered(outcomes, exchanges=2, rolls=2 * PER_BATCH)


@pytest.mark.parametrize("where", ["decoder", "mtp"])
def test_a_forward_that_raises_does_not_disturb_the_next(four, where):
    outcomes = compare(four, Case(), "a_forward_that_raises", where)
    before_the_error = 2 if where == "mtp" else 0
    exchanges = 4 if where == "mtp" else 2  # the decoder raises before the exchange leaves
    assert_answered(outcomes, exchanges=exchanges, rolls=2 * (PER_BATCH + before_the_error))


def test_batches_may_change_in_rows_tokens_and_documents(four):
    outcomes = compare(four, Case(settings={"max_documents": 4}), "changing_batches")
    assert_answered(outcomes, exchanges=12, rolls=12 * PER_BATCH)


@pytest.mark.parametrize("schedule", ["prefetch", "sync"])
def test_evaluation_in_inference_mode_gives_megatrons_results(four, schedule):
    outcomes = compare(four, Case(is_eval=True, settings={"schedule": schedule}), "in_inference_mode")
    # Whoever rolls the tensors of inference mode, all others are answered.
    assert all(outcome.answered >= 3 * PER_BATCH for outcome in outcomes)


def test_a_context_parallel_group_of_the_batch_is_left_to_megatron(four):
    for outcome in [
        *compare(four, Case(documents=3), "of_a_group_of_its_own"),
        *compare(four, Case(documents=3), "of_one_rank_alone"),
    ]:
        assert (outcome.exchanges, outcome.answered) == (0, 0)
        [(reason, count)] = outcome.fallbacks.items()
        assert "dynamic context parallelism" in reason
        assert count == PER_BATCH


def test_a_failure_is_raised_by_the_next_forward_whatever_its_kind(four):
    results = four.run(on_megatron, 4, "megatron_programs", "failures_of_another_kind")
    assert results == [[]] * 4


@pytest.mark.skipif(MAIN, reason="main's inference runs no MTP, and needs its own engine")
def test_inference_is_left_to_megatron(four):
    for outcome in compare(four, Case(is_eval=True), "for_inference"):
        assert (outcome.exchanges, outcome.answered) == (0, 0)
        assert set(outcome.fallbacks) == {"inference"}


@pytest.mark.parametrize("documents", [0, 3])
def test_the_callers_tensors_stay_as_they_are(four, documents):
    four.check(on_megatron, 4, "megatron_programs", "callers_tensors_change", Case(documents=documents))


def test_uninstalling_between_microbatches_keeps_results_and_counts(four):
    case = Case(documents=3, microbatches=4)
    for wrong, counts in four.run(
        on_megatron, 4, "megatron_programs", "uninstall_between_microbatches", case
    ):
        assert wrong == []
        assert counts == [PER_BATCH] * 4  # install counts from 0, uninstall keeps the counts


def test_uninstalling_within_a_forward_keeps_results(four):
    four.check(on_megatron, 4, "megatron_programs", "uninstall_within_a_forward", Case(documents=3))


# Documents that are padded, a tail, and other layouts: the reference says what is right.

UNIT = 8  # what a document's padded length is a multiple of on four ranks
BOUNDS, VALID = [0, 4 * UNIT, 10 * UNIT, 18 * UNIT], [4 * UNIT - 3, 6 * UNIT - 2, 8 * UNIT - 1]
TOKENS = 18 * UNIT // 4  # of a rank


def rolls(four: RankPool, *arguments: Any) -> list[dict[str, Any]]:
    return four.run(on_megatron, 4, "megatron_programs", "rolls_of_documents", *arguments)


def assert_exact(found: list[dict[str, Any]]) -> None:
    for one in found:
        assert one["wrong"] == []
        assert (one["answered"], one["fallbacks"]) == (PER_BATCH, {})


ANY_LENGTH = [0, 5, 11, 11, 100, 18 * UNIT]
DOCUMENTS = {
    "padded": (TOKENS, BOUNDS, VALID, "zigzag"),
    "padded, of fewer tokens than a chunk for each rank": (UNIT, [0, UNIT, 4 * UNIT], [1, UNIT], "zigzag"),
    "nothing but padding in one": (TOKENS, BOUNDS, [4 * UNIT, 0, 1], "zigzag"),
    "the last bound again and again": (TOKENS, [*BOUNDS, BOUNDS[-1], BOUNDS[-1]], None, "zigzag"),
    "padded, the last bound again": (TOKENS, [*BOUNDS, BOUNDS[-1]], [*VALID, 0], "zigzag"),
    "a tail": (TOKENS + 5, BOUNDS, None, "zigzag"),
    "padded, a tail": (TOKENS + 5, BOUNDS, VALID, "zigzag"),
    "the whole stream in zigzag": (TOKENS, ANY_LENGTH, None, "zigzag_stream"),
    "the whole stream in zigzag, padded": (TOKENS, ANY_LENGTH, [3, 6, 0, 80, 44], "zigzag_stream"),
    "the whole stream in zigzag, a tail": (TOKENS + 4, ANY_LENGTH, None, "zigzag_stream"),
    "contiguous": (TOKENS, ANY_LENGTH, None, "contiguous"),
    "contiguous, padded": (TOKENS, ANY_LENGTH, [3, 6, 0, 80, 44], "contiguous"),
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_are_rolled_exactly(four, name):
    tokens, bounds, valid, layout = DOCUMENTS[name]
    assert_exact(rolls(four, Case(tokens=tokens), bounds, valid, {"layout": layout}, layout))


@pytest.mark.parametrize("layout", ["zigzag_stream", "contiguous"])
def test_dense_batches_of_other_layouts_are_rolled_exactly(four, layout):
    assert_exact(rolls(four, Case(), [0, 64], None, {"layout": layout}, layout))


def test_padding_of_megatron_gives_its_bits_even_if_they_are_wrong(four):
    arguments = (Case(tokens=TOKENS), BOUNDS, VALID)
    own, ours = rolls(four, *arguments, None), rolls(four, *arguments, {"padding": "megatron"})
    assert any(one["wrong"] for one in own)  # Megatron-LM is wrong here
    for mine, theirs in zip(ours, own, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine["rolled"], theirs["rolled"], strict=True))
        assert mine["answered"] == 0
        [(reason, count)] = mine["fallbacks"].items()
        assert "padding='megatron'" in reason
        assert count == PER_BATCH


# Main rolls more.

DERIVED = 2 * DEPTHS + 2 * (DEPTHS + 1)  # rolls without labels: ids and mask once more
ONLY_MAIN = {
    "labels derived": (Case(has_labels=False), DERIVED),
    "labels derived, packed": (Case(has_labels=False, documents=4), DERIVED),
    "labels derived, no loss mask": (Case(has_labels=False, has_loss_mask=False), DERIVED),
    "padding mask": (Case(has_padding_mask=True), 5 * DEPTHS),
    "detached heads": (Case(Model(options=(("mtp_detach_heads", True),))), PER_BATCH),
    "repeated layer": (Case(Model(options=(("mtp_use_repeated_layer", True),))), PER_BATCH),
    "packed, full recompute": (Case(Model(options=FULL_RECOMPUTE), documents=4), PER_BATCH),
    "HybridModel": (Case(Model(hybrid=True)), PER_BATCH),
    "HybridModel, packed": (Case(Model(hybrid=True), documents=4), PER_BATCH),
    "HybridModel, sequence parallel, labels derived": (
        Case(Model(cp=2, tp=2, sequence_parallel=True, hybrid=True), has_labels=False),
        DERIVED,
    ),
}


@needs_main
@pytest.mark.parametrize("name", ONLY_MAIN)
def test_an_exchange_answers_every_roll_of_main(four, name):
    case, per_batch = ONLY_MAIN[name]
    assert_answered(compare(four, case), exchanges=2, rolls=2 * per_batch)


@needs_main
@pytest.mark.parametrize("documents", [0, 4])
def test_hidden_states_that_are_mixed_are_left_to_megatron(four, documents):
    for outcome in compare(four, Case(Model(options=(("mtp_hsm", True),)), documents=documents)):
        assert outcome.answered == 2 * PER_BATCH
        assert set(outcome.fallbacks) <= {"a tensor that needs a gradient"}
