"""Modes that a comparison refuses, and costs that it adds up."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from compare.comparison import Problem, Settings
from compare.steps import _sum
from overlap_mtp.model.config import PRESETS
from overlap_mtp.schedules.timed import Cost

TINY = PRESETS["tiny"].model
TOKENS = Problem(TINY, 256, 1, 4, forward_only=False)
ACTIVATIONS = Problem(replace(TINY, hidden_state_mixing=True), 256, 1, 4, forward_only=False)


@pytest.mark.parametrize(
    "mode", ["sync:process_group", "sync:symmetric", "prepared:symmetric", "none:process_group"]
)
def test_a_schedule_of_tokens_without_a_transport_cannot_name_one(mode):
    with pytest.raises(ValueError, match="has no transport"):
        Settings(modes=(mode, "prefetch")).check(TOKENS, on_gpu=True)
    Settings(modes=("prefetch:symmetric", "merged:process_group")).check(TOKENS, on_gpu=True)


def test_none_of_activations_cannot_name_a_transport():
    with pytest.raises(ValueError, match="has no transport"):
        Settings(modes=("none:process_group", "overlap")).check(ACTIVATIONS, on_gpu=True)
    Settings(modes=("overlap:symmetric", "none")).check(ACTIVATIONS, on_gpu=True)


def test_a_use_without_a_backward_leaves_the_stall_of_the_others():
    assert _sum([Cost(10, 5), Cost(0, None)]) == (10, 5)
    assert math.isnan(_sum([Cost(10, 5), Cost(3, None)])[1])
    assert math.isnan(_sum([Cost(0, None)])[1])
