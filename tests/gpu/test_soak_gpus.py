"""A short soak on GPUs."""

from __future__ import annotations

import pytest
import torch

from rank_pool import RankPool
from soak_bodies import wrong_words

pytestmark = pytest.mark.multi_gpu


@pytest.mark.parametrize("transport", ["process_group", "symmetric"])
@pytest.mark.parametrize("carries", ["tokens", "activations"])
def test_nothing_is_wrong(gpu_pool: RankPool, carries, transport):
    size = gpu_pool.world_size
    if transport == "symmetric" and torch.cuda.device_count() < size:
        pytest.skip("ranks share a GPU")
    assert gpu_pool.run(wrong_words, size, carries, transport, 200) == [0] * size
