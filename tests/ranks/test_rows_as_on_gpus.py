"""Rolls of activations by the transports of GPUs: their maps, kernels, buffers and messages, on CPU ranks."""

from __future__ import annotations

import activation_losses
import pytest
import torch
import torch.distributed as dist

from overlap_mtp import SequenceLayout
from overlap_mtp.exchange.group import Traffic
from overlap_mtp.schedules.activations import ACTIVATION_SCHEDULES, make_activation_roller

import activation_faults
from activation_strays import OF_ONE_SIZE, assert_tp_ranks_heard, differ_among_tp_ranks
from activations import bits_differ, rows_differ, shared_rows_differ, wrong_rows
from exact_activations import SEQ_DIM, Activations
from pretended_gpus import on_pretended_gpus
from rank_bodies import LAYOUTS
from rank_pool import RankPool
from strategies import KINDS

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs them on GPUs")


OVER = [pytest.param(False, id="process_group"), pytest.param(True, id="symmetric")]


@pytest.mark.parametrize("is_symmetric", OVER)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("documents", LAYOUTS)
def test_every_row_and_its_gradient_are_those_of_the_definition(
    ranks: RankPool, documents, kind, is_symmetric
):
    forms = list(SEQ_DIM)
    for n, (size, num_depths) in enumerate(((2, 2), (4, 3))):
        layout = LAYOUTS[documents](16 * size, size, kind)
        how = layout, num_depths, forms[(n + len(documents)) % len(forms)], "ab", torch.float64, n, False
        schedules = ("overlap",) if is_symmetric else ACTIVATION_SCHEDULES
        ranks.check(on_pretended_gpus, size, is_symmetric, rows_differ, *how, schedules)


@pytest.mark.parametrize("is_symmetric", OVER)
def test_schedules_and_runs_give_the_same_bits(ranks: RankPool, is_symmetric):
    layout = LAYOUTS["packed"](32, 2, "zigzag")
    ranks.check(on_pretended_gpus, 2, is_symmetric, bits_differ, layout, torch.float32)


def test_rows_that_tp_ranks_share_are_those_of_the_definition(ranks: RankPool):
    ranks.check(on_pretended_gpus, 4, False, shared_rows_differ, [(2, 2)])


def test_tp_ranks_that_differ_are_an_error_on_all_ranks(ranks: RankPool):
    found = ranks.run(on_pretended_gpus, 4, False, differ_among_tp_ranks, OF_ONE_SIZE)
    assert_tp_ranks_heard(found)


@pytest.mark.parametrize(
    ("body", "is_symmetric"),
    [
        (activation_losses.wrong_after_passes, True),
        (activation_faults.recompute, False),
        (activation_faults.roll_among_others, True),
    ],
)
def test_buffers_are_used_again_after_any_pass_of_autograd(ranks: RankPool, body, is_symmetric):
    ranks.check(on_pretended_gpus, 2, is_symmetric, body)


@pytest.mark.parametrize("is_symmetric", OVER)
def test_buffers_are_used_again_after_unfinished_steps(ranks: RankPool, is_symmetric):
    ranks.check(on_pretended_gpus, 2, is_symmetric, activation_faults.leaks, ("overlap",), 3)


def traffic_of(group: dist.ProcessGroup, layout: SequenceLayout) -> list[Traffic]:
    """What each schedule sends, forward and backward."""
    counted = []
    for schedule in ACTIVATION_SCHEDULES:
        roller = make_activation_roller(schedule, group, 2, layout.num_documents)
        assert wrong_rows(Activations.of(group, layout, 2), roller) == []
        counted.append(roller.traffic)
        roller.close()
    return counted


@pytest.mark.parametrize("is_symmetric", OVER)
def test_as_much_is_sent_as_between_cpu_ranks(ranks: RankPool, is_symmetric):
    layout = LAYOUTS["padded"](48, 3, "zigzag")
    found = ranks.run(on_pretended_gpus, 3, is_symmetric, traffic_of, layout)
    assert found == ranks.run(traffic_of, 3, layout)


@pytest.mark.parametrize("skipped", ["forward", "backward"])
def test_a_late_peer_over_symmetric_memory_is_named(ranks: RankPool, skipped):
    said, nothing = ranks.run(on_pretended_gpus, 2, True, activation_faults.said_of_a_late_peer, skipped)
    assert nothing == ""
    assert "cp rank 0 of 2 gave up waiting for the activations of cp rank 1" in said
    assert said.endswith("; it was a backward, which every rank must run") == (skipped == "backward")
