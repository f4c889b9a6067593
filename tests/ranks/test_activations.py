"""Rolls of activations and their gradients on gloo ranks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from overlap_mtp import SequenceLayout
from overlap_mtp.schedules.activations import ACTIVATION_SCHEDULES

from activation_mutants import LOSING, MUTANTS, wrong_with
from activations import (
    bits_differ,
    count_traffic,
    gradients_under_a_hook,
    rows_differ,
    shared_bits_differ,
    shared_rows_differ,
    sums_over_tp_differ,
    wrong_if_compiled,
    wrong_under_a_default_device,
)
from exact_activations import SEQ_DIM
from pretended_gpus import on_pretended_gpus
from rank_pool import RankPool
from strategies import layouts


@settings(max_examples=40)
@given(
    layout=layouts(cp_sizes=(1, 2, 3, 4, 8)),
    num_depths=st.integers(1, 5),
    form=st.sampled_from(list(SEQ_DIM)),
    names=st.sampled_from(["a", "ab", "abc"]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 999),
    on_device=st.booleans(),
)
def test_every_row_and_its_gradient_are_those_of_the_definition(
    pool: RankPool, layout, num_depths, form, names, dtype, seed, on_device
):
    how = layout, num_depths, form, names, dtype, seed, on_device and layout.is_packed
    if layout.cp_size == 1:
        assert rows_differ(None, *how) == []
    else:
        pool.check(rows_differ, layout.cp_size, *how)


@pytest.mark.parametrize("is_symmetric", [None, True])
def test_the_default_device_does_not_matter(ranks: RankPool, is_symmetric):
    ranks.check(on_pretended_gpus, 2, is_symmetric, wrong_under_a_default_device)


def test_rolls_between_compiled_layers_are_those_between_eager_ones(ranks: RankPool):
    ranks.check(wrong_if_compiled, 2)


def test_hooks_that_are_older_than_the_rolls_see_what_peers_add(ranks: RankPool):
    first, second = ranks.run(gradients_under_a_hook, 2)
    assert first == [[0.5, 1.0, 1.0, 1.0]] * 2
    assert second == [[1.0, 0.5, 0.5, 0.5]] * 2


GRIDS = [(2, 1), (2, 2), (2, 4), (4, 1), (4, 2)]


def test_rows_that_tp_ranks_share_are_those_of_the_definition(pool: RankPool):
    pool.check(shared_rows_differ, 8, GRIDS)


def test_wrong_exchanges_are_found_row_by_row(ranks: RankPool):
    """Each is wrong in one row. Every schedule finds it, and names rows that cross ranks if these are wrong."""
    layout = SequenceLayout.packed([0, 24, 72, 96], 3, valid_lengths=[24, 41, 24])
    by_rank = ranks.run(wrong_with, 3, layout)
    found = {name: [one for wrong in by_rank for one in wrong[name]] for name in by_rank[0]}
    assert found.pop("nothing") == []
    for name, (_, where) in MUTANTS.items():
        for schedule in ACTIVATION_SCHEDULES:
            mine = [one for one in found[name] if one.startswith(schedule)]
            assert any(where in one for one in mine), (name, schedule, mine)
        is_of_values = "returns" not in where and not any("gradient" in word for word in (name, where))
        assert is_of_values == any("at depth" in one for one in found[name]), (name, found[name])
    for schedule in LOSING:
        for where in ("arrives", "returns"):
            assert any(where in one for one in found[schedule]), (schedule, found[schedule])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_all_schedules_and_repeated_runs_give_the_same_bits(pool: RankPool, dtype):
    padded = SequenceLayout.packed([0, 16, 24, 48, 64], 4, valid_lengths=[16, 5, 23, 9])
    for layout in (padded, SequenceLayout.dense(32, 4, "contiguous"), SequenceLayout.dense(8, 4)):
        pool.check(bits_differ, 4, layout, dtype)
    pool.check(shared_bits_differ, 8, dtype)
    pool.check(sums_over_tp_differ, 8, dtype, 4)


NEIGHBOURS = {"zigzag": [1, 2, 2, 1], "contiguous": [0, 1, 1, 1]}  # that 4 cp ranks send to in forward


@pytest.mark.parametrize("kind", NEIGHBOURS)
def test_messages_and_their_bytes(ranks: RankPool, kind):
    """Dense, with chunks longer than num_depths. In a zigzag each rank has two neighbours, or one at an end, and they
    share one boundary for each of its chunks; the last rank also follows itself."""
    num_depths, names, widths = 3, "ab", [3, 5]
    layout = SequenceLayout.dense(32, 4, kind)
    row_bytes = [2 * 4 * width for width in widths]  # two rows of the batch, float32
    whole_row = 16 * -(-sum(row_bytes) // 16)
    forward = NEIGHBOURS[kind]
    backward = forward if kind == "zigzag" else [1, 1, 1, 0]
    for schedule in ("sync", "merged", "overlap", "none"):
        for rank, counts in enumerate(ranks.run(count_traffic, 4, schedule, layout, num_depths, names)):
            for neighbours, count in zip((forward[rank], backward[rank]), counts, strict=True):
                rows = num_depths * neighbours  # that leave
                expected = {
                    "sync": (len(names) * rows, sum(row_bytes) * rows),
                    "merged": (rows, whole_row * (rows + rows)),  # each with a header
                    "overlap": (neighbours, whole_row * (rows + neighbours)),
                    "none": (0, 0),
                }
                assert count == expected[schedule], (schedule, rank)


def test_documents_multiply_the_messages_of_sync_alone(ranks: RankPool):
    num_depths, names = 2, "ab"
    for documents in (1, 3):
        layout = SequenceLayout.packed([32 * n for n in range(documents + 1)], 2)
        found = {
            one: ranks.run(count_traffic, 2, one, layout, num_depths, names) for one in ACTIVATION_SCHEDULES
        }
        messages = {
            name: [[count[0] for count in counts] for counts in all_ranks]
            for name, all_ranks in found.items()
        }
        assert messages["sync"] == [[len(names) * num_depths * documents] * 2] * 2
        assert messages["merged"] == [[num_depths] * 2] * 2
        assert messages["overlap"] == [[1] * 2] * 2
