"""Rolls of activations and their gradients on gloo ranks."""

from __future__ import annotations

import pytest
import torch
from activations import activations_differ
from hypothesis import given, settings
from hypothesis import strategies as st

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
