"""Faults of ranks on NCCL, whose kernels spin for ever: no exception comes if a peer is gone."""

from __future__ import annotations

import pytest

from overlap_mtp.training.watchdog import EXIT_CODE

from watched_ranks import Scenario, run


@pytest.mark.multi_gpu
@pytest.mark.parametrize(
    ("fault", "others", "what"),
    [
        ("is killed", "reduce", 'rank 1 is gone: no heartbeat for 4 s, the last in "step 3"'),
        ("sleeps", "reduce", "rank 1 has not arrived after"),
        ("sleeps", "follow", "rank 1 has not arrived after"),
        ("raises", "reduce", "rank 1 failed in \"step 3\": ValueError('a batch of nonsense')"),
    ],
)
def test_on_nccl_too_the_rank_is_named(tmp_path, fault, others, what):
    status, said = run(Scenario(fault, 1, others, "nccl", world_size=2), tmp_path)[0]
    assert status == EXIT_CODE, said
    assert what in said
