"""A soak finds what is wrong."""

from __future__ import annotations

import pytest

from rank_pool import RankPool
from soak_bodies import wrong_words, wrong_words_with


@pytest.mark.parametrize("carries", ["tokens", "activations"])
def test_nothing_is_wrong(ranks: RankPool, carries):
    assert ranks.run(wrong_words, 3, carries, "process_group", 60) == [0, 0, 0]


def test_wrong_exchanges_of_activations_are_found(ranks: RankPool):
    names = ["two received rows are swapped", "another row is sent", "two gradients are sent for each other"]
    for found in ranks.run(wrong_words_with, 2, names):
        assert all(found), dict(zip(names, found, strict=True))
