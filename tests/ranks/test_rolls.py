"""Every schedule against the reference, bit for bit, on 1, 2, 3, 4 and 8 ranks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from overlap_mtp import SCHEDULES, SequenceLayout, make_roller, roll_tensor

from cases import Microbatch
from rank_bodies import (
    LAYOUTS,
    mixed_rolls_differ,
    packed_roll_tensor_differs,
    roll_tensor_differs,
    rolls_differ,
    rolls_differ_in_a_default_group,
)
from rank_pool import RankPool
from strategies import KINDS, dtype_choices, layouts, random_batch


@settings(max_examples=60)
@given(
    layout=layouts(cp_sizes=(2, 3, 4, 8)),
    num_depths=st.integers(1, 5),
    rows=st.integers(1, 2),
    dtypes=dtype_choices,
    seed=st.integers(0, 999),
)
def test_rolls_are_exact_on_any_layout(pool: RankPool, layout, num_depths, rows, dtypes, seed):
    pool.check(rolls_differ, layout.cp_size, layout, num_depths, rows, dtypes, seed)


@pytest.mark.parametrize("num_depths", [1, 2, 9])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("documents", LAYOUTS)
@pytest.mark.parametrize("cp_size", [2, 3, 4, 8])
def test_rolls_are_exact(pool: RankPool, cp_size, documents, kind, num_depths):
    pool.check(rolls_differ, cp_size, LAYOUTS[documents](16 * cp_size, cp_size, kind), num_depths)


@settings(max_examples=20)
@given(layout=layouts(cp_sizes=(1, 2, 3)), on_device=st.booleans())
def test_tensors_of_other_shapes_depths_and_fills_travel_together(pool: RankPool, layout, on_device):
    """On CPU ranks, bounds "on the device" are read on the host."""
    on_device = on_device and layout.is_packed
    if layout.cp_size == 1:
        assert mixed_rolls_differ(None, layout, on_device=on_device) == []
    else:
        pool.check(mixed_rolls_differ, layout.cp_size, layout, "auto", on_device)


def test_rolls_are_exact_in_a_device_mesh():
    with RankPool(2) as pool:
        pool.check(rolls_differ_in_a_default_group, 2)


@settings(max_examples=40)
@given(layout=layouts(cp_sizes=(1,)), num_depths=st.integers(1, 9), dtypes=dtype_choices)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_rank_needs_no_group(schedule, layout, num_depths, dtypes):
    batch = Microbatch(None, layout, random_batch(layout, dtypes=dtypes))
    assert batch.wrong(batch.start(make_roller(schedule, None, num_depths)), num_depths) == []


@pytest.mark.parametrize("cp_size", [2, 3, 4])
@pytest.mark.parametrize(("dims", "shifts"), [(-1, -1), (0, -1), (1, -2), (-1, -5)])
def test_roll_tensor_keeps_the_contract(pool: RankPool, cp_size, dims, shifts):
    pool.check(roll_tensor_differs, cp_size, dims, shifts)


@settings(max_examples=20)
@given(
    layout=layouts(cp_sizes=(1, 2, 3), kinds=("zigzag",), has_dense=False)
    | layouts(cp_sizes=(1,), kinds=("contiguous",), has_dense=False),
    shifts=st.integers(-3, -1),
)
def test_roll_tensor_takes_documents(pool: RankPool, layout, shifts):
    if layout.cp_size == 1:
        assert packed_roll_tensor_differs(None, layout, shifts) == []
    else:
        pool.check(packed_roll_tensor_differs, layout.cp_size, layout, shifts)


def test_roll_tensor_takes_a_tail_that_makes_the_length_odd(pool: RankPool):
    pool.check(packed_roll_tensor_differs, 2, SequenceLayout.packed([0, 4, 8], 2, seq_len=10), -1)


def test_roll_tensor_of_nothing_is_nothing():
    assert roll_tensor(None) == (None, None)
    assert roll_tensor(torch.arange(3), return_sum=False)[1] is None


def test_roll_tensor_on_one_rank_carries_no_gradients():
    rolled, total = roll_tensor(torch.arange(1.0, 6, requires_grad=True), shifts=-2)
    assert rolled.tolist() == [3, 4, 5, 0, 0]
    assert total.item() == 12
    assert not rolled.requires_grad
