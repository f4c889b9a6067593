"""Checkpoints of GPU ranks load at other sizes."""

from __future__ import annotations

import pytest

from tiny_runs import assert_loads_at


@pytest.mark.multi_gpu
def test_loads_at_other_sizes_on_gpus(gpu_pool, tmp_path):
    count = gpu_pool.world_size
    assert_loads_at(gpu_pool, [(count, 1), (1, count), (1, 1)], (1, count), tmp_path)
