"""Which rank gets which GPU."""

from __future__ import annotations

import os

import pytest
import torch

from harness import launch


@pytest.fixture(autouse=True)
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NCCL_HOSTID"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("ranks", [-1, 3])
def test_ranks_have_a_gpu_each(ranks):
    with pytest.raises(ValueError, match=rf"ranks must be in \[1, 2\] on this machine's GPUs, got {ranks}"):
        launch.run_on_ranks(pytest.fail, ranks, "cuda")


@pytest.mark.parametrize(("name", "value"), [("LOCAL_WORLD_SIZE", "3"), ("LOCAL_RANK", "2")])
def test_under_torchrun_too(monkeypatch, name, value):
    """Or under another launcher, which says less."""
    monkeypatch.setenv("RANK", "6")
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"ranks must be in \[1, 2\] on this machine's GPUs, got 3"):
        launch.run_on_ranks(pytest.fail, None, "cuda")


def test_ranks_that_share_a_gpu_are_on_different_hosts_to_nccl(monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    seen = []
    for local_rank in range(6):
        monkeypatch.setenv("NCCL_HOSTID", "this host")
        seen.append((launch.take_gpu(local_rank).index, os.environ["NCCL_HOSTID"]))
    assert [index for index, _ in seen] == [0, 1, 0, 1, 0, 1]
    assert len(set(seen)) == 6  # no GPU twice on a host
    assert seen[0][1] == seen[1][1] == "this host"
