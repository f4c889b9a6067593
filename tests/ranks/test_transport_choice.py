"""Ranks choose a transport together: if one of them cannot share its memory, none does."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from overlap_mtp.exchange import cuda, select
from overlap_mtp.exchange.group import exchange_group_of

from rank_pool import RankPool


def choose(group: dist.ProcessGroup, failing: str, asked: tuple[str, ...]) -> list[object]:
    """What a rank gets for each way to ask, if a step fails on the last rank; and how often it has tried."""
    made_on = exchange_group_of(dist.new_group(list(range(group.size()))))
    tried: list[str] = []

    def step(name: str, result: str) -> str:
        tried.append(name)
        if name == failing and made_on.cp_rank == group.size() - 1:
            raise MemoryError("no room")
        return result

    found: list[object] = []
    for one in asked:
        config: Any = SimpleNamespace(group=made_on, spec=SimpleNamespace(transport=one))
        try:
            with mock.patch.object(cuda, "free_orphans"):
                found.append(
                    select._make_symmetric(
                        config,
                        "activations",
                        lambda: partial(step, "make", f"transport with {step('allocate', 'memory')}"),
                    )
                )
        except ValueError as error:
            found.append(str(error))
    return [*found, len(tried), sorted(made_on.why_not_symmetric)]


@pytest.mark.parametrize(("failing", "steps"), [("allocate", 1), ("make", 2)])
def test_none_shares_memory_if_one_rank_cannot(ranks: RankPool, failing, steps):
    found = ranks.run(choose, 3, failing, ("auto", "auto", "symmetric"))
    refusal = "transport symmetric does not work here: cp rank 2: MemoryError: no room"
    assert found == [[None, None, refusal, steps, ["activations"]]] * 3  # the first answer counts


def test_all_share_memory_if_all_can(ranks: RankPool):
    found = ranks.run(choose, 3, "nothing", ("auto", "symmetric"))
    assert found == [["transport with memory", "transport with memory", 4, ["activations"]]] * 3
