"""Ranks that were started with other settings or other data stop at the start and name what differs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from overlap_mtp.training.same_settings import SettingsDifferError, check_same_on_all_ranks
from training.run import train_on_rank
from training.settings import RunSettings

from rank_pool import RankPool
from training_runs import NoWatchdog


def error_of_odd_rank(group: dist.ProcessGroup, common: RunSettings, changes: dict) -> str:
    settings = replace(common, **changes) if group.rank() == 2 else common
    try:
        check_same_on_all_ranks(settings.shared(settings.corpus()), group)
    except SettingsDifferError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ""),
        ({"seed": 1}, "seed is 0 on rank 0, 1 on rank 2"),
        ({"learning_rate": 0.1}, "learning_rate is 0.001 on rank 0, 0.1 on rank 2"),
        ({"cp": 2, "dp": 2}, "dp is 1 on rank 0, 2 on rank 2; cp is None on rank 0, 2 on rank 2"),
        ({"normalisation": "batch"}, "normalisation is token on rank 0, batch on rank 2"),
        ({"accumulate": 2, "experts": 4}, "experts is 0 on rank 0, 4 on rank 2"),
        ({"data": "stale"}, "data is 3 documents, 27 tokens, CRC-32 "),
        ({"data": "copy"}, ""),
    ],
)
def test_all_ranks_name_the_setting_and_both_values(ranks: RankPool, tmp_path, changes, words):
    for folder, letter in (("data", "a"), ("copy", "a"), ("stale", "b")):
        (tmp_path / folder).mkdir()
        for number in range(3):
            (tmp_path / folder / f"{number}.txt").write_text(9 * letter)
    changes = {name: tmp_path / value if name == "data" else value for name, value in changes.items()}
    common = RunSettings(data=Path(tmp_path / "data"))
    errors = ranks.run(error_of_odd_rank, 4, common, changes)
    assert len(set(errors)) == 1
    assert words in errors[0]
    assert bool(errors[0]) == bool(words)


def error_of_training(group: dist.ProcessGroup, common: RunSettings) -> str:
    settings = replace(common, seed=7) if group.rank() == 2 else common
    try:
        train_on_rank(torch.device("cpu"), settings, NoWatchdog())
    except SettingsDifferError as error:
        return str(error)
    return ""


def test_a_run_compares_settings_before_its_first_step(ranks: RankPool, tmp_path):
    (tmp_path / "data.txt").write_text(999 * "a")
    common = RunSettings(
        tmp_path / "run", data=tmp_path / "data.txt", device="cpu", cp=4, documents=0, steps=1
    )
    for error in ranks.run(error_of_training, 4, common):
        assert "seed is 0 on rank 0, 7 on rank 2" in error
    assert not (tmp_path / "run").exists()
