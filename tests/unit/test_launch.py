"""Which rank gets which GPU."""

from __future__ import annotations

import os

import pytest
import torch

from harness import launch
from overlap_mtp.training.access import TOKEN


@pytest.fixture(autouse=True)
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NCCL_HOSTID"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("ranks", "environment", "here"),
    [
        (-1, {}, -1),
        (3, {}, 3),
        (None, {"RANK": "6", "LOCAL_WORLD_SIZE": "3"}, 3),
        (None, {"RANK": "6", "LOCAL_RANK": "2"}, 3),  # a launcher that sets less than torchrun
    ],
)
def test_each_rank_needs_a_gpu(monkeypatch, ranks, environment, here):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=rf"ranks must be in \[1, 2\] on this machine's GPUs, got {here}"):
        launch.run_on_ranks(pytest.fail, ranks, "cuda")


def test_ranks_that_share_a_gpu_are_on_different_hosts_to_nccl(monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    seen = []
    for local_rank in range(6):
        monkeypatch.setenv("NCCL_HOSTID", "this host")
        seen.append((launch.take_gpu(local_rank).index, os.environ["NCCL_HOSTID"]))
    assert [index for index, _ in seen] == [0, 1, 0, 1, 0, 1]
    assert len(set(seen)) == 6  # no GPU twice on a host
    assert seen[0][1] == seen[1][1] == "this host"


def test_each_run_has_a_token_of_its_own(monkeypatch):
    started = []
    monkeypatch.setattr(launch, "spawn", lambda _, arguments, **__: started.append(arguments[0]))
    monkeypatch.setattr(launch, "start_and_join", lambda start, _: start())
    for _ in range(2):
        launch.run_on_ranks(pytest.fail, 2, "cpu")
    first, second = (environment[TOKEN] for environment in started)
    assert first != second
    assert min(len(first), len(second)) >= 32


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, ""),
        ({"RANK": "abc"}, "the variable RANK must be a whole number, got 'abc'"),
        ({"RANK": "-1"}, "the variable RANK must be a whole number, got '-1'"),
        ({"WORLD_SIZE": "\u0664"}, "the variable WORLD_SIZE must be a whole number"),  # int() takes this 4
        ({"MASTER_PORT": ""}, "the variable MASTER_PORT must be a whole number, got ''"),
        ({"RANK": "2"}, "RANK must be below WORLD_SIZE = 2, got 2"),
        ({"MASTER_ADDR": None}, "RANK is set but MASTER_ADDR is not"),
    ],
)
def test_variables_of_a_launcher_make_sense_or_are_named(monkeypatch, change, words):
    good = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"}
    for name, value in {**good, **change}.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    if not words:
        launch.check_environment()
        return
    with pytest.raises(ValueError, match=words):
        launch.check_environment()
