"""Rolls of activations and their gradients on gloo ranks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from activations import activations_differ, rows_differ, shared_rows_differ
from exact_activations import SEQ_DIM
from rank_bodies import LAYOUTS
from rank_pool import RankPool
from strategies import KINDS, layouts


@settings(max_examples=40)
@given(
    layout=layouts(cp_sizes=(2, 3, 4, 8)),
    num_depths=st.integers(1, 5),
    names=st.sampled_from(["a", "ab"]),
    hidden=st.integers(1, 9),
    seq_dim=st.integers(0, 1),
    seed=st.integers(0, 999),
)
def test_rolls_and_gradients_are_exact_on_any_layout(
    pool: RankPool, layout, num_depths, names, hidden, seq_dim, seed
):
    pool.check(
        activations_differ, layout.cp_size, layout, num_depths, names, hidden, torch.float64, seq_dim, seed
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("documents", LAYOUTS)
@pytest.mark.parametrize("cp_size", [2, 4])
def test_rolls_and_gradients_are_exact(pool: RankPool, cp_size, documents, kind, dtype):
    layout = LAYOUTS[documents](16 * cp_size, cp_size, kind)
    pool.check(activations_differ, cp_size, layout, 2, "a", 4, dtype)


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


GRIDS = [(2, 1), (2, 2), (2, 4), (4, 1), (4, 2)]


def test_rows_that_tp_ranks_share_are_those_of_the_definition(pool: RankPool):
    pool.check(shared_rows_differ, 8, GRIDS)
