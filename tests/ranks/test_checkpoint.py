"""Checkpoints: at other sizes, bit-equal at the same, the last few kept, and saves that fail."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
import torch.distributed as dist

from overlap_mtp.training.checkpoint import Checkpoints

from rank_pool import device_of
from tiny_runs import BATCH, IDENTITY, Run, assert_all_say, assert_same, error_in, kept, of_sizes, on_ranks


def save_after_three(group, sizes, folder):
    run = Run(sizes, "cpu" if group is None else device_of(group).type)
    run.train(3)
    run.evaluate()
    run.save(of_sizes(folder, sizes))
    return run.state(), run.train(3)


def load_and_go_on(group, sizes, folder):
    run = Run(sizes, "cpu" if group is None else device_of(group).type, seed=1)
    run.train(1)  # what is there must go
    run.evaluate()
    torch.rand(7)
    random_state = torch.get_rng_state()
    progress = run.load(of_sizes(folder, sizes))
    left_alone = torch.equal(random_state, torch.get_rng_state())
    return progress, run.state(), run.train(3), left_alone


def assert_loads_at(pool, all_sizes, saved_at, folder):
    expected, losses = on_ranks(pool, save_after_three, saved_at, folder)[0]
    for sizes in all_sizes:
        for progress, state, found, left_alone in on_ranks(pool, load_and_go_on, sizes, folder):
            assert progress == {"step": 3, "samples": 3 * BATCH}
            assert_same(state, expected)
            assert found == pytest.approx(losses, rel=1e-6)
            assert left_alone == (sizes != saved_at), "random generators, at other sizes alone"


@pytest.mark.parametrize("saved_at", [(2, 2), (1, 4), (1, 1)])
def test_loads_at_other_sizes(ranks, tmp_path, saved_at):
    assert_loads_at(ranks, [(2, 2), (4, 1), (1, 4), (1, 1)], saved_at, tmp_path)


@pytest.mark.multi_gpu
def test_loads_at_other_sizes_on_gpus(gpu_pool, tmp_path):
    count = gpu_pool.world_size
    assert_loads_at(gpu_pool, [(count, 1), (1, count), (1, 1)], (1, count), tmp_path)


def straight(_group, sizes, steps):
    run = Run(sizes, dropout=0.2)
    return run.train(steps), run.state(), torch.get_rng_state().numpy()


def with_saves(_group, sizes, folder, steps):
    """Step 0 too, where the optimizer has no state."""
    run, checkpoints = Run(sizes, dropout=0.2), of_sizes(folder, sizes)
    run.save(checkpoints)
    losses = run.train(steps)
    run.save(checkpoints)
    return losses


def resumed(_group, sizes, folder, steps, step):
    run, checkpoints = Run(sizes, seed=1, dropout=0.2), of_sizes(folder, sizes)
    run.train(1)
    torch.rand(7)
    assert run.load(checkpoints, folder / f"step-{step:08d}")["step"] == step
    return run.train(steps), run.state(), torch.get_rng_state().numpy()


@pytest.mark.parametrize("sizes", [(2, 2), (1, 1)])
def test_goes_on_bit_equal_at_the_same_sizes(ranks, tmp_path, sizes):
    expected = on_ranks(ranks, straight, sizes, 6)
    before = on_ranks(ranks, with_saves, sizes, tmp_path, 3)
    for step in (0, 3):
        for rank, found in enumerate(on_ranks(ranks, resumed, sizes, tmp_path, 6 - step, step)):
            assert before[rank][:step] + found[0] == expected[rank][0]
            assert_same(found[1], expected[rank][1])
            np.testing.assert_array_equal(found[2], expected[rank][2])


def load_none(group, folder):
    run = Run((1, 1))
    return error_in(lambda: run.load(Checkpoints(folder, group=group)), run)


def test_a_folder_without_checkpoints_is_told_apart(ranks, tmp_path):
    (tmp_path / ".step-00000001.tmp").mkdir()
    for folder in (tmp_path, tmp_path / "missing"):
        errors = ranks.run(load_none, 2, folder)
        assert_all_say(errors, [str(folder), "no checkpoint"])
        assert errors[0][0] == "NoCheckpointError"
        assert Checkpoints(folder).latest() is None
    assert kept(tmp_path) == [".step-00000001.tmp"]


def failing_saves(group, folder):
    run, checkpoints = Run((1, 1)), Checkpoints(folder, group=group)
    run.train(2)
    run.save(checkpoints)
    own = kept(folder)
    refused = [error_in(lambda: checkpoints.save(9, *run.parts(), {"x": object()}, IDENTITY), run)]
    refused += [error_in(lambda: checkpoints.save(1, *run.parts(), {}, IDENTITY), run)]
    dist.barrier(group)
    assert kept(folder) == own
    run.optimizer.param_groups[0]["odd"] = Run
    refused += [error_in(lambda: checkpoints.save(9, *run.parts(), {}, IDENTITY), run)]
    del run.optimizer.param_groups[0]["odd"]
    rename = os.rename
    try:
        os.rename = no_rename
        refused += [error_in(lambda: checkpoints.save(9, *run.parts(), {}, IDENTITY), run)]
    finally:
        os.rename = rename
    assert checkpoints.latest() == folder / "step-00000002"
    dist.barrier(group)
    run.train(1)
    run.save(checkpoints)
    return refused


def no_rename(*_args):
    raise OSError("disk is full")


def test_failing_saves_are_told_on_all_ranks_and_leave_the_rest(ranks, tmp_path):
    by_rank = ranks.run(failing_saves, 2, tmp_path)
    words = ["not JSON serializable", "step-00000002 is there: a run taken back", "Run", "disk is full"]
    for errors, word in zip(zip(*by_rank, strict=True), words, strict=True):
        assert_all_say(errors, [word, str(tmp_path)])
    assert kept(tmp_path) == ["step-00000002", "step-00000003"]


def test_the_last_few_are_kept(tmp_path):
    run, checkpoints = Run((1, 1)), Checkpoints(tmp_path, keep=2)
    for step in range(1, 5):
        run.train(1)
        assert run.save(checkpoints) == checkpoints.latest() == tmp_path / f"step-{step:08d}"
        assert kept(tmp_path) == [f"step-{one:08d}" for one in range(max(1, step - 1), step + 1)]
    with pytest.raises(ValueError, match="keep must be >= 1, got 0"):
        Checkpoints(tmp_path, keep=0)


def test_saving_a_step_again_always_leaves_one(tmp_path, monkeypatch):
    run, checkpoints = Run((1, 1)), Checkpoints(tmp_path, keep=1)
    run.train(1)
    run.save(checkpoints)
    rename, seen = os.rename, []

    def watched(*args):
        seen.append(checkpoints.latest())
        rename(*args)
        seen.append(checkpoints.latest())

    monkeypatch.setattr(os, "rename", watched)
    for again in (2, 3):
        run.train(1)
        run.step = 1
        assert run.save(checkpoints) == tmp_path / f"step-00000001-{again}"
        assert kept(tmp_path) == [f"step-00000001-{again}"]
        other = Run((1, 1), seed=1)
        other.load(checkpoints)
        assert_same(other.state(), run.state())
    assert None not in seen
    assert len(seen) >= 8


def test_state_of_a_compiled_model_loads_into_a_plain_one(tmp_path):
    run, plain = Run((1, 1)), Run((1, 1), seed=1)
    run.train(2)
    run.model.up = torch.compile(run.model.up)  # which puts a wrapper's name between
    assert any("_orig_mod" in name for name, _ in run.model.named_parameters())
    run.save(Checkpoints(tmp_path))
    plain.load(Checkpoints(tmp_path))
    for (_, found), (_, expected) in zip(
        plain.model.named_parameters(), run.model.named_parameters(), strict=True
    ):
        assert torch.equal(found, expected)
