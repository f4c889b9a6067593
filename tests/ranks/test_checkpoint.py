"""Checkpoints: at other sizes, bit-equal at the same sizes, the last few kept, and saves that fail."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
import torch.distributed as dist

from overlap_mtp.training.checkpoint import Checkpoints

from tiny_runs import IDENTITY, Run, assert_all_say, assert_loads_at, assert_same, kept, on_ranks


@pytest.mark.parametrize(
    ("saved_at", "loaded_at"),
    [
        ((2, 2), [(2, 2), (4, 1), (1, 4), (1, 1)]),
        ((1, 4), [(4, 1), (1, 1)]),
        ((1, 1), [(2, 2), (1, 1)]),
    ],
)
def test_loads_at_other_sizes(ranks, tmp_path, saved_at, loaded_at):
    assert_loads_at(ranks, loaded_at, saved_at, tmp_path)


def straight(group, sizes, steps):
    run = Run(sizes, group, dropout=0.2)
    return run.train(steps), run.state(), torch.get_rng_state().numpy()


def with_saves(group, sizes, folder, steps):
    """Step 0 is saved too, when the optimizer has no state."""
    run = Run(sizes, group, dropout=0.2)
    run.save(folder)
    losses = run.train(steps)
    run.save(folder)
    return losses


def resumed(group, sizes, folder, steps, step):
    run = Run(sizes, group, seed=1, dropout=0.2)
    run.train()
    torch.rand(7)
    assert run.load(folder, folder / f"step-{step:08d}")["step"] == step
    return run.train(steps), run.state(), torch.get_rng_state().numpy()


@pytest.mark.parametrize("sizes", [(2, 2), (1, 1)])
def test_continues_bit_equal_at_the_same_sizes(ranks, tmp_path, sizes):
    expected = on_ranks(ranks, straight, sizes, 6)
    before = on_ranks(ranks, with_saves, sizes, tmp_path, 3)
    for step in (0, 3):
        for rank, found in enumerate(on_ranks(ranks, resumed, sizes, tmp_path, 6 - step, step)):
            assert before[rank][:step] + found[0] == expected[rank][0]
            assert_same(found[1], expected[rank][1])
            np.testing.assert_array_equal(found[2], expected[rank][2])


def load_none(group, folder):
    run = Run(group=group)
    return run.error_in(lambda: run.load(folder))


def test_a_folder_without_checkpoints_has_its_own_error(ranks, tmp_path):
    (tmp_path / ".step-00000001.tmp").mkdir()
    for folder in (tmp_path, tmp_path / "missing"):
        errors = ranks.run(load_none, 2, folder)
        assert_all_say(errors, [str(folder), "no checkpoint"])
        assert errors[0][0] == "NoCheckpointError"
        assert Checkpoints(folder).latest() is None
    assert kept(tmp_path) == [".step-00000001.tmp"]


def failing_saves(group, folder):
    run = Run(group=group)
    checkpoints = run.checkpoints(folder)
    run.train(2)
    run.save(folder)
    own, errors = kept(folder), []

    def fail(step=9, progress=None):
        errors.append(run.error_in(lambda: checkpoints.save(step, *run.parts(), progress or {}, IDENTITY)))

    fail(progress={"x": object()})
    fail(step=1)
    dist.barrier(group)
    assert kept(folder) == own
    dist.barrier(group)  # the next save makes a folder
    run.optimizer.param_groups[0]["odd"] = Run
    fail()
    del run.optimizer.param_groups[0]["odd"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "rename", no_rename)
        fail()
    assert checkpoints.latest() == folder / "step-00000002"
    dist.barrier(group)
    run.train()
    run.save(folder)
    return errors


def no_rename(*_args):
    raise OSError("disk is full")


def test_failing_saves_are_told_on_all_ranks_and_leave_the_rest(ranks, tmp_path):
    by_rank = ranks.run(failing_saves, 2, tmp_path)
    newer = "checkpoint step-00000002 is newer than step 1: resume into a different folder"
    for errors, word in zip(
        zip(*by_rank, strict=True), ["not JSON serializable", newer, "Run", "disk is full"], strict=True
    ):
        assert_all_say(errors, [word, str(tmp_path)])
    assert kept(tmp_path) == ["step-00000002", "step-00000003"]


def test_the_last_few_are_kept(tmp_path):
    run = Run()
    for step in range(1, 5):
        run.train()
        assert run.save(tmp_path, keep=2) == Checkpoints(tmp_path).latest() == tmp_path / f"step-{step:08d}"
        assert kept(tmp_path) == [f"step-{one:08d}" for one in range(max(1, step - 1), step + 1)]
    with pytest.raises(ValueError, match="keep must be >= 1, got 0"):
        Checkpoints(tmp_path, keep=0)


def test_saving_a_step_again_always_leaves_one(tmp_path, monkeypatch):
    run, checkpoints = Run(), Checkpoints(tmp_path)
    run.train()
    run.save(tmp_path, keep=1)
    rename, seen = os.rename, []

    def watched(*args):
        seen.append(checkpoints.latest())
        rename(*args)
        seen.append(checkpoints.latest())

    monkeypatch.setattr(os, "rename", watched)
    for again in (2, 3):
        run.train()
        run.step = 1
        assert run.save(tmp_path, keep=1) == tmp_path / f"step-00000001-{again}"
        assert kept(tmp_path) == [f"step-00000001-{again}"]
        other = Run(seed=1)
        other.load(tmp_path)
        assert_same(other.state(), run.state())
    assert None not in seen
    assert len(seen) >= 8


def test_state_of_a_compiled_model_loads_into_a_plain_one(tmp_path):
    run, plain = Run(), Run(seed=1)
    run.train(2)
    run.model.up = torch.compile(run.model.up)  # which adds a wrapper to the name
    assert any("_orig_mod" in name for name, _ in run.model.named_parameters())
    run.save(tmp_path)
    plain.load(tmp_path)
    for found, expected in zip(plain.model.parameters(), run.model.parameters(), strict=True):
        assert torch.equal(found, expected)


def save_ruined(group, folder, value):
    """Save a run whose last rank holds one weight that is not finite."""
    run = Run((2, 2), group)
    run.save(folder)
    run.train()
    if group.rank() == 3:
        dict(run.model.named_parameters())["up.weight"].to_local().data[0, 0] = value
    return run.error_of(lambda: run.save(folder))


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_never_saved(ranks, tmp_path, value):
    errors = ranks.run(save_ruined, 4, tmp_path, value)
    assert_all_say(errors, ["saving step 1", "up.weight is not finite: go on from an earlier checkpoint"])
    assert kept(tmp_path) == ["step-00000000"]


def test_a_buffer_may_be_infinite(tmp_path):
    """As a mask of attention is."""
    run = Run()
    run.model.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
    run.save(tmp_path)
    run.model.mask.zero_()
    run.load(tmp_path)
    assert run.model.mask.tolist() == [0.0, float("-inf")]
